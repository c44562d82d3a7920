#pragma once
// The short convolution where channels are not neighbours in memory, [batch, channel, token] above all: one channel at a
// time, packets of tokens. What a channel needs is first brought into contiguous spans of accumulators.
#include <cstring>

#include "chela/conv/short.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_activation.hpp"
#include "chela/cpu/conv/short_runs.hpp"
#include "chela/cpu/conv/stream_lanes.hpp"

namespace chela::cpu::detail {

/// Tokens of a span, tokens of one inner loop, and channels of one task.
inline constexpr Index span_len = 512, span_channels = 8;
template <class T>
inline constexpr Index span_step = 4 * packet_lanes<T>;

/// Elements of a span with a history in front and room for whole inner loops behind.
template <int Width, class T>
inline constexpr Index span_size = Width - 1 + span_len + span_step<T>;

/// One channel's taps and bias.
template <int Width, class S>
struct ChannelTaps {
  S taps[Width];
  S bias;

  ChannelTaps(TensorView<const S, 2> all, TensorView<const S, 1> biases, Index d)
      : bias(biases.present() ? biases(d) : S(0)) {
    for (int j = 0; j < Width; ++j) taps[j] = all(d, j);
  }
};

/// Converts `count` elements that are `stride` apart.
template <class T, class S>
void gather_span(const T* from, Index stride, Index count, S* to) {
  using P = LanePacket<T>;
  constexpr Index lanes = packet_lanes<T>;
  Index t = 0;
  if (stride == 1)
    for (; t + lanes <= count; t += lanes) store_lanes(to + t, load_lanes<P>(from + t));
  for (; t < count; ++t) to[t] = static_cast<S>(from[t * stride]);
}

/// The way back. A streamed span has stride 1; its lines are stored past the caches as far as they are whole.
template <class S, class T>
void scatter_span(const S* from, Index count, T* to, Index stride, bool streamed = false) {
  using P = LanePacket<T>;
  constexpr Index lanes = packet_lanes<T>;
  Index t = 0;
  if (streamed) {
    const Index past_line = Index(reinterpret_cast<std::uintptr_t>(to) % line_bytes / sizeof(T));
    const Index head = past_line > 0 ? std::min<Index>(count, line_bytes / Index(sizeof(T)) - past_line) : 0;
    for (; t < head; ++t) to[t] = static_cast<T>(from[t]);
    for (; t + lanes <= count; t += lanes) stream_lanes(to + t, load_lanes<P>(from + t));
  }
  if (stride == 1)
    for (; t + lanes <= count; t += lanes) store_lanes(to + t, load_lanes<P>(from + t));
  for (; t < count; ++t) to[t * stride] = static_cast<T>(from[t]);
}

/// Calls f(j) for the taps of each output in the order of the other layout: blocks of eight, in each the oldest input first.
template <int Width, class F>
CHELA_ALWAYS_INLINE void for_each_tap_from_oldest(F&& f) {
  constexpr int block = 8, whole = Width / block * block;
  for (int j0 = 0; j0 < whole; j0 += block) CHELA_UNROLL for (int j = block - 1; j >= 0; --j) f(j0 + j);
  CHELA_UNROLL for (int j = Width - whole - 1; j >= 0; --j) f(whole + j);
}

/// out[t] = activation(bias + sum_j taps[j] in[t - j]) for `count` tokens and on to a whole inner loop.
template <int Width, Activation A, class T, class S>
void convolve_span(const S* in, const ChannelTaps<Width, S>& taps, S* out, Index count) {
  using namespace Eigen::internal;
  using P = LanePacket<T>;
  constexpr int packets = 4, lanes = packet_lanes<T>;
  for (Index t = 0; t < count; t += span_step<T>) {
    P sums[packets];
    CHELA_UNROLL for (P& sum : sums) sum = pset1<P>(taps.bias);
    for_each_tap_from_oldest<Width>([&](int j) {
      const P weight = pset1<P>(taps.taps[j]);
      CHELA_UNROLL for (int p = 0; p < packets; ++p) sums[p] =
          pmadd(weight, ploadu<P>(in + t + p * lanes - j), sums[p]);
    });
    CHELA_UNROLL for (int p = 0; p < packets; ++p) {
      if constexpr (A == Activation::silu) sums[p] = silu_lanes<T>(sums[p]);
      pstoreu(out + t + p * lanes, sums[p]);
    }
  }
}

/// The Width - 1 inputs before token t of one channel.
template <int Width, class T, class S>
void gather_history(const HistoryRows<T>& inputs, Index t, Index d, S* to) {
  for (Index r = 0; r < Width - 1; ++r) {
    const ChannelRow<const T> row = inputs(t + r - (Width - 1));
    to[r] = static_cast<S>(row.data[d * row.stride]);
  }
}

template <int Width, Activation A, class T, Executor E>
void short_conv_over_tokens(const ShortConvArgs<T>& a, const E& executor) {
  using S = Accumulator<T>;
  constexpr Index run_len = 4096, history = Width - 1;
  const Index channels = a.x.extents[2], groups = ceil_div(channels, span_channels);
  const TokenRuns runs(sequences_of(a), run_len);
  const Tensor<T, 1> zeros(a.initial_state.present() ? 0 : channels);
  Tensor<S, 3> scratch(executor.workers(), 2, span_size<Width, T>);
  const bool streamed = worth_streaming(transposed(a.y, 1, 2));

  executor.for_each(runs.size() * groups, [&](Index task, int worker) {
    S *const in = &scratch(worker, 0, 0), *const out = &scratch(worker, 1, 0);
    const Index first = task % groups * span_channels, last = std::min(channels, first + span_channels);
    runs.for_each_piece(task / groups, [&](const SequencePiece& piece) {
      const Index entry = a.state_slots.present() ? a.state_slots[piece.index] : piece.index;
      const Index steps = a.positions.present() ? a.positions[piece.index] : a.position;
      const HistoryRows<T> inputs{tokens_of(a.x, piece.sequence), state_of(a.initial_state, entry),
                                  oldest_row(steps, history), zeros.data()};
      const TensorView<T, 2> y = tokens_of(a.y, piece.sequence);
      for (Index d = first; d < last; ++d) {
        const ChannelTaps<Width, S> taps(a.taps, a.bias, d);
        gather_history<Width>(inputs, piece.begin, d, in);
        for (Index t = piece.begin; t < piece.end; t += span_len) {
          const Index count = std::min(span_len, piece.end - t);
          gather_span(&inputs.x(t, d), inputs.x.strides[0], count, in + history);
          convolve_span<Width, A, T>(in + history, taps, out, count);
          scatter_span(out, count, &y(t, d), y.strides[0], streamed);
          std::memmove(in, in + count, sizeof(S) * std::size_t(history));
        }
      }
    });
    if (streamed) finish_streams();
  });
}

}  // namespace chela::cpu::detail
