#pragma once
// The inner loops of the short convolution where channels are neighbours in memory: a few tokens by a run of channels, one
// packet of channels at a time.
#include <cstring>

#include "chela/conv/short.hpp"
#include "chela/cpu/conv/short_activation.hpp"
#include "chela/cpu/conv/short_runs.hpp"
#include "chela/cpu/conv/stream_lanes.hpp"

namespace chela::cpu::detail {

/// Tokens computed together, so that each input and each tap is loaded once for several outputs.
inline constexpr int short_conv_tile = 8;

/// Wide kernels meet an input so often that it is first converted into rows of our own, which also keeps tokens a power of
/// two apart out of each other's cache sets.
template <int Width>
inline constexpr bool short_conv_copies_rows = Width > 8;

/// Channels of one task: whole pages of narrow kernels, for the prefetchers, and few enough of wide ones that their rows stay
/// near.
template <int Width>
inline constexpr Index short_conv_block = short_conv_copies_rows<Width> ? 256 : 1024;

/// Elements added to rows of our own, so that they stay out of each other's cache sets when the channels are a power of
/// two, and so that a whole packet may be read at any channel.
inline constexpr Index row_padding = 16;

/// Whole packets of neighbouring channels.
struct AdjacentChannels {
  template <class P, class T>
  CHELA_ALWAYS_INLINE P load(const ChannelRow<T>& row, Index d) const {
    return load_lanes<P>(row.data + d);
  }
  template <class P, class T>
  CHELA_ALWAYS_INLINE void store(const ChannelRow<T>& row, Index d, const P& value) const {
    store_lanes(row.data + d, value);
  }
  template <class P, class T>
  CHELA_ALWAYS_INLINE void copy(const ChannelRow<const T>& from, const ChannelRow<T>& to, Index d) const {
    T moved[lane_count<P>];
    std::memcpy(static_cast<void*>(moved), from.data + d, sizeof(moved));
    std::memcpy(static_cast<void*>(to.data + d), moved, sizeof(moved));
  }
};

/// The same, stored past the caches.
struct StreamedChannels : AdjacentChannels {
  template <class P, class T>
  CHELA_ALWAYS_INLINE void store(const ChannelRow<T>& row, Index d, const P& value) const {
    stream_lanes(row.data + d, value);
  }
};

/// Fewer channels than a packet has, or with gaps between them.
struct GatheredChannels {
  int count;

  template <class P, class T>
  CHELA_ALWAYS_INLINE P load(const ChannelRow<T>& row, Index d) const {
    using S = LaneScalar<P>;
    S lanes[lane_count<P>] = {};
    for (int i = 0; i < count; ++i) lanes[i] = static_cast<S>(row.data[(d + i) * row.stride]);
    return Eigen::internal::ploadu<P>(lanes);
  }
  template <class P, class T>
  CHELA_ALWAYS_INLINE void store(const ChannelRow<T>& row, Index d, const P& value) const {
    LaneScalar<P> lanes[lane_count<P>];
    Eigen::internal::pstoreu(lanes, value);
    for (int i = 0; i < count; ++i) row.data[(d + i) * row.stride] = static_cast<T>(lanes[i]);
  }
  template <class P, class T>
  CHELA_ALWAYS_INLINE void copy(const ChannelRow<const T>& from, const ChannelRow<T>& to, Index d) const {
    for (int i = 0; i < count; ++i) to.data[(d + i) * to.stride] = from.data[(d + i) * from.stride];
  }
};

/// Packets that make a cache line of T.
template <class T>
inline constexpr int line_packets = std::max(1, int(line_bytes) / (packet_lanes<T> * int(sizeof(T))));

/// Calls f(access, packets, begin, end) for the channels [begin, end): for whole packets, if they are neighbours, then for
/// those left over.
template <class T, class F>
CHELA_ALWAYS_INLINE void for_each_packet_run(Index begin, Index end, bool adjacent, F&& f) {
  constexpr Index lanes = packet_lanes<T>;
  constexpr std::integral_constant<int, 1> one;
  const Index packed = adjacent ? begin + (end - begin) / lanes * lanes : begin;
  if (packed > begin) f(AdjacentChannels{}, one, begin, packed);
  for (begin = packed; begin < end; begin += lanes)
    f(GatheredChannels{int(std::min(lanes, end - begin))}, one, begin, begin + 1);
}

/// The same for neighbouring channels whose results are streamed as far as they fill cache lines.
template <class T, class F>
CHELA_ALWAYS_INLINE void for_each_line_run(Index begin, Index end, F&& f) {
  constexpr int packets = line_packets<T>;
  constexpr Index line = packets * packet_lanes<T>;
  const Index lines = begin + (end - begin) / line * line;
  if (lines > begin) f(StreamedChannels{}, std::integral_constant<int, packets>{}, begin, lines);
  for_each_packet_run<T>(lines, end, true, f);
}

/// Taps and bias as rows of channels.
template <class S>
struct TapRows {
  const S* taps;
  const S* bias_row;
  Index stride;

  ChannelRow<const S> row(Index j) const { return {taps + j * stride, 1}; }
  ChannelRow<const S> bias() const { return {bias_row, 1}; }
  TapRows from(Index channel) const { return {taps + channel, bias_row + channel, stride}; }
};

/// Borrows taps that are stored as rows, unless a copy is wanted in any case, and copies others.
template <class S>
class HeldTaps {
 public:
  HeldTaps(TensorView<const S, 2> taps, TensorView<const S, 1> bias, bool copy = false) {
    const Index channels = taps.extents[0], width = taps.extents[1], stride = channels + row_padding;
    const bool borrow_taps = taps.strides[0] == 1 && !copy, borrow_bias = bias.present() && bias.strides[0] == 1;
    if (!borrow_taps || !borrow_bias) copy_ = Tensor<S, 2>(borrow_taps ? 1 : width + 1, stride);
    rows_ = {borrow_taps ? taps.data : copy_.data() + stride, borrow_bias ? bias.data : copy_.data(),
             borrow_taps ? taps.strides[1] : stride};
    if (bias.present() && !borrow_bias)
      for (Index d = 0; d < channels; ++d) copy_(0, d) = bias(d);
    if (!borrow_taps)
      for (Index d = 0; d < channels; ++d)
        for (Index j = 0; j < width; ++j) copy_(j + 1, d) = taps(d, j);
  }

  const TapRows<S>& rows() const { return rows_; }

 private:
  Tensor<S, 2> copy_;  // bias, then taps
  TapRows<S> rows_;
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

/// sums[t] = bias[d] + sum_j taps[j, d] in[Width - 1 + t - j, d].
template <int Width, int Tokens, class P, class X, class S, class Access>
CHELA_ALWAYS_INLINE void convolve(P (&sums)[Tokens], const ChannelRow<const X>* in, const TapRows<S>& taps, Index d,
                                  const Access& access) {
  const P bias = in_register(access.template load<P>(taps.bias(), d));
  CHELA_UNROLL for (P& sum : sums) sum = bias;
  P weights[8], value;
  for_each_tap<Width, Tokens>(
      [&](int j0, auto count) {
        CHELA_UNROLL for (int j = 0; j < decltype(count)::value; ++j) weights[j] =
            in_register(access.template load<P>(taps.row(j0 + j), d));
      },
      [&](int r) { value = in_register(access.template load<P>(in[r], d)); },
      [&](int t, int j) { sums[t] = Eigen::internal::pmadd(weights[j], value, sums[t]); }, [](int, auto) {});
}

/// Asks for the line that a row of the next tile, `ahead` elements on, will be read from. Rows are pages apart, too far for
/// the hardware to see the next one coming.
template <class T>
CHELA_ALWAYS_INLINE void fetch_ahead(const ChannelRow<const T>& row, Index d, Index ahead) {
  Eigen::internal::prefetch(
      reinterpret_cast<const T*>(reinterpret_cast<std::uintptr_t>(row.data) + std::uintptr_t(d + ahead) * sizeof(T)));
}

/// Outputs of `Tokens` tokens; `Packets` of them in a row are stored one after the other. `ahead` is 0 for no next tile.
template <int Width, Activation A, int Tokens, int Packets, class T, class X, class S, class Access>
void convolve_tile(const ChannelRow<const X>* in, const TapRows<S>& taps, const ChannelRow<T>* out, Index ahead,
                   Index begin, Index end, const Access& access) {
  using P = LanePacket<T>;
  constexpr Index lanes = packet_lanes<T>;
  for (Index d = begin; d < end; d += Packets * lanes) {
    P sums[Packets][Tokens];
    if (ahead != 0) CHELA_UNROLL for (int t = 0; t < Tokens; ++t) fetch_ahead(in[t + Width - 1], d, ahead);
    CHELA_UNROLL for (int p = 0; p < Packets; ++p) {
      convolve<Width>(sums[p], in, taps, d + p * lanes, access);
      if constexpr (A == Activation::silu) CHELA_UNROLL for (P& sum : sums[p]) sum = silu_lanes<T>(sum);
    }
    CHELA_UNROLL for (int t = 0; t < Tokens; ++t) CHELA_UNROLL for (int p = 0; p < Packets; ++p)
        access.store(out[t], d + p * lanes, sums[p][t]);
  }
}

/// Rows of our own for as many neighbouring tokens: token t in row t % rows.
template <class S>
struct RowRing {
  S* data;
  Index rows, stride;

  /// Elements from one row to the next.
  static constexpr Index stride_of(Index channels) { return round_up(channels, row_padding) + row_padding; }

  /// Token t, from -rows on.
  ChannelRow<S> operator()(Index t) const { return {data + (t + rows) % rows * stride, 1}; }

  /// `count` tokens from `begin` on.
  template <class Row>
  void find(Index begin, int count, Row* found) const {
    Index row = (begin + rows) % rows;
    for (int i = 0; i < count; ++i, row = row + 1 < rows ? row + 1 : 0) found[i] = {data + row * stride, 1};
  }

  /// Converts `count` channels of an input row.
  template <class T>
  static void fill(const ChannelRow<S>& to, const ChannelRow<const T>& from, Index count) {
    using P = LanePacket<T>;
    constexpr Index lanes = packet_lanes<T>;
    Index d = 0;
    for (; d + lanes <= count; d += lanes) store_lanes(to.data + d, load_lanes<P>(from.data + d));
    for (; d < count; ++d) to.data[d] = static_cast<S>(from.data[d]);
  }
};

}  // namespace chela::cpu::detail
