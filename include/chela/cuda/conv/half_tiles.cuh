#pragma once
// Rows of 16-bit tokens times a kernel's spectrum where neighbouring channels lie next to each other: a block brings in
// the rows of eight channels, whose elements share units of 16 bytes, and turns them on the way to shared memory and back.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_convolution.cuh"

namespace chela::cuda::detail {

/// The bytes of one staged row, tokens or results.
template <class Row>
inline constexpr int staged_row_bytes = [] {
  constexpr int in = StagedInput<Row::residues>::bytes, out = StagedOutput<Row::residues>::bytes;
  return in > out ? in : out;
}();
/// Of a block, neighbours in units of 16 bytes; a warp has a row.
inline constexpr int tile_channels = 8, tile_threads = 32 * tile_channels;
template <class Row>
inline constexpr int tile_bytes = tile_channels* staged_row_bytes<Row>;

/// Whether rows have tiles. Of longer ones so few fit into shared memory that copies in the workspace take less time.
template <class Row>
inline constexpr bool has_tiles = Row::warps == 1;
static_assert(tile_bytes<WarpRow<8>> <= 48 * 1024, "every GPU has as much");

/// Calls f(m, at) for pairs of tokens 2 m, 2 m + 1, at(c) being the staged word of channel c.
template <class Layout, class Row, class F>
__device__ __forceinline__ void for_token_pairs(char* tile, const F& f) {
#pragma unroll 4
  for (int m = int(threadIdx.x); m < Row::points / 2; m += tile_threads) {
    char* const first = tile + Layout::point(2 * m);
    f(2 * m,
      [&](int c) -> std::uint32_t& { return *reinterpret_cast<std::uint32_t*>(first + c * staged_row_bytes<Row>); });
  }
}

/// x and y are rows whose token_stride is that of neighbouring tokens, channels being neighbours.
template <class T, class Source = StoredTokens>
struct HalfTileCall {
  HalfConvolutionCall<T, Source> rows = {};
  Index x_token_stride = 0, y_token_stride = 0;
};

template <class Row, class T, class Source>
__global__ void __launch_bounds__(tile_threads, 2)
    half_tile_kernel(const __grid_constant__ HalfTileCall<T, Source> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  char* const tile = reinterpret_cast<char*>(shared);
  const int tiles = call.rows.channels / tile_channels;
  const int batch = int(blockIdx.x) / tiles, first_channel = tile_channels * (int(blockIdx.x) - batch * tiles);

  const T* const from = call.rows.x.row(batch, first_channel);
  const int tokens = call.rows.x.tokens;
  for_token_pairs<StagedInput<Row::residues>, Row>(tile, [&](int t, const auto& at) {
    const auto load = [&](int token) {
      return token < tokens ? __ldcs(reinterpret_cast<const uint4*>(from + token * call.x_token_stride)) : uint4{};
    };
    const uint4 a = load(t), b = load(t + 1);
    const auto put = [&](int c, std::uint32_t x, std::uint32_t y) {
      at(c) = __byte_perm(x, y, 0x5410), at(c + 1) = __byte_perm(x, y, 0x7632);
    };
    put(0, a.x, b.x), put(2, a.y, b.y), put(4, a.z, b.z), put(6, a.w, b.w);
  });
  __syncthreads();

  const int warp = int(threadIdx.x) / 32, channel = first_channel + warp;
  char* const staged = tile + warp * staged_row_bytes<Row>;
  Row row(nullptr, 0, int(threadIdx.x) % 32);
  RowResults<T, Row::own> results, unused;
  convolve_row<false, false, RowWay::tile>(row, call.rows, batch, channel, staged, results, unused);
  put_row<RowWay::tile>(row, results, call.rows.y, batch, channel, staged);
  __syncthreads();

  T* const to = call.rows.y.row(batch, first_channel);
  for_token_pairs<StagedOutput<Row::residues>, Row>(tile, [&](int t, const auto& at) {
    const auto first = [&](int c) { return __byte_perm(at(c), at(c + 1), 0x5410); };
    const auto second = [&](int c) { return __byte_perm(at(c), at(c + 1), 0x7632); };
    const auto store = [&](int token, uint4 unit) {
      if (token < tokens) __stcs(reinterpret_cast<uint4*>(to + token * call.y_token_stride), unit);
    };
    store(t, {first(0), first(2), first(4), first(6)});
    store(t + 1, {second(0), second(2), second(4), second(6)});
  });
}

}  // namespace chela::cuda::detail
