#pragma once
// Copies of rows whose tokens do not lie next to each other, to and from memory where they do.
#include "chela/conv/long.hpp"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

/// Both [batch, token, channel].
template <class T>
struct TurnRowsCall {
  TensorView<const T, 3> from = {};
  TensorView<T, 3> to = {};
};

inline constexpr int turned_tile = 64, turned_threads = 256;

template <class T>
__global__ void __launch_bounds__(turned_threads) turn_rows_kernel(const __grid_constant__ TurnRowsCall<T> call) {
  __shared__ T tile[turned_tile][turned_tile + 2];
  const Index tokens = call.from.extents[1], channels = call.from.extents[2];
  const Index token_tiles = ceil_div(tokens, turned_tile), tiles = token_tiles * ceil_div(channels, turned_tile);
  const Index batch = blockIdx.x / tiles, at = blockIdx.x % tiles;
  const Index first_token = at % token_tiles * turned_tile, first_channel = at / token_tiles * turned_tile;
  const auto walk = [&](bool along_tokens, auto f) {
#pragma unroll 8
    for (int i = int(threadIdx.x); i < turned_tile * turned_tile; i += turned_threads) {
      const int inner = i % turned_tile, outer = i / turned_tile;
      const int t = along_tokens ? inner : outer, d = along_tokens ? outer : inner;
      if (first_token + t < tokens && first_channel + d < channels) f(t, d);
    }
  };
  walk(call.from.strides[1] == 1,
       [&](int t, int d) { tile[t][d] = call.from(batch, first_token + t, first_channel + d); });
  __syncthreads();
  walk(call.to.strides[1] == 1, [&](int t, int d) { call.to(batch, first_token + t, first_channel + d) = tile[t][d]; });
}

template <class T>
Status turn_rows(TensorView<const T, 3> from, TensorView<T, 3> to, cudaStream_t stream) {
  const Index blocks =
      from.extents[0] * ceil_div(from.extents[1], turned_tile) * ceil_div(from.extents[2], turned_tile);
  return launch(turn_rows_kernel<T>, dim3(unsigned(blocks)), turned_threads, 0, stream, {from, to});
}

}  // namespace chela::cuda::detail
