#pragma once
// Gradients of the short convolution. With da = grad_y activation'(a), the sums a recomputed:
//
//   grad_x[t] = sum_j taps[j] da[t+j]        grad_taps[j] = sum_{b,t} da[t] x[t-j]        grad_bias = sum_{b,t} da[t]
//
// Tokens are walked from last to first with the da of the next width - 1 tokens at hand. Sums over batch and tokens are
// taken per segment, a cut that depends on the shape alone, and then over segments in order.
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_tiles.hpp"

namespace chela::cpu {

namespace detail {

/// Batch and token axes cut into runs, and runs gathered into at most 64 segments.
struct ShortConvSegments {
  static constexpr Index run_len = 512, most = 64;
  Index tokens, runs_per_sequence, runs, runs_per_segment, count;

  ShortConvSegments(Index batch, Index token_count)
      : tokens(token_count),
        runs_per_sequence(ceil_div(token_count, run_len)),
        runs(batch * runs_per_sequence),
        runs_per_segment(std::max<Index>(1, ceil_div(runs, most))),
        count(ceil_div(runs, runs_per_segment)) {}
};

/// da of `Tokens` tokens from inputs and output gradients.
template <int Width, Activation A, int Tokens, class P, class T, class S>
void slope_tile(const ChannelRow<const T>* in, const ChannelRow<const T>* grad_out, const TapRows<S>& taps,
                const ChannelRow<S>* slopes, Index begin, Index end) {
  for (Index d = begin; d < end; d += lane_count<P>) {
    P sums[Tokens];
    if constexpr (A == Activation::silu) {
      CHELA_UNROLL for (P& sum : sums) sum = load_lanes<P>(taps.bias() + d);
      add_convolution<Width, Tokens>(sums, in, taps.row(0), taps.stride(), d);
    }
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) {
      P slope = load_lanes<P>(grad_out[t].template at<P>(d));
      if constexpr (A == Activation::silu) slope = Eigen::internal::pmul(slope, silu_slope_lanes(sums[t]));
      store_lanes(slopes[t].data + d, slope);
    }
  }
}

/// grad_x of `Tokens` tokens: sum_j taps[j] slopes[t + j], plus `extra` where a row is given.
template <int Width, int Tokens, class P, class T, class S>
void input_gradient_tile(const ChannelRow<S>* slopes, const TapRows<S>& taps, const ChannelRow<const T>* extra,
                         const ChannelRow<T>* grad_in, Index begin, Index end) {
  for (Index d = begin; d < end; d += lane_count<P>) {
    P sums[Tokens], weights[8], value;
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) sums[t] =
        extra[t].data ? load_lanes<P>(extra[t].template at<P>(d)) : set_lanes<P>(0);
    // Time mirrored: walking slopes from the last row on, output Tokens - 1 - t meets them as a convolution would.
    for_each_tap<Width, Tokens>(
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) weights[j] =
              load_lanes<P>(taps.row(j0 + j) + d);
        },
        [&](int r) { value = load_lanes<P>(slopes[Tokens + Width - 2 - r].data + d); },
        [&](int t, int j) {
          P& sum = sums[Tokens - 1 - t];
          sum = Eigen::internal::pmadd(weights[j], value, sum);
        },
        [](int, auto) {});
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) store_lanes(grad_in[t].template at<P>(d), sums[t]);
  }
}

/// Adds the tile's share to grad_taps [width, channel] and to grad_bias, the row after them.
template <int Width, int Tokens, class P, class T, class S>
void tap_gradient_tile(const ChannelRow<const T>* in, const ChannelRow<S>* slopes, S* sums, Index stride, Index begin,
                       Index end) {
  for (Index d = begin; d < end; d += lane_count<P>) {
    P da[Tokens], grads[8], value;
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) da[t] = load_lanes<P>(slopes[t].data + d);
    P bias = da[0];
    CHELA_UNROLL for (int t = 1; t < Tokens; ++t) bias = Eigen::internal::padd(bias, da[t]);
    S* const bias_sum = sums + Width * stride + d;
    store_lanes(bias_sum, Eigen::internal::padd(load_lanes<P>(bias_sum), bias));
    for_each_tap<Width, Tokens>(
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) grads[j] =
              load_lanes<P>(sums + (j0 + j) * stride + d);
        },
        [&](int r) { value = load_lanes<P>(in[r].template at<P>(d)); },
        [&](int t, int j) { grads[j] = Eigen::internal::pmadd(da[t], value, grads[j]); },
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j)
              store_lanes(sums + (j0 + j) * stride + d, grads[j]);
        });
  }
}

/// One call's backward pass over a block of channels.
template <int Width, Activation A, class T>
class ShortConvBackward {
  using S = Accumulator<T>;
  static constexpr int tile = short_conv_tile<Width>, window = tile + Width - 1;
  static constexpr Index block_len = std::min<Index>(256, short_conv_block<Width>);

 public:
  ShortConvBackward(const ShortConvBackwardArgs<T>& args, int workers)
      : args_(args),
        segments_(args.x.extents[0], args.x.extents[1]),
        channels_(args.x.extents[2]),
        blocks_(ceil_div(channels_, block_len)),
        taps_(args.taps, args.bias),
        zeros_(args.initial_state.present() ? 0 : channels_),
        rings_(workers, window, channels_ + row_padding),
        wants_taps_(args.grad_taps.present() || args.grad_bias.present()),
        contiguous_(unit(args.x) && unit(args.grad_y) && unit(args.initial_state) && unit(args.grad_final_state) &&
                    unit(args.grad_x)) {
    if (wants_taps_) sums_ = Tensor<S, 3>(segments_.count, Width + 1, channels_);
  }

  void run(const Executor auto& executor) {
    executor.for_each(segments_.count * blocks_, [&](Index task, int worker) {
      const Index segment = task / blocks_, block = task % blocks_;
      const Index end = std::min(segments_.runs, (segment + 1) * segments_.runs_per_segment);
      for (Index r = segment * segments_.runs_per_segment; r < end; ++r) walk(r, segment, block, worker);
    });
    if (wants_taps_) executor.for_each(blocks_, [&](Index block, int) { sum_segments(block); });
    if (segments_.runs == 0) grad_initial_state_of_nothing();
  }

 private:
  template <class V>
  static bool unit(const V& view) {
    return !view.present() || unit_last_stride(view);
  }

  template <class V>
  static auto row(const V& view, Index b, Index t) {
    return ChannelRow<typename V::Value>{view.data + b * view.strides[0] + t * view.strides[1], view.strides[2]};
  }

  /// The gradient that reaches input t of sequence b from the final state, or an absent row.
  ChannelRow<const T> final_row(Index b, Index t) const {
    const Index s = t - (segments_.tokens - (Width - 1));
    if (!args_.grad_final_state.present() || s < 0) return {};
    return row(args_.grad_final_state, b, s);
  }

  void walk(Index run, Index segment, Index block, int worker) {
    const Index b = run / segments_.runs_per_sequence, tokens = segments_.tokens;
    const Index begin = run % segments_.runs_per_sequence * ShortConvSegments::run_len;
    const Index end = std::min(tokens, begin + ShortConvSegments::run_len);
    const Index first = block * block_len, last = std::min(channels_, first + block_len);
    const HistoryRows<T> inputs{
        slice(args_.x, b), args_.initial_state.present() ? slice(args_.initial_state, b) : TensorView<const T, 2>{},
        zeros_.data()};
    const auto slope_row = [&](Index t) { return ChannelRow<S>{&rings_(worker, t % window, 0), 1}; };

    ChannelRow<const T> in[window], grad_out[tile], extra[tile];
    ChannelRow<T> grad_in[tile];
    ChannelRow<S> slopes[window];
    const auto find_slopes = [&](Index t, int count) {
      for (int r = 0; r < count + Width - 1; ++r) in[r] = inputs(t + r - (Width - 1));
      for (int i = 0; i < count; ++i) grad_out[i] = row(args_.grad_y, b, t + i), slopes[i] = slope_row(t + i);
      for_each_packet_run<T>(first, last, contiguous_, [&](auto lanes, Index from, Index to) {
        using P = typename decltype(lanes)::type;
        if (count == tile)
          slope_tile<Width, A, tile, P>(in, grad_out, taps_, slopes, from, to);
        else
          slope_tile<Width, A, 1, P>(in, grad_out, taps_, slopes, from, to);
      });
    };

    for (Index t = end; t < end + Width - 1; ++t) {
      if (t < tokens)
        find_slopes(t, 1);
      else
        std::fill_n(slope_row(t).data + first, last - first, S(0));
    }
    for (Index left = end - begin; left > 0;) {
      const int count = left % tile == 0 ? tile : 1;
      left -= count;
      const Index t = begin + left;
      find_slopes(t, count);
      for (int r = count; r < count + Width - 1; ++r) slopes[r] = slope_row(t + r);
      if (args_.grad_x.present())
        for (int i = 0; i < count; ++i) extra[i] = final_row(b, t + i), grad_in[i] = row(args_.grad_x, b, t + i);
      for_each_packet_run<T>(first, last, contiguous_, [&](auto lanes, Index from, Index to) {
        using P = typename decltype(lanes)::type;
        if (count == tile)
          add_gradients<tile, P>(in, slopes, extra, grad_in, segment, from, to);
        else
          add_gradients<1, P>(in, slopes, extra, grad_in, segment, from, to);
      });
    }
    if (begin == 0 && args_.grad_initial_state.present())
      write_grad_initial_state(b, first, last, [&](Index t, Index d) { return slope_row(t).data[d]; });
  }

  template <int Tokens, class P>
  void add_gradients(const ChannelRow<const T>* in, const ChannelRow<S>* slopes, const ChannelRow<const T>* extra,
                     const ChannelRow<T>* grad_in, Index segment, Index from, Index to) {
    if (args_.grad_x.present()) input_gradient_tile<Width, Tokens, P>(slopes, taps_, extra, grad_in, from, to);
    if (wants_taps_) tap_gradient_tile<Width, Tokens, P>(in, slopes, &sums_(segment, 0, 0), channels_, from, to);
  }

  /// Row s is input s - (Width - 1); da of tokens past the end are in the ring as zeros.
  template <class Slope>
  void write_grad_initial_state(Index b, Index first, Index last, Slope&& slope) {
    for (Index s = 0; s < Width - 1; ++s) {
      const Index t = s - (Width - 1);
      const ChannelRow<const T> extra = final_row(b, t);
      for (Index d = first; d < last; ++d) {
        S sum = extra.data ? static_cast<S>(*extra.template at<S>(d)) : S(0);
        for (Index j = -t; j < Width; ++j) sum += taps_.row(j)[d] * slope(t + j, d);
        args_.grad_initial_state(b, s, d) = static_cast<T>(sum);
      }
    }
  }

  /// Without tokens the final state is the initial one.
  void grad_initial_state_of_nothing() {
    if (!args_.grad_initial_state.present()) return;
    for (Index b = 0; b < args_.x.extents[0]; ++b)
      write_grad_initial_state(b, 0, channels_, [](Index, Index) { return S(0); });
  }

  void sum_segments(Index block) {
    const Index first = block * block_len, last = std::min(channels_, first + block_len);
    for (Index j = 0; j <= Width; ++j)
      for (Index d = first; d < last; ++d) {
        S sum = 0;
        for (Index segment = 0; segment < segments_.count; ++segment) sum += sums_(segment, j, d);
        if (j < Width && args_.grad_taps.present()) args_.grad_taps(d, j) = sum;
        if (j == Width && args_.grad_bias.present()) args_.grad_bias(d) = sum;
      }
  }

  const ShortConvBackwardArgs<T>& args_;
  ShortConvSegments segments_;
  Index channels_, blocks_;
  TapRows<S> taps_;
  Tensor<T, 1> zeros_;
  Tensor<S, 3> rings_;  // [worker, window, channel]: da of token t in row t % window
  Tensor<S, 3> sums_;   // [segment, width + 1, channel]
  bool wants_taps_, contiguous_;
};

}  // namespace detail

/// Gradients of `short_conv`, see chela/conv/short.hpp. Scratch: up to 64 copies of the taps, and the da of a few
/// tokens per worker.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv_backward(const ShortConvBackwardArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  detail::ShortConvBackward<Width, A, T>(args, executor.workers()).run(executor);
  return {};
}

}  // namespace chela::cpu
