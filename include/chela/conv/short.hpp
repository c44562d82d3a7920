#pragma once
// Short depthwise causal convolution, the first stage of CHELA's short-long convolution (arXiv 2406.08128, section
// 3.1):
//
//   a[b,t,d] = bias[d] + sum_{j=0}^{Width-1} taps[d,j] x[b,t-j,d]        y = activation(a)
//
// Inputs before the first token come from the state: the last Width - 1 inputs of the call before, oldest first. Steps
// leave it as a ring: after n of them its oldest row is n % (Width - 1), and nothing has been shifted.
#include "chela/chunk/ragged.hpp"
#include "chela/chunk/state_slots.hpp"
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Applied to each output of a convolution or a projection. silu(a) = a sigmoid(a).
enum class Activation { none, silu };

/// Inputs and outputs of one forward pass. The width is a template argument of the operator, 1 to 64. A sequence is a
/// batch entry, or with `cu_seqlens` a run of tokens of the only one (chunk/ragged.hpp).
template <Element T>
struct ShortConvArgs {
  TensorView<const T, 3> x = {};  ///< [batch, token, channel]; quickest where channels or tokens have stride 1
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, width]; taps[d, 0] meets the newest input
  TensorView<const Accumulator<T>, 1> bias = {};  ///< [channel], or absent for zero
  TensorView<T, 3> y = {};                        ///< [batch, token, channel]; every element is written
  TensorView<const T, 3> initial_state = {};      ///< [sequence, width - 1, channel], or absent for zero
  TensorView<T, 3> final_state = {};  ///< like it, oldest first; absent, or maybe the initial state's memory
  IndexView cu_seqlens = {};          ///< [sequences + 1], or absent
  /// [sequence]: the entry of the states' first axis that is each sequence's own, or absent for their order. Then that
  /// axis may be a pool of any size. No two sequences may share an entry.
  IndexView state_slots = {};
  Index position = 0;        ///< steps that `initial_state` has seen since it was oldest first
  IndexView positions = {};  ///< [sequence]: the same where it differs, instead of `position`
};

/// Gradients of the same pass from a state that is oldest first; what the forward pass saw is recomputed, nothing need
/// be kept. Absent outputs are skipped. Gradients of states have memory of their own.
template <Element T>
struct ShortConvBackwardArgs {
  TensorView<const T, 3> x = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 2> taps = {};
  TensorView<const Accumulator<T>, 1> bias = {};
  TensorView<const T, 3> initial_state = {};
  TensorView<const T, 3> grad_y = {};            ///< [batch, token, channel]
  TensorView<const T, 3> grad_final_state = {};  ///< [sequence, width - 1, channel], or absent for zero
  TensorView<T, 3> grad_x = {};                  ///< like x
  TensorView<Accumulator<T>, 2> grad_taps = {};  ///< like taps; overwritten, summed over batch and tokens
  TensorView<Accumulator<T>, 1> grad_bias = {};  ///< like bias; overwritten
  TensorView<T, 3> grad_initial_state = {};      ///< [sequence, width - 1, channel]
  IndexView cu_seqlens = {};                     ///< as in the forward pass
};

/// One token per sequence. x takes the place of the oldest input in the state; the caller counts positions on.
template <Element T>
struct ShortConvStepArgs {
  TensorView<const T, 2> x = {};                  ///< [sequence, channel]
  TensorView<const Accumulator<T>, 2> taps = {};  ///< [channel, width]
  TensorView<const Accumulator<T>, 1> bias = {};  ///< [channel], or absent
  TensorView<T, 2> y = {};                        ///< [sequence, channel]; may be x's memory
  TensorView<T, 3> state = {};                    ///< [sequence or slot, width - 1, channel]
  Index position = 0;          ///< steps made before this one since `state` was oldest first: 0 after a pass
  IndexView positions = {};    ///< [sequence]: the same where it differs, instead of `position`
  IndexView state_slots = {};  ///< as in the forward pass
};

template <Element T>
CHELA_HOST_DEVICE constexpr SequenceBatch sequences_of(const ShortConvArgs<T>& a) {
  return {a.x.extents[0], a.x.extents[1], a.cu_seqlens};
}
template <Element T>
CHELA_HOST_DEVICE constexpr SequenceBatch sequences_of(const ShortConvBackwardArgs<T>& a) {
  return {a.x.extents[0], a.x.extents[1], a.cu_seqlens};
}
template <Element T>
CHELA_HOST_DEVICE constexpr SequenceBatch sequences_of(const ShortConvStepArgs<T>& a) {
  return {a.x.extents[0], 1};
}

namespace detail {

/// The one place where a width is judged.
template <int Width>
constexpr void require_short_width() {
  static_assert(Width >= 1 && Width <= 64,
                "the width of a short convolution must be 1 to 64; use long_conv for longer kernels");
}

template <class X, class W, class C, int Rank>
constexpr Status check_short_conv_inputs(TensorView<X, Rank> x, TensorView<W, 2> taps, TensorView<C, 1> bias,
                                         Index width) {
  const Index channels = x.extents[Rank - 1];
  return first_failure(
      require(readable(x), Code::bad_shape, "x needs data and extents of zero or more"),
      require(has_extents(taps, channels, width) && readable(taps), Code::bad_shape,
              "taps must be [channel, width] with the operator's width; pad shorter kernels with zeros"),
      require(!bias.present() || has_extents(bias, channels), Code::bad_shape, "bias must be [channel], or absent"));
}

/// Absent, or [sequence, width - 1, channel]; a pool has any number of entries.
template <class S>
constexpr bool is_short_conv_state(TensorView<S, 3> state, Index sequences, Index channels, Index width,
                                   bool pooled = false) {
  return !state.present() || has_extents(state, pooled ? state.extents[0] : sequences, width - 1, channels);
}

/// Absent, or of the extents of `of`, with a place of its own for each element.
template <class G, class X, int Rank>
constexpr bool is_gradient_of(TensorView<G, Rank> grad, TensorView<X, Rank> of) {
  return !grad.present() || (same_extents(grad, of) && writable(grad));
}

constexpr Status check_positions(IndexView positions, Index sequences) {
  return require(!positions.present() || positions.size() == sequences, Code::bad_shape,
                 "positions must be [sequence], or absent where `position` holds for all");
}

/// Reads the positions, which must be in host memory.
constexpr Status check_position_values(Index position, IndexView positions) {
  bool counts = position >= 0;
  for (Index i = 0; positions.present() && i < positions.size(); ++i) counts = counts && positions[i] >= 0;
  return require(counts, Code::bad_value, "position and positions count steps: they must be zero or more");
}

}  // namespace detail

/// Refuses arguments that do not fit together or do not fit an operator of this width; both backends call it first. It
/// reads no tensor.
template <Element T>
constexpr Status check(const ShortConvArgs<T>& a, Index width) {
  if (Status s = detail::check_short_conv_inputs(a.x, a.taps, a.bias, width); !s.ok()) return s;
  if (Status s = check_ragged(sequences_of(a)); !s.ok()) return s;
  const Index sequences = sequences_of(a).size(), channels = a.x.extents[2];
  const bool pooled = a.state_slots.present();
  return first_failure(
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(detail::is_short_conv_state(a.initial_state, sequences, channels, width, pooled), Code::bad_shape,
              "initial_state must be [sequence, width - 1, channel], or absent for zero"),
      require(detail::is_short_conv_state(a.final_state, sequences, channels, width, pooled), Code::bad_shape,
              "final_state must be [sequence, width - 1, channel], or absent"),
      require(writable(a.final_state) || !a.final_state.present(), Code::bad_stride,
              "final_state must not have broadcast axes"),
      detail::check_slots(a.state_slots, sequences), detail::check_positions(a.positions, sequences));
}

template <Element T>
constexpr Status check(const ShortConvBackwardArgs<T>& a, Index width) {
  if (Status s = detail::check_short_conv_inputs(a.x, a.taps, a.bias, width); !s.ok()) return s;
  if (Status s = check_ragged(sequences_of(a)); !s.ok()) return s;
  const Index sequences = sequences_of(a).size(), channels = a.x.extents[2];
  return first_failure(
      require(same_extents(a.grad_y, a.x) && readable(a.grad_y), Code::bad_shape, "grad_y must have the extents of x"),
      require(detail::is_short_conv_state(a.initial_state, sequences, channels, width) &&
                  detail::is_short_conv_state(a.grad_final_state, sequences, channels, width) &&
                  detail::is_short_conv_state(a.grad_initial_state, sequences, channels, width),
              Code::bad_shape,
              "initial_state, grad_final_state and grad_initial_state must be [sequence, width - 1, channel], or "
              "absent"),
      require(detail::is_gradient_of(a.grad_x, a.x) && detail::is_gradient_of(a.grad_taps, a.taps), Code::bad_shape,
              "grad_x and grad_taps must have the extents of x and taps, without broadcast axes"),
      require(!a.grad_bias.present() || (has_extents(a.grad_bias, channels) && writable(a.grad_bias)), Code::bad_shape,
              "grad_bias must be [channel] without a broadcast axis, or absent"),
      require(writable(a.grad_initial_state) || !a.grad_initial_state.present(), Code::bad_stride,
              "grad_initial_state must not have broadcast axes"));
}

template <Element T>
constexpr Status check(const ShortConvStepArgs<T>& a, Index width) {
  if (Status s = detail::check_short_conv_inputs(a.x, a.taps, a.bias, width); !s.ok()) return s;
  const Index sequences = a.x.extents[0], channels = a.x.extents[1];
  const Index entries = a.state_slots.present() ? a.state.extents[0] : sequences;
  return first_failure(
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(has_extents(a.state, entries, width - 1, channels) && writable(a.state), Code::bad_shape,
              "state must be [sequence, width - 1, channel] with data: a step reads it and writes to it"),
      detail::check_slots(a.state_slots, sequences), detail::check_positions(a.positions, sequences));
}

/// Refuses offsets, slots and positions that would lead outside of the tensors. It reads them: they must be in host
/// memory.
template <Element T>
constexpr Status check_indices(const ShortConvArgs<T>& a) {
  return first_failure(check_offsets(sequences_of(a)), detail::check_slot_values(a.state_slots, a.initial_state),
                       detail::check_slot_values(a.state_slots, a.final_state),
                       detail::check_position_values(a.position, a.positions));
}

template <Element T>
constexpr Status check_indices(const ShortConvBackwardArgs<T>& a) {
  return check_offsets(sequences_of(a));
}

template <Element T>
constexpr Status check_indices(const ShortConvStepArgs<T>& a) {
  return first_failure(detail::check_slot_values(a.state_slots, a.state),
                       detail::check_position_values(a.position, a.positions));
}

}  // namespace chela
