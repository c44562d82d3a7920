#pragma once
// Inputs or outputs of a long convolution as a block of threads sees them: one sequence's tokens with those of its state
// before them, channels taken eight at a time, moved between global memory in any layout and shared memory as
// [channel][token].
#include <cstdint>

#include "chela/conv/long.hpp"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// How units of eight elements lie in a tensor [batch, token, channel].
enum class UnitLayout {
  none,        ///< elements one by one
  of_tokens,   ///< eight tokens of a channel side by side, aligned
  of_channels  ///< eight channels of a token side by side, aligned
};

template <class T>
UnitLayout unit_layout(TensorView<T, 3> view) {
  const auto spaced = [&](int axis) { return view.extents[axis] <= 1 || view.strides[axis] % 8 == 0; };
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0 || !spaced(0)) return UnitLayout::none;
  if (view.strides[2] == 1 && spaced(1)) return UnitLayout::of_channels;
  if (view.strides[1] == 1 && spaced(2)) return UnitLayout::of_tokens;
  return UnitLayout::none;
}

/// Tokens of all sequences, and the rows before them.
template <class T>
struct ConvTensors {
  TensorView<T, 3> tokens = {};  ///< [batch, token, channel]
  TensorView<T, 3> state = {};   ///< [sequence, history, channel], or absent
  UnitLayout layout = UnitLayout::none;
};

template <class T>
ConvTensors<T> conv_tensors(TensorView<T, 3> tokens, TensorView<T, 3> state) {
  return {tokens, state, unit_layout(tokens)};
}

/// Those of one sequence: positions from begin() to end() - 1, where positions below zero are the state's.
template <class T>
struct ConvRows {
  TensorView<T, 2> tokens = {};  ///< [token, channel], or absent
  TensorView<T, 2> state = {};   ///< [history, channel], or absent
  Index channels = 0;
  UnitLayout layout = UnitLayout::none;

  __device__ ConvRows(const ConvTensors<T>& all, Index sequence, const Sequence& rows) : layout(all.layout) {
    if (all.state.present()) state = slice(all.state, sequence), channels = state.extents[1];
    if (all.tokens.present()) {
      tokens = run(slice(all.tokens, rows.batch), 0, rows.begin, rows.count);
      channels = tokens.extents[1];
    }
    if (layout == UnitLayout::of_tokens && rows.begin % 8 != 0) layout = UnitLayout::none;
  }

  __device__ Index begin() const { return -state.extents[0]; }
  __device__ Index end() const { return tokens.extents[0]; }
  __device__ T* at(Index position, Index channel) const {
    return position >= 0 ? &tokens(position, channel) : &state(state.extents[0] + position, channel);
  }
  __device__ bool has(Index position, Index channel) const {
    return position >= begin() && position < end() && channel < channels;
  }
  __device__ bool meets(Index first, Index count) const { return first < end() && first + count > begin(); }
};

inline constexpr int conv_channels = 8;

/// Positions [first, first + 8) of a channel as a unit, elements one by one; zero where there is none. Not unrolled
/// further: it is rare, and would take registers from what is not.
template <class T>
__device__ uint4 gather_unit(const ConvRows<const T>& rows, Index first, Index channel) {
  std::uint64_t low = 0, high = 0;  // elements enter at the top, and the first ends at the bottom
#pragma unroll 4
  for (int i = 0; i < 8; ++i) {
    std::uint64_t bits = 0;
    if (rows.has(first + i, channel)) bits = reinterpret_cast<const unsigned short&>(*rows.at(first + i, channel));
    low = low >> 16 | high << 48, high = high >> 16 | bits << 48;
  }
  return {std::uint32_t(low), std::uint32_t(low >> 32), std::uint32_t(high), std::uint32_t(high >> 32)};
}

template <class T>
__device__ void scatter_unit(const ConvRows<T>& rows, Index first, Index channel, uint4 unit) {
  std::uint64_t low = std::uint64_t(unit.y) << 32 | unit.x, high = std::uint64_t(unit.w) << 32 | unit.z;
#pragma unroll 4
  for (int i = 0; i < 8; ++i) {
    const auto bits = static_cast<unsigned short>(low);
    if (rows.has(first + i, channel)) *rows.at(first + i, channel) = reinterpret_cast<const T&>(bits);
    low = low >> 16 | high << 48, high >>= 16;
  }
}

/// Exchanges rows and columns of eight units of 16-bit elements.
__device__ inline void transpose_units(uint4 (&units)[8]) {
  std::uint32_t turned[8][4];
#pragma unroll
  for (int row = 0; row < 8; row += 2) {
    const std::uint32_t a[4] = {units[row].x, units[row].y, units[row].z, units[row].w};
    const std::uint32_t b[4] = {units[row + 1].x, units[row + 1].y, units[row + 1].z, units[row + 1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      turned[2 * i][row / 2] = __byte_perm(a[i], b[i], 0x5410);
      turned[2 * i + 1][row / 2] = __byte_perm(a[i], b[i], 0x7632);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) units[i] = {turned[i][0], turned[i][1], turned[i][2], turned[i][3]};
}

/// Whether threads of all warps move what lies in shared memory for each channel; else a warp moves its own.
template <class T>
__device__ bool shares_channels(const ConvRows<T>& rows, Index first_channel) {
  return rows.layout == UnitLayout::of_channels && first_channel + conv_channels <= rows.channels;
}

/// Waits for the block, or only for the warp where each moves its own.
__device__ inline void sync(bool shares) {
  if (shares)
    __syncthreads();
  else
    __syncwarp();
}

/// Brings positions [first, first + 8 units) of eight channels, a warp each, into shared memory, `pitch` bytes a
/// channel; what is nowhere is zero. All threads of the block; copies are under way until they are waited for.
template <class T>
__device__ void load_rows(const ConvRows<const T>& rows, Index first, int units, Index first_channel,
                          std::uint32_t shared, int pitch) {
  if (shares_channels(rows, first_channel)) {
    const Index stride = rows.tokens.strides[0];
    for (int u = int(threadIdx.x); u < units; u += int(blockDim.x)) {
      const Index position = first + 8 * u;
      const std::uint32_t to = shared + std::uint32_t(u * 16);
      if (position < 0 && rows.begin() < 0) {
        for (int c = 0; c < 8; ++c)
          arch::store_shared_unit(to + std::uint32_t(c * pitch), gather_unit(rows, position, first_channel + c));
        continue;
      }
      const T* from = &rows.tokens(position, first_channel);
      const int low = position < 0 ? 8 : 0, high = int(max(Index(0), min(Index(8), rows.end() - position)));
      uint4 unit[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        unit[i] = i >= low && i < high ? *reinterpret_cast<const uint4*>(from + i * stride) : uint4{};
      transpose_units(unit);
#pragma unroll
      for (int c = 0; c < 8; ++c) arch::store_shared_unit(to + std::uint32_t(c * pitch), unit[c]);
    }
    return;
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const Index channel = first_channel + warp;
  const bool whole = rows.layout == UnitLayout::of_tokens && channel < rows.channels;
  const T* const from = whole ? &rows.tokens(first, channel) : nullptr;
  shared += std::uint32_t(warp * pitch);
  for (int u = lane; u < units; u += 32) {
    const Index position = first + 8 * u;
    const std::uint32_t to = shared + std::uint32_t(u * 16);
    if (whole && position >= 0 && position + 8 <= rows.end())
      arch::copy_async_16(to, from + 8 * u, true);
    else
      arch::store_shared_unit(to, rows.meets(position, 8) ? gather_unit(rows, position, channel) : uint4{});
  }
}

/// The reverse, for positions that exist.
template <class T>
__device__ void store_rows(const ConvRows<T>& rows, Index first, int units, Index first_channel, std::uint32_t shared,
                           int pitch) {
  if (shares_channels(rows, first_channel)) {
    const Index stride = rows.tokens.strides[0];
    for (int u = int(threadIdx.x); u < units; u += int(blockDim.x)) {
      const Index position = first + 8 * u;
      if (!rows.meets(position, 8)) continue;
      uint4 unit[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) unit[c] = arch::load_shared_unit(shared + std::uint32_t(c * pitch + u * 16));
      if (position < 0) {
#pragma unroll
        for (int c = 0; c < 8; ++c) scatter_unit(rows, position, first_channel + c, unit[c]);
        continue;
      }
      transpose_units(unit);
      T* const to = &rows.tokens(position, first_channel);
      const int high = int(min(Index(8), rows.end() - position));
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < high) *reinterpret_cast<uint4*>(to + i * stride) = unit[i];
    }
    return;
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const Index channel = first_channel + warp;
  if (channel >= rows.channels) return;
  const bool whole = rows.layout == UnitLayout::of_tokens;
  T* const to = whole ? &rows.tokens(first, channel) : nullptr;
  shared += std::uint32_t(warp * pitch);
  for (int u = lane; u < units; u += 32) {
    const Index position = first + 8 * u;
    if (!rows.meets(position, 8)) continue;
    const uint4 unit = arch::load_shared_unit(shared + std::uint32_t(u * 16));
    if (whole && position >= 0 && position + 8 <= rows.end())
      *reinterpret_cast<uint4*>(to + 8 * u) = unit;
    else
      scatter_unit(rows, position, channel, unit);
  }
}

/// Of the kernels that sum the gradient of taps, by lags.
template <class T>
struct TapsGradientCall {
  ConvTensors<const T> x = {}, grad_y = {};
  SequenceBatch sequences = {};
  Index channels = 0, least = 0, lags = 0;  ///< the kernel's lags: `lags` from `least` on
  Index tiles = 1, runs = 1;
  float* sums = nullptr;  ///< [run][channel][lag]
};

}  // namespace chela::cuda::detail
