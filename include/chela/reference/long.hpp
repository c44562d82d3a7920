#pragma once
// Long depthwise convolution as sums in double. Shapes as in chela/conv/long.hpp; absent views are zero or not wanted. The
// gradients are read off the sum: y(b,t,d) holds k_m x(b,t-m,d) for each lag m, so k_m grad_y(b,t,d) flows to x(b,t-m,d) and
// x(b,t-m,d) grad_y(b,t,d) to k_m.
#include <algorithm>

#include "chela/core/tensor_view.hpp"

namespace chela::reference {

/// Input t of a sequence: the state's for t < 0, zero where there is none.
inline double long_conv_input(TensorView<const double, 3> x, TensorView<const double, 3> initial_state, Index b,
                              Index t, Index d) {
  if (t >= 0) return t < x.extents[1] ? x(b, t, d) : 0.0;
  const Index row = initial_state.extents[1] + t;
  return initial_state.present() && row >= 0 ? initial_state(b, row, d) : 0.0;
}

/// One output.
inline double long_conv_at(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                           TensorView<const double, 2> back_taps, TensorView<const double, 1> skip,
                           TensorView<const double, 3> initial_state, Index b, Index t, Index d) {
  double sum = skip.present() ? skip(d) * x(b, t, d) : 0.0;
  for (Index j = 0; j < taps.extents[1]; ++j) sum += taps(d, j) * long_conv_input(x, initial_state, b, t - j, d);
  if (back_taps.present())
    for (Index j = 0; j < back_taps.extents[1]; ++j)
      sum += back_taps(d, j) * long_conv_input(x, initial_state, b, t + 1 + j, d);
  return sum;
}

inline void long_conv(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                      TensorView<const double, 2> back_taps, TensorView<const double, 1> skip,
                      TensorView<const double, 3> initial_state, TensorView<double, 3> y,
                      TensorView<double, 3> final_state) {
  const Index batch = x.extents[0], tokens = x.extents[1], channels = x.extents[2], history = taps.extents[1] - 1;
  for (Index b = 0; b < batch; ++b)
    for (Index d = 0; d < channels; ++d) {
      for (Index t = 0; t < tokens; ++t) y(b, t, d) = long_conv_at(x, taps, back_taps, skip, initial_state, b, t, d);
      if (final_state.present())
        for (Index r = 0; r < history; ++r)
          final_state(b, r, d) = long_conv_input(x, initial_state, b, tokens - history + r, d);
    }
}

/// Every gradient is written; those of back taps, skip and initial state only where present. `grad_final_state`, where present,
/// flows to the inputs that the final state is made of.
inline void long_conv_backward(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                               TensorView<const double, 2> back_taps, TensorView<const double, 1> skip,
                               TensorView<const double, 3> initial_state, TensorView<const double, 3> grad_y,
                               TensorView<double, 3> grad_x, TensorView<double, 2> grad_taps,
                               TensorView<double, 2> grad_back_taps, TensorView<double, 1> grad_skip,
                               TensorView<double, 3> grad_initial_state,
                               TensorView<const double, 3> grad_final_state = {}) {
  const Index batch = x.extents[0], tokens = x.extents[1], channels = x.extents[2], history = taps.extents[1] - 1;
  const Index ahead = back_taps.present() ? back_taps.extents[1] : 0;
  for (Index d = 0; d < channels; ++d) {
    const auto kernel = [&](Index lag) {
      const double tap = lag >= 0 ? taps(d, lag) : back_taps(d, -lag - 1);
      return tap + (lag == 0 && skip.present() ? skip(d) : 0.0);
    };
    for (Index b = 0; b < batch; ++b)
      for (Index s = -history; s < tokens; ++s) {  // the input that gradients flow to
        double sum = 0;
        for (Index t = std::max<Index>(0, s - ahead); t < std::min(tokens, s + history + 1); ++t)
          sum += kernel(t - s) * grad_y(b, t, d);
        if (grad_final_state.present() && s >= tokens - history) sum += grad_final_state(b, s - tokens + history, d);
        if (s >= 0)
          grad_x(b, s, d) = sum;
        else if (grad_initial_state.present())
          grad_initial_state(b, history + s, d) = sum;
      }
    const auto kernel_gradient = [&](Index lag) {
      double sum = 0;
      for (Index b = 0; b < batch; ++b)
        for (Index t = 0; t < tokens; ++t) sum += grad_y(b, t, d) * long_conv_input(x, initial_state, b, t - lag, d);
      return sum;
    };
    for (Index j = 0; j <= history; ++j) grad_taps(d, j) = kernel_gradient(j);
    if (grad_back_taps.present())
      for (Index j = 0; j < ahead; ++j) grad_back_taps(d, j) = kernel_gradient(-1 - j);
    if (grad_skip.present()) grad_skip(d) = kernel_gradient(0);
  }
}

}  // namespace chela::reference
