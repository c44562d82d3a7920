#pragma once
// Work on rows of numbers: Eigen maps for products, packet loops for everything elementwise. A row's result depends
// neither on its alignment nor on who computes it: the tail goes through a padded packet, and sums are taken in one
// order.
//
// Compile with EIGEN_DONT_PARALLELIZE, or hold Eigen to one thread: the executor already hands out the blocks of rows.
#include <Eigen/Core>
#include <algorithm>
#include <type_traits>

#include "chela/core/executor.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela::cpu::rowwise {

/// Rows of one task. Fixed, so that no sum depends on the number of workers; a block of rows of a layer stays in the L2
/// cache.
inline constexpr Index row_block = 128;

/// Calls f(first row, row count, worker, block) for each block of rows.
template <Executor E, class F>
void for_each_row_block(Index rows, const E& executor, F&& f) {
  executor.for_each(ceil_div(rows, row_block), [&](Index block, int worker) {
    const Index first = block * row_block;
    f(first, std::min(row_block, rows - first), worker, block);
  });
}

template <class T>
using RowMap = Eigen::Map<
    std::conditional_t<std::is_const_v<T>, const Eigen::Matrix<std::remove_const_t<T>, -1, -1, Eigen::RowMajor>,
                       Eigen::Matrix<T, -1, -1, Eigen::RowMajor>>,
    Eigen::Unaligned, Eigen::OuterStride<>>;

/// The view as an Eigen matrix; its last stride is taken to be 1.
template <class T>
RowMap<T> as_rows(TensorView<T, 2> view) {
  return {view.data, view.extents[0], view.extents[1], Eigen::OuterStride<>(view.strides[0])};
}

template <class T>
auto as_row(TensorView<T, 1> view) {
  using Row = Eigen::Matrix<std::remove_const_t<T>, 1, -1>;
  return Eigen::Map<std::conditional_t<std::is_const_v<T>, const Row, Row>>(view.data, view.extents[0]);
}

/// [batch, token, ...] contiguous as [row, entry].
template <class T, int Rank>
TensorView<T, 2> flat_rows(TensorView<T, Rank> view, Index width) {
  return contiguous(view.data, width > 0 ? view.size() / width : 0, width);
}

template <class A>
using Lanes = typename Eigen::internal::packet_traits<A>::type;
template <class A>
inline constexpr Index lane_count = Index(Eigen::internal::packet_traits<A>::size);

/// out[i] = f(in[i]...), f on packets; out may be any of the inputs.
template <class A, class F, class... In>
void map_row(Index count, F&& f, A* out, const In*... in) {
  using namespace Eigen::internal;
  constexpr Index lanes = lane_count<A>;
  Index i = 0;
  for (; i + lanes <= count; i += lanes) pstoreu(out + i, f(ploadu<Lanes<A>>(in + i)...));
  if (i == count) return;
  const auto padded = [&](const A* from) {
    A whole[lanes] = {};
    std::copy_n(from + i, count - i, whole);
    return ploadu<Lanes<A>>(whole);
  };
  A whole[lanes];
  pstoreu(whole, f(padded(in)...));
  std::copy_n(whole, count - i, out + i);
}

/// sum_i f(in[i]...); f gives zero where all its inputs are zero.
template <class A, class F, class... In>
A sum_row(Index count, F&& f, const A* first, const In*... in) {
  using namespace Eigen::internal;
  constexpr Index lanes = lane_count<A>;
  Lanes<A> sum = pset1<Lanes<A>>(A(0));
  Index i = 0;
  for (; i + lanes <= count; i += lanes) sum = padd(sum, f(ploadu<Lanes<A>>(first + i), ploadu<Lanes<A>>(in + i)...));
  if (i < count) {
    const auto padded = [&](const A* from) {
      A whole[lanes] = {};
      std::copy_n(from + i, count - i, whole);
      return ploadu<Lanes<A>>(whole);
    };
    sum = padd(sum, f(padded(first), padded(in)...));
  }
  return predux(sum);
}

/// The largest of one entry or more.
template <class A>
A max_row(Index count, const A* in) {
  constexpr Index lanes = lane_count<A>;
  Lanes<A> highest = Eigen::internal::pset1<Lanes<A>>(in[0]);
  Index i = 0;
  for (; i + lanes <= count; i += lanes)
    highest = Eigen::internal::pmax(highest, Eigen::internal::ploadu<Lanes<A>>(in + i));
  A result = Eigen::internal::predux_max(highest);
  for (; i < count; ++i) result = std::max(result, in[i]);
  return result;
}

/// out[i] += f(in[i]...).
template <class A, class F, class... In>
void add_row(Index count, F&& f, A* out, const In*... in) {
  map_row<A>(
      count, [&](Lanes<A> old, auto... x) { return Eigen::internal::padd(old, f(x...)); }, out, out, in...);
}

template <class A>
Lanes<A> splat(A value) {
  return Eigen::internal::pset1<Lanes<A>>(value);
}

/// 1 / (1 + e^-a).
template <class A>
struct Sigmoid {
  Lanes<A> operator()(Lanes<A> a) const {
    using namespace Eigen::internal;
    const Lanes<A> one = splat(A(1));
    return pdiv(one, padd(one, pexp(pnegate(a))));
  }
};

/// a / (1 + e^-a).
template <class A>
struct Silu {
  Lanes<A> operator()(Lanes<A> a) const {
    using namespace Eigen::internal;
    return pdiv(a, padd(splat(A(1)), pexp(pnegate(a))));
  }
};

/// SiLU(a) b.
template <class A>
struct SwiGlu {
  Lanes<A> operator()(Lanes<A> a, Lanes<A> b) const { return Eigen::internal::pmul(Silu<A>{}(a), b); }
};

/// gradient * dSiLU(a)/da.
template <class A>
struct SiluGradient {
  Lanes<A> operator()(Lanes<A> a, Lanes<A> gradient) const {
    using namespace Eigen::internal;
    const Lanes<A> one = splat(A(1)), s = Sigmoid<A>{}(a);
    return pmul(gradient, pmul(s, pmadd(a, psub(one, s), one)));
  }
};

/// The packet itself, for add_row and sum_row.
template <class A>
struct Same {
  Lanes<A> operator()(Lanes<A> a) const { return a; }
};

/// Product of two packets, for sum_row and map_row.
template <class A>
struct Product {
  Lanes<A> operator()(Lanes<A> a, Lanes<A> b) const { return Eigen::internal::pmul(a, b); }
};

/// map_row over each row of views of the same extents.
template <class F, class A, class... In>
void map_rows(F&& f, TensorView<A, 2> out, TensorView<In, 2>... in) {
  for (Index r = 0; r < out.extents[0]; ++r)
    map_row<A>(out.extents[1], f, out.data + r * out.strides[0], static_cast<const A*>(in.data + r * in.strides[0])...);
}

/// Columns [begin, begin + count) of rows.
template <class T>
TensorView<T, 2> columns(TensorView<T, 2> view, Index begin, Index count) {
  return run(view, 1, begin, count);
}

template <class T>
TensorView<T, 2> row_range(TensorView<T, 2> view, Index begin, Index count) {
  return run(view, 0, begin, count);
}

}  // namespace chela::cpu::rowwise
