#pragma once
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "chela/cpu/tile/packing.hpp"
#include "chela/cpu/tile/small_products.hpp"
#include "chela/tile/tile_ops.hpp"

namespace chela::cpu {

/// The tile algebra over Eigen: a tile is a row-major matrix over scratch memory that its owner provides, and that must be
/// readable up to one packet beyond the tile's end (cpu/tile/small_products.hpp).
template <class S>
struct EigenTileOps {
  using Scalar = S;
  using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Tile = Eigen::Map<Matrix, Eigen::Unaligned, Eigen::OuterStride<>>;

  FetchAhead fetch_ahead;  ///< advances while products run

  static Tile tile(S* memory, Index rows, Index columns) {
    return Tile(memory, rows, columns, Eigen::OuterStride<>(columns));
  }

  template <class T>
  void load(Tile& tile, TensorView<const T, 2> source) const {
    load_scaled(tile, source, S(1));
  }
  template <class T>
  void load_scaled(Tile& tile, TensorView<const T, 2> source, S factor) const {
    pack_rows(source, factor, tile.data(), tile.outerStride());
  }
  template <class T>
  void store(const Tile& tile, TensorView<T, 2> target) const {
    unpack_rows(tile.data(), tile.outerStride(), target);
  }
  template <class T>
  void store_transposed(const Tile& tile, TensorView<T, 2> target) const {
    if constexpr (std::is_same_v<T, S>)
      if (target.strides[1] == 1)
        return transpose_rows(tile.data(), tile.outerStride(), tile.rows(), tile.cols(), target.data, target.strides[0],
                              tile.rows());
    for (Index i = 0; i < tile.rows(); ++i)
      for (Index j = 0; j < tile.cols(); ++j) target(j, i) = static_cast<T>(tile(i, j));
  }
  void copy(Tile& tile, const Tile& a) const { tile = a; }
  void zero(Tile& tile) const { tile.setZero(); }
  Index rows(const Tile& tile) const { return tile.rows(); }
  Index columns(const Tile& tile) const { return tile.cols(); }
  Tile part(Tile tile, Index row, Index column, Index rows, Index columns) const {
    return Tile(tile.data() + row * tile.outerStride() + column, rows, columns,
                Eigen::OuterStride<>(tile.outerStride()));
  }

  void set_product_abt(Tile& tile, const Tile& a, const Tile& b) {
    product_abt<Into::set>(ref(tile), ref(a), ref(b), fetch_ahead);
  }
  void add_product_abt(Tile& tile, const Tile& a, const Tile& b) {
    product_abt<Into::add>(ref(tile), ref(a), ref(b), fetch_ahead);
  }
  void subtract_product_abt(Tile& tile, const Tile& a, const Tile& b) {
    product_abt<Into::subtract>(ref(tile), ref(a), ref(b), fetch_ahead);
  }
  void add_product_atb(Tile& tile, const Tile& a, const Tile& b) {
    product_atb<Into::add>(ref(tile), ref(a), ref(b), fetch_ahead);
  }
  void solve_unit_lower(Tile& tile, const Tile& a) const { cpu::solve_unit_lower(ref(tile), ref(a)); }

  void scale(Tile& tile, S factor) const { tile *= factor; }
  void multiply(Tile& tile, const Tile& a) const {
    const bool one_row = a.rows() == 1, one_column = a.cols() == 1;
    for (Index i = 0; i < tile.rows(); ++i) {
      if (one_column)
        tile.row(i) *= a(one_row ? 0 : i, 0);
      else
        tile.row(i).array() *= a.row(one_row ? 0 : i).array();
    }
  }
  void keep_upper(Tile& tile) const { tile.template triangularView<Eigen::StrictlyLower>().setZero(); }
  void exp(Tile& tile) const {
    for (Index i = 0; i < tile.rows(); ++i) exp_row(tile.data() + i * tile.outerStride(), tile.cols());
  }

  void set_running_product(Tile& tile, const Tile& a) const {
    tile.row(0) = a.row(0);
    for (Index i = 1; i < tile.rows(); ++i) tile.row(i) = tile.row(i - 1).cwiseProduct(a.row(i));
  }
  void set_spans(Tile& tile, const Tile& a) const {
    const Index last = tile.rows() - 1;
    tile.row(last).setZero();
    tile(last, last) = 1;
    for (Index j = last - 1; j >= 0; --j) {
      tile.row(j) = tile.row(j + 1) * a(j + 1, 0);
      tile(j, j) = 1;
    }
  }
  void meet_in_turn(Tile& tile, Tile& other, const Tile& a, const Tile& b) const {
    const Index columns = other.cols();
    for (Index i = 0; i < tile.rows(); ++i) {
      for (Index j = 0; j < i; ++j)
        tile(j, i) = decayed_dot(&other(j, 0), &b.coeffRef(i, 0), &a.coeffRef(i, 0), columns), tile(i, j) = 0;
      tile(i, i) = other.row(i).dot(a.row(i));
    }
  }

 private:
  static MatrixRef<S> ref(Tile& tile) { return {tile.data(), tile.rows(), tile.cols(), tile.outerStride()}; }
  static MatrixRef<const S> ref(const Tile& tile) {
    return {tile.data(), tile.rows(), tile.cols(), tile.outerStride()};
  }

  /// x *= decay, then the dot product of x and y.
  static S decayed_dot(S* x, const S* decay, const S* y, Index count) {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<S>::type;
    constexpr int lanes = packet_traits<S>::size;
    Packet sums = pset1<Packet>(S(0));
    Index i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Packet left = pmul(ploadu<Packet>(x + i), ploadu<Packet>(decay + i));
      pstoreu(x + i, left);
      sums = pmadd(left, ploadu<Packet>(y + i), sums);
    }
    S sum = predux(sums);
    for (; i < count; ++i) sum += (x[i] *= decay[i]) * y[i];
    return sum;
  }
  /// Eigen's packet exponential stops at the smallest normal number; below it this one gives 0.
  static void exp_row(S* x, Index count) {
    using Packet = typename Eigen::internal::packet_traits<S>::type;
    constexpr int lanes = Eigen::internal::packet_traits<S>::size;
    const S lowest = std::log(std::numeric_limits<S>::min());
    const Packet least = Eigen::internal::pset1<Packet>(lowest);
    Index i = 0;
    for (; i + lanes <= count; i += lanes) {
      const Packet p = Eigen::internal::ploadu<Packet>(x + i);
      const Packet vanishes = Eigen::internal::pcmp_lt(p, least);
      Eigen::internal::pstoreu(x + i, Eigen::internal::pandnot(Eigen::internal::pexp(p), vanishes));
    }
    for (; i < count; ++i) x[i] = x[i] < lowest ? S(0) : std::exp(x[i]);
  }
};

static_assert(TileOps<EigenTileOps<float>> && TileOps<EigenTileOps<double>>);

}  // namespace chela::cpu
