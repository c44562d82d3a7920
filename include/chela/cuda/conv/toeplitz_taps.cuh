#pragma once
// A kernel as operands of tensor cores. With tokens written as t = 8 a + c and s = 8 (a - m) + e, a convolution is
//
//   Y[a][c] = sum_m sum_e X[a - m][e] K_m[e][c],    X[a][e] = x[8 a + e],    K_m[e][c] = k[8 m + c - e]
//
// products of the rows of X, each 16 bytes, with 8x8 Toeplitz blocks of which two (m even, and the next) are one operand.
// Its registers are pairs (k[j], k[j - 1]): neighbours in a list of taps from the last lag to the first, of which there
// are two copies, one an element further on, so that every pair is a word.
#include <algorithm>

#include "chela/core/tensor_view.hpp"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// A kernel's lags, and the groups of 64 lags (eight blocks, four operands) that they lie in.
struct ToeplitzLags {
  Index least = 0, most = 0;  ///< the kernel's lags
  /// Operands p hold lags 16 p - 7 to 16 p + 15: those that meet the kernel, and those that it fills.
  Index first_operand = 0, end_operand = 0, first_full = 0, end_full = 0;
  Index first_group = 0, end_group = 0;  ///< of four operands; in slabs of `slab` groups
  int slab = 1;

  constexpr ToeplitzLags() = default;
  constexpr ToeplitzLags(Index least_lag, Index most_lag, int slab_groups)
      : least(least_lag), most(most_lag), slab(slab_groups) {
    first_operand = -floor_div(15 - least, 16), end_operand = floor_div(most + 7, 16) + 1;
    first_full = -floor_div(-7 - least, 16), end_full = std::max(first_full, floor_div(most - 15, 16) + 1);
    first_group = floor_div(first_operand, 4);
    end_group = first_group + round_up(floor_div(end_operand + 3, 4) - first_group, slab);
  }

  /// Words of one copy of the taps.
  CHELA_HOST_DEVICE constexpr Index words() const { return 32 * (end_group - first_group) + 4; }
  constexpr std::size_t bytes(Index channels) const {
    return std::size_t(channels) * (2 * std::size_t(words()) + 4) * sizeof(std::uint32_t);
  }
};

/// The taps [channel][copy][word] in memory, and what each channel's are multiplied by: a power of two, as half the
/// types have too few exponents for taps of any size.
struct ToeplitzTaps {
  std::uint32_t* words = nullptr;
  float* scales = nullptr;  ///< [channel][4]: the scale, and one over it

  ToeplitzTaps(void* memory, const ToeplitzLags& lags, Index channels)
      : words(static_cast<std::uint32_t*>(memory)),
        scales(reinterpret_cast<float*>(words + 2 * lags.words() * channels)) {}
  ToeplitzTaps() = default;
};

struct ToeplitzTapsCall {
  TensorView<const float, 2> taps = {}, back_taps = {};
  bool reversed = false;  ///< lag j of the operands is lag -j of the kernel
  ToeplitzLags lags = {};
  ToeplitzTaps to = {};
};

inline constexpr int toeplitz_taps_threads = 256;

/// One block a channel.
template <HalfElement T>
__global__ void __launch_bounds__(toeplitz_taps_threads)
    toeplitz_taps_kernel(const __grid_constant__ ToeplitzTapsCall call) {
  const Index channel = blockIdx.x;
  const auto tap = [&](Index lag) {
    if (lag < call.lags.least || lag > call.lags.most) return 0.0f;
    const Index j = call.reversed ? -lag : lag;
    return j >= 0 ? call.taps(channel, j) : call.back_taps(channel, -1 - j);
  };
  float scale = 1;
  if constexpr (std::same_as<T, __half>) {
    __shared__ float largest[toeplitz_taps_threads / 32];
    float most = 0;
    for (Index lag = call.lags.least + threadIdx.x; lag <= call.lags.most; lag += toeplitz_taps_threads)
      most = fmaxf(most, fabsf(tap(lag)));
    for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    for (float other : largest) most = fmaxf(most, other);
    // To [2^14, 2^15). Exponents stay where one over the scale is a float too.
    if (most > 0 && most <= 0x1.fffffep127f) scale = ldexpf(1.0f, min(max(14 - ilogbf(most), -100), 100));
  }
  if (threadIdx.x == 0) call.to.scales[4 * channel] = scale, call.to.scales[4 * channel + 1] = 1 / scale;
  const Index words = call.lags.words(), last = 64 * call.lags.end_group;
  for (Index i = threadIdx.x; i < 2 * words; i += toeplitz_taps_threads) {
    const Index lag = last - (i < words ? 2 * i : 2 * (i - words) + 1);
    call.to.words[channel * 2 * words + i] = arch::pack<T>(scale * tap(lag), scale * tap(lag - 1));
  }
}

template <HalfElement T>
Status make_toeplitz_taps(const ToeplitzTapsCall& call, cudaStream_t stream) {
  const Index channels = call.taps.extents[0];
  return launch(toeplitz_taps_kernel<T>, dim3(unsigned(channels)), toeplitz_taps_threads, 0, stream, call);
}

}  // namespace chela::cuda::detail
