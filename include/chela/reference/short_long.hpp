#pragma once
// The short-long convolution in double: the two references one after the other, and backwards. Shapes as in
// chela/conv/short_long.hpp; absent views are zero.
#include "chela/reference/long.hpp"
#include "chela/reference/short.hpp"

namespace chela::reference {

/// What both passes read.
struct ShortLongConvInputs {
  TensorView<const double, 3> x = {};
  TensorView<const double, 2> short_taps = {};
  TensorView<const double, 1> short_bias = {};
  TensorView<const double, 2> taps = {}, back_taps = {};
  TensorView<const double, 1> skip = {};
  TensorView<const double, 3> short_initial_state = {}, long_initial_state = {};
};

/// Where gradients go; all but those of absent inputs are written.
struct ShortLongConvGradients {
  TensorView<double, 3> x = {};
  TensorView<double, 2> short_taps = {};
  TensorView<double, 1> short_bias = {};
  TensorView<double, 2> taps = {}, back_taps = {};
  TensorView<double, 1> skip = {};
  TensorView<double, 3> short_initial_state = {}, long_initial_state = {};
};

/// `inner` is the activation between the stages.
inline void short_long_conv(const ShortLongConvInputs& in, TensorView<double, 3> inner, TensorView<double, 3> z,
                            TensorView<double, 3> short_final_state, TensorView<double, 3> long_final_state) {
  short_conv(in.x, in.short_taps, in.short_bias, in.short_initial_state, true, inner, short_final_state);
  long_conv(inner, in.taps, in.back_taps, in.skip, in.long_initial_state, z, long_final_state);
}

inline void short_long_conv_backward(const ShortLongConvInputs& in, TensorView<const double, 3> grad_z,
                                     const ShortLongConvGradients& grads) {
  Tensor<double, 3> inner(in.x.extents[0], in.x.extents[1], in.x.extents[2]), grad_inner(inner.extents());
  short_conv(in.x, in.short_taps, in.short_bias, in.short_initial_state, true, inner, {});
  long_conv_backward(inner, in.taps, in.back_taps, in.skip, in.long_initial_state, grad_z, grad_inner, grads.taps,
                     grads.back_taps, grads.skip, grads.long_initial_state);
  short_conv_backward(in.x, in.short_taps, in.short_bias, in.short_initial_state, true, grad_inner, {}, grads.x,
                      grads.short_taps, grads.short_bias, grads.short_initial_state);
}

}  // namespace chela::reference
