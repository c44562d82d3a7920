#pragma once
// The forward pass where channels are neighbours in memory: runs of tokens by blocks of channels, each a task.
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_tiles.hpp"

namespace chela::cpu::detail {

/// One block of channels of a pass.
template <int Width, Activation A, class T>
class ShortConvBlock {
  using S = Accumulator<T>;
  using Input = std::conditional_t<short_conv_copies_rows<Width>, S, T>;
  static constexpr int tile = short_conv_tile, history = Width - 1;
  // Measured: a gain of 10 % for 16 bits, a loss of 5 % for 32, whose rows are long enough for the hardware.
  static constexpr bool fetches_ahead = sizeof(T) == 2 && !short_conv_copies_rows<Width>;

 public:
  /// `ring` holds tile + history rows where rows are copied.
  ShortConvBlock(const ShortConvArgs<T>& a, const TapRows<S>& taps, const T* zeros, RowRing<S> ring, Index first,
                 Index count, bool streamed)
      : args_(a),
        x_(run(a.x, 2, first, count)),
        y_(run(a.y, 2, first, count)),
        state_(a.initial_state.present() ? run(a.initial_state, 2, first, count) : a.initial_state),
        taps_(taps.from(first)),
        zeros_(zeros),
        ring_(ring),
        channels_(count),
        streamed_(streamed) {}

  void operator()(const SequencePiece& piece) const {
    const Index entry = args_.state_slots.present() ? args_.state_slots[piece.index] : piece.index;
    const Index steps = args_.positions.present() ? args_.positions[piece.index] : args_.position;
    const HistoryRows<T> inputs{tokens_of(x_, piece.sequence), state_of(state_, entry), oldest_row(steps, history),
                                zeros_};
    const TensorView<T, 2> y = tokens_of(y_, piece.sequence);
    if constexpr (short_conv_copies_rows<Width>)
      for (Index t = piece.begin - history; t < piece.begin; ++t) ring_.fill(ring_(t), inputs(t), channels_);
    for (Index t = piece.begin; t < piece.end;) {
      const int count = t + tile <= piece.end ? tile : 1;
      const bool another = fetches_ahead && t + 2 * tile <= piece.end;
      convolve_tokens(inputs, y, t, count, another ? tile * inputs.x.strides[0] : 0);
      t += count;
    }
  }

 private:
  void convolve_tokens(const HistoryRows<T>& inputs, TensorView<T, 2> y, Index t, int count, Index ahead) const {
    ChannelRow<const Input> in[tile + history];
    ChannelRow<T> out[tile];
    if constexpr (short_conv_copies_rows<Width>) {
      for (int i = 0; i < count; ++i) ring_.fill(ring_(t + i), inputs(t + i), channels_);
      ring_.find(t - history, count + history, in);
    } else {
      for (int r = 0; r < count + history; ++r) in[r] = inputs(t + r - history);
    }
    for (int i = 0; i < count; ++i) out[i] = channel_row(y, t + i);
    const auto whole_tile = [&](auto access, auto packets, Index from, Index to) {
      convolve_tile<Width, A, tile, decltype(packets)::value>(in, taps_, out, ahead, from, to, access);
    };
    const auto single = [&](auto access, auto packets, Index from, Index to) {
      convolve_tile<Width, A, 1, decltype(packets)::value>(in, taps_, out, 0, from, to, access);
    };
    if (count < tile)
      for_each_packet_run<T>(0, channels_, true, single);
    else if (streamed_)
      for_each_line_run<T>(0, channels_, whole_tile);
    else
      for_each_packet_run<T>(0, channels_, true, whole_tile);
  }

  const ShortConvArgs<T>& args_;
  TensorView<const T, 3> x_;
  TensorView<T, 3> y_;
  TensorView<const T, 3> state_;
  TapRows<S> taps_;
  const T* zeros_;
  RowRing<S> ring_;
  Index channels_;
  bool streamed_;
};

template <int Width, Activation A, class T, Executor E>
void short_conv_over_channels(const ShortConvArgs<T>& args, const E& executor) {
  using S = Accumulator<T>;
  constexpr Index run_len = 256, block_len = short_conv_block<Width>, ring_rows = short_conv_tile + Width - 1;
  const Index channels = args.x.extents[2], blocks = ceil_div(channels, block_len);
  const TokenRuns runs(sequences_of(args), run_len);
  const HeldTaps<S> taps(args.taps, args.bias, short_conv_copies_rows<Width>);
  const Tensor<T, 1> zeros(args.initial_state.present() ? 0 : std::min(channels, block_len));
  const Index ring_stride = RowRing<S>::stride_of(std::min(channels, block_len));
  Tensor<S, 3> rings(short_conv_copies_rows<Width> ? executor.workers() : 0, ring_rows, ring_stride);
  const bool streamed = worth_streaming(args.y);

  executor.for_each(runs.size() * blocks, [&](Index task, int worker) {
    const Index first = task % blocks * block_len;
    const ShortConvBlock<Width, A, T> block(args, taps.rows(), zeros.data(),
                                            {&rings(worker, 0, 0), ring_rows, ring_stride}, first,
                                            std::min(block_len, channels - first), streamed);
    runs.for_each_piece(task / blocks, block);
    if (streamed) finish_streams();
  });
}

}  // namespace chela::cpu::detail
