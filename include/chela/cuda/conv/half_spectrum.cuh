#pragma once
// Spectra of long kernels in 16 bits, and what all kernels of the transform share: the place of a row in the grid, and
// its constants, which are made just before the spectra.
#include "chela/cuda/arch/dependent_launch.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_block_row.cuh"
#include "chela/cuda/conv/half_rows.cuh"
#include "chela/cuda/conv/half_warp_row.cuh"

namespace chela::cuda::detail {

/// The spectra of all channels' kernels, divided by a power of two that brings them under 1, and by the points of the way
/// back that PartBackward does not divide by.
struct HalfSpectrumView {
  uint4* units = nullptr;  ///< [channel][unit][lane], as the organisation of a row has its middle
  float* scale = nullptr;  ///< [channel]
  uint4* roots = nullptr;  ///< [unit][lane]
};

template <class Row>
inline constexpr int spectrum_units = 16 * Row::pairs* Row::portions;

struct HalfSpectrumCall {
  TensorView<const float, 2> taps = {}, back_taps = {};  ///< [channel, lag]
  TensorView<const float, 1> skip = {};
  int channels = 0, taps_met = 0, back_taps_met = 0;
  HalfSpectrumView spectrum = {};
};

/// Which row a warp works on, and the row's own memory.
template <class Row>
struct RowPlace {
  int row, warp;  ///< of all rows; of the row's
  char* memory;

  __device__ RowPlace(char* shared, int bytes_per_row) {
    const int warp_of_block = int(threadIdx.x) / 32;
    row = int(blockIdx.x) * Row::rows_per_block + warp_of_block / Row::warps;
    warp = warp_of_block % Row::warps;
    memory = shared + warp_of_block / Row::warps * bytes_per_row;
  }
};

inline constexpr int root_threads = 64;

template <class Row, bool TwoSided>
inline constexpr int spectrum_row_bytes = [] {
  constexpr int staged = (TwoSided ? 2 : 1) * StagedInput<Row::residues>::bytes;
  return staged > Row::work_bytes ? staged : Row::work_bytes;
}();

/// The constants of all rows.
template <class Row>
__global__ void __launch_bounds__(root_threads) half_roots_kernel(const __grid_constant__ HalfSpectrumView spectrum) {
  arch::let_next_kernel_start();
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < 32 * Row::roots) spectrum.roots[i] = Row::root(i / 32, i % 32);
}

/// The spectrum of one channel in a row of the grid. It may start before the constants are there.
template <class Row, bool TwoSided>
__global__ void __launch_bounds__(32 * Row::warps * Row::rows_per_block,
                                  Row::warps == 1 ? 2 : Row::blocks_per_multiprocessor)
    half_spectrum_kernel(const __grid_constant__ HalfSpectrumCall call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const RowPlace<Row> place(reinterpret_cast<char*>(shared), spectrum_row_bytes<Row, TwoSided>);
  if (place.row >= call.channels) return;
  const int channel = place.row, lane = int(threadIdx.x) % 32;
  Row row(place.memory, place.warp, lane);
  const float* const taps = call.taps.data + channel * call.taps.strides[0];
  const float* const back = TwoSided ? call.back_taps.data + channel * call.back_taps.strides[0] : nullptr;
  const float skip = call.skip.data ? call.skip(channel) : 0.f;
  const auto tap = [&](int n) {
    const float t = n < call.taps_met ? taps[n * call.taps.strides[1]] : 0.f;
    return n == 0 ? t + skip : t;
  };
  // A tap that looks m tokens ahead is coefficient N - m, times -i.
  const auto back_tap = [&](int n) {
    const int m = Row::points - n;
    return m <= call.back_taps_met ? -back[(m - 1) * call.back_taps.strides[1]] : 0.f;
  };

  // Four neighbours at a time.
  const bool in_fours = call.taps.strides[1] == 1 && reinterpret_cast<std::uintptr_t>(taps) % 16 == 0;
  const auto four_taps = [&](int n) {
    if (in_fours && n > 0 && n + 4 <= call.taps_met) return __ldg(reinterpret_cast<const float4*>(taps + n));
    return float4{tap(n), tap(n + 1), tap(n + 2), tap(n + 3)};
  };
  const auto four_back_taps = [&](int n) {
    return float4{back_tap(n), back_tap(n + 1), back_tap(n + 2), back_tap(n + 3)};
  };
  const auto for_fours = [&](const auto& f) {
#pragma unroll 8
    for (int n = 4 * row.thread(); n < Row::points; n += 4 * Row::threads) f(n);
  };
  const auto magnitude = [](float4 x) { return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))); };

  float most = 0;
  for_fours([&](int n) {
    most = fmaxf(most, magnitude(four_taps(n)));
    if constexpr (TwoSided) most = fmaxf(most, magnitude(four_back_taps(n)));
  });
  const PowerOfTwo in(row.largest(most));
  using Layout = StagedInput<Row::residues>;
  float total = 0;
  for_fours([&](int n) {
    const auto put = [&](char* staged, float4 x) {
      x = {in.factor * x.x, in.factor * x.y, in.factor * x.z, in.factor * x.w};
      total += (fabsf(x.x) + fabsf(x.y)) + (fabsf(x.z) + fabsf(x.w));
      *reinterpret_cast<uint2*>(staged + Layout::point(n)) = {arch::pack<__half>(x.x, x.y),
                                                              arch::pack<__half>(x.z, x.w)};
    };
    put(place.memory, four_taps(n));
    if constexpr (TwoSided) put(place.memory + Layout::bytes, four_back_taps(n));
  });
  // No point is larger than the sum of all magnitudes, to rounding.
  const PowerOfTwo out(fmaxf(1.02f * row.sum(total), 0x1p-2f));
  row.sync();
  RowWords<Row::own> words[TwoSided ? 2 : 1];
#pragma unroll
  for (int part = 0; part < (TwoSided ? 2 : 1); ++part)
    read_staged_row<Row::residues, Row::own>(words[part], place.memory + part * Layout::bytes, row.first_residue(),
                                             lane);
  row.sync();

  arch::wait_for_last_kernel();
  const StoredRoots roots{arch::made_anew(call.spectrum.roots), lane};
  row.forward(PartForward<TwoSided>(roots), [&](int c, bool imaginary, int q, int k) {
    const RowWords<Row::own>& x = words[TwoSided && imaginary ? 1 : 0];
    return pair_of<__half>(x[4 * k + q][c / 2], x[4 * k + 2 + q][c / 2], c & 1);
  });
  uint4* const units = call.spectrum.units + Index(channel) * spectrum_units<Row> + lane;
  const float factor = out.factor / float(Row::normalisation);
  row.template middle<true, false>(roots, [&](int portion, ComplexPair(&z)[Row::pairs]) {
    const auto scaled = [&](ComplexPair x) {
      const float2 re = __half22float2(x.re), im = __half22float2(x.im);
      return ComplexPair{__floats2half2_rn(factor * re.x, factor * re.y),
                         __floats2half2_rn(factor * im.x, factor * im.y)};
    };
#pragma unroll
    for (int i = 0; i < Row::pairs / 2; ++i)
      units[(portion * (Row::pairs / 2) + i) * 32] = unit_of(scaled(z[2 * i]), scaled(z[2 * i + 1]));
  });
  if (row.thread() == 0) call.spectrum.scale[channel] = in.inverse * out.inverse;
}

}  // namespace chela::cuda::detail
