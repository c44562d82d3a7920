#pragma once
// Long depthwise convolution (CHELA, arXiv 2406.08128, section 3.1), exact, with no wrap-around at any length:
//
//   y[b,t,d] = skip[d] x[b,t,d] + sum_{j=0}^{L-1} taps[d,j] x[b,t-j,d] + sum_{j=0}^{M-1} back_taps[d,j] x[b,t+1+j,d]
//
// `taps` looks back (causal); `back_taps`, if given, looks ahead and makes the kernel two-sided. Inputs before the first token
// come from the state: the last L - 1 inputs, oldest first.
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

template <Element T>
struct LongConvArgs {
  TensorView<const T, 3> x = {};                  ///< [batch, token, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, L]; taps beyond the token count never meet an input
  TensorView<const Accumulator<T>, 2> back_taps = {};  ///< [channel, M], or absent for a causal kernel
  TensorView<const Accumulator<T>, 1> skip = {};       ///< [channel], or absent for zero
  TensorView<T, 3> y = {};                             ///< [batch, token, channel]; every element is written
  TensorView<const T, 3> initial_state = {};           ///< [batch, L - 1, channel], or absent for zero
  TensorView<T, 3> final_state = {};                   ///< [batch, L - 1, channel], or absent when not wanted
};

template <Element T>
struct LongConvBackwardArgs {
  TensorView<const T, 3> x = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 2> back_taps = {};
  TensorView<const Accumulator<T>, 1> skip = {};
  TensorView<const T, 3> initial_state = {};
  TensorView<const T, 3> grad_y = {};  ///< [batch, token, channel]
  TensorView<T, 3> grad_x = {};        ///< like x; absent outputs are skipped
  TensorView<Accumulator<T>, 2> grad_taps =
      {};  ///< like taps; overwritten, summed over batch and tokens in a fixed order
  TensorView<Accumulator<T>, 2> grad_back_taps = {};  ///< like back_taps
  TensorView<Accumulator<T>, 1> grad_skip = {};       ///< like skip
  TensorView<T, 3> grad_initial_state = {};           ///< like initial_state
};

/// One token per sequence, causal kernels only. The state is a ring of the last `ring` inputs with `position` tokens seen so
/// far: the input of token p lives in slot p % ring. A ring shorter than the kernel's length is refused.
template <Element T>
struct LongConvStepArgs {
  TensorView<const T, 2> x = {};                  ///< [batch, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, L]
  TensorView<const Accumulator<T>, 1> skip = {};  ///< [channel], or absent
  TensorView<T, 2> y = {};                        ///< [batch, channel]; may be x's memory
  TensorView<T, 3> ring = {};                     ///< [batch, ring, channel], ring >= L; this token's slot is written
  Index position = 0;                             ///< tokens already in the ring before this one
};

}  // namespace chela
