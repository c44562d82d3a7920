#pragma once
// Gradients of the short convolution where channels are neighbours in memory: runs of tokens by blocks of channels, a tile
// of tokens at a time. The formulas and the order of the walk are those of short_backward.hpp.
#include "chela/cpu/conv/short_tiles.hpp"

namespace chela::cpu::detail {

/// Slopes of `Tokens` tokens from their output gradients and inputs.
template <int Width, Activation A, int Tokens, class T, class X, class S, class Access>
void slope_tile(const ChannelRow<const X>* in, const ChannelRow<const T>* grad_out, const TapRows<S>& taps,
                const ChannelRow<S>* slopes, Index begin, Index end, const Access& access) {
  using P = LanePacket<T>;
  for (Index d = begin; d < end; d += packet_lanes<T>) {
    P sums[Tokens];
    if constexpr (A == Activation::silu) convolve<Width>(sums, in, taps, d, access);
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) {
      P slope = access.template load<P>(grad_out[t], d);
      if constexpr (A == Activation::silu) slope = Eigen::internal::pmul(slope, silu_slope_lanes(sums[t]));
      access.store(slopes[t], d, slope);
    }
  }
}

/// grad_in[t] = sum_j taps[j] slopes[t + j], plus `extra` where a row is given.
template <int Width, int Tokens, class T, class S, class Access>
void input_gradient_tile(const ChannelRow<S>* slopes, const TapRows<S>& taps, const ChannelRow<const T>* extra,
                         const ChannelRow<T>* grad_in, Index begin, Index end, const Access& access) {
  using P = LanePacket<T>;
  for (Index d = begin; d < end; d += packet_lanes<T>) {
    P sums[Tokens], weights[8], value;
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) sums[t] =
        extra[t].data ? access.template load<P>(extra[t], d) : set_lanes<P>(0);
    // Time mirrored: walking slopes from the last row on, output Tokens - 1 - t meets them as a convolution would.
    for_each_tap<Width, Tokens>(
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) weights[j] =
              in_register(access.template load<P>(taps.row(j0 + j), d));
        },
        [&](int r) { value = in_register(access.template load<P>(slopes[Tokens + Width - 2 - r], d)); },
        [&](int t, int j) {
          P& sum = sums[Tokens - 1 - t];
          sum = Eigen::internal::pmadd(weights[j], value, sum);
        },
        [](int, auto) {});
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) access.store(grad_in[t], d, sums[t]);
  }
}

/// Adds the tile's share to grad_taps [width, channel] and to grad_bias, the row after them.
template <int Width, int Tokens, class T, class X, class S, class Access>
void tap_gradient_tile(const ChannelRow<const X>* in, const ChannelRow<S>* slopes, const ChannelRow<S>* sums,
                       Index begin, Index end, const Access& access) {
  using P = LanePacket<T>;
  for (Index d = begin; d < end; d += packet_lanes<T>) {
    P da[Tokens], grads[8], value;
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) da[t] = access.template load<P>(slopes[t], d);
    P bias = da[0];
    CHELA_UNROLL for (int t = 1; t < Tokens; ++t) bias = Eigen::internal::padd(bias, da[t]);
    access.store(sums[Width], d, P(Eigen::internal::padd(access.template load<P>(sums[Width], d), bias)));
    for_each_tap<Width, Tokens>(
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) grads[j] =
              access.template load<P>(sums[j0 + j], d);
        },
        [&](int r) { value = access.template load<P>(in[r], d); },
        [&](int t, int j) { grads[j] = Eigen::internal::pmadd(da[t], value, grads[j]); },
        [&](int j0, auto count) {
          CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) access.store(sums[j0 + j], d, grads[j]);
        });
  }
}

/// All three in one go: `slopes` begins with the Width - 1 tokens before the tile, whose gradients and the next few, as far
/// as the tile's slopes complete them, are written to `grad_in`.
template <int Width, Activation A, int Tokens, int Packets, class T, class S, class Access>
void gradient_tile_at_once(const ChannelRow<const T>* in, const ChannelRow<const T>* grad_out, const TapRows<S>& taps,
                           const ChannelRow<S>* slopes, const ChannelRow<T>* grad_in, const ChannelRow<S>* sums,
                           Index begin, Index end, const Access& access) {
  using namespace Eigen::internal;
  using P = LanePacket<T>;
  constexpr AdjacentChannels our_rows;
  for (Index first = begin; first < end; first += Packets * packet_lanes<T>) {
    P grads[Packets][Tokens];
    CHELA_UNROLL for (int p = 0; p < Packets; ++p) {
      const Index d = first + p * packet_lanes<T>;
      P weights[Width], tap_sums[Width], values[Tokens + Width - 1], da[Tokens + Width - 1];
      CHELA_UNROLL for (int j = 0; j < Width; ++j) {
        weights[j] = in_register(access.template load<P>(taps.row(j), d));
        tap_sums[j] = our_rows.load<P>(sums[j], d);
      }
      P bias_sum = our_rows.load<P>(sums[Width], d);
      const P bias = access.template load<P>(taps.bias(), d);
      CHELA_UNROLL for (int r = 0; r < Width - 1; ++r) {
        values[r] = in_register(access.template load<P>(in[r], d));
        da[r] = in_register(our_rows.load<P>(slopes[r], d));
      }
      CHELA_UNROLL for (int t = 0; t < Tokens; ++t) {
        values[t + Width - 1] = in_register(access.template load<P>(in[t + Width - 1], d));
        P slope = access.template load<P>(grad_out[t], d);
        if constexpr (A == Activation::silu) {
          P sum = bias;
          CHELA_UNROLL for (int j = Width - 1; j >= 0; --j) sum = pmadd(weights[j], values[t + Width - 1 - j], sum);
          slope = pmul(slope, silu_slope_lanes(sum));
        }
        da[t + Width - 1] = slope;
        bias_sum = padd(bias_sum, slope);
        CHELA_UNROLL for (int j = 0; j < Width; ++j) tap_sums[j] = pmadd(slope, values[t + Width - 1 - j], tap_sums[j]);
        grads[p][t] = set_lanes<P>(0);
        CHELA_UNROLL for (int j = Width - 1; j >= 0; --j) grads[p][t] = pmadd(weights[j], da[t + j], grads[p][t]);
        if (t >= Tokens - (Width - 1)) our_rows.store(slopes[t + Width - 1], d, slope);
      }
      CHELA_UNROLL for (int j = 0; j < Width; ++j) our_rows.store(sums[j], d, tap_sums[j]);
      our_rows.store(sums[Width], d, bias_sum);
    }
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) CHELA_UNROLL for (int p = 0; p < Packets; ++p)
        access.store(grad_in[t], first + p * packet_lanes<T>, grads[p][t]);
  }
}

/// One block of channels of a backward pass.
template <int Width, Activation A, class T>
class ChannelGradients {
  using S = Accumulator<T>;
  static constexpr bool copies = short_conv_copies_rows<Width>;
  using Input = std::conditional_t<copies, S, T>;
  static constexpr int tile = short_conv_tile, history = Width - 1, window = tile + history;

 public:
  /// Elements of scratch for blocks of up to this many channels: slopes, inputs where they are copied, sums over tokens.
  static constexpr Index scratch_size(Index channels) {
    return ((copies ? 2 : 1) * window) * RowRing<S>::stride_of(channels);
  }

  /// `sums` is [width + 1, channel] with rows of whole packets; `unread`, [channel], takes what nobody asked for.
  ChannelGradients(const ShortConvBackwardArgs<T>& a, const TapRows<S>& taps, const T* zeros, T* unread, S* scratch,
                   S* sums, Index sum_stride, Index first, Index count, bool streamed)
      : x_(run(a.x, 2, first, count)),
        grad_y_(run(a.grad_y, 2, first, count)),
        state_(block(a.initial_state, first, count)),
        grad_final_(block(a.grad_final_state, first, count)),
        grad_x_(block(a.grad_x, first, count)),
        grad_initial_(block(a.grad_initial_state, first, count)),
        taps_(taps.from(first)),
        zeros_(zeros),
        unread_(unread),
        slopes_{scratch, window, RowRing<S>::stride_of(count)},
        inputs_{scratch + window * slopes_.stride, window, slopes_.stride},
        channels_(count),
        streamed_(streamed) {
    for (int j = 0; j <= Width; ++j) sums_[j] = {sums + first + j * sum_stride, 1};
  }

  void operator()(const SequencePiece& piece) const {
    const Walk walk{piece,
                    {tokens_of(x_, piece.sequence), state_of(state_, piece.index), 0, zeros_},
                    tokens_of(grad_y_, piece.sequence)};
    for (Index t = piece.begin - history; t < piece.begin; ++t) {
      std::fill_n(slopes_(t).data, slopes_.stride, S(0));
      if constexpr (copies) inputs_.fill(inputs_(t), walk.inputs(t), channels_);
    }
    for_each_tile(piece.begin, piece.end, [&](Index t, auto tokens) { add_tile<decltype(tokens)::value>(walk, t); });
    // Gradients of the last inputs wait for slopes past the piece: those of the next one, then zeros.
    const Index next = std::min(piece.sequence.count, piece.end + history);
    for_each_tile(piece.end, next, [&](Index t, auto tokens) {
      find_slopes<decltype(tokens)::value>(walk, t);
      write_gradients<decltype(tokens)::value>(walk, t);
    });
    for (Index t = next; t < piece.end + history; ++t) {
      std::fill_n(slopes_(t).data, channels_, S(0));
      write_gradients<1>(walk, t);
    }
  }

 private:
  struct Walk {
    const SequencePiece& piece;
    HistoryRows<T> inputs;
    TensorView<const T, 2> grad_y;
  };

  template <class V>
  static V block(V view, Index first, Index count) {
    return view.present() ? chela::run(view, 2, first, count) : view;
  }

  /// Calls f(t, tokens) for whole tiles, then for single tokens.
  template <class F>
  static void for_each_tile(Index begin, Index end, F&& f) {
    for (; begin + tile <= end; begin += tile) f(begin, std::integral_constant<int, tile>{});
    for (; begin < end; ++begin) f(begin, std::integral_constant<int, 1>{});
  }

  /// Rows of the Width - 1 inputs before t and of `Tokens` from t on.
  template <int Tokens>
  void find_inputs(const Walk& walk, Index t, ChannelRow<const Input>* in) const {
    if constexpr (copies) {
      for (int i = 0; i < Tokens; ++i) inputs_.fill(inputs_(t + i), walk.inputs(t + i), channels_);
      inputs_.find(t - history, Tokens + history, in);
    } else {
      for (int r = 0; r < Tokens + history; ++r) in[r] = walk.inputs(t + r - history);
    }
  }

  /// Where the gradient of input u goes, and whether that is a row of grad_x.
  ChannelRow<T> gradient_row(const Walk& walk, Index u, bool& in_grad_x) const {
    in_grad_x = u >= walk.piece.begin && grad_x_.present();
    if (in_grad_x) return channel_row(tokens_of(grad_x_, walk.piece.sequence), u);
    if (u < 0 && walk.piece.begin == 0 && grad_initial_.present())
      return channel_row(state_of(grad_initial_, walk.piece.index), u + history);
    return {unread_, 1};
  }

  /// Slopes, sums and gradients of the tokens of the piece itself.
  template <int Tokens>
  void add_tile(const Walk& walk, Index t) const {
    if constexpr (copies) {
      ChannelRow<const Input> in[window];
      ChannelRow<S> slopes[Tokens];
      find_slopes<Tokens>(walk, t, in);
      slopes_.find(t, Tokens, slopes);
      for_each_packet_run<T>(0, channels_, true, [&](auto access, auto, Index from, Index to) {
        tap_gradient_tile<Width, Tokens, T>(in, slopes, sums_, from, to, access);
      });
      write_gradients<Tokens>(walk, t);
    } else {
      ChannelRow<const T> in[window], grad_out[Tokens];
      ChannelRow<S> slopes[window];
      ChannelRow<T> grad_in[Tokens];
      find_inputs<Tokens>(walk, t, in);
      bool streamed = streamed_ && Tokens == tile;
      for (int i = 0; i < Tokens; ++i) {
        bool in_grad_x;
        grad_out[i] = channel_row(walk.grad_y, t + i);
        grad_in[i] = gradient_row(walk, t + i - history, in_grad_x);
        streamed = streamed && in_grad_x;
      }
      slopes_.find(t - history, Tokens + history, slopes);
      const auto at_once = [&](auto access, auto packets, Index from, Index to) {
        gradient_tile_at_once<Width, A, Tokens, decltype(packets)::value>(in, grad_out, taps_, slopes, grad_in, sums_,
                                                                          from, to, access);
      };
      if constexpr (Tokens == tile)
        if (streamed) return for_each_line_run<T>(0, channels_, at_once);
      for_each_packet_run<T>(0, channels_, true, at_once);
    }
  }

  template <int Tokens>
  void find_slopes(const Walk& walk, Index t, ChannelRow<const Input>* in) const {
    ChannelRow<const T> grad_out[Tokens];
    ChannelRow<S> slopes[Tokens];
    find_inputs<Tokens>(walk, t, in);
    slopes_.find(t, Tokens, slopes);
    for (int i = 0; i < Tokens; ++i) grad_out[i] = channel_row(walk.grad_y, t + i);
    for_each_packet_run<T>(0, channels_, true, [&](auto access, auto, Index from, Index to) {
      slope_tile<Width, A, Tokens>(in, grad_out, taps_, slopes, from, to, access);
    });
  }
  template <int Tokens>
  void find_slopes(const Walk& walk, Index t) const {
    ChannelRow<const Input> in[window];
    find_slopes<Tokens>(walk, t, in);
  }

  /// Gradients of the inputs that the slopes of the tokens from t on complete.
  template <int Tokens>
  void write_gradients(const Walk& walk, Index t) const {
    ChannelRow<S> slopes[window];
    ChannelRow<const T> extra[Tokens];
    ChannelRow<T> grad_in[Tokens];
    slopes_.find(t - history, Tokens + history, slopes);
    for (int i = 0; i < Tokens; ++i) {
      const Index u = t + i - history, s = u - (walk.piece.sequence.count - history);
      bool in_grad_x;
      grad_in[i] = gradient_row(walk, u, in_grad_x);
      if (grad_final_.present() && s >= 0) extra[i] = channel_row(state_of(grad_final_, walk.piece.index), s);
    }
    for_each_packet_run<T>(0, channels_, true, [&](auto access, auto, Index from, Index to) {
      input_gradient_tile<Width, Tokens>(slopes, taps_, extra, grad_in, from, to, access);
    });
  }

  TensorView<const T, 3> x_, grad_y_, state_, grad_final_;
  TensorView<T, 3> grad_x_, grad_initial_;
  TapRows<S> taps_;
  const T* zeros_;
  T* unread_;
  RowRing<S> slopes_, inputs_;
  ChannelRow<S> sums_[Width + 1];
  Index channels_;
  bool streamed_;
};

}  // namespace chela::cpu::detail
