#pragma once
// Long depthwise convolution (CHELA, arXiv 2406.08128, section 3.1), exact, with no wrap-around at any length:
//
//   y[b,t,d] = skip[d] x[b,t,d] + sum_{j=0}^{L-1} taps[d,j] x[b,t-j,d] + sum_{j=0}^{M-1} back_taps[d,j] x[b,t+1+j,d]
//
// `taps` looks back (causal); `back_taps`, if given, looks ahead and makes the kernel two-sided. Inputs before the
// first token come from the state: the last L - 1 inputs, oldest first. The state holds inputs, so a call that
// continues another gives the rows that one call over all tokens would give; a two-sided kernel looks ahead within its
// call only.
//
// A sequence is a batch entry, or with `cu_seqlens` a run of tokens of the only one (chunk/ragged.hpp); each has a
// state.
#include <algorithm>

#include "chela/chunk/ragged.hpp"
#include "chela/conv/long_policy.hpp"
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
  TensorView<T, 3> y = {};  ///< [batch, token, channel], in memory of its own; every element is written
  TensorView<const T, 3> initial_state = {};  ///< [sequence, L - 1, channel], or absent for zero
  /// [sequence, L - 1, channel], or absent when not wanted; may be the initial state's memory
  TensorView<T, 3> final_state = {};
  IndexView cu_seqlens = {};  ///< [sequences + 1], or absent
};

template <Element T>
struct LongConvBackwardArgs {
  TensorView<const T, 3> x = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 2> back_taps = {};
  TensorView<const Accumulator<T>, 1> skip = {};
  TensorView<const T, 3> initial_state = {};
  TensorView<const T, 3> grad_y = {};            ///< [batch, token, channel]
  TensorView<const T, 3> grad_final_state = {};  ///< [sequence, L - 1, channel], or absent for zero
  TensorView<T, 3> grad_x = {};                  ///< like x; absent outputs are skipped
  TensorView<Accumulator<T>, 2> grad_taps =
      {};  ///< like taps; overwritten, summed over batch and tokens in a fixed order
  TensorView<Accumulator<T>, 2> grad_back_taps = {};  ///< like back_taps
  TensorView<Accumulator<T>, 1> grad_skip = {};       ///< like skip
  /// [sequence, L - 1, channel], in memory of its own; may be wanted without an initial state, which then is zero
  TensorView<T, 3> grad_initial_state = {};
  IndexView cu_seqlens = {};  ///< as in the forward pass
};

/// One token per sequence, causal kernels only. The state is a ring of the last `ring` inputs with `position` tokens
/// seen so far: the input of token p lives in slot p % ring. A ring shorter than the kernel's length is refused.
template <Element T>
struct LongConvStepArgs {
  TensorView<const T, 2> x = {};                  ///< [batch, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, L]
  TensorView<const Accumulator<T>, 1> skip = {};  ///< [channel], or absent
  TensorView<T, 2> y = {};                        ///< [batch, channel]; may be x's memory
  TensorView<T, 3> ring = {};                     ///< [batch, ring, channel], ring >= L; this token's slot is written
  Index position = 0;                             ///< tokens already in the ring before this one
};

/// Sizes of a problem, once its arguments have passed `check`.
struct LongConvShape {
  Index batch = 0, tokens = 0, channels = 0;
  Index taps = 0, back_taps = 0;
  SequenceBatch sequences = {};

  CHELA_HOST_DEVICE constexpr Index history() const { return taps - 1; }
};

namespace detail {

template <class W>
constexpr Status check_long_conv_taps(TensorView<W, 2> taps, TensorView<W, 2> back_taps, Index channels) {
  return first_failure(
      require(taps.extents[0] == channels && taps.extents[1] >= 1 && readable(taps), Code::bad_shape,
              "taps must be [channel, L] with data and L at least 1; a kernel that only looks ahead has a tap of zero"),
      require(!back_taps.present() || (back_taps.extents[0] == channels && readable(back_taps)), Code::bad_shape,
              "back_taps must be [channel, M], or absent for a causal kernel"));
}

template <class S>
constexpr bool is_long_conv_state(TensorView<S, 3> state, const LongConvShape& s) {
  return !state.present() || has_extents(state, s.sequences.size(), s.history(), s.channels);
}

template <class V, class... I>
constexpr bool absent_or_writable(V view, I... extents) {
  return !view.present() || (has_extents(view, extents...) && writable(view));
}

/// Everything but the taps, for a kernel of this shape.
template <Element T>
constexpr Status check_long_conv(const LongConvArgs<T>& a, const LongConvShape& s) {
  if (Status ragged = check_ragged(s.sequences); !ragged.ok()) return ragged;
  return first_failure(
      require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(!a.skip.present() || has_extents(a.skip, s.channels), Code::bad_shape,
              "skip must be [channel], or absent for zero"),
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(is_long_conv_state(a.initial_state, s), Code::bad_shape,
              "initial_state must be [sequence, L - 1, channel], or absent for zero"),
      require(absent_or_writable(a.final_state, s.sequences.size(), s.history(), s.channels), Code::bad_shape,
              "final_state must be [sequence, L - 1, channel] without broadcast axes, or absent"));
}

template <Element T>
constexpr Status check_long_conv(const LongConvBackwardArgs<T>& a, const LongConvShape& s) {
  if (Status ragged = check_ragged(s.sequences); !ragged.ok()) return ragged;
  return first_failure(
      require(is_long_conv_state(a.grad_final_state, s), Code::bad_shape,
              "grad_final_state must be [sequence, L - 1, channel], or absent for zero"),
      require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(!a.skip.present() || has_extents(a.skip, s.channels), Code::bad_shape,
              "skip must be [channel], or absent for zero"),
      require(same_extents(a.grad_y, a.x) && readable(a.grad_y), Code::bad_shape, "grad_y must have the extents of x"),
      require(is_long_conv_state(a.initial_state, s), Code::bad_shape,
              "initial_state must be [sequence, L - 1, channel], or absent for zero"),
      require(absent_or_writable(a.grad_x, s.batch, s.tokens, s.channels), Code::bad_shape,
              "grad_x must have the extents of x, without broadcast axes"),
      require(absent_or_writable(a.grad_taps, s.channels, s.taps), Code::bad_shape,
              "grad_taps must have the extents of taps, without broadcast axes"),
      require(absent_or_writable(a.grad_back_taps, s.channels, s.back_taps), Code::bad_shape,
              "grad_back_taps must have the extents of back_taps, without broadcast axes"),
      require(absent_or_writable(a.grad_skip, s.channels), Code::bad_shape,
              "grad_skip must be [channel] without a broadcast axis"),
      require(absent_or_writable(a.grad_initial_state, s.sequences.size(), s.history(), s.channels), Code::bad_shape,
              "grad_initial_state must be [sequence, L - 1, channel] without broadcast axes"));
}

}  // namespace detail

/// Of LongConvArgs or LongConvBackwardArgs.
template <class Args>
CHELA_HOST_DEVICE constexpr LongConvShape long_conv_shape(const Args& a) {
  return {a.x.extents[0],
          a.x.extents[1],
          a.x.extents[2],
          a.taps.extents[1],
          a.back_taps.present() ? a.back_taps.extents[1] : 0,
          {a.x.extents[0], a.x.extents[1], a.cu_seqlens}};
}

/// Refuses arguments that do not fit together; both backends call it first.
template <Element T>
constexpr Status check(const LongConvArgs<T>& a) {
  return first_failure(detail::check_long_conv_taps(a.taps, a.back_taps, a.x.extents[2]),
                       detail::check_long_conv(a, long_conv_shape(a)));
}

template <Element T>
constexpr Status check(const LongConvBackwardArgs<T>& a) {
  return first_failure(detail::check_long_conv_taps(a.taps, a.back_taps, a.x.extents[2]),
                       detail::check_long_conv(a, long_conv_shape(a)));
}

template <Element T>
constexpr Status check(const LongConvStepArgs<T>& a) {
  const Index batch = a.x.extents[0], channels = a.x.extents[1];
  return first_failure(
      require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
      detail::check_long_conv_taps(a.taps, {}, channels),
      require(!a.skip.present() || has_extents(a.skip, channels), Code::bad_shape,
              "skip must be [channel], or absent for zero"),
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(a.ring.extents[0] == batch && a.ring.extents[2] == channels && writable(a.ring), Code::bad_shape,
              "ring must be [batch, ring, channel] with data and without broadcast axes"),
      require(a.ring.extents[1] >= a.taps.extents[1], Code::bad_shape,
              "ring must hold at least L inputs; a longer ring than the kernel is fine"),
      require(a.position >= 0, Code::bad_value, "position counts the tokens before this one: zero or more"));
}

}  // namespace chela
