#pragma once
// Short depthwise causal convolution, the first stage of CHELA's short-long convolution (arXiv 2406.08128, section
// 3.1):
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
  TensorView<const T, 3> x = {};  ///< [batch, token, channel]
  /// [channel, width]; taps[d, 0] meets the newest input. The CPU repacks them on each call unless the channel stride
  /// is 1.
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 1> bias = {};  ///< [channel], or absent for zero
  TensorView<T, 3> y = {};                        ///< [batch, token, channel]; every element is written
  TensorView<const T, 3> initial_state = {};      ///< [batch, width - 1, channel], or absent for zero
  TensorView<T, 3> final_state = {};              ///< [batch, width - 1, channel]; may be the initial state's memory
};

/// Gradients of the same pass; what the forward pass saw is recomputed, nothing need be kept. Absent outputs are
/// skipped.
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

namespace detail {

/// The one place where a width is judged.
template <int Width>
constexpr void require_short_width() {
  static_assert(Width >= 1 && Width <= 64,
                "the width of a short convolution must be 1 to 64; use long_conv for longer kernels");
}

template <class X, class W, class C>
constexpr Status check_short_conv_inputs(TensorView<X, 3> x, TensorView<W, 2> taps, TensorView<C, 1> bias,
                                         Index width) {
  const Index channels = x.extents[2];
  return first_failure(
      require(readable(x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(has_extents(taps, channels, width) && readable(taps), Code::bad_shape,
              "taps must be [channel, width] with the operator's width; pad shorter kernels with zeros"),
      require(!bias.present() || has_extents(bias, channels), Code::bad_shape, "bias must be [channel], or absent"));
}

/// Absent, or [batch, width - 1, channel].
template <class X, class S>
constexpr bool is_short_conv_state(TensorView<S, 3> state, TensorView<X, 3> x, Index width) {
  return !state.present() || has_extents(state, x.extents[0], width - 1, x.extents[2]);
}

/// Absent, or of the extents of `of`, with a place of its own for each element.
template <class G, class X, int Rank>
constexpr bool is_gradient_of(TensorView<G, Rank> grad, TensorView<X, Rank> of) {
  return !grad.present() || (same_extents(grad, of) && writable(grad));
}

}  // namespace detail

/// Refuses arguments that do not fit together or do not fit an operator of this width; both backends call it first.
template <Element T>
constexpr Status check(const ShortConvArgs<T>& a, Index width) {
  return first_failure(detail::check_short_conv_inputs(a.x, a.taps, a.bias, width),
                       require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
                               "y must have the extents of x, with data and without broadcast axes"),
                       require(detail::is_short_conv_state(a.initial_state, a.x, width), Code::bad_shape,
                               "initial_state must be [batch, width - 1, channel], or absent for zero"),
                       require(detail::is_short_conv_state(a.final_state, a.x, width), Code::bad_shape,
                               "final_state must be [batch, width - 1, channel], or absent"),
                       require(writable(a.final_state) || !a.final_state.present(), Code::bad_stride,
                               "final_state must not have broadcast axes"));
}

template <Element T>
constexpr Status check(const ShortConvBackwardArgs<T>& a, Index width) {
  return first_failure(
      detail::check_short_conv_inputs(a.x, a.taps, a.bias, width),
      require(same_extents(a.grad_y, a.x) && readable(a.grad_y), Code::bad_shape, "grad_y must have the extents of x"),
      require(detail::is_short_conv_state(a.initial_state, a.x, width) &&
                  detail::is_short_conv_state(a.grad_final_state, a.x, width) &&
                  detail::is_short_conv_state(a.grad_initial_state, a.x, width),
              Code::bad_shape,
              "initial_state, grad_final_state and grad_initial_state must be [batch, width - 1, channel], or absent"),
      require(detail::is_gradient_of(a.grad_x, a.x) && detail::is_gradient_of(a.grad_taps, a.taps), Code::bad_shape,
              "grad_x and grad_taps must have the extents of x and taps, without broadcast axes"),
      require(!a.grad_bias.present() || (has_extents(a.grad_bias, a.x.extents[2]) && writable(a.grad_bias)),
              Code::bad_shape, "grad_bias must be [channel] without a broadcast axis, or absent"),
      require(writable(a.grad_initial_state) || !a.grad_initial_state.present(), Code::bad_stride,
              "grad_initial_state must not have broadcast axes"));
}

template <Element T>
constexpr Status check(const ShortConvStepArgs<T>& a, Index width) {
  const Index batch = a.x.extents[0], channels = a.x.extents[1];
  return first_failure(
      require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(has_extents(a.taps, channels, width) && readable(a.taps), Code::bad_shape,
              "taps must be [channel, width] with the operator's width; pad shorter kernels with zeros"),
      require(!a.bias.present() || has_extents(a.bias, channels), Code::bad_shape, "bias must be [channel], or absent"),
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(has_extents(a.state, batch, width - 1, channels) && writable(a.state), Code::bad_shape,
              "state must be [batch, width - 1, channel] with data: a step reads and shifts it"));
}

}  // namespace chela
