#pragma once
// The sums of the long convolution for floats. A lane has twelve neighbouring outputs of a warp's 384 of one channel; for
// four lags at a time the inputs that they meet shift by four, so that each is loaded once and a tap serves all.
#include <concepts>

#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/conv_rows.cuh"

namespace chela::cuda::detail {

/// Sizes of a block's work: outputs of eight channels, by slabs of lags.
struct FloatSumsTile {
  static constexpr int lane_outputs = 12, outputs = 32 * lane_outputs, slab = 256, inputs = outputs + slab;
  static constexpr int pitch = inputs + 4, threads = 32 * conv_channels;  // channels share no banks
  static constexpr int shared_bytes = conv_channels * (pitch + slab) * int(sizeof(float));
};

/// The numbers `first + step k`, k < count, of eight channels. All threads of the block; copies are under way until they
/// are waited for.
__device__ inline void load_floats(const ConvRows<const float>& rows, Index first, Index step, int count,
                                   Index first_channel, std::uint32_t shared, int pitch) {
  const bool channels_first = rows.layout == UnitLayout::of_channels;
  for (int k = int(threadIdx.x); k < conv_channels * count; k += FloatSumsTile::threads) {
    const int c = channels_first ? k % conv_channels : k / count, i = channels_first ? k / conv_channels : k % count;
    const Index position = first + step * i, channel = first_channel + c;
    const bool there = rows.has(position, channel);
    arch::copy_async_4(shared + std::uint32_t(4 * (c * pitch + i)), rows.at(there ? position : 0, there ? channel : 0),
                       there);
  }
}

/// Twelve sums of a lane.
class FloatSums {
 public:
  /// Adds steps of four lags. `x` is the lane's first output's input at the first lag, `taps` that lag. Of lags before
  /// `least` or after `most`, counted from there, nothing is added: zero taps would spread NaN.
  template <bool Partial>
  __device__ void add(const float* x, const float* taps, int steps, int least = 0, int most = 0) {
    float w[16];
#pragma unroll
    for (int i = 0; i < outputs; i += 4) take(w, i, x + i);
    for (int s0 = 0; s0 < steps; s0 += 4)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (s0 + s >= steps) break;
        const int lag = 4 * (s0 + s);
        take(w, 12 - 4 * s, x - lag - 4);
        const float4 four = *reinterpret_cast<const float4*>(taps + lag);
        const float tap[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int d = 0; d < 4; ++d)
          if (!Partial || (lag + d >= least && lag + d <= most))
#pragma unroll
            for (int i = 0; i < outputs; ++i) sums_[i] = fmaf(tap[d], w[(i - d - 4 * s + 32) % 16], sums_[i]);
      }
  }

  /// Closes a slab: sums of sums keep their digits.
  __device__ void close() {
#pragma unroll
    for (int i = 0; i < outputs; ++i) totals_[i] += sums_[i], sums_[i] = 0;
  }

  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < outputs; i += 4)
      *reinterpret_cast<float4*>(to + i) = {totals_[i], totals_[i + 1], totals_[i + 2], totals_[i + 3]};
  }

  /// Adds `factor` times what is at `x`.
  __device__ void add_scaled(float factor, const float* x) {
#pragma unroll
    for (int i = 0; i < outputs; ++i) totals_[i] = fmaf(factor, x[i], totals_[i]);
  }

 private:
  static constexpr int outputs = FloatSumsTile::lane_outputs;

  __device__ static void take(float (&w)[16], int slot, const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    w[slot % 16] = four.x, w[(slot + 1) % 16] = four.y, w[(slot + 2) % 16] = four.z, w[(slot + 3) % 16] = four.w;
  }

  float sums_[outputs] = {}, totals_[outputs] = {};
};

template <std::same_as<float> T>
struct FloatConvCall {
  ConvTensors<const T> x = {};
  ConvTensors<T> y = {};
  TensorView<const T, 2> taps = {}, back_taps = {};
  TensorView<const T, 1> skip = {};
  bool reversed = false;  ///< lag j is lag -j of the kernel
  Index least = 0, most = 0, channels = 0;
  SequenceTiles tiles = {};
};

/// A block has 384 outputs of eight channels, a warp each.
template <std::same_as<float> T>
__global__ void __launch_bounds__(FloatSumsTile::threads, 3)
    float_conv_kernel(const __grid_constant__ FloatConvCall<T> call) {
  using Tile = FloatSumsTile;
  auto* const shared = arch::dynamic_shared<uint4>();
  float* const all_rows = reinterpret_cast<float*>(shared);
  float* const all_taps = all_rows + conv_channels * Tile::pitch;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float* const rows = all_rows + warp * Tile::pitch + Tile::slab + lane * Tile::lane_outputs;
  const float* const taps = all_taps + warp * Tile::slab;
  const Index groups = ceil_div(call.channels, conv_channels);
  const Index first_channel = blockIdx.x % groups * conv_channels, channel = first_channel + warp;
  const SequenceTile tile = call.tiles[blockIdx.x / groups];
  const ConvRows<const T> x(call.x, tile.sequence, tile.rows);
  const ConvRows<T> y(call.y, tile.sequence, tile.rows);
  if (tile.rows.count == 0 || !y.meets(tile.first, Tile::outputs)) return;
  const auto tap = [&](Index lag, Index of) {
    const Index j = call.reversed ? -lag : lag;
    return j >= 0 ? call.taps(of, j) : call.back_taps(of, -1 - j);
  };

  FloatSums sums;
  const Index least = max(call.least, tile.first - x.end() + 1);
  const Index most = min(call.most, tile.first + Tile::outputs - 1 - x.begin());
  for (Index begin = floor_div(least, 4) * 4; begin <= most; begin += Tile::slab) {
    __syncthreads();
    load_floats(x, tile.first - begin - Tile::slab, 1, Tile::inputs, first_channel, arch::shared_address(all_rows),
                Tile::pitch);
    for (int k = int(threadIdx.x); k < conv_channels * Tile::slab; k += Tile::threads) {
      const Index lag = begin + k % Tile::slab, of = first_channel + k / Tile::slab;
      all_taps[k] = lag >= call.least && lag <= call.most && of < call.channels ? tap(lag, of) : 0.0f;
    }
    arch::commit_copies();
    arch::wait_copies<0>();
    __syncthreads();
    const int first = int(max(call.least - begin, Index(0))), last = int(min(most - begin, Index(Tile::slab - 1)));
    const int kernel_last = int(min(call.most - begin, Index(Tile::slab - 1)));
    const int first_full = (first + 3) / 4, end_full = max(first_full, min(last / 4 + 1, (kernel_last + 1) / 4));
    if (first % 4 != 0) sums.add<true>(rows, taps, 1, first, kernel_last);
    sums.add<false>(rows - 4 * first_full, taps + 4 * first_full, end_full - first_full);
    if (last >= 4 * end_full)
      sums.add<true>(rows - 4 * end_full, taps + 4 * end_full, 1, 0, kernel_last - 4 * end_full);
    sums.close();
  }

  if (call.skip.present()) {
    __syncthreads();
    load_floats(x, tile.first, 1, Tile::outputs, first_channel, arch::shared_address(all_rows + Tile::slab),
                Tile::pitch);
    arch::commit_copies();
    arch::wait_copies<0>();
    __syncthreads();
    if (channel < call.channels) sums.add_scaled(call.skip(channel), rows);
  }
  __syncthreads();
  sums.store(rows);
  __syncthreads();
  const bool channels_first = y.layout == UnitLayout::of_channels;
  for (int k = int(threadIdx.x); k < conv_channels * Tile::outputs; k += Tile::threads) {
    const int c = channels_first ? k % conv_channels : k / Tile::outputs;
    const int i = channels_first ? k / conv_channels : k % Tile::outputs;
    if (y.has(tile.first + i, first_channel + c))
      *y.at(tile.first + i, first_channel + c) = all_rows[c * Tile::pitch + Tile::slab + i];
  }
}

/// The gradient of the kernel is a convolution too, of the tokens run backwards with the outputs' gradient for taps:
///
///   grad_k[j] = sum_t g[t] x[t - j] = sum_t g[t] z[j - t],    z[s] = x[-s]
///
/// A block has 384 lags of eight channels, a warp each, and one run of sequences.
template <std::same_as<float> T>
__global__ void __launch_bounds__(FloatSumsTile::threads, 3)
    float_taps_gradient_kernel(const __grid_constant__ TapsGradientCall<T> call) {
  using Tile = FloatSumsTile;
  auto* const shared = arch::dynamic_shared<uint4>();
  float* const all_rows = reinterpret_cast<float*>(shared);
  float* const all_grads = all_rows + conv_channels * Tile::pitch;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const float* const rows = all_rows + warp * Tile::pitch + Tile::slab + lane * Tile::lane_outputs;
  const Index groups = ceil_div(call.channels, conv_channels), task = blockIdx.x / groups;
  const Index first_channel = blockIdx.x % groups * conv_channels, channel = first_channel + warp;
  const Index run = task / call.tiles, first = call.least + task % call.tiles * Tile::outputs;

  FloatSums sums;
  const Index each = ceil_div(call.sequences.size(), call.runs);
  for (Index i = run * each; i < min((run + 1) * each, call.sequences.size()); ++i) {
    const Sequence tokens = sequence_inside(call.sequences, i);
    const ConvRows<const T> x(call.x, i, tokens), grad_y(call.grad_y, i, tokens);
    for (Index begin = 0; begin < tokens.count; begin += Tile::slab) {
      const Index last_x = begin + Tile::slab - first;
      if (!x.meets(last_x - Tile::inputs + 1, Tile::inputs)) continue;
      __syncthreads();
      load_floats(x, last_x, -1, Tile::inputs, first_channel, arch::shared_address(all_rows), Tile::pitch);
      load_floats(grad_y, begin, 1, Tile::slab, first_channel, arch::shared_address(all_grads), Tile::slab);
      arch::commit_copies();
      arch::wait_copies<0>();
      __syncthreads();
      const Index count = min(tokens.count - begin, Index(Tile::slab));
      sums.add<false>(rows, all_grads + warp * Tile::slab, int(ceil_div(count, 4)));
      sums.close();
    }
  }
  __syncthreads();
  float* const out = all_rows + warp * Tile::pitch + lane * Tile::lane_outputs;
  sums.store(out);
  if (channel >= call.channels) return;
#pragma unroll
  for (int i = 0; i < Tile::lane_outputs; ++i)
    if (const Index j = first - call.least + lane * Tile::lane_outputs + i; j < call.lags)
      call.sums[(run * call.channels + channel) * call.lags + j] = out[i];
}

}  // namespace chela::cuda::detail
