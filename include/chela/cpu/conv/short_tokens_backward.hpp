#pragma once
// Gradients of the short convolution where channels are not neighbours in memory: one channel at a time, packets of tokens.
// The formulas and the order of the walk are those of short_backward.hpp.
#include "chela/cpu/conv/short_tokens.hpp"

namespace chela::cpu::detail {

/// slopes = grad_out, times the activation's derivative at `sums`; zero from `count` on to a whole inner loop.
template <Activation A, class T, class S>
void slope_span(const S* grad_out, const S* sums, S* slopes, Index count) {
  using P = LanePacket<T>;
  constexpr Index lanes = packet_lanes<T>;
  if constexpr (A == Activation::silu)
    for (Index t = 0; t < count; t += lanes)
      store_lanes(slopes + t,
                  Eigen::internal::pmul(load_lanes<P>(grad_out + t), silu_slope_lanes(load_lanes<P>(sums + t))));
  else
    std::copy_n(grad_out, count, slopes);
  std::fill(slopes + count, slopes + round_up(count, span_step<T>), S(0));
}

/// grad[t] = sum_j taps[j] slopes[t + j].
template <int Width, class T, class S>
void input_gradient_span(const S* slopes, const ChannelTaps<Width, S>& taps, S* grad, Index count) {
  using namespace Eigen::internal;
  using P = LanePacket<T>;
  constexpr int packets = 4, lanes = packet_lanes<T>;
  for (Index t = 0; t < count; t += span_step<T>) {
    P sums[packets];
    CHELA_UNROLL for (P& sum : sums) sum = pset1<P>(S(0));
    for_each_tap_from_oldest<Width>([&](int j) {
      const P weight = pset1<P>(taps.taps[j]);
      CHELA_UNROLL for (int p = 0; p < packets; ++p) sums[p] =
          pmadd(weight, ploadu<P>(slopes + t + p * lanes + j), sums[p]);
    });
    CHELA_UNROLL for (int p = 0; p < packets; ++p) pstoreu(grad + t + p * lanes, sums[p]);
  }
}

template <class P>
LaneScalar<P> sum_of_lanes(const P& value) {
  LaneScalar<P> lanes[lane_count<P>], sum = 0;
  Eigen::internal::pstoreu(lanes, value);
  for (LaneScalar<P> lane : lanes) sum += lane;
  return sum;
}

/// Adds sum_t slopes[t] in[t - j] to grads[j * stride], and the sum of slopes to the bias after them.
template <int Width, class T, class S>
void tap_gradient_span(const S* in, const S* slopes, Index count, S* grads, Index stride) {
  using namespace Eigen::internal;
  using P = LanePacket<T>;
  constexpr int block = 8, lanes = packet_lanes<T>;
  const auto add = [&]<int Count>(std::integral_constant<int, Count>, int j0) {
    P sums[Count];
    CHELA_UNROLL for (P& sum : sums) sum = pset1<P>(S(0));
    for (Index t = 0; t < count; t += lanes) {
      const P slope = ploadu<P>(slopes + t);
      CHELA_UNROLL for (int j = 0; j < Count; ++j) sums[j] = pmadd(slope, ploadu<P>(in + t - j0 - j), sums[j]);
    }
    CHELA_UNROLL for (int j = 0; j < Count; ++j) grads[(j0 + j) * stride] += sum_of_lanes(sums[j]);
  };
  for (int j0 = 0; j0 + block <= Width; j0 += block) add(std::integral_constant<int, block>{}, j0);
  if constexpr (Width % block > 0) add(std::integral_constant<int, Width % block>{}, Width - Width % block);
  P bias = pset1<P>(S(0));
  for (Index t = 0; t < count; t += lanes) bias = padd(bias, ploadu<P>(slopes + t));
  grads[Width * stride] += sum_of_lanes(bias);
}

/// One channel of one piece.
template <int Width, Activation A, class T>
class TokenGradients {
  using S = Accumulator<T>;
  static constexpr Index history = Width - 1;

 public:
  /// Elements of scratch.
  static constexpr Index scratch_size = 4 * span_size<Width, T>;

  TokenGradients(const ShortConvBackwardArgs<T>& a, const SequencePiece& piece, const T* zeros, bool streamed,
                 S* scratch)
      : args_(a),
        piece_(piece),
        inputs_{tokens_of(a.x, piece.sequence), state_of(a.initial_state, piece.index), 0, zeros},
        grad_y_(tokens_of(a.grad_y, piece.sequence)),
        streamed_(streamed),
        in_(scratch),
        slopes_(scratch + span_size<Width, T>),
        grad_out_(scratch + 2 * span_size<Width, T>),
        sums_(scratch + 3 * span_size<Width, T>) {}

  void operator()(Index d, S* grads, Index stride) {
    const ChannelTaps<Width, S> taps(args_.taps, args_.bias, d);
    gather_history<Width>(inputs_, piece_.begin, d, in_);
    std::fill_n(slopes_, history, S(0));
    for (Index t = piece_.begin; t < piece_.end; t += span_len) {
      const Index count = std::min(span_len, piece_.end - t);
      find_slopes(taps, t, d, count, count);
      tap_gradient_span<Width, T>(in_ + history, slopes_ + history, count, grads, stride);
      write_gradients(taps, t, d, count);
    }
    if constexpr (history > 0) {
      find_slopes(taps, piece_.end, d, std::min(history, piece_.sequence.count - piece_.end), history);
      write_gradients(taps, piece_.end, d, history);
    }
  }

 private:
  /// Slopes of the tokens from t on, of which `known` are in the sequence.
  void find_slopes(const ChannelTaps<Width, S>& taps, Index t, Index d, Index known, Index count) {
    if (known > 0) {
      gather_span(&inputs_.x(t, d), inputs_.x.strides[0], known, in_ + history);
      gather_span(&grad_y_(t, d), grad_y_.strides[0], known, grad_out_);
      if constexpr (A == Activation::silu) convolve_span<Width, Activation::none, T>(in_ + history, taps, sums_, known);
    }
    slope_span<A, T>(grad_out_, sums_, slopes_ + history, known);
    std::fill(slopes_ + history + known, slopes_ + history + count, S(0));
  }

  /// Gradients of the `count` inputs from t - history on, and the spans moved on.
  void write_gradients(const ChannelTaps<Width, S>& taps, Index t, Index d, Index count) {
    input_gradient_span<Width, T>(slopes_, taps, sums_, count);
    const Index begin = t - history, tokens = piece_.sequence.count;
    if (args_.grad_final_state.present())
      for (Index u = std::max(begin, tokens - history); u < begin + count; ++u)
        sums_[u - begin] += static_cast<S>(args_.grad_final_state(piece_.index, u - (tokens - history), d));
    if (args_.grad_initial_state.present() && piece_.begin == 0)
      for (Index u = begin; u < std::min<Index>(begin + count, 0); ++u)
        args_.grad_initial_state(piece_.index, u + history, d) = static_cast<T>(sums_[u - begin]);
    const Index skipped = std::clamp<Index>(piece_.begin - begin, 0, count);
    if (args_.grad_x.present() && skipped < count) {
      const TensorView<T, 2> grad_x = tokens_of(args_.grad_x, piece_.sequence);
      scatter_span(sums_ + skipped, count - skipped, &grad_x(begin + skipped, d), grad_x.strides[0], streamed_);
    }
    std::memmove(in_, in_ + count, sizeof(S) * std::size_t(history));
    std::memmove(slopes_, slopes_ + count, sizeof(S) * std::size_t(history));
  }

  const ShortConvBackwardArgs<T>& args_;
  const SequencePiece& piece_;
  HistoryRows<T> inputs_;
  TensorView<const T, 2> grad_y_;
  bool streamed_;
  S *in_, *slopes_, *grad_out_, *sums_;  // sums: outputs before the activation, then gradients of inputs
};

}  // namespace chela::cpu::detail
