#pragma once
// The tile algebra: the vocabulary in which the chunk step is written once. The CPU models it with Eigen tiles; a GPU models
// it with warp and warpgroup tiles. Two kinds of product suffice because states and outputs are kept transposed
// (chunk/step.hpp): the accumulator of one product is then the operand of the next, on every backend.
#include <concepts>

#include "chela/core/index.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// What a backend must offer. `Tile` is a handle to a matrix of `Scalar` in the backend's fastest memory, with run-time
/// extents up to what was asked for; copying the handle does not copy the matrix. Targets come first and are overwritten.
template <class Ops>
concept TileOps = requires(Ops ops, typename Ops::Tile tile, typename Ops::Tile other, const typename Ops::Tile a,
                           const typename Ops::Tile b, typename Ops::Scalar factor, Index index,
                           TensorView<const typename Ops::Scalar, 2> source,
                           TensorView<typename Ops::Scalar, 2> target) {
  // Memory.
  ops.load(tile, source);                 // tile = source, converted to Scalar
  ops.load_scaled(tile, source, factor);  // tile = factor * source
  ops.store(a, target);                   // target = tile, converted to the target's element
  ops.store_transposed(a, target);        // target = tile^T
  ops.copy(tile, a);                      // tile = a
  ops.zero(tile);                         // tile = 0
  { ops.rows(a) } -> std::convertible_to<Index>;
  { ops.columns(a) } -> std::convertible_to<Index>;
  // The part of a tile that begins at (row, column), sharing its memory: part(tile, row, column, rows, columns).
  { ops.part(a, index, index, index, index) } -> std::same_as<typename Ops::Tile>;

  // Products.
  ops.set_product_abt(tile, a, b);       // tile = a b^T
  ops.add_product_abt(tile, a, b);       // tile += a b^T
  ops.subtract_product_abt(tile, a, b);  // tile -= a b^T
  ops.add_product_atb(tile, a, b);       // tile += a^T b
  ops.solve_unit_lower(tile, a);         // tile = (I + strict upper triangle of a, transposed)^-1 tile

  // Element by element.
  ops.scale(tile, factor);  // tile *= factor
  ops.multiply(tile, a);    // tile *= a, where a row or a column of extent 1 stands for all
  ops.keep_upper(tile);     // tile[i, j] = 0 for i > j
  ops.exp(tile);            // tile = exp(tile) for tile <= 0; exactly 0 at -infinity

  // Products of decays, each in [0, 1]. Nothing is divided, so that 0 is a decay like any other.
  ops.set_running_product(tile, a);  // tile[i, :] = a[0, :] ... a[i, :]; may work in place
  ops.set_spans(tile, a);            // tile[j, i] = a[j + 1] ... a[i] for j <= i, else 0, of a column a
  // Row i meets the rows up to it, each decayed since it came: with w = b[j + 1, :] ... b[i, :],
  // tile[j, i] = sum over columns of w * other[j, :] * a[i, :] for j <= i, else 0. Leaves `other` decayed to the last row.
  ops.meet_in_turn(tile, other, a, b);
};

}  // namespace chela
