#pragma once
// Rows of transforms too long for a thread block, for 16-bit data: complex points that lie in memory between the passes
// over columns, which are in float (float_transform_columns.cuh). A block transforms a row on tensor cores as if it were
// one of tokens, with imaginary parts (half_parts.cuh): columns turn what they hand over to be modulo x^N - i.
//
// Rows are scaled by powers of two to less than 2: no point of a spectrum is larger than 2 sqrt(2) 16384 < 65504.
#include <concepts>

#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/float_transform_rows.cuh"
#include "chela/cuda/conv/half_spectrum.cuh"

namespace chela::cuda::detail {

/// A row's points in registers, as pairs of 16-bit numbers: what belongs to residue c of tokens belongs to 2 c and
/// 2 c + 1 of these.
template <class Row>
struct HalfPoints {
  static constexpr int residues = 2 * Row::residues, own = 2 * Row::own;
  static constexpr int staged_bytes = StagedInput<residues>::bytes > StagedOutput<residues>::bytes
                                          ? StagedInput<residues>::bytes
                                          : StagedOutput<residues>::bytes;
  RowWords<own> words;
  float scale;  ///< that the points are to be multiplied by

  /// 2^run_shift neighbouring points share one of the scales.
  __device__ __forceinline__ HalfPoints(const Row& row, const __half2* points, const float* scales, int run_shift,
                                        char* memory) {
    fetch_row<residues, Row::threads>(memory, reinterpret_cast<const __half*>(points), 2 * Row::points, true,
                                      row.thread());
    float most = 0;
#pragma unroll 2
    for (int i = row.thread(); i < Row::points >> run_shift; i += Row::threads) most = fmaxf(most, scales[i]);
    scale = row.largest(most);
    arch::wait_copies<0>();
    row.sync();
    read_staged_row<residues, own>(words, memory, 2 * row.first_residue(), row.lane());
    row.sync();
    constexpr int one = 127 << 23, shortest_run = StoredPoints<__half2>::shortest_run;
    for_input_runs(row.lane(), [&](int i, int a, int b) {
      const int first = Row::residues * (16 * a + b) + row.first_residue();
#pragma unroll
      for (int e = 0; e < Row::own; e += shortest_run) {
        const int bits_of_scale = __float_as_int(scales[(first + e) >> run_shift]);
        const __half2 factor = __float2half2_rn(__int_as_float(max(0, one + bits_of_scale - __float_as_int(scale))));
#pragma unroll
        for (int n = e; n < e + shortest_run; ++n) words[i][n] = bits(__hmul2(halves(words[i][n]), factor));
      }
    });
  }

  /// As PartForward asks for them.
  __device__ __forceinline__ std::uint32_t operator()(int c, bool imaginary, int q, int k) const {
    return __byte_perm(words[4 * k + q][c], words[4 * k + 2 + q][c], imaginary ? 0x7632 : 0x5410);
  }

  /// The sum of all magnitudes of real and of imaginary parts, of all threads.
  __device__ __forceinline__ float sum(const Row& row) const {
    float total = 0;
#pragma unroll
    for (const auto& run : words)
#pragma unroll
      for (const std::uint32_t word : run) {
        const float2 x = __half22float2(__habs2(halves(word)));
        total += x.x + x.y;
      }
    return row.sum(total);
  }
};

template <class Row>
inline constexpr int half_points_bytes =
    HalfPoints<Row>::staged_bytes > Row::work_bytes ? HalfPoints<Row>::staged_bytes : Row::work_bytes;

/// Where the units of a row's spectrum lie for this thread.
template <class Row>
__device__ inline uint4* spectrum_of(const StoredPoints<__half2>& spectra, Index row, int lane) {
  return reinterpret_cast<uint4*>(spectra.points + row * Row::points) + lane;
}

/// From the spectrum that `row.middle` left to points in memory, times a factor.
template <class Row>
__device__ __forceinline__ void put_points(const Row& row, const StoredRoots& roots, const StoredPoints<__half2>& to,
                                           Index at, float factor, float scale, char* memory) {
  constexpr int residues = HalfPoints<Row>::residues;
  RowResults<__half, HalfPoints<Row>::own> results;
  row.template backward<true>(roots, [&](int c, const float(&re)[2][4], const float(&im)[2][4]) {
    results.take(2 * c, re, factor), results.take(2 * c + 1, im, factor);
  });
  row.sync();
  results.template write_staged<residues>(memory, 2 * row.first_residue(), row.lane());
  row.sync();
  send_row<residues, Row::threads>(reinterpret_cast<__half*>(to.points + at * Row::points), memory, 2 * Row::points,
                                   true, row.thread());
  if (row.thread() == 0) to.row_scales[at] = scale;
}

/// From points to their spectrum plus skip, divided by the result and by R: put(unit, spectrum) gets it for this thread's
/// units, which are under 1 / R.
template <class Row, class Put>
__device__ __forceinline__ float put_spectrum(Row& row, const StoredRoots& roots, const FloatRowsCall<__half2>& call,
                                              const StoredPoints<__half2>& from, int run_shift, Index transform,
                                              Index at, Index channel, char* memory, const Put& put) {
  const HalfPoints<Row> points(row, from.points + at * Row::points, from.run_scale(transform, 0, Row::points),
                               run_shift, memory);
  const float skip =
      call.skip.present() ? call.skip(call.first_channel + channel) / (float(call.columns) * points.scale) : 0.f;
  const PowerOfTwo out(fmaxf(1.02f * points.sum(row) + fabsf(skip), 0x1p-2f));
  row.forward(PartForward<true>(roots), points);
  const float factor = out.factor / float(Row::normalisation), constant = factor * skip;
  row.template middle<true, false>(roots, [&](int portion, ComplexPair(&z)[Row::pairs]) {
    const auto scaled = [&](ComplexPair x) {
      const float2 re = __half22float2(x.re), im = __half22float2(x.im);
      return ComplexPair{__floats2half2_rn(fmaf(factor, re.x, constant), fmaf(factor, re.y, constant)),
                         __floats2half2_rn(factor * im.x, factor * im.y)};
    };
#pragma unroll
    for (int i = 0; i < Row::pairs / 2; ++i)
      put((portion * (Row::pairs / 2) + i) * 32, unit_of(scaled(z[2 * i]), scaled(z[2 * i + 1])));
  });
  return points.scale * out.inverse;
}

template <class Row>
__global__ void __launch_bounds__(Row::threads, Row::blocks_per_multiprocessor)
    half_points_spectrum_kernel(const __grid_constant__ FloatRowsCall<__half2> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const PlaceOfRow place(call, blockIdx.x);
  if (!place.active) return;
  char* const memory = reinterpret_cast<char*>(shared);
  Row row(memory, int(threadIdx.x) / 32, int(threadIdx.x) % 32);
  uint4* const units = spectrum_of<Row>(call.spectrum_to, place.at, row.lane());
  const float scale =
      put_spectrum(row, StoredRoots{call.roots, row.lane()}, call, call.points_from, call.run_shift, place.transform,
                   place.at, place.channel, memory, [&](int unit, uint4 spectrum) { units[unit] = spectrum; });
  if (row.thread() == 0) call.spectrum_to.row_scales[place.at] = scale;
}

/// Points times a kernel's spectrum, or its conjugate. `Correlates`: before that, their product with the conjugate of a
/// spectrum takes its place in memory. `MakesKernel`: of the kernel there are points too.
template <class Row, bool Correlates, bool MakesKernel>
__global__ void __launch_bounds__(Row::threads,
                                  MakesKernel ? Row::blocks_per_multiprocessor - 1 : Row::blocks_per_multiprocessor)
    half_points_product_kernel(const __grid_constant__ FloatRowsCall<__half2> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const PlaceOfRow place(call, blockIdx.x);
  if (!place.active) return;
  char* const memory = reinterpret_cast<char*>(shared);
  Row row(memory, int(threadIdx.x) / 32, int(threadIdx.x) % 32);
  const auto roots = [&] { return StoredRoots{arch::made_anew(call.roots), row.lane()}; };
  const Index of_kernel = place.channel * call.columns + place.column;
  const uint4* kernel;
  float kernel_scale = 1;
  if constexpr (MakesKernel) {
    uint4* const units = reinterpret_cast<uint4*>(memory + half_points_bytes<Row>) + row.lane();
    kernel_scale = put_spectrum(row, roots(), call, call.kernel, call.kernel_run_shift, place.channel, of_kernel,
                                place.channel, memory, [&](int unit, uint4 spectrum) { units[unit] = spectrum; });
    kernel = units;
  } else {
    kernel = call.kernel.present() ? spectrum_of<Row>(call.kernel, of_kernel, row.lane()) : nullptr;
    if (kernel) kernel_scale = call.kernel.row_scales[of_kernel];
  }
  float scale;
  const StoredRoots now = roots();
  {
    const HalfPoints<Row> points(row, call.points_from.points + place.at * Row::points,
                                 call.points_from.run_scale(place.transform, 0, Row::points), call.run_shift, memory);
    scale = points.scale;
    row.forward(PartForward<true>(now), points);
  }
  uint4* const correlated = Correlates ? spectrum_of<Row>(call.correlate, place.at, row.lane()) : nullptr;
  const std::uint32_t sign = call.conjugate ? 0x80008000u : 0u;
  row.template middle<true, true>(now, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
    for (int i = 0; i < Row::pairs / 2; ++i) {
      const int at = (portion * (Row::pairs / 2) + i) * 32;
      ComplexPair first, second;
      if constexpr (Correlates) {
        take_unit(correlated[at], first, second);
        correlated[at] = unit_of(times_conjugate(z[2 * i], first), times_conjugate(z[2 * i + 1], second));
        if (!MakesKernel && !kernel) continue;
      }
      uint4 unit = kernel[at];
      unit.y ^= sign, unit.w ^= sign;
      take_unit(unit, first, second);
      z[2 * i] = z[2 * i] * first, z[2 * i + 1] = z[2 * i + 1] * second;
    }
  });
  if constexpr (Correlates) {
    if (row.thread() == 0) call.correlate.row_scales[place.at] *= scale * float(Row::normalisation);
    if (!MakesKernel && !kernel) return;
  }
  put_points(row, now, call.points_to, place.at, 1, scale * kernel_scale, memory);
}

/// The sum of the spectra of all sequences of a channel, in their order, to points.
template <class Row>
__global__ void __launch_bounds__(Row::threads, Row::blocks_per_multiprocessor)
    half_points_sum_kernel(const __grid_constant__ FloatRowsCall<__half2> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  char* const memory = reinterpret_cast<char*>(shared);
  const PlaceOfRow place(call, blockIdx.x);
  Row row(memory, int(threadIdx.x) / 32, int(threadIdx.x) % 32);
  const StoredRoots roots{call.roots, row.lane()};
  // Two pairs of points as re, im, re, im.
  const auto sum = [&](int unit, float(&x)[8]) {
    for (float& each : x) each = 0;
    for (Index i = 0; i < call.sequences.all.size(); ++i) {
      const Sequence tokens = sequence_inside(call.sequences.all, i);
      if (!call.sequences.has(tokens)) continue;
      const Index from = place.at + call.sequences.place(tokens, i) * call.columns;
      const uint4 term = spectrum_of<Row>(call.sum_from, from, row.lane())[unit];
      const float scale = call.sum_from.row_scales[from];
      const std::uint32_t words[4] = {term.x, term.y, term.z, term.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 pair = __half22float2(halves(words[w]));
        x[2 * w] = fmaf(scale, pair.x, x[2 * w]), x[2 * w + 1] = fmaf(scale, pair.y, x[2 * w + 1]);
      }
    }
  };
  float most = 0;
  for (int portion = int(threadIdx.x) / 32; portion < Row::portions; portion += Row::warps)
    for (int i = 0; i < Row::pairs / 2; ++i) {
      float x[8];
      sum((portion * (Row::pairs / 2) + i) * 32, x);
      for (const float each : x) most = fmaxf(most, fabsf(each));
    }
  const PowerOfTwo scale(row.largest(most));
  const float factor = scale.factor / float(Row::normalisation);
  row.template middle<false, true>(roots, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
    for (int i = 0; i < Row::pairs / 2; ++i) {
      float x[8];
      sum((portion * (Row::pairs / 2) + i) * 32, x);
      const auto pair = [&](int k) { return __floats2half2_rn(factor * x[k], factor * x[k + 1]); };
      z[2 * i] = {pair(0), pair(2)}, z[2 * i + 1] = {pair(4), pair(6)};
    }
  });
  constexpr float larger = 256;  // a mean of spectra under 2, kept clear of the smallest halves
  put_points(row, roots, call.points_to, place.at, larger, scale.inverse / larger, memory);
}

/// Calls f(Row) with the organisation of rows of so many points.
template <class F>
auto with_half_points_row(int points, const F& f) {
  using Short = BlockRow<16, 2>;
  using Long = BlockRow<16, 4>;
  return points == Short::points ? f(static_cast<Short*>(nullptr)) : f(static_cast<Long*>(nullptr));
}

/// Whether rows of so many points may be multiplied by a kernel that is given as points. Longer ones take too much memory.
constexpr bool makes_kernel(int row_points) { return row_points <= 8192; }

inline Index half_points_root_bytes(int row_points) {
  return with_half_points_row(row_points, []<class Row>(Row*) { return Index(512) * Row::roots; });
}

/// Writes the constants that the rows need.
template <std::same_as<uint4> Units>
Status prepare_half_points(Units* roots, int row_points, cudaStream_t stream) {
  return with_half_points_row(row_points, [&]<class Row>(Row*) {
    HalfSpectrumView view;
    view.roots = roots;
    return launch(half_roots_kernel<Row>, dim3(unsigned(ceil_div(32 * Row::roots, root_threads))), root_threads, 0,
                  stream, view);
  });
}

/// As for rows in float: points to points or spectra.
template <std::same_as<__half2> Stored>
Status transform_rows(const FloatRowsCall<Stored>& call, int row_points, cudaStream_t stream) {
  return with_half_points_row(row_points, [&]<class Row>(Row*) {
    const auto queue = [&](auto* kernel, int more_bytes = 0) {
      return launch(kernel, dim3(unsigned(call.rows())), Row::threads, half_points_bytes<Row> + more_bytes, stream,
                    call);
    };
    if (call.rows() == 0) return Status{};
    if (call.rows() >= Index(1) << 31)
      return Status{Code::unsupported, "too many rows for one call on the GPU; call with fewer sequences"};
    if (call.sum_from.present()) return queue(half_points_sum_kernel<Row>);
    if (call.spectrum_to.present()) return queue(half_points_spectrum_kernel<Row>);
    if (call.kernel.present() && call.kernel_run_shift > 0) {
      if constexpr (makes_kernel(Row::points)) {
        constexpr int bytes = 16 * spectrum_units<Row>;
        if (call.correlate.present()) return queue(half_points_product_kernel<Row, true, true>, bytes);
        return queue(half_points_product_kernel<Row, false, true>, bytes);
      }
    }
    if (call.correlate.present()) return queue(half_points_product_kernel<Row, true, false>);
    return queue(half_points_product_kernel<Row, false, false>);
  });
}

}  // namespace chela::cuda::detail
