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

/// Where a tier's piece leaves the outputs of a block of a row.
template <int Tier, class T>
__device__ float* stream_outputs(const StreamCall<T>& call, Index piece, Index row, Index block) {
  return call.state.outputs[Tier] + (2 * (piece * call.rows() + row) + block % 2) * StreamTiers::block(Tier);
}

/// The outputs that begin B tokens after `seen`, a multiple of B, of one piece of a row's lags: number q of them, where
/// sequences of a channel are neighbours, which share its spectrum. Inputs n and n + 4 B of the last 7 B that the piece meets
/// are the parts of point n, and the outputs imaginary parts in the third quarter: the product's other coefficients are not
/// wanted, and what wraps around reaches only them.
template <int Tier, class T>
__device__ void stream_tier_row(const StreamCall<T>& call, const StreamRows<Tier>& rows, Index q, Index seen,
                                float2* memory) {
  using Size = StreamRowSize<Tier>;
  constexpr int block = int(StreamTiers::block(Tier)), points = Size::points, threads = Size::threads;
  constexpr int each = Size::per_thread;
  const int t = rows.thread.t;
  const Index spectrum = q / call.batch, channel = spectrum % call.channels, piece = spectrum / call.channels;
  const Index row = q % call.batch * call.channels + channel, kept = call.tiers.history();
  const T* const history = call.state.history + row * kept;
  const Index newest = (seen + kept - 1) % kept, oldest = call.tiers.taps - block - 2;  // as tokens before the newest
  const auto input = [&](Index back) {
    if (back > oldest) return 0.f;
    const Index at = newest - back;
    return static_cast<float>(history[at < 0 ? at + kept : at]);
  };
  const Index back = 7 * block - 1 + piece * StreamTiers::lags(Tier);
  float2 x[each];
  for_each_constant<each>([&](auto e) {
    const int n = t + e * threads;
    x[e] = {input(back - n), 4 * e < 3 * each ? input(back - n - points) : 0.f};
  });
  transform_row(rows.thread, x, rows.shared(memory), 0.25f, rows.barrier());
  const float2* const factors = call.taps.spectra[Tier] + spectrum * points + t;
  for_each_constant<each>([&](auto e) { x[e] = times(x[e], factors[e * threads]); });
  transform_row_back(rows.thread, x, rows.shared(memory), rows.barrier());
  const float2 base = turn_of(float(t) * (-0.5f / points));
  float* const to = stream_outputs<Tier>(call, piece, row, seen / block + 1) + t;
  for_each_constant<each / 4>([&](auto k) {
    constexpr int e = each / 2 + k;
    const float2 turn = turned<-e, 2 * each>(base);
    to[k * threads] = fmaf(x[e].x, turn.y, x[e].y * turn.x);
  });
}

/// A channel and its sequences of pair number `pair`, those that are not there being one that is.
template <class T>
struct StreamPair {
  Index channel;
  int sequence, count;  ///< the first, and how many there are
  Index rows[stream_sequences];

  __device__ StreamPair(const StreamCall<T>& call, Index pair) {
    const bool there = pair < call.pairs();
    if (!there) pair = call.pairs() - 1;
    channel = pair % call.channels, sequence = int(pair / call.channels) * stream_sequences;
    count = there ? min(stream_sequences, int(call.batch) - sequence) : 0;
#pragma unroll
    for (int s = 0; s < stream_sequences; ++s)
      rows[s] = min(Index(sequence + s), call.batch - 1) * call.channels + channel;
  }
};

inline constexpr int stream_group_pairs = 32, stream_group_warps = stream_threads / stream_group_pairs;
inline constexpr int stream_group_bytes = stream_threads * stream_sequences * StreamTiers::group * int(sizeof(float));

/// The sums of lags 32 to 255, and what tiers give, for the 16 outputs that begin 16 tokens after `seen`, a multiple of
/// 16: by one block, of 32 pairs. Each warp sums the products with a run of the inputs, then all sums of two outputs. Also
/// brings the last 16 inputs to the history.
template <int Tiers, class T>
__device__ void stream_group(const StreamCall<T>& call, Index first_pair, Index seen, float* memory) {
  constexpr int group = StreamTiers::group, first_lag = StreamTiers::direct_lags, warps = stream_group_warps;
  constexpr int chunks = (StreamTiers::group_lags - group) / group, chunks_each = (chunks + warps - 1) / warps;
  constexpr int outputs_each = group / warps;
  const int lane = int(threadIdx.x) % stream_group_pairs, warp = int(threadIdx.x) / stream_group_pairs;
  const StreamPair<T> pair(call, first_pair + lane);
  const Index channels = call.channels, rows = call.rows(), kept = call.tiers.history();

  // Input m before the last meets output i by lag 17 + i + m, so a tap serves each output one input later than the next.
  const int lags = int(min(call.tiers.taps, Index(StreamTiers::group_lags)));
  const float* const taps_of_channel = call.taps.lags + first_lag * channels + pair.channel;
  float sums[stream_sequences][group] = {}, taps[group];
#pragma unroll
  for (int u = 0; u < group; ++u)
    taps[u] = warp > 0 ? taps_of_channel[(group * (warp * chunks_each - 1) + u) * channels] : 0.f;
#pragma unroll 1
  for (int chunk = warp * chunks_each; chunk < (warp + 1) * chunks_each; ++chunk) {
    if (chunk * group >= lags - (group + 1)) break;
    T inputs[stream_sequences][group];
    float next[group];
#pragma unroll
    for (int u = 0; u < group; ++u) {
      const int m = chunk * group + u;
      next[u] = taps_of_channel[m * channels];
      const T* const from = call.state.recent + ((seen - 1 - m) & (StreamTiers::group_lags - 1)) * rows;
#pragma unroll
      for (int s = 0; s < stream_sequences; ++s) inputs[s][u] = from[pair.rows[s]];
    }
#pragma unroll
    for (int u = 0; u < group; ++u) {
      taps[u] = next[u];
#pragma unroll
      for (int s = 0; s < stream_sequences; ++s)
#pragma unroll
        for (int i = 0; i < group; ++i)
          sums[s][i] = fmaf(taps[(u + i + 1) % group], static_cast<float>(inputs[s][u]), sums[s][i]);
    }
    if constexpr (Tiers > 0)
      if (chunk == 0)
#pragma unroll
        for (int s = 0; s < stream_sequences; ++s) {
          alignas(16) T oldest_first[group];
#pragma unroll
          for (int i = 0; i < group; ++i) oldest_first[i] = inputs[s][group - 1 - i];
          auto* const to = reinterpret_cast<uint4*>(call.state.history + pair.rows[s] * kept + (seen - group) % kept);
#pragma unroll
          for (int i = 0; i < group * int(sizeof(T)) / 16; ++i)
            if (s < pair.count) to[i] = reinterpret_cast<const uint4*>(oldest_first)[i];
        }
  }

  const auto place = [&](int of_warp, int s, int i) -> float& {
    return memory[((of_warp * stream_sequences + s) * group + i) * stream_group_pairs + lane];
  };
#pragma unroll
  for (int s = 0; s < stream_sequences; ++s)
#pragma unroll
    for (int i = 0; i < group; ++i) place(warp, s, i) = sums[s][i];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < stream_sequences; ++s)
#pragma unroll
    for (int e = 0; e < outputs_each; ++e) {
      const int i = warp * outputs_each + e;
      const Index output = seen + group + i, row = pair.rows[s];
      float sum = 0;
#pragma unroll
      for (int w = 0; w < warps; ++w) sum += place(w, s, i);
      for_each_constant<Tiers>([&](auto tier) {
        constexpr Index block = StreamTiers::block(tier);
        for (Index piece = 0; piece < call.tiers.pieces(tier); ++piece)
          sum += stream_outputs<tier>(call, piece, row, output / block)[output % block];
      });
      if (s < pair.count) call.state.due[output % (2 * group) * rows + row] = sum;
    }
}

/// y for the token at this position, which enters: by one thread, of a pair.
template <class T>
__device__ void stream_token(const StreamCall<T>& call, Index number, Index position) {
  constexpr int lags = StreamTiers::direct_lags;
  const StreamPair<T> pair(call, number);
  const Index rows = call.rows();
  const auto recent = [&](Index token) { return call.state.recent + (token & (StreamTiers::group_lags - 1)) * rows; };
  const float* const due = call.state.due + position % (2 * StreamTiers::group) * rows;
  T x[stream_sequences];
  float sums[stream_sequences];
#pragma unroll
  for (int s = 0; s < stream_sequences; ++s)
    x[s] = call.args.x(min(Index(pair.sequence + s), call.batch - 1), pair.channel), sums[s] = due[pair.rows[s]];
#pragma unroll
  for (int j = 0; j < lags; ++j) {
    float tap = call.taps.lags[j * call.channels + pair.channel];
    if (j == 0 && call.args.skip.present()) tap += call.args.skip(pair.channel);
#pragma unroll
    for (int s = 0; s < stream_sequences; ++s)
      sums[s] = fmaf(tap, static_cast<float>(j == 0 ? x[s] : recent(position - j)[pair.rows[s]]), sums[s]);
  }
#pragma unroll
  for (int s = 0; s < stream_sequences; ++s) {
    if (s >= pair.count) break;
    recent(position)[pair.rows[s]] = x[s];
    call.args.y(pair.sequence + s, pair.channel) = T(sums[s]);
  }
}

}  // namespace chela::cuda::detail
