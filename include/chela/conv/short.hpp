#pragma once
// Short depthwise causal convolution, the first stage of CHELA's short-long convolution (arXiv 2406.08128, section 3.1):
//
//   a[b,t,d] = bias[d] + sum_{j=0}^{Width-1} taps[d,j] x[b,t-j,d]        y = activation(a)
//
// Inputs before the first token come from the state: the last Width - 1 inputs of the call before, oldest first.
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Applied to each output of a convolution or a projection. silu(a) = a sigmoid(a).
enum class Activation { none, silu };

/// Inputs and outputs of one forward pass. The width is a template argument of the operator, 1 to 64.
template <Element T>
struct ShortConvArgs {
  TensorView<const T, 3> x = {};                  ///< [batch, token, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, width]; taps[d, 0] meets the newest input
  TensorView<const Accumulator<T>, 1> bias = {};  ///< [channel], or absent for zero
  TensorView<T, 3> y = {};                        ///< [batch, token, channel]; every element is written
  TensorView<const T, 3> initial_state = {};      ///< [batch, width - 1, channel], or absent for zero
  TensorView<T, 3> final_state = {};              ///< [batch, width - 1, channel]; may be the initial state's memory
};

/// Gradients of the same pass; what the forward pass saw is recomputed, nothing need be kept. Absent outputs are skipped.
template <Element T>
struct ShortConvBackwardArgs {
  TensorView<const T, 3> x = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 1> bias = {};
  TensorView<const T, 3> initial_state = {};
  TensorView<const T, 3> grad_y = {};            ///< [batch, token, channel]
  TensorView<const T, 3> grad_final_state = {};  ///< [batch, width - 1, channel], or absent for zero
  TensorView<T, 3> grad_x = {};                  ///< like x
  TensorView<Accumulator<T>, 2> grad_taps = {};  ///< like taps; overwritten, summed over batch and tokens
  TensorView<Accumulator<T>, 1> grad_bias = {};  ///< like bias; overwritten
  TensorView<T, 3> grad_initial_state = {};      ///< [batch, width - 1, channel]
};

/// One token per sequence; `state` is read and shifted in place.
template <Element T>
struct ShortConvStepArgs {
  TensorView<const T, 2> x = {};                  ///< [batch, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, width]
  TensorView<const Accumulator<T>, 1> bias = {};  ///< [channel], or absent
  TensorView<T, 2> y = {};                        ///< [batch, channel]; may be x's memory
  TensorView<T, 3> state = {};                    ///< [batch, width - 1, channel]
};

}  // namespace chela
