#pragma once
// Short depthwise convolution on the CPU: packets of channels where channels are neighbours in memory, else packets of
// tokens. Each output is one sum in one order, whatever the layout, the workers, the tiles or the pieces of a call.
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_backward.hpp"
#include "chela/cpu/conv/short_channels.hpp"
#include "chela/cpu/conv/short_tokens.hpp"

namespace chela::cpu {

namespace detail {

/// The last width - 1 inputs of each sequence, oldest first; the initial state's memory may be the same.
template <int Width, Element T, Executor E>
void write_final_states(const ShortConvArgs<T>& a, const E& executor) {
  constexpr Index kept = Width - 1;
  const SequenceBatch sequences = sequences_of(a);
  executor.for_each(sequences.size(), [&](Index i, int) {
    const Index entry = a.state_slots.present() ? a.state_slots[i] : i;
    const Index oldest = oldest_row(a.positions.present() ? a.positions[i] : a.position, kept);
    const TensorView<const T, 2> x = tokens_of(a.x, sequences[i]), before = state_of(a.initial_state, entry);
    const TensorView<T, 2> after = state_of(a.final_state, entry);
    const Index old_rows = std::max<Index>(kept - x.extents[0], 0);  // that stay
    for (Index d = 0; d < x.extents[1]; ++d) {
      T rows[Width] = {};
      for (Index s = 0; s < old_rows && before.present(); ++s) rows[s] = before((x.extents[0] + s + oldest) % kept, d);
      for (Index s = 0; s < kept; ++s) after(s, d) = s < old_rows ? rows[s] : x(x.extents[0] + s - kept, d);
    }
  });
}

/// One token: the output, and x in the place of the oldest input. `in` is the state from its oldest row on, then x.
template <int Width, Activation A, class T, class S, class Access>
void step_channels(const ChannelRow<const T>* in, const TapRows<S>& taps, const ChannelRow<T>& oldest,
                   const ChannelRow<T>& out, Index begin, Index end, const Access& access) {
  using P = LanePacket<T>;
  for (Index d = begin; d < end; d += packet_lanes<T>) {
    P sum[1];
    convolve<Width>(sum, in, taps, d, access);
    if constexpr (A == Activation::silu) sum[0] = silu_lanes<T>(sum[0]);
    if constexpr (Width > 1) access.template copy<P>(in[Width - 1], oldest, d);
    access.store(out, d, sum[0]);
  }
}

}  // namespace detail

/// y = activation(bias + taps * x), see chela/conv/short.hpp. Scratch: the taps once more, unless they are narrow and their
/// channel stride is 1, and a few tokens of a few channels per worker.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv(const ShortConvArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_indices(args); !s.ok()) return s;
  if (args.x.size() > 0) {
    if (detail::has_adjacent_channels(args.x) && detail::has_adjacent_channels(args.y) &&
        detail::has_adjacent_channels(args.initial_state))
      detail::short_conv_over_channels<Width, A>(args, executor);
    else
      detail::short_conv_over_tokens<Width, A>(args, executor);
  }
  if constexpr (Width > 1) {
    if (args.final_state.present()) detail::write_final_states<Width>(args, executor);
  }
  return {};
}

/// One token per sequence; the state is a ring that is written in place.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv_step(const ShortConvStepArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_indices(args); !s.ok()) return s;
  constexpr Index kept = Width - 1, together = 8, block_len = 1024;  // sequences that meet a block's taps while near
  const Index sequences = args.x.extents[0], channels = args.x.extents[1];
  const Index groups = ceil_div(sequences, together), blocks = ceil_div(channels, block_len);
  const detail::HeldTaps<Accumulator<T>> taps(args.taps, args.bias);
  const bool adjacent = detail::has_adjacent_channels(args.x) && detail::has_adjacent_channels(args.y) &&
                        detail::has_adjacent_channels(args.state);

  executor.for_each(groups * blocks, [&](Index task, int) {
    const Index first = task % blocks * block_len, last = std::min(channels, first + block_len);
    const Index begin = task / blocks * together, end = std::min(sequences, begin + together);
    for (Index i = begin; i < end; ++i) {
      detail::ChannelRow<const T> in[Width];
      detail::ChannelRow<T> oldest;
      if constexpr (kept > 0) {
        const auto state = slice(args.state, args.state_slots.present() ? args.state_slots[i] : i);
        const Index row = (args.positions.present() ? args.positions[i] : args.position) % kept;
        for (Index r = 0; r < kept; ++r)
          in[r] = detail::channel_row(TensorView<const T, 2>(state), row + r < kept ? row + r : row + r - kept);
        oldest = detail::channel_row(state, row);
      }
      in[kept] = detail::channel_row(args.x, i);
      const detail::ChannelRow<T> out = detail::channel_row(args.y, i);
      detail::for_each_packet_run<T>(first, last, adjacent, [&](auto access, auto, Index from, Index to) {
        detail::step_channels<Width, A>(in, taps.rows(), oldest, out, from, to, access);
      });
    }
  });
  return {};
}

}  // namespace chela::cpu
