#pragma once
// The gradient of a convolution's kernel on tensor cores, as sums of
//
//   S_m[e][c] = sum_a X[a - m][e] G[a][c],    grad_k[j] = sum of S_m[e][c] over 8 m + c - e = j
//
// in the letters of cuda/conv/toeplitz_taps.cuh, with G of the outputs' gradient. A warp has 32 blocks m of one channel,
// which are the sums of 31 blocks' lags, and runs through the tokens of some sequences; sums over runs of sequences meet
// in memory, and are added in order.
#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/conv_rows.cuh"

namespace chela::cuda::detail {

/// Sizes of one block's work: lags of a tile, and what it holds of the tokens at once.
struct TapsGradientTile {
  static constexpr int blocks = 32, lags = 8 * (blocks - 1), threads = 32 * conv_channels;
  static constexpr int grad_units = 64, x_units = grad_units + blocks;
  static constexpr int grad_pitch = 16 * grad_units, x_pitch = 16 * (x_units + 8);
  static constexpr int sums_bytes = blocks * 64 * int(sizeof(float));
  static constexpr int shared_bytes = conv_channels * std::max(grad_pitch + x_pitch, sums_bytes);
};

template <HalfElement T>
class TapsGradientWarp {
 public:
  /// Adds 64 rows a; row 0 of `x` is row -32 - m of the first of them, for the tile's first block m.
  __device__ void add(std::uint32_t x, std::uint32_t grad) {
    const int lane = int(threadIdx.x) % 32;
    std::uint32_t b[4][2];
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      std::uint32_t m[4];
      arch::load_matrices_transposed(m, grad + std::uint32_t(16 * (16 * step + lane)));
      b[step][0] = m[0], b[step][1] = m[1], b[step + 1][0] = m[2], b[step + 1][1] = m[3];
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      // Rows of two groups of eight, from three groups before the first on, for blocks 2 part and the next. Blocks eight
      // further on meet them one group later.
      std::uint32_t a[10][4];
      const std::uint32_t lane_row =
          x + std::uint32_t(16 * (32 + lane / 16 * 8 - lane / 8 % 2 + lane % 8 - 2 * part - 24));
#pragma unroll
      for (int step = -1; step < 4; ++step) {
#pragma unroll
        for (int g = 2 * step + 2; g < 2 * step + 4; ++g)
          arch::load_matrices_transposed(a[g], lane_row + std::uint32_t(g * 128));
#pragma unroll
        for (int j = 0; step >= 0 && j < 4; ++j)
          arch::multiply_add<T>(sums_[part][j], a[2 * step + 3 - j], b[step][0], b[step][1]);
      }
    }
  }

  /// Sums over the diagonals of the blocks: put(lag of the tile, sum). `scratch` is this warp's.
  template <class Put>
  __device__ void finish(float* scratch, Put put) const {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int part = 0; part < 4; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int second = 0; second < 2; ++second)
          reinterpret_cast<float2*>(scratch)[(8 * j + 2 * part + second) * 32 + lane] = {
              sums_[part][j][2 * second], sums_[part][j][2 * second + 1]};
    __syncwarp();
    for (int lag = lane; lag < TapsGradientTile::lags; lag += 32) {
      float sum = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int c = e + lag % 8;
        sum += scratch[(lag / 8 + c / 8) * 64 + e * 8 + c % 8];
      }
      put(lag, sum);
    }
  }

 private:
  float sums_[4][4][4] = {};
};

/// A block has eight channels, a warp each, one tile of lags and one run of sequences.
template <HalfElement T>
__global__ void __launch_bounds__(TapsGradientTile::threads, 2)
    toeplitz_taps_gradient_kernel(const __grid_constant__ TapsGradientCall<T> call) {
  using Tile = TapsGradientTile;
  auto* const shared = arch::dynamic_shared<uint4>();
  const Index groups = ceil_div(call.channels, conv_channels), task = blockIdx.x / groups;
  const Index first_channel = blockIdx.x % groups * conv_channels, tile = task % call.tiles, run = task / call.tiles;
  const int warp = int(threadIdx.x) / 32;
  const Index first_block = floor_div(call.least, 8) + tile * (Tile::blocks - 1);
  const std::uint32_t grads = arch::shared_address(shared), xs = grads + conv_channels * Tile::grad_pitch;

  TapsGradientWarp<T> sums;
  const Index each = ceil_div(call.sequences.size(), call.runs);
  for (Index i = run * each; i < min((run + 1) * each, call.sequences.size()); ++i) {
    const Sequence tokens = sequence_inside(call.sequences, i);
    for (Index first = 0; first < tokens.count; first += 8 * Tile::grad_units) {
      const Index first_x = first - 8 * (first_block + Tile::blocks);
      const ConvRows<const T> x(call.x, i, tokens), grad_y(call.grad_y, i, tokens);
      const bool shares = shares_channels(x, first_channel) || shares_channels(grad_y, first_channel);
      if (!x.meets(first_x, 8 * Tile::x_units)) continue;
      sync(shares);
      load_rows(grad_y, first, Tile::grad_units, first_channel, grads, Tile::grad_pitch);
      load_rows(x, first_x, Tile::x_units, first_channel, xs, Tile::x_pitch);
      arch::commit_copies();
      arch::wait_copies<0>();
      sync(shares);
      sums.add(xs + std::uint32_t(warp * Tile::x_pitch), grads + std::uint32_t(warp * Tile::grad_pitch));
    }
  }
  __syncthreads();
  const Index channel = first_channel + warp;
  sums.finish(reinterpret_cast<float*>(shared) + warp * Tile::blocks * 64, [&](int lag, float sum) {
    const Index j = 8 * first_block + lag - call.least;
    if (channel < call.channels && j >= 0 && j < call.lags)
      call.sums[(run * call.channels + channel) * call.lags + j] = sum;
  });
}

template <class T>
struct SumRunsCall {
  const float* sums = nullptr;  ///< [run][channel][lag]
  Index runs = 1, channels = 0, least = 0, lags = 0;
  TensorView<T, 2> grad_taps = {}, grad_back_taps = {};
  TensorView<T, 1> grad_skip = {};
};

template <class T>
__global__ void __launch_bounds__(256) sum_runs_kernel(const __grid_constant__ SumRunsCall<T> call) {
  const Index size = call.channels * call.lags;
  for (Index k = Index(blockIdx.x) * 256 + threadIdx.x; k < size; k += Index(gridDim.x) * 256) {
    float sum = 0;
    for (Index run = 0; run < call.runs; ++run) sum += call.sums[run * size + k];
    const Index channel = k / call.lags, lag = call.least + k % call.lags;
    if (lag >= 0 && call.grad_taps.present()) call.grad_taps(channel, lag) = sum;
    if (lag < 0 && call.grad_back_taps.present()) call.grad_back_taps(channel, -1 - lag) = sum;
    if (lag == 0 && call.grad_skip.present()) call.grad_skip(channel) = sum;
  }
}

inline Status launch_sum_runs(const SumRunsCall<float>& call, cudaStream_t stream) {
  const Index blocks = std::min<Index>(ceil_div(call.channels * call.lags, 256), 1 << 16);
  return launch(sum_runs_kernel<float>, dim3(unsigned(blocks)), 256, 0, stream, call);
}

}  // namespace chela::cuda::detail
