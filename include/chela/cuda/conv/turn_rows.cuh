#pragma once
// Copies of rows whose tokens do not lie next to each other, to and from memory where they do.
#include <cstdint>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/conv_rows.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

/// Both [batch, token, channel], of 16-bit elements.
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

/// Whether units of 16 bytes hold eight neighbours along an axis, all of them at multiples of 16 bytes.
template <class T>
bool has_units(TensorView<T, 3> x, int axis) {
  bool fits = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.strides[axis] == 1;
  for (int other = 0; other < 3; ++other)
    fits = fits && (other == axis || x.extents[other] == 1 || x.strides[other] % 8 == 0);
  return fits;
}
/// Whether they hold eight neighbouring channels of a token.
template <class T>
bool has_channel_units(TensorView<T, 3> x) {
  return has_units(x, 2) && x.extents[2] % 8 == 0;
}

inline constexpr int unit_channels = 64, unit_tokens = 256;  ///< of a block

/// Units of neighbouring channels to those of neighbouring tokens, or back: eight by eight elements in a thread's
/// registers. The units of tokens are whole beyond the last one too.
template <bool ToTokens, class T>
__global__ void __launch_bounds__(turned_threads) turn_units_kernel(const __grid_constant__ TurnRowsCall<T> call) {
  const Index tokens = call.from.extents[1], channels = call.from.extents[2];
  const Index channel_tiles = ceil_div(channels, unit_channels), tiles = ceil_div(tokens, unit_tokens) * channel_tiles;
  const Index batch = blockIdx.x / tiles, at = blockIdx.x % tiles;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const Index channel = at % channel_tiles * unit_channels + 8 * (lane % 8);
  const Index token = at / channel_tiles * unit_tokens + 32 * warp + 8 * (lane / 8);
  if (channel >= channels || token >= tokens) return;
  const T* from = &call.from(batch, token, channel);
  T* to = &call.to(batch, token, channel);
  const Index from_step = call.from.strides[ToTokens ? 1 : 2], to_step = call.to.strides[ToTokens ? 2 : 1];
  const int count = int(min(tokens - token, Index(8)));
  uint4 units[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    units[i] = !ToTokens || i < count ? *reinterpret_cast<const uint4*>(from + i * from_step) : uint4{};
  transpose_units(units);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (ToTokens || i < count) *reinterpret_cast<uint4*>(to + i * to_step) = units[i];
}

/// The side whose tokens are neighbours has room for a multiple of eight of them.
template <class T>
Status turn_rows(TensorView<const T, 3> from, TensorView<T, 3> to, cudaStream_t stream) {
  const auto queue = [&](auto kernel, int tile_tokens, int tile_channels) {
    const Index tiles = ceil_div(from.extents[1], tile_tokens) * ceil_div(from.extents[2], tile_channels);
    return launch(kernel, dim3(unsigned(from.extents[0] * tiles)), turned_threads, 0, stream, {from, to});
  };
  if (has_channel_units(from) && has_units(to, 1)) return queue(turn_units_kernel<true, T>, unit_tokens, unit_channels);
  if (has_units(from, 1) && has_channel_units(to))
    return queue(turn_units_kernel<false, T>, unit_tokens, unit_channels);
  return queue(turn_rows_kernel<T>, turned_tile, turned_tile);
}

}  // namespace chela::cuda::detail
