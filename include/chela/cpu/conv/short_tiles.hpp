#pragma once
// The inner loops of the short convolution: a few tokens by a run of channels, one packet of channels at a time.
#include <algorithm>

#include "chela/conv/short.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/conv/lanes.hpp"

namespace chela::cpu::detail {

/// Tokens computed together, so that each input and each tap is loaded once for several outputs. Wide kernels load so
/// many rows that more outputs per row pay.
template <int Width>
inline constexpr int short_conv_tile = Width > 8 ? 8 : 4;

/// Channels of one task: whole pages of narrow kernels, for the prefetchers; few enough of wide ones that their rows
/// stay near.
template <int Width>
inline constexpr Index short_conv_block = Width > 8 ? 128 : 1024;

/// Elements added to rows of our own, so that they stay out of each other's cache sets when the channels are a power of
/// two.
inline constexpr Index row_padding = 16;

/// The channels of one token.
template <class T>
struct ChannelRow {
  T* data = nullptr;
  Index stride = 1;

  /// Where channel d is. Packets hold neighbours, so their rows have stride 1.
  template <class P>
  CHELA_ALWAYS_INLINE T* at(Index d) const {
    return lane_count<P> > 1 ? data + d : data + d * stride;
  }
};

/// One sequence's inputs with its state in front: token -1 is the state's last row. Zeros where the state is absent.
template <class T>
struct HistoryRows {
  TensorView<const T, 2> x;      ///< [token, channel]
  TensorView<const T, 2> state;  ///< [width - 1, channel]
  const T* zeros;                ///< [channel]

  ChannelRow<const T> operator()(Index t) const {
    if (t >= 0) return {x.data + t * x.strides[0], x.strides[1]};
    if (!state.present()) return {zeros, 1};
    return {state.data + (state.extents[0] + t) * state.strides[0], state.strides[1]};
  }
};

/// Taps as rows of channels. Borrowed when they are stored like that, else copied.
template <class S>
class TapRows {
 public:
  TapRows(TensorView<const S, 2> taps, TensorView<const S, 1> bias) {
    const Index channels = taps.extents[0], width = taps.extents[1];
    const bool borrow_taps = taps.strides[0] == 1, borrow_bias = bias.present() && bias.strides[0] == 1;
    if (!borrow_taps || !borrow_bias) copy_ = Tensor<S, 2>(borrow_taps ? 1 : width + 1, channels + row_padding);
    bias_ = borrow_bias ? bias.data : copy_.data();
    taps_ = borrow_taps ? taps.data : copy_.data() + channels + row_padding;
    stride_ = borrow_taps ? taps.strides[1] : channels + row_padding;
    if (bias.present() && !borrow_bias)
      for (Index d = 0; d < channels; ++d) copy_(0, d) = bias(d);
    if (!borrow_taps)
      for (Index d = 0; d < channels; ++d)
        for (Index j = 0; j < width; ++j) copy_(j + 1, d) = taps(d, j);
  }

  const S* row(Index j) const { return taps_ + j * stride_; }
  const S* bias() const { return bias_; }
  Index stride() const { return stride_; }

 private:
  Tensor<S, 2> copy_;  // bias, then taps
  const S* taps_;
  const S* bias_;
  Index stride_;
};

/// Visits every pair (token, tap) of a tile, taps in blocks of eight so that they and the outputs stay in registers:
/// begin(j0, count), then row(r) for each input row the block meets, pair(token, j - j0) for each use of it, end(j0,
/// count). Row r holds token r - (Width - 1) of the tile. The order of one output's terms does not depend on `Tokens`.
template <int Width, int Tokens, class Begin, class Row, class Pair, class End>
CHELA_ALWAYS_INLINE void for_each_tap(Begin&& begin, Row&& row, Pair&& pair, End&& end) {
  constexpr int block = 8, whole = Width / block, rest = Width % block;
  const auto visit = [&]<int Count>(std::integral_constant<int, Count>, int j0) {
    begin(j0, std::integral_constant<int, Count>{});
    CHELA_UNROLL for (int i = 0; i < Tokens + Count - 1; ++i) {
      row(Width - j0 - Count + i);
      CHELA_UNROLL for (int t = 0; t < Tokens; ++t) {
        const int j = Count - 1 + t - i;
        if (j >= 0 && j < Count) pair(t, j);
      }
    }
    end(j0, std::integral_constant<int, Count>{});
  };
  for (int b = 0; b < whole; ++b) visit(std::integral_constant<int, block>{}, b * block);
  if constexpr (rest > 0) visit(std::integral_constant<int, rest>{}, whole * block);
}

/// sums[t] += sum_j taps[j, d] in[Width - 1 + t - j, d].
template <int Width, int Tokens, class P, class T, class S>
CHELA_ALWAYS_INLINE void add_convolution(P (&sums)[Tokens], const ChannelRow<const T>* in, const S* taps, Index stride,
                                         Index d) {
  P weights[8], value;
  for_each_tap<Width, Tokens>(
      [&](int j0, auto count) {
        CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) weights[j] =
            in_register(load_lanes<P>(taps + (j0 + j) * stride + d));
      },
      [&](int r) { value = in_register(load_lanes<P>(in[r].template at<P>(d))); },
      [&](int t, int j) { sums[t] = Eigen::internal::pmadd(weights[j], value, sums[t]); }, [](int, auto) {});
}

template <int Width, Activation A, int Tokens, class P, class T, class S>
void convolve_tile(const ChannelRow<const T>* in, const TapRows<S>& taps, const ChannelRow<T>* out, Index begin,
                   Index end) {
  const S *weights = taps.row(0), *bias = taps.bias();
  const Index stride = taps.stride();
  for (Index d = begin; d < end; d += lane_count<P>) {
    P sums[Tokens];
    CHELA_UNROLL for (P& sum : sums) sum = load_lanes<P>(bias + d);
    add_convolution<Width, Tokens>(sums, in, weights, stride, d);
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) {
      if constexpr (A == Activation::silu) sums[t] = silu_lanes(sums[t]);
      store_lanes(out[t].template at<P>(d), sums[t]);
    }
  }
}

/// Names the type of whole packets or of single channels in a call: GCC warns where a packet itself is deduced.
template <bool Packed, class T>
struct Lanes {
  using type = LanePacket<T>;
};
template <class T>
struct Lanes<false, T> {
  using type = Accumulator<T>;
};

/// Calls f(lanes, begin, end) for the whole packets of [begin, end), then for the channels left over.
template <class T, class F>
CHELA_ALWAYS_INLINE void for_each_packet_run(Index begin, Index end, bool contiguous, F&& f) {
  constexpr Index lanes = Eigen::internal::packet_traits<Accumulator<T>>::size;
  const Index packed = contiguous ? begin + (end - begin) / lanes * lanes : begin;
  if (packed > begin) f(Lanes<true, T>{}, begin, packed);
  if (end > packed) f(Lanes<false, T>{}, packed, end);
}

}  // namespace chela::cpu::detail
