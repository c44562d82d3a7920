#pragma once
// The tile algebra: the vocabulary in which the chunk step is written once. The CPU models it with Eigen tiles; a GPU models
// it with warp and warpgroup tiles. Two products suffice because states and outputs are kept transposed (chunk/step.hpp): the
// accumulator of one product is then the operand of the next, on every backend.
#include <concepts>

#include "chela/core/index.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// What a backend must offer. `Tile` is a matrix of `Scalar` in the backend's fastest memory, with run-time extents up to what
/// was asked for.
template <class Ops>
concept TileOps = requires(Ops ops, typename Ops::Tile tile, const typename Ops::Tile a, const typename Ops::Tile b,
                           typename Ops::Scalar factor, TensorView<const typename Ops::Scalar, 2> source,
                           TensorView<typename Ops::Scalar, 2> target) {
  ops.load(tile, source);                 // tile = source, converted to Scalar
  ops.load_scaled(tile, source, factor);  // tile = factor * source
  ops.store(a, target);                   // target = tile, converted to the target's element
  ops.store_transposed(a, target);        // target = tile^T
  ops.zero(tile);                         // tile = 0
  ops.set_product_abt(tile, a, b);        // tile = a b^T
  ops.add_product_abt(tile, a, b);        // tile += a b^T
  ops.add_product_atb(tile, a, b);        // tile += a^T b
  ops.scale(tile, factor);                // tile *= factor
  ops.keep_upper(tile);                   // tile[i, j] = 0 for i > j
};

}  // namespace chela
