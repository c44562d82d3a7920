#pragma once
// The kernels of streams: who works on what at which token, and how kernels and streams are made ready.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/long_stream_rows.cuh"

namespace chela::cuda::detail {

struct StreamTapsCall {
  TensorView<const float, 2> taps = {};
  float* lags = nullptr;
  float2* spectrum = nullptr;
};

/// Lags of the direct and grouped sums, by channel, with zeros at the end.
template <class = void>
__global__ void __launch_bounds__(stream_threads) stream_lags_kernel(const __grid_constant__ StreamTapsCall call) {
  const Index channels = call.taps.extents[0], at = Index(blockIdx.x) * stream_threads + threadIdx.x;
  const Index lag = at / channels, channel = at % channels;
  if (lag >= StreamTiers::padded_lags) return;
  const bool met = lag < StreamTiers::group_lags && lag < call.taps.extents[1];
  call.lags[at] = met ? call.taps(channel, lag) : 0.f;
}

/// Spectra of a tier's lags, in the order in which threads hold points, divided by their number.
template <int Tier>
__global__ void __launch_bounds__(stream_threads) stream_spectrum_kernel(const __grid_constant__ StreamTapsCall call) {
  using Size = StreamRowSize<Tier>;
  auto* const stream_points = arch::dynamic_shared<float2>();
  constexpr int points = Size::points, threads = Size::threads, each = Size::per_thread;
  const StreamRows<Tier> rows;
  const Index channels = call.taps.extents[0], taps = call.taps.extents[1];
  const Index row = Index(blockIdx.x) * StreamRows<Tier>::rows + rows.row, piece = row / channels;
  if (piece >= StreamTiers{taps}.pieces(Tier)) return;
  const Index channel = row % channels, first = StreamTiers::first_lag(Tier) + piece * StreamTiers::lags(Tier);
  const int t = rows.thread.t;
  const auto tap = [&](Index n) {
    const bool met = n < StreamTiers::lags(Tier) && first + n < taps;
    return met ? call.taps(channel, first + n) * (1.f / points) : 0.f;
  };
  float2 x[each];
  for_each_constant<each>([&](auto e) { x[e] = {tap(t + e * threads), tap(t + e * threads + points)}; });
  transform_row(rows.thread, x, rows.shared(stream_points), 0.25f, rows.barrier());
  float2* const to = call.spectrum + row * points + t;
  for_each_constant<each>([&](auto e) { to[e * threads] = x[e]; });
}

/// One token. Blocks know by the position what their turn is: a tier's rows from 2 * 16 tokens before their outputs are
/// collected, and groups within 16 tokens, none of which touches what another one of this token writes. The last block to
/// be done counts the position on.
template <class T, int Tiers>
__global__ void __launch_bounds__(stream_threads, 2) stream_step_kernel(const __grid_constant__ StreamCall<T> call) {
  auto* const stream_points = arch::dynamic_shared<float2>();
  StreamClock& clock = *call.state.clock;
  const Index position = Index(*static_cast<volatile unsigned long long*>(&clock.position));
  int block = int(blockIdx.x);
  bool mine = true;
  for_each_constant<Tiers>([&](auto from_longest) {
    constexpr int tier = Tiers - 1 - from_longest, rows_each = StreamRows<tier>::rows;
    if (!mine) return;
    if (block >= call.tier_blocks[tier]) {
      block -= call.tier_blocks[tier];
      return;
    }
    mine = false;
    constexpr Index turns = StreamTiers::turns(tier);
    const Index turn = position % StreamTiers::block(tier) - StreamTiers::group;
    if (turn < 0 || turn >= turns) return;
    const StreamRows<tier> rows;
    const Index transforms = call.rows() * call.tiers.pieces(tier);
    const Index first = transforms * turn / turns, end = transforms * (turn + 1) / turns;
    const Index q = first + Index(block) * rows_each + rows.row;
    if (q < end) stream_tier_row<tier>(call, rows, q, position - position % StreamTiers::block(tier), stream_points);
  });
  if (mine) {
    const Index turn = position % StreamTiers::group;
    if (block < call.group_blocks)
      stream_group<Tiers>(call, (Index(block) * StreamTiers::group + turn) * stream_group_pairs, position - turn,
                          reinterpret_cast<float*>(stream_points));
    else
      stream_token(call, Index(block - call.group_blocks) * stream_threads + threadIdx.x, position);
  }
  __syncthreads();
  if (threadIdx.x == 0 && atomicInc(&clock.blocks_done, gridDim.x - 1) == gridDim.x - 1)
    clock.position = static_cast<unsigned long long>(position) + 1;
}

/// What `count` inputs [batch, token, channel] leave behind, the last of them before `position`.
template <class T>
struct StreamInputsCall {
  TensorView<const T, 3> inputs = {};
  StreamTiers tiers = {};
  StreamState<T> state = {};
  Index position = 0;
};

template <class T>
__global__ void __launch_bounds__(stream_threads)
    stream_inputs_kernel(const __grid_constant__ StreamInputsCall<T> call) {
  const Index batch = call.inputs.extents[0], count = call.inputs.extents[1], channels = call.inputs.extents[2];
  const Index kept = call.tiers.history(), size = batch * count * channels;
  for (Index i = Index(blockIdx.x) * stream_threads + threadIdx.x; i < size; i += Index(gridDim.x) * stream_threads) {
    const Index channel = i % channels, b = i / channels % batch, n = i / channels / batch;
    const Index token = call.position - count + n, row = b * channels + channel;
    const T x = call.inputs(b, n, channel);
    if (token >= call.position - (StreamTiers::group_lags - 1))
      call.state.recent[(token & (StreamTiers::group_lags - 1)) * batch * channels + row] = x;
    if (kept > 0) call.state.history[row * kept + token % kept] = x;
  }
}

template <class T>
struct StreamBeginCall {
  StreamCall<T> stream = {};
  Index position = 0;
};

/// A tier's outputs of all rows that come with the position.
template <class T, int Tier>
__global__ void __launch_bounds__(stream_threads) stream_tier_kernel(const __grid_constant__ StreamBeginCall<T> call) {
  auto* const stream_points = arch::dynamic_shared<float2>();
  const StreamRows<Tier> rows;
  const Index q = Index(blockIdx.x) * StreamRows<Tier>::rows + rows.row;
  if (q < call.stream.rows() * call.stream.tiers.pieces(Tier))
    stream_tier_row<Tier>(call.stream, rows, q, call.position - StreamTiers::block(Tier), stream_points);
}

/// The first group's outputs, and the position.
template <class T, int Tiers>
__global__ void __launch_bounds__(stream_threads) stream_group_kernel(const __grid_constant__ StreamBeginCall<T> call) {
  auto* const stream_points = arch::dynamic_shared<float2>();
  stream_group<Tiers>(call.stream, Index(blockIdx.x) * stream_group_pairs, call.position - StreamTiers::group,
                      reinterpret_cast<float*>(stream_points));
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *call.stream.state.clock = {static_cast<unsigned long long>(call.position), 0};
}

}  // namespace chela::cuda::detail
