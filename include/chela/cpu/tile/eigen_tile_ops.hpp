#pragma once
#include <Eigen/Core>

#include "chela/cpu/tile/packing.hpp"
#include "chela/tile/tile_ops.hpp"

namespace chela::cpu {

/// The tile algebra over Eigen: a tile is a row-major matrix over scratch memory that its owner provides.
template <class S>
struct EigenTileOps {
  using Scalar = S;
  using Matrix = Eigen::Matrix<S, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Tile = Eigen::Map<Matrix>;

  template <class T>
  void load(Tile& tile, TensorView<const T, 2> source) const {
    load_scaled(tile, source, S(1));
  }
  template <class T>
  void load_scaled(Tile& tile, TensorView<const T, 2> source, S factor) const {
    pack_rows(source, factor, tile.data(), tile.cols());
  }
  template <class T>
  void store(const Tile& tile, TensorView<T, 2> target) const {
    unpack_rows(tile.data(), tile.cols(), target);
  }
  template <class T>
  void store_transposed(const Tile& tile, TensorView<T, 2> target) const {
    for (Index i = 0; i < tile.rows(); ++i)
      for (Index j = 0; j < tile.cols(); ++j) target(j, i) = static_cast<T>(tile(i, j));
  }
  void zero(Tile& tile) const { tile.setZero(); }
  void set_product_abt(Tile& tile, const Tile& a, const Tile& b) const { tile.noalias() = a * b.transpose(); }
  void add_product_abt(Tile& tile, const Tile& a, const Tile& b) const { tile.noalias() += a * b.transpose(); }
  void add_product_atb(Tile& tile, const Tile& a, const Tile& b) const { tile.noalias() += a.transpose() * b; }
  void scale(Tile& tile, S factor) const { tile *= factor; }
  void keep_upper(Tile& tile) const { tile.template triangularView<Eigen::StrictlyLower>().setZero(); }
};

static_assert(TileOps<EigenTileOps<float>> && TileOps<EigenTileOps<double>>);

}  // namespace chela::cpu
