#pragma once
// Products of matrices that lie in the first-level cache, row-major, as the tiles of a chunk do. A general matrix product
// packs both operands into its own order first, which for a few dozen rows costs as much as the product; here one operand is
// read where it lies, a number at a time, and the other by packets along its rows, transposed beforehand only where its rows
// run along the sum.
//
// Operands may be read up to one packet beyond the end of a row, so that memory must be readable that far. What is read there
// is never used.
#include <Eigen/Core>
#include <algorithm>
#include <type_traits>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/cpu/tile/fetch_ahead.hpp"
#include "chela/cpu/tile/transposition.hpp"

namespace chela::cpu {

/// What a product does to its target.
enum class Into { set, add, subtract };

/// A borrowed row-major matrix.
template <class S>
struct MatrixRef {
  S* data;
  Index rows, columns, stride;

  S* row(Index i) const { return data + i * stride; }
  MatrixRef from_column(Index c) const { return {data + c, rows, columns - c, stride}; }
};

namespace detail {

/// target[0, count) = or += or -= value, of which the last packet may be cut short.
template <Into I, class Packet, int Vectors, class S>
CHELA_ALWAYS_INLINE void put_packets(const Packet (&value)[Vectors], S* target, Index count) {
  using namespace Eigen::internal;
  constexpr int lanes = unpacket_traits<Packet>::size;
  const auto into = [](const Packet& before, const Packet& sum) {
    return I == Into::add ? padd(before, sum) : psub(before, sum);
  };
  CHELA_UNROLL
  for (int n = 0; n < Vectors; ++n) {
    S* const to = target + n * lanes;
    if (count >= (n + 1) * lanes) {
      pstoreu(to, I == Into::set ? value[n] : into(ploadu<Packet>(to), value[n]));
    } else {
      S part[lanes];
      pstoreu(part, value[n]);
      for (Index i = 0; i < count - n * lanes; ++i)
        to[i] = I == Into::set ? part[i] : I == Into::add ? to[i] + part[i] : to[i] - part[i];
    }
  }
}

/// Numbers a(row, d) read one at a time, d along the sum.
template <class S>
struct Coefficients {
  const S* data;
  Index row_stride, depth_stride;

  Coefficients from_row(Index row) const { return {data + row * row_stride, row_stride, depth_stride}; }
  S operator()(Index row, Index d) const { return data[row * row_stride + d * depth_stride]; }
};

/// Rows x Vectors packets of the target, of which `columns` elements count: sum over d < b.rows of a(r, d) * b[d, column].
template <Into I, int Rows, int Vectors, class S>
CHELA_ALWAYS_INLINE void product_block(S* target, Index stride, Index columns, const Coefficients<S>& a,
                                       const MatrixRef<const S>& b) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr int lanes = packet_traits<S>::size;
  Packet sum[Rows][Vectors];
  CHELA_UNROLL
  for (int r = 0; r < Rows; ++r) CHELA_UNROLL
  for (int n = 0; n < Vectors; ++n) sum[r][n] = pset1<Packet>(S(0));
  for (Index d = 0; d < b.rows; ++d) {
    Packet row[Vectors];
    CHELA_UNROLL
    for (int n = 0; n < Vectors; ++n) row[n] = ploadu<Packet>(b.row(d) + n * lanes);
    CHELA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Packet factor = pset1<Packet>(a(r, d));
      CHELA_UNROLL
      for (int n = 0; n < Vectors; ++n) sum[r][n] = pmadd(factor, row[n], sum[r][n]);
    }
  }
  CHELA_UNROLL
  for (int r = 0; r < Rows; ++r) put_packets<I>(sum[r], target + r * stride, columns);
}

/// All rows of the leading columns of the target, by blocks that fill the registers.
template <Into I, int Vectors, class S, class FetchAhead>
void product_panel(const MatrixRef<S>& target, const Coefficients<S>& a, const MatrixRef<const S>& b,
                   FetchAhead& fetch_ahead) {
  constexpr int rows = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 8 : 4, lines = 8;
  Index r = 0;
  for (; r + rows <= target.rows; r += rows) {
    product_block<I, rows, Vectors>(target.row(r), target.stride, target.columns, a.from_row(r), b);
    for (int i = 0; i < lines; ++i) fetch_ahead();
  }
  for (; r < target.rows; ++r)
    product_block<I, 1, Vectors>(target.row(r), target.stride, target.columns, a.from_row(r), b);
}

/// Calls f(first column, packets in the panel) for panels of one or two packets.
template <class S, class F>
void for_each_panel(Index columns, const F& f) {
  constexpr int lanes = Eigen::internal::packet_traits<S>::size;
  Index c = 0;
  for (; columns - c > lanes; c += 2 * lanes) f(c, std::integral_constant<int, 2>{});
  if (c < columns) f(c, std::integral_constant<int, 1>{});
}

}  // namespace detail

/// target = or += or -= a^T b. `fetch_ahead` is called a few times for each block of the target; a pass brings the memory it
/// reads next nearer with it.
template <Into I, class S, class FetchAhead>
void product_atb(MatrixRef<S> target, MatrixRef<const S> a, MatrixRef<const S> b, FetchAhead&& fetch_ahead) {
  detail::for_each_panel<S>(target.columns, [&](Index c, auto vectors) {
    detail::product_panel<I, vectors.value, S>(target.from_column(c), {a.data, 1, a.stride}, b.from_column(c),
                                               fetch_ahead);
  });
}

/// target = or += or -= a b^T.
template <Into I, class S, class FetchAhead>
void product_abt(MatrixRef<S> target, MatrixRef<const S> a, MatrixRef<const S> b, FetchAhead&& fetch_ahead) {
  constexpr Index lanes = Eigen::internal::packet_traits<S>::size, most_depth = 256;
  constexpr Into then = I == Into::subtract ? Into::subtract : Into::add;
  S packed[most_depth * 2 * lanes];
  detail::for_each_panel<S>(target.columns, [&](Index c, auto vectors) {
    constexpr Index width = vectors.value * lanes;
    for (Index d = 0; d < a.columns; d += most_depth) {
      const Index depth = std::min(most_depth, a.columns - d);
      transpose_rows(b.row(c) + d, b.stride, std::min(width, b.rows - c), depth, packed, width, width);
      const MatrixRef<const S> panel{packed, depth, width, width};
      const detail::Coefficients<S> coefficients{a.data + d, a.stride, 1};
      if (d == 0)
        detail::product_panel<I, vectors.value, S>(target.from_column(c), coefficients, panel, fetch_ahead);
      else
        detail::product_panel<then, vectors.value, S>(target.from_column(c), coefficients, panel, fetch_ahead);
    }
  });
}

/// target = (I + L)^-1 target, with L the transposed strict upper triangle of a: by blocks of rows, the earlier ones in a
/// product, those of its own block in turn.
template <class S>
void solve_unit_lower(MatrixRef<S> target, MatrixRef<const S> a) {
  constexpr Index lanes = Eigen::internal::packet_traits<S>::size, block_rows = 16;
  constexpr int vectors = 4;
  for (Index begin = 0; begin < target.rows; begin += block_rows) {
    const Index end = std::min(begin + block_rows, target.rows);
    const auto take_in_turn = [&](Index c, auto vectors) {
      const MatrixRef<S> rest = target.from_column(c);
      for (Index i = begin + 1; i < end; ++i)
        detail::product_block<Into::subtract, 1, vectors.value, S>(
            rest.row(i), rest.stride, rest.columns, {a.row(begin) + i, 1, a.stride},
            {rest.row(begin), i - begin, rest.columns, rest.stride});
    };
    if (begin > 0)
      product_atb<Into::subtract, S>({target.row(begin), end - begin, target.columns, target.stride},
                                     {a.data + begin, begin, end - begin, a.stride},
                                     {target.data, begin, target.columns, target.stride}, FetchNothing{});
    Index c = 0;
    for (; c + vectors * lanes <= target.columns; c += vectors * lanes)
      take_in_turn(c, std::integral_constant<int, vectors>{});
    for (; c < target.columns; c += lanes) take_in_turn(c, std::integral_constant<int, 1>{});
  }
}

}  // namespace chela::cpu
