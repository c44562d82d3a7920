#pragma once
// Short depthwise convolution on the CPU: vectorised across channels, so every view wants a channel stride of 1; others
// are served one channel at a time. Each output is one sum in one order, whatever the workers, the tiles or the pieces
// of a call.
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_backward.hpp"
#include "chela/cpu/conv/short_tiles.hpp"

namespace chela::cpu {

namespace detail {

/// The last width - 1 inputs of each sequence; in place this moves older rows forward.
template <Element T>
void write_final_state(const ShortConvArgs<T>& a) {
  const Index kept = a.final_state.extents[1], tokens = a.x.extents[1];
  for (Index b = 0; b < a.final_state.extents[0]; ++b)
    for (Index s = 0; s < kept; ++s)
      for (Index d = 0; d < a.final_state.extents[2]; ++d) {
        const Index t = tokens + s - kept;
        a.final_state(b, s, d) = t >= 0                      ? a.x(b, t, d)
                                 : a.initial_state.present() ? a.initial_state(b, kept + t, d)
                                                             : T(0);
      }
}

/// One token: the output, and every row of the state takes the next one's place. `in` is the state's rows, then x.
template <int Width, Activation A, class P, class T, class S>
void step_channels(const ChannelRow<const T>* in, const TapRows<S>& taps, const ChannelRow<T>* state,
                   const ChannelRow<T>& out, Index begin, Index end) {
  for (Index d = begin; d < end; d += lane_count<P>) {
    P sum[1] = {load_lanes<P>(taps.bias() + d)};
    add_convolution<Width, 1>(sum, in, taps.row(0), taps.stride(), d);
    if constexpr (A == Activation::silu) sum[0] = silu_lanes(sum[0]);
    for (int r = 0; r < Width - 1; ++r)
      store_lanes(state[r].template at<P>(d), load_lanes<P>(in[r + 1].template at<P>(d)));
    store_lanes(out.template at<P>(d), sum[0]);
  }
}

}  // namespace detail

/// y = activation(bias + taps * x), see chela/conv/short.hpp. Scratch: the taps once more, unless their channel stride
/// is 1.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv(const ShortConvArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  constexpr int tile = detail::short_conv_tile<Width>;
  constexpr Index run_len = 256, block_len = detail::short_conv_block<Width>;
  const Index batch = args.x.extents[0], tokens = args.x.extents[1], channels = args.x.extents[2];
  const Index runs = ceil_div(tokens, run_len), blocks = ceil_div(channels, block_len);

  const detail::TapRows<Accumulator<T>> taps(args.taps, args.bias);
  const Tensor<T, 1> zeros(args.initial_state.present() ? 0 : channels);
  const bool contiguous = unit_last_stride(args.x) && unit_last_stride(args.y) &&
                          (!args.initial_state.present() || unit_last_stride(args.initial_state));

  executor.for_each(batch * runs * blocks, [&](Index task, int) {
    const Index b = task / (runs * blocks), run = task / blocks % runs, block = task % blocks;
    const detail::HistoryRows<T> inputs{
        slice(args.x, b), args.initial_state.present() ? slice(args.initial_state, b) : TensorView<const T, 2>{},
        zeros.data()};
    const Index end = std::min(tokens, (run + 1) * run_len);
    const Index first = block * block_len, last = std::min(channels, first + block_len);
    detail::ChannelRow<const T> in[tile + Width - 1];
    detail::ChannelRow<T> out[tile];
    for (Index t = run * run_len; t < end;) {
      const int count = t + tile <= end ? tile : 1;
      for (int r = 0; r < count + Width - 1; ++r) in[r] = inputs(t + r - (Width - 1));
      for (int i = 0; i < count; ++i)
        out[i] = {args.y.data + b * args.y.strides[0] + (t + i) * args.y.strides[1], args.y.strides[2]};
      detail::for_each_packet_run<T>(first, last, contiguous, [&](auto lanes, Index from, Index to) {
        using P = typename decltype(lanes)::type;
        if (count == tile)
          detail::convolve_tile<Width, A, tile, P>(in, taps, out, from, to);
        else
          detail::convolve_tile<Width, A, 1, P>(in, taps, out, from, to);
      });
      t += count;
    }
  });
  if (args.final_state.present()) detail::write_final_state(args);
  return {};
}

/// One token per sequence; the state is shifted in place.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv_step(const ShortConvStepArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  const Index channels = args.x.extents[1];
  const detail::TapRows<Accumulator<T>> taps(args.taps, args.bias);
  const bool contiguous =
      unit_last_stride(args.x) && unit_last_stride(args.y) && (Width == 1 || unit_last_stride(args.state));

  executor.for_each(args.x.extents[0], [&](Index b, int) {
    detail::ChannelRow<T> state[Width];  // one more than there are, since an array cannot be empty
    detail::ChannelRow<const T> in[Width];
    for (int r = 0; r < Width - 1; ++r) {
      state[r] = {args.state.data + b * args.state.strides[0] + r * args.state.strides[1], args.state.strides[2]};
      in[r] = {state[r].data, state[r].stride};
    }
    in[Width - 1] = {args.x.data + b * args.x.strides[0], args.x.strides[1]};
    const detail::ChannelRow<T> out{args.y.data + b * args.y.strides[0], args.y.strides[1]};
    detail::for_each_packet_run<T>(0, channels, contiguous, [&](auto lanes, Index from, Index to) {
      detail::step_channels<Width, A, typename decltype(lanes)::type>(in, taps, state, out, from, to);
    });
  });
  return {};
}

}  // namespace chela::cpu
