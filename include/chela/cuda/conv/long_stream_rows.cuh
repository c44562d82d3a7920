#pragma once
// What thread blocks do for streams: the direct sums of a token, the sums of 16 tokens together, and a tier's transform
// of one row. Each is given what it works on; when that is its turn, others decide.
#include <cstdint>

#include "chela/conv/long_stream.hpp"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/float_transform_size.cuh"
#include "chela/cuda/conv/long_stream_plan.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

inline constexpr int stream_threads = 256;
inline constexpr int stream_sequences = 2;  ///< of a channel, that a thread sums with the same taps

/// The transform of a tier.
template <int Tier>
struct StreamRowSize;
template <>
struct StreamRowSize<0> : RowSize<512, 16, 16, 2> {};
template <>
struct StreamRowSize<1> : RowSize<2048, 16, 16, 8> {};
template <>
struct StreamRowSize<2> : RowSize<8192, 32, 16, 16> {};

/// How a block's threads are cut in rows of a tier.
template <int Tier>
struct StreamRows {
  using Size = StreamRowSize<Tier>;
  static constexpr int rows = stream_threads / Size::threads;
  static constexpr int shared_points = Size::padded(Size::points);
  static constexpr int shared_bytes = rows * shared_points * int(sizeof(float2));
  static_assert(Size::points == StreamTiers::points(Tier) && Size::per_thread % 4 == 0);
  static_assert(stream_threads % Size::threads == 0 && Size::threads % 32 == 0);

  RowThread<Size> thread{int(threadIdx.x) % Size::threads};
  int row = int(threadIdx.x) / Size::threads;

  __device__ float2* shared(float2* memory) const { return memory + row * shared_points; }
  __device__ auto barrier() const {
    return [id = 1 + row] { arch::sync_threads<Size::threads>(id); };
  }
};

template <class T>
struct StreamCall {
  LongConvStreamArgs<T> args = {};
  Index batch = 0, channels = 0;
  StreamTiers tiers = {};
  StreamTaps taps = {};
  StreamState<T> state = {};
  int tier_blocks[StreamTiers::most] = {}, group_blocks = 0;  ///< and the others for direct sums

  CHELA_HOST_DEVICE Index rows() const { return batch * channels; }
  /// A channel's sequences in pairs: what a thread of sums has.
  CHELA_HOST_DEVICE Index pairs() const { return ceil_div(batch, stream_sequences) * channels; }
};

/// The outputs that begin B tokens after `seen`, a multiple of B, of row number q: sequences of a channel are neighbours,
/// which share its spectrum. Inputs n and n + 4 B of the last 7 B, before the piece's lags, are the parts of point n, and
/// the outputs imaginary parts in the third quarter: the product's other coefficients are not wanted, and what wraps
/// around reaches only them.
template <int Tier, class T>
__device__ void stream_tier_row(const StreamCall<T>& call, const StreamRows<Tier>& rows, Index q, Index seen,
                                float2* memory) {
  using Size = StreamRowSize<Tier>;
  constexpr int block = int(StreamTiers::block(Tier)), points = Size::points, threads = Size::threads;
  constexpr int each = Size::per_thread;
  const int t = rows.thread.t;
  const Index channel = q / call.batch, row = q % call.batch * call.channels + channel, kept = call.tiers.history();
  const T* const history = call.state.history + row * kept;
  const Index newest = (seen + kept - 1) % kept, oldest = call.tiers.taps - block - 2;  // as tokens before the newest
  const auto input = [&](Index back) {
    if (back > oldest) return 0.f;
    const Index at = newest - back;
    return static_cast<float>(history[at < 0 ? at + kept : at]);
  };
  float sums[each / 4] = {};
  for (Index piece = 0; piece < call.tiers.pieces(Tier); ++piece) {
    const Index back = 7 * block - 1 + piece * StreamTiers::lags(Tier);
    float2 x[each];
    for_each_constant<each>([&](auto e) {
      const int n = t + e * threads;
      x[e] = {input(back - n), 4 * e < 3 * each ? input(back - n - points) : 0.f};
    });
    transform_row(rows.thread, x, rows.shared(memory), 0.25f, rows.barrier());
    const float2* const spectrum = call.taps.spectra[Tier] + (piece * call.channels + channel) * points + t;
    for_each_constant<each>([&](auto e) { x[e] = times(x[e], spectrum[e * threads]); });
    transform_row_back(rows.thread, x, rows.shared(memory), rows.barrier());
    const float2 base = turn_of(float(t) * (-0.5f / points));
    for_each_constant<each / 4>([&](auto k) {
      constexpr int e = each / 2 + k;
      const float2 turn = turned<-e, 2 * each>(base);
      sums[k] += fmaf(x[e].x, turn.y, x[e].y * turn.x);
    });
  }
  float* const to = call.state.outputs[Tier] + (2 * row + (seen / block + 1) % 2) * block + t;
  for_each_constant<each / 4>([&](auto k) { to[k * threads] = sums[k]; });
}

/// The sums of lags 32 to 255, and what tiers give, for the 16 outputs that begin 16 tokens after `seen`, a multiple of
/// 16: by one thread, of a pair of sequences. Also brings the last 16 inputs to the history.
template <int Tiers, class T>
__device__ void stream_group(const StreamCall<T>& call, Index pair, Index seen) {
  constexpr int group = StreamTiers::group, first_lag = StreamTiers::direct_lags;
  if (pair >= call.pairs()) return;
  const Index channel = pair % call.channels, rows = call.rows();
  const int sequence = int(pair / call.channels) * stream_sequences, batch = int(call.batch);
  const auto for_sequences = [&](auto f) {
#pragma unroll
    for (int s = 0; s < stream_sequences; ++s)
      if (sequence + s < batch) f(s, (sequence + s) * call.channels + channel);
  };
  // Input m before the last meets output i by lag 17 + i + m, whose tap came to its place when the lag's first input did.
  float sums[stream_sequences][group] = {}, taps[group] = {};
  T newest[stream_sequences][group];
  const int lags = call.tiers.taps < StreamTiers::group_lags ? int(call.tiers.taps) : StreamTiers::group_lags;
  for (int first = 0; first < lags - (group + 1); first += group) {
    const bool inputs_to_keep = first == 0;
#pragma unroll
    for (int u = 0; u < group; ++u) {
      const int m = first + u;
      taps[u] = call.taps.lags[(first_lag + m) * call.channels + channel];
      for_sequences([&](int s, Index row) {
        const T stored = call.state.recent[((seen - 1 - m) & (StreamTiers::group_lags - 1)) * rows + row];
        if (inputs_to_keep) newest[s][u] = stored;
        const float x = static_cast<float>(stored);
#pragma unroll
        for (int i = 0; i < group; ++i) sums[s][i] = fmaf(taps[(u + i + 1) % group], x, sums[s][i]);
      });
    }
  }
  const Index output = seen + group;
  for_sequences([&](int s, Index row) {
    for_each_constant<Tiers>([&](auto tier) {
      constexpr Index block = StreamTiers::block(tier);
      const auto* from = reinterpret_cast<const float4*>(call.state.outputs[tier] +
                                                         (2 * row + output / block % 2) * block + output % block);
#pragma unroll
      for (int i = 0; i < group; i += 4) {
        const float4 x = from[i / 4];
        sums[s][i] += x.x, sums[s][i + 1] += x.y, sums[s][i + 2] += x.z, sums[s][i + 3] += x.w;
      }
    });
#pragma unroll
    for (int i = 0; i < group; ++i) call.state.due[(output + i) % (2 * group) * rows + row] = sums[s][i];
    if constexpr (Tiers > 0) {
      const Index kept = call.tiers.history();
      auto* const to = reinterpret_cast<uint4*>(call.state.history + row * kept + (seen - group) % kept);
      alignas(16) T inputs[group];
#pragma unroll
      for (int i = 0; i < group; ++i) inputs[i] = newest[s][group - 1 - i];
#pragma unroll
      for (int i = 0; i < group * int(sizeof(T)) / 16; ++i) to[i] = reinterpret_cast<const uint4*>(inputs)[i];
    }
  });
}

/// y for the token at this position, which enters: by one thread, of a pair of sequences.
template <class T>
__device__ void stream_token(const StreamCall<T>& call, Index pair, Index position) {
  constexpr int lags = StreamTiers::direct_lags;
  if (pair >= call.pairs()) return;
  const Index channel = pair % call.channels, rows = call.rows();
  const int sequence = int(pair / call.channels) * stream_sequences, batch = int(call.batch);
  T x[stream_sequences];
  float sums[stream_sequences];
#pragma unroll
  for (int j = 0; j < lags; ++j) {
    float tap = call.taps.lags[j * call.channels + channel];
    if (j == 0 && call.args.skip.present()) tap += call.args.skip(channel);
    const T* const inputs = call.state.recent + ((position - j) & (StreamTiers::group_lags - 1)) * rows;
    const float* const due = call.state.due + position % (2 * StreamTiers::group) * rows;
#pragma unroll
    for (int s = 0; s < stream_sequences; ++s) {
      if (sequence + s >= batch) break;
      const Index row = (sequence + s) * call.channels + channel;
      if (j == 0) x[s] = call.args.x(sequence + s, channel), sums[s] = due[row];
      sums[s] = fmaf(tap, static_cast<float>(j == 0 ? x[s] : inputs[row]), sums[s]);
    }
  }
#pragma unroll
  for (int s = 0; s < stream_sequences; ++s) {
    if (sequence + s >= batch) break;
    const Index row = (sequence + s) * call.channels + channel;
    call.state.recent[(position & (StreamTiers::group_lags - 1)) * rows + row] = x[s];
    call.args.y(sequence + s, channel) = T(sums[s]);
  }
}

}  // namespace chela::cuda::detail
