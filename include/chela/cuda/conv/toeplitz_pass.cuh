#pragma once
// Convolutions as products of the rows of X with Toeplitz blocks (cuda/conv/toeplitz_taps.cuh), on tensor cores.
//
// A warp has 128 R outputs of one channel: R tiles of 16 rows a by 8 columns c. Their inputs, and the taps of a slab of
// lags, are in shared memory; eight rows of X are an 8x8 matrix that loads without a conflict from any row on. At
// operands that are eight apart (128 lags) the inputs of one tile are those of the tile before, so that each is loaded
// once and then wanders through the tiles.
//
// An operand that the kernel does not fill has zeros for taps. A product with zero leaves the sum's bits as they are,
// however large the input (measured over all exponents, H100), unless it is infinite or NaN: there such inputs are taken
// out, and met by those outputs alone whose kernel reaches them.
#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/conv_rows.cuh"
#include "chela/cuda/conv/toeplitz_taps.cuh"

namespace chela::cuda::detail {

template <class T>
struct ToeplitzCall {
  ConvTensors<const T> x = {};
  ConvTensors<T> y = {};
  TensorView<const float, 1> skip = {};
  ToeplitzTaps taps = {};
  ToeplitzLags lags = {};
  SequenceTiles tiles = {};
  Index channels = 0, tiles_each = 1;
};

inline constexpr int toeplitz_threads = 32 * conv_channels;

/// What shared memory holds of a channel, in bytes: two copies of a slab's taps, whose words share no banks, and groups
/// of 64 inputs.
struct ToeplitzShared {
  int slab = 1, tiles = 1;

  CHELA_HOST_DEVICE constexpr int copy_words() const { return 32 * slab + 16; }
  CHELA_HOST_DEVICE constexpr int taps_pitch() const { return 2 * copy_words() * 4; }
  CHELA_HOST_DEVICE constexpr int groups() const { return slab + 2 * tiles; }
  CHELA_HOST_DEVICE constexpr int rows_pitch() const { return groups() * 128; }
  CHELA_HOST_DEVICE constexpr int bytes() const { return conv_channels * (taps_pitch() + rows_pitch()); }
};

/// Copies this warp's channel's taps of the slab that ends before group `end`.
__device__ inline void load_slab_taps(const ToeplitzTaps& taps, const ToeplitzLags& lags, Index end, Index channel,
                                      std::uint32_t shared, const ToeplitzShared& plan) {
  const int units = 8 * lags.slab + 1, lane = int(threadIdx.x) % 32;
  const std::uint32_t* from = taps.words + 2 * channel * lags.words() + 32 * (lags.end_group - end) + 4 * lane;
  shared += std::uint32_t(16 * lane);
  for (int copy = 0; copy < 2; ++copy, from += lags.words(), shared += std::uint32_t(4 * plan.copy_words()))
    for (int unit = lane; unit < units; unit += 32)
      arch::copy_async_16(shared + std::uint32_t(16 * (unit - lane)), from + 4 * (unit - lane), true);
}

/// Halves of a word that are infinite or NaN, as ones.
template <HalfElement T>
__device__ std::uint32_t not_finite(std::uint32_t word) {
  constexpr std::uint32_t exponents = std::same_as<T, __half> ? 0x7c007c00u : 0x7f807f80u;
  return __vcmpeq2(word & exponents, exponents);
}

/// One warp's outputs of one channel. Groups of 64 tokens are counted from the first output's.
template <HalfElement T, int R>
class ToeplitzWarp {
 public:
  __device__ ToeplitzWarp(const ToeplitzLags& lags, int first_input, int end_input, int end_tile)
      : lags_(lags), first_input_(first_input), end_input_(end_input), end_tile_(end_tile) {}

  /// Adds what a slab of groups [begin, end) of lags gives: its taps, and inputs from group -end on.
  __device__ void add(int begin, int end, std::uint32_t rows, std::uint32_t taps, int copy_words) {
    const int lane = int(threadIdx.x) % 32, n = lane / 4, q = lane % 4;
    const std::uint32_t lane_taps = taps + std::uint32_t(4 * ((n & 1) * copy_words + 32 * end - ((n + 1) >> 1) + q));
    const std::uint32_t row_zero = rows + std::uint32_t(128 * end);
    const int first_full = max(int(lags_.first_full), 4 * begin), end_full = min(int(lags_.end_full), 4 * end);
    for (int part = 0; part < 8; ++part) {
      const int first = max((first_full - part + 7) >> 3, -((end_input_ + 1) >> 1));
      const int last = min((end_full - part + 7) >> 3, R - (first_input_ >> 1));
      if (first < last) add_full(part, first, last, row_zero, lane_taps);
    }
    const int first = max(int(lags_.first_operand), 4 * begin), last = min(int(lags_.end_operand), 4 * end);
    for (int operand = first; operand < last; ++operand) {
      if (operand >= first_full && operand < end_full) {
        operand = end_full - 1;
        continue;
      }
      add_partial(operand, row_zero, lane_taps, taps + std::uint32_t(128 * end));
    }
  }

  /// Adds skip times the outputs' own inputs.
  __device__ void add_skip(float skip, std::uint32_t row_zero) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      if (i < first_input_ || i >= end_input_) continue;
      const float2 x = arch::unpack<T>(arch::load_shared_word(own_word(row_zero, i)));
      sums_[i / 2][i % 2 * 2] += skip * x.x, sums_[i / 2][i % 2 * 2 + 1] += skip * x.y;
    }
  }

  /// Writes the outputs times `factor` to shared memory.
  __device__ void store(float factor, std::uint32_t row_zero) const {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i)
      arch::store_shared_word(own_word(row_zero, i),
                              arch::pack<T>(factor * sums_[i / 2][i % 2 * 2], factor * sums_[i / 2][i % 2 * 2 + 1]));
  }

 private:
  /// Of the two outputs that this lane has in half a tile.
  __device__ static std::uint32_t own_word(std::uint32_t row_zero, int half_tile) {
    return row_zero + std::uint32_t(half_tile * 128 + int(threadIdx.x) % 32 * 4);
  }

  /// The tiles that meet any input at operands of group `lag` of 128 lags, as bits.
  __device__ unsigned meeting_tiles(int lag) const {
    const int first = max(0, (first_input_ >> 1) + lag), end = min(end_tile_, ((end_input_ + 1) >> 1) + lag + 1);
    return first < end ? ((1u << end) - 1) & ~((1u << first) - 1) : 0u;
  }

  /// Operands 8 j + part for j in [first, last): all of their taps are the kernel's.
  __device__ void add_full(int part, int first, int last, std::uint32_t row_zero, std::uint32_t lane_taps) {
    const int lane = int(threadIdx.x) % 32;
    const std::uint32_t lane_row =
        row_zero + std::uint32_t(16 * (lane / 8 % 2 * 8 - lane / 16 + lane % 8 - 2 * part - 16 * first));
    std::uint32_t a[R][4];  // tile i's for j in place i - j, and that modulo R
#pragma unroll
    for (int i = 0; i < R; ++i) arch::load_matrices(a[i], lane_row + std::uint32_t(i * 256));
    std::uint32_t tap = lane_taps - std::uint32_t(32 * (8 * first + part)), row = lane_row;
    std::uint32_t b[2] = {arch::load_shared_word(tap), arch::load_shared_word(tap - 16)};
    for (int j0 = first; j0 < last; j0 += R, tap -= R * 256, row -= R * 256)
#pragma unroll
      for (int u = 0; u < R; ++u) {
        const int j = j0 + u;
        if (j >= last) break;
        const unsigned tiles = meeting_tiles(j);
        const std::uint32_t b0 = b[0], b1 = b[1];
        const auto multiply = [&](int i) {
          if (tiles & (1u << i)) arch::multiply_add<T>(sums_[i], a[(i - u + R) % R], b0, b1);
        };
        multiply(R - 1);
        if (j + 1 < last) {
          arch::load_matrices(a[R - 1 - u], row - std::uint32_t((u + 1) * 256));
          b[0] = arch::load_shared_word(tap - std::uint32_t((u + 1) * 256));
          b[1] = arch::load_shared_word(tap - std::uint32_t((u + 1) * 256 + 16));
        }
#pragma unroll
        for (int i = R - 2; i >= 0; --i) multiply(i);
      }
  }

  /// One operand with taps of zero where the kernel has none.
  __device__ void add_partial(int operand, std::uint32_t row_zero, std::uint32_t lane_taps, std::uint32_t last_tap) {
    const int lane = int(threadIdx.x) % 32;
    const std::uint32_t lane_row =
        row_zero + std::uint32_t(16 * (lane / 8 % 2 * 8 - lane / 16 + lane % 8 - 2 * operand));
    const std::uint32_t tap = lane_taps - std::uint32_t(32 * operand);
    const std::uint32_t b0 = arch::load_shared_word(tap), b1 = arch::load_shared_word(tap - 16);
    const unsigned tiles = meeting_tiles(operand >> 3);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (!(tiles & (1u << i))) continue;
      std::uint32_t a[4], infinite = 0;
      arch::load_matrices(a, lane_row + std::uint32_t(i * 256));
#pragma unroll
      for (std::uint32_t& word : a) {
        const std::uint32_t found = not_finite<T>(word);
        word &= ~found, infinite |= found;
      }
      arch::multiply_add<T>(sums_[i], a, b0, b1);
      if (__any_sync(~0u, infinite != 0)) add_infinite(sums_[i], operand, row_zero + std::uint32_t(i * 256), last_tap);
    }
  }

  /// What infinite inputs and NaN give in one operand and tile: each to the outputs that it reaches.
  __device__ void add_infinite(float (&sums)[4], int operand, std::uint32_t tile_rows, std::uint32_t last_tap) const {
    const int lane = int(threadIdx.x) % 32, n = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int k = 0; k < 16; ++k) {
      const int block = 2 * operand + k / 8, e = k % 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t element = tile_rows + std::uint32_t(16 * (n + 8 * half - block) + 2 * e);
        const std::uint32_t word = arch::load_shared_word(element & ~3u) >> (element & 2 ? 16 : 0);
        if (!(not_finite<T>(word) & 0xffff)) continue;
        const float x = arch::unpack<T>(word).x;
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int lag = 8 * block + 2 * q + odd - e;
          if (lag < lags_.least || lag > lags_.most) continue;
          const std::uint32_t tap = last_tap - std::uint32_t(2 * lag);
          sums[2 * half + odd] += x * arch::unpack<T>(arch::load_shared_word(tap & ~3u) >> (tap & 2 ? 16 : 0)).x;
        }
      }
    }
  }

  const ToeplitzLags& lags_;
  int first_input_, end_input_, end_tile_;
  float sums_[R][4] = {};
};

/// A block has eight channels, a warp each, and `tiles_each` tiles of 128 R outputs in a row.
template <HalfElement T, int R>
__global__ void __launch_bounds__(toeplitz_threads, R > 4 ? 2 : 3)
    toeplitz_kernel(const __grid_constant__ ToeplitzCall<T> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const ToeplitzLags& lags = call.lags;
  const ToeplitzShared plan{lags.slab, R};
  const Index groups = ceil_div(call.channels, conv_channels);
  const Index first_channel = blockIdx.x % groups * conv_channels, channel = first_channel + threadIdx.x / 32;
  const int warp = int(threadIdx.x) / 32;
  const std::uint32_t all_taps = arch::shared_address(shared), all_rows = all_taps + conv_channels * plan.taps_pitch();
  const std::uint32_t taps = all_taps + std::uint32_t(warp * plan.taps_pitch());
  const std::uint32_t rows = all_rows + std::uint32_t(warp * plan.rows_pitch());
  const bool exists = channel < call.channels;

  Index loaded = lags.end_group;  // the slab of taps in shared memory: none
  const Index first_number = blockIdx.x / groups * call.tiles_each;
  for (Index number = first_number; number < min(first_number + call.tiles_each, call.tiles.size()); ++number) {
    const SequenceTile tile = call.tiles[number];
    const auto x_rows = [&] { return ConvRows<const T>(call.x, tile.sequence, tile.rows); };
    const auto y_rows = [&] { return ConvRows<T>(call.y, tile.sequence, tile.rows); };
    if (tile.rows.count == 0 || !y_rows().meets(tile.first, 128 * R)) continue;
    const bool shares = shares_channels(x_rows(), first_channel) || shares_channels(y_rows(), first_channel);
    const auto groups_to = [&](Index position) { return int(floor_div(position - tile.first, 64)); };
    const int first_input = groups_to(x_rows().begin()), end_input = groups_to(x_rows().end() + 63);
    const int end_tile = int(min(Index(R), ceil_div(y_rows().end() - tile.first, 128)));
    ToeplitzWarp<T, R> outputs(lags, first_input, end_input, end_tile);
    for (int begin = int(lags.first_group); begin < int(lags.end_group); begin += lags.slab) {
      const int end = begin + lags.slab;
      if (2 * R - begin <= first_input || -end >= end_input) continue;
      sync(shares);
      // A tile that meets inputs reads up to three groups of zeros before and behind them.
      const int first = max(-end, first_input - 3), last = min(2 * R - begin, end_input + 3);
      load_rows(x_rows(), tile.first + 64 * first, 8 * (last - first), first_channel,
                all_rows + std::uint32_t(128 * (first + end)), plan.rows_pitch());
      if (loaded != begin && exists) load_slab_taps(call.taps, lags, end, channel, taps, plan);
      loaded = begin;
      arch::commit_copies();
      arch::wait_copies<0>();
      sync(shares);
      outputs.add(begin, end, rows, taps, plan.copy_words());
      if (call.skip.present() && begin <= 0 && end > 0)
        outputs.add_skip(exists ? call.taps.scales[4 * channel] * call.skip(channel) : 0,
                         rows + std::uint32_t(128 * end));
    }
    __syncwarp();
    outputs.store(exists ? call.taps.scales[4 * channel + 1] : 0, rows);
    sync(shares);
    store_rows(y_rows(), tile.first, 16 * end_tile, first_channel, all_rows, plan.rows_pitch());
  }
}

template <HalfElement T, int R>
Status launch_toeplitz(ToeplitzCall<T> call, cudaStream_t stream) {
  constexpr Index enough_blocks = 2048, most_tiles = 8;
  const Index groups = ceil_div(call.channels, conv_channels), tiles = call.tiles.size();
  if (call.lags.end_group - call.lags.first_group == call.lags.slab)
    call.tiles_each = std::clamp<Index>(tiles * groups / enough_blocks, 1, most_tiles);
  const Index blocks = groups * ceil_div(tiles, call.tiles_each);
  if (blocks >= Index(1) << 31)
    return {Code::unsupported, "x is too large for one call on the GPU; call with fewer sequences"};
  return launch(toeplitz_kernel<T, R>, dim3(unsigned(blocks)), toeplitz_threads,
                ToeplitzShared{call.lags.slab, R}.bytes(), stream, call);
}

}  // namespace chela::cuda::detail
