#pragma once
// CHELA's short-long convolution (arXiv 2406.08128, section 3.1): a short convolution steadies the signal that the long
// one reads,
//
//   u = silu(short_bias + short_taps * x)        z = skip u + taps * u  (+ back_taps, looking ahead)
//
// with both stages depthwise: see conv/short.hpp and conv/long.hpp. The state is the last width - 1 inputs x and the
// last L - 1 inner activations u.
#include "chela/conv/long.hpp"
#include "chela/conv/short.hpp"

namespace chela {

/// Inputs and outputs of one forward pass. The short width is a template argument of the operator, 1 to 64.
template <Element T>
struct ShortLongConvArgs {
  TensorView<const T, 3> x = {};                        ///< [batch, token, channel]
  TensorView<const Accumulator<T>, 2> short_taps = {};  ///< [channel, width]
  TensorView<const Accumulator<T>, 1> short_bias = {};  ///< [channel], or absent for zero
  TensorView<const Accumulator<T>, 2> taps = {};        ///< [channel, L]
  TensorView<const Accumulator<T>, 2> back_taps = {};   ///< [channel, M], or absent for a causal kernel
  TensorView<const Accumulator<T>, 1> skip = {};        ///< [channel], or absent for zero
  TensorView<T, 3> z = {};                              ///< [batch, token, channel]; every element is written
  /// u, [batch, token, channel]. Absent, the CPU allocates it for the call; a backward pass may be given it.
  TensorView<T, 3> inner = {};
  TensorView<const T, 3> short_initial_state = {};  ///< [batch, width - 1, channel], or absent for zero
  TensorView<const T, 3> long_initial_state = {};   ///< [batch, L - 1, channel], or absent for zero
  TensorView<T, 3> short_final_state = {};          ///< like the initial state, whose memory it may be; or absent
  TensorView<T, 3> long_final_state = {};           ///< like the initial state, in memory of its own; or absent
};

/// Gradients of the same pass. Absent outputs are skipped.
template <Element T>
struct ShortLongConvBackwardArgs {
  TensorView<const T, 3> x = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 2> short_taps = {};
  TensorView<const Accumulator<T>, 1> short_bias = {};
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 2> back_taps = {};
  TensorView<const Accumulator<T>, 1> skip = {};
  TensorView<const T, 3> inner = {};  ///< what the forward pass wrote, or absent to compute it again
  TensorView<const T, 3> short_initial_state = {};
  TensorView<const T, 3> long_initial_state = {};
  TensorView<const T, 3> grad_z = {};                  ///< [batch, token, channel]
  TensorView<T, 3> grad_x = {};                        ///< like x
  TensorView<Accumulator<T>, 2> grad_short_taps = {};  ///< like short_taps; these are overwritten
  TensorView<Accumulator<T>, 1> grad_short_bias = {};  ///< like short_bias
  TensorView<Accumulator<T>, 2> grad_taps = {};        ///< like taps
  TensorView<Accumulator<T>, 2> grad_back_taps = {};   ///< like back_taps
  TensorView<Accumulator<T>, 1> grad_skip = {};        ///< like skip
  TensorView<T, 3> grad_short_initial_state = {};      ///< like short_initial_state
  TensorView<T, 3> grad_long_initial_state = {};       ///< like long_initial_state
};

/// One token per sequence, causal kernels only. Both states are updated in place.
template <Element T>
struct ShortLongConvStepArgs {
  TensorView<const T, 2> x = {};                        ///< [batch, channel]
  TensorView<const Accumulator<T>, 2> short_taps = {};  ///< [channel, width]
  TensorView<const Accumulator<T>, 1> short_bias = {};  ///< [channel], or absent
  TensorView<const Accumulator<T>, 2> taps = {};        ///< [channel, L]
  TensorView<const Accumulator<T>, 1> skip = {};        ///< [channel], or absent
  TensorView<T, 2> z = {};                              ///< [batch, channel]; may be x's memory
  TensorView<T, 3> short_state = {};                    ///< [batch, width - 1, channel]; a ring, see conv/short.hpp
  Index short_position = 0;    ///< steps made before this one since `short_state` was oldest first
  TensorView<T, 3> ring = {};  ///< [batch, ring, channel] of u, ring >= L
  Index position = 0;          ///< tokens already in the ring before this one
};

namespace detail {

/// What a stage's forward and backward arguments share.
template <class Stage, class Args>
constexpr Stage short_stage_inputs(const Args& a) {
  Stage stage;
  stage.x = a.x, stage.taps = a.short_taps, stage.bias = a.short_bias, stage.initial_state = a.short_initial_state;
  return stage;
}
template <class Stage, class Args, class T>
constexpr Stage long_stage_inputs(const Args& a, TensorView<const T, 3> inner) {
  Stage stage;
  stage.x = inner, stage.taps = a.taps, stage.back_taps = a.back_taps, stage.skip = a.skip;
  stage.initial_state = a.long_initial_state;
  return stage;
}

}  // namespace detail

/// x to u, given where u is to be. From the arguments of a backward pass: to compute it again.
template <Element T>
constexpr ShortConvArgs<T> short_stage(const ShortLongConvArgs<T>& a, TensorView<T, 3> inner) {
  auto stage = detail::short_stage_inputs<ShortConvArgs<T>>(a);
  stage.y = inner, stage.final_state = a.short_final_state;
  return stage;
}
template <Element T>
constexpr ShortConvArgs<T> short_stage(const ShortLongConvBackwardArgs<T>& a, TensorView<T, 3> inner) {
  auto stage = detail::short_stage_inputs<ShortConvArgs<T>>(a);
  stage.y = inner;
  return stage;
}

/// u to z.
template <Element T>
constexpr LongConvArgs<T> long_stage(const ShortLongConvArgs<T>& a, TensorView<const T, 3> inner) {
  auto stage = detail::long_stage_inputs<LongConvArgs<T>>(a, inner);
  stage.y = a.z, stage.final_state = a.long_final_state;
  return stage;
}

/// grad_z to the gradient of u.
template <Element T>
constexpr LongConvBackwardArgs<T> long_stage(const ShortLongConvBackwardArgs<T>& a, TensorView<const T, 3> inner,
                                             TensorView<T, 3> grad_inner) {
  auto stage = detail::long_stage_inputs<LongConvBackwardArgs<T>>(a, inner);
  stage.grad_y = a.grad_z, stage.grad_x = grad_inner;
  stage.grad_taps = a.grad_taps, stage.grad_back_taps = a.grad_back_taps, stage.grad_skip = a.grad_skip;
  stage.grad_initial_state = a.grad_long_initial_state;
  return stage;
}

/// The gradient of u to that of x.
template <Element T>
constexpr ShortConvBackwardArgs<T> short_stage_backward(const ShortLongConvBackwardArgs<T>& a,
                                                        TensorView<const T, 3> grad_inner) {
  auto stage = detail::short_stage_inputs<ShortConvBackwardArgs<T>>(a);
  stage.grad_y = grad_inner, stage.grad_x = a.grad_x;
  stage.grad_taps = a.grad_short_taps, stage.grad_bias = a.grad_short_bias;
  stage.grad_initial_state = a.grad_short_initial_state;
  return stage;
}

/// One token of x to u, which takes z's place.
template <Element T>
constexpr ShortConvStepArgs<T> short_stage(const ShortLongConvStepArgs<T>& a) {
  return {.x = a.x,
          .taps = a.short_taps,
          .bias = a.short_bias,
          .y = a.z,
          .state = a.short_state,
          .position = a.short_position};
}

/// One token of u, in z's place, to z.
template <Element T>
constexpr LongConvStepArgs<T> long_stage(const ShortLongConvStepArgs<T>& a) {
  return {.x = a.z, .taps = a.taps, .skip = a.skip, .y = a.z, .ring = a.ring, .position = a.position};
}

namespace detail {

/// Names the arguments by which the two stages differ; the rest is refused in the words of each stage.
template <class X, class S, class A>
constexpr Status check_short_long_inputs(TensorView<X, 3> x, TensorView<A, 2> short_taps, TensorView<A, 1> short_bias,
                                         TensorView<A, 2> taps, TensorView<S, 3> short_state,
                                         TensorView<S, 3> long_state, Index width) {
  const Index batch = x.extents[0], channels = x.extents[2];
  return first_failure(
      require(readable(x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(has_extents(short_taps, channels, width) && readable(short_taps), Code::bad_shape,
              "short_taps must be [channel, width] with the operator's width; pad shorter kernels with zeros"),
      require(!short_bias.present() || has_extents(short_bias, channels), Code::bad_shape,
              "short_bias must be [channel], or absent"),
      require(is_short_conv_state(short_state, batch, channels, width), Code::bad_shape,
              "short_initial_state must be [batch, width - 1, channel], or absent for zero"),
      require(!long_state.present() || has_extents(long_state, batch, taps.extents[1] - 1, channels), Code::bad_shape,
              "long_initial_state must be [batch, L - 1, channel], or absent for zero"));
}

}  // namespace detail

/// Refuses arguments that do not fit together or do not fit an operator of this short width; both backends call it
/// first.
template <Element T>
constexpr Status check(const ShortLongConvArgs<T>& a, Index width) {
  return first_failure(detail::check_short_long_inputs(a.x, a.short_taps, a.short_bias, a.taps, a.short_initial_state,
                                                       a.long_initial_state, width),
                       require(same_extents(a.z, a.x) && writable(a.z), Code::bad_shape,
                               "z must have the extents of x, with data and without broadcast axes"),
                       require(!a.inner.present() || (same_extents(a.inner, a.x) && writable(a.inner)), Code::bad_shape,
                               "inner must have the extents of x without broadcast axes, or be absent"),
                       require(detail::is_short_conv_state(a.short_final_state, a.x.extents[0], a.x.extents[2], width),
                               Code::bad_shape, "short_final_state must be [batch, width - 1, channel], or absent"),
                       check(short_stage(a, a.z), width), check(long_stage(a, TensorView<const T, 3>(a.z))));
}

template <Element T>
constexpr Status check(const ShortLongConvBackwardArgs<T>& a, Index width) {
  return first_failure(
      detail::check_short_long_inputs(a.x, a.short_taps, a.short_bias, a.taps, a.short_initial_state,
                                      a.long_initial_state, width),
      require(same_extents(a.grad_z, a.x) && readable(a.grad_z), Code::bad_shape, "grad_z must have the extents of x"),
      require(!a.inner.present() || same_extents(a.inner, a.x), Code::bad_shape,
              "inner must have the extents of x, or be absent"),
      require(!a.grad_short_taps.present() || same_extents(a.grad_short_taps, a.short_taps), Code::bad_shape,
              "grad_short_taps must have the extents of short_taps"),
      check(short_stage_backward(a, a.grad_z), width), check(long_stage(a, a.x, a.grad_x)));
}

template <Element T>
constexpr Status check(const ShortLongConvStepArgs<T>& a, Index width) {
  const Index batch = a.x.extents[0], channels = a.x.extents[1];
  return first_failure(
      require(has_extents(a.short_state, batch, width - 1, channels) && writable(a.short_state), Code::bad_shape,
              "short_state must be [batch, width - 1, channel] with data: a step reads it and writes to it"),
      require(same_extents(a.z, a.x) && writable(a.z), Code::bad_shape,
              "z must have the extents of x, with data and without broadcast axes"),
      check(short_stage(a), width), check(long_stage(a)));
}

}  // namespace chela
