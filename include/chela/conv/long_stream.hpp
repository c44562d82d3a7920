#pragma once
// The causal long convolution of conv/long.hpp one token at a time, exactly, in O(log^2 L) work per token and channel
// instead of L. Lags below 2B are summed directly. Level i takes the lags from 2 B_i to 4 B_i, B_i = 2^i B: each block
// of B_i inputs that is complete meets them all in one product of polynomials, whose first output is due B_i tokens
// later. In these B_i tokens the product's work is done a little at each, so no single token waits for much (online
// convolution by dyadic blocks, as in Gardner's zero-delay convolution, with every block's work spread evenly).
//
// A GPU, which serves many sequences at once, takes lags in wider tiers and gives rows their turns at different tokens:
// cuda/conv/long_stream_plan.cuh.
#include <algorithm>

#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// One token per sequence.
template <Element T>
struct LongConvStreamArgs {
  TensorView<const T, 2> x = {};                  ///< [batch, channel]
  TensorView<const Accumulator<T>, 1> skip = {};  ///< [channel], or absent
  TensorView<T, 2> y = {};                        ///< [batch, channel]; may be x's memory
};

/// How a kernel of `taps` is cut.
struct StreamLevels {
  static constexpr Index least_block = 32;  ///< B
  Index taps = 0;

  /// The lags that are summed at each token.
  constexpr Index direct() const { return std::min(taps, 2 * least_block); }
  constexpr Index block(int level) const { return least_block << level; }
  /// Points of the product of a block and its lags, which has less than twice as many coefficients.
  constexpr Index points(int level) const { return 2 * block(level); }
  constexpr int count() const {
    int levels = 0;
    while (2 * block(levels) < taps) ++levels;
    return levels;
  }
  /// Inputs that are kept, and outputs that are under way; powers of two, so that a block never wraps around.
  constexpr Index input_rows() const { return count() > 0 ? 2 * block(count() - 1) : 2 * least_block; }
  constexpr Index output_rows() const { return count() > 0 ? 4 * block(count() - 1) : 1; }
};

template <Element T>
constexpr Status check(const LongConvStreamArgs<T>& a) {
  return first_failure(require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
                       require(!a.skip.present() || has_extents(a.skip, a.x.extents[1]), Code::bad_shape,
                               "skip must be [channel], or absent for zero"),
                       require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
                               "y must have the extents of x, with data and without broadcast axes"));
}

}  // namespace chela
