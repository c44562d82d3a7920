#pragma once
// Short depthwise causal convolution, one plain loop in double. Shapes as in chela/conv/short.hpp; absent views are
// zero.
#include <cmath>

#include "chela/core/tensor.hpp"

namespace chela::reference {

/// x before token 0 is the initial state's: token -1 is its last row.
inline double short_conv_input(TensorView<const double, 3> x, TensorView<const double, 3> initial_state, Index width,
                               Index b, Index t, Index d) {
  if (t >= 0) return x(b, t, d);
  return initial_state.present() ? initial_state(b, width - 1 + t, d) : 0.0;
}

/// The output before the activation.
inline double short_conv_sum(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                             TensorView<const double, 1> bias, TensorView<const double, 3> initial_state, Index b,
                             Index t, Index d) {
  const Index width = taps.extents[1];
  double sum = bias.present() ? bias(d) : 0.0;
  for (Index j = 0; j < width; ++j) sum += taps(d, j) * short_conv_input(x, initial_state, width, b, t - j, d);
  return sum;
}

inline void short_conv(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                       TensorView<const double, 1> bias, TensorView<const double, 3> initial_state, bool silu,
                       TensorView<double, 3> y, TensorView<double, 3> final_state) {
  const Index width = taps.extents[1];
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index d = 0; d < x.extents[2]; ++d) {
      for (Index t = 0; t < x.extents[1]; ++t) {
        const double a = short_conv_sum(x, taps, bias, initial_state, b, t, d);
        y(b, t, d) = silu ? a / (1 + std::exp(-a)) : a;
      }
      if (final_state.present())
        for (Index s = 0; s < width - 1; ++s)
          final_state(b, s, d) = short_conv_input(x, initial_state, width, b, x.extents[1] + s - (width - 1), d);
    }
}

/// Every gradient is written; those of the states only where present.
inline void short_conv_backward(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                                TensorView<const double, 1> bias, TensorView<const double, 3> initial_state, bool silu,
                                TensorView<const double, 3> grad_y, TensorView<const double, 3> grad_final_state,
                                TensorView<double, 3> grad_x, TensorView<double, 2> grad_taps,
                                TensorView<double, 1> grad_bias, TensorView<double, 3> grad_initial_state) {
  const Index batch = x.extents[0], tokens = x.extents[1], channels = x.extents[2], width = taps.extents[1];
  Tensor<double, 3> grad_input(batch, width - 1 + tokens, channels);  // of the state's rows, then of x
  for (Index d = 0; d < channels; ++d) {
    grad_bias(d) = 0;
    for (Index j = 0; j < width; ++j) grad_taps(d, j) = 0;
    for (Index b = 0; b < batch; ++b) {
      for (Index t = 0; t < tokens; ++t) {
        const double a = short_conv_sum(x, taps, bias, initial_state, b, t, d), s = 1 / (1 + std::exp(-a));
        const double grad_a = grad_y(b, t, d) * (silu ? s * (1 + a * (1 - s)) : 1);
        grad_bias(d) += grad_a;
        for (Index j = 0; j < width; ++j) {
          grad_taps(d, j) += grad_a * short_conv_input(x, initial_state, width, b, t - j, d);
          grad_input(b, width - 1 + t - j, d) += grad_a * taps(d, j);
        }
      }
      if (grad_final_state.present())
        for (Index s = 0; s < width - 1; ++s) grad_input(b, tokens + s, d) += grad_final_state(b, s, d);
      for (Index t = 0; t < tokens; ++t) grad_x(b, t, d) = grad_input(b, width - 1 + t, d);
      if (grad_initial_state.present())
        for (Index s = 0; s < width - 1; ++s) grad_initial_state(b, s, d) = grad_input(b, s, d);
    }
  }
}

}  // namespace chela::reference
