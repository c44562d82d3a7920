#pragma once
// Gradients of long convolutions of 16-bit tokens, of the kernel and of the inputs at once:
// grad_taps[j] = sum over rows and t of grad_y[t] x[t - j] is the product of one's spectrum with the conjugate of the
// other's, and grad_x that with the conjugate of the kernel's. Spectra are summed over the batch in float: each worker, a
// warp or a block as the organisation of a row has it, sums a run of the batch in shared memory, and runs are added in
// their order.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_convolution.cuh"

namespace chela::cuda::detail {

/// Where a kernel's gradient goes.
struct HalfTapsGradient {
  TensorView<float, 2> taps = {}, back_taps = {};  ///< or absent
  TensorView<float, 1> skip = {};
};

template <class T>
struct HalfGradientCall {
  TokenRows<const T> x = {}, grad_y = {};
  TokenRows<T> grad_x = {};  ///< or no data
  HistoryRows<const T> history = {};
  HistoryRows<T> history_gradient = {};
  int batch = 0, channels = 0;
  int sums_of_channel = 1;  ///< the blocks that share a channel's batch; with one the block finishes by itself
  HalfSpectrumView spectrum = {};
  float4* sums = nullptr;  ///< [channel][block][2 units][lane], if there are several
  float* skips = nullptr;  ///< [channel][block], likewise
  uint4* kept = nullptr;   ///< [channel][block][unit][lane], for organisations that keep spectra in memory
  HalfTapsGradient gradient = {};
};

/// The sum of the products of two rows' tokens, a thread's part. The skip's gradient is a single number, on which the
/// error of a whole row of taps would weigh too much.
template <int Threads, class T>
__device__ __forceinline__ float product_of_rows(const TokenRows<const T>& x, const TokenRows<const T>& y, int batch,
                                                 int channel, int thread) {
  const T *const a = x.row(batch, channel), *const b = y.row(batch, channel);
  const int units = x.in_units && y.in_units ? x.tokens / 8 : 0;
  float sum = 0;
#pragma unroll 2
  for (int u = thread; u < units; u += Threads) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(a) + u), w = __ldg(reinterpret_cast<const uint4*>(b) + u);
    const auto add = [&](std::uint32_t p, std::uint32_t q) {
      const float2 c = arch::unpack<T>(p), d = arch::unpack<T>(q);
      sum = fmaf(c.y, d.y, fmaf(c.x, d.x, sum));
    };
    add(v.x, w.x), add(v.y, w.y), add(v.z, w.z), add(v.w, w.w);
  }
#pragma unroll 4
  for (int n = 8 * units + thread; n < x.tokens; n += Threads)
    sum = fmaf(static_cast<float>(a[n]), static_cast<float>(b[n]), sum);
  return sum;
}

/// Products of a pair of points a with the conjugates of b, as re, im, re, im.
__device__ inline float4 product_with_conjugate(ComplexPair a, ComplexPair b) {
  const float2 re = __half22float2(a.re), im = __half22float2(a.im), c = __half22float2(b.re), s = __half22float2(b.im);
  return {re.x * c.x + im.x * s.x, im.x * c.x - re.x * s.x, re.y * c.y + im.y * s.y, im.y * c.y - re.y * s.y};
}
__device__ inline float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

/// Of a row's units of sums, a pair of points each.
template <class Row>
__device__ constexpr int sum_place(int portion, int pair) {
  return 32 * (portion * Row::pairs + pair);
}
template <class Row>
inline constexpr int sum_units = 2 * spectrum_units<Row>;

/// From a spectrum, sum(place) for each of the thread's places, to the gradient of a channel's taps. By one row's
/// threads.
template <class Row, class Sum>
__device__ __forceinline__ void finish_gradient(Row& row, const StoredRoots& roots, const Sum& sum,
                                                const HalfTapsGradient& gradient, int channel, int warp, char* memory) {
  float most = 0;
  for (int portion = warp; portion < Row::portions; portion += Row::warps)
#pragma unroll
    for (int i = 0; i < Row::pairs; ++i) {
      const float4 x = sum(sum_place<Row>(portion, i));
      most = fmaxf(fmaxf(fmaxf(most, fabsf(x.x)), fmaxf(fabsf(x.y), fabsf(x.z))), fabsf(x.w));
    }
  const PowerOfTwo scale(row.largest(most));
  const float factor = scale.factor / float(Row::normalisation);
  row.template middle<false, true>(roots, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
    for (int i = 0; i < Row::pairs; ++i) {
      const float4 x = sum(sum_place<Row>(portion, i));
      z[i] = {__floats2half2_rn(factor * x.x, factor * x.z), __floats2half2_rn(factor * x.y, factor * x.w)};
    }
  });
  // A mean of spectra under 2: enlarged, it keeps clear of the smallest halves.
  constexpr float larger = 256, smaller = 1 / larger;
  RowResults<__half, Row::own> ahead, behind;
  row.template backward<true>(roots, [&](int c, const float(&re)[2][4], const float(&im)[2][4]) {
    ahead.take(c, re, larger), behind.take(c, im, -larger);
  });
  const auto put = [&](const RowResults<__half, Row::own>& results, const auto& store) {
    row.sync();
    results.template write_staged<Row::residues>(memory, row.first_residue(), row.lane());
    row.sync();
    using Layout = StagedOutput<Row::residues>;
#pragma unroll 4
    for (int n = row.thread(); n < Row::points; n += Row::threads)
      store(n, scale.inverse * (smaller * __half2float(*reinterpret_cast<const __half*>(memory + Layout::point(n)))));
  };
  put(ahead, [&](int n, float tap) {
    if (gradient.taps.data && n < int(gradient.taps.extents[1])) gradient.taps(channel, n) = tap;
  });
  if (gradient.back_taps.data)
    put(behind, [&](int n, float tap) {
      const int m = Row::points - n;
      if (m <= int(gradient.back_taps.extents[1])) gradient.back_taps(channel, m - 1) = tap;
    });
}

template <class Row>
inline constexpr int gradient_row_bytes = convolution_row_bytes<Row> + 16 * sum_units<Row> + 16;

template <class Row>
inline constexpr int gradient_blocks_per_multiprocessor = Row::warps == 1 ? (Row::residues <= 4 ? 4 : 2)
                                                                          : (Row::pairs <= 4   ? 4
                                                                             : Row::pairs <= 8 ? 2
                                                                                               : 1);

/// A block has one channel, and a run of the batch for each of its workers.
template <class Row, class T, bool History, RowWay Way>
__global__ void __launch_bounds__(32 * Row::warps * Row::rows_per_block, gradient_blocks_per_multiprocessor<Row>)
    half_gradient_kernel(const __grid_constant__ HalfGradientCall<T> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const int channel = int(blockIdx.x) / call.sums_of_channel;
  const int block = int(blockIdx.x) - channel * call.sums_of_channel, lane = int(threadIdx.x) % 32;
  const RowPlace<Row> place(reinterpret_cast<char*>(shared), gradient_row_bytes<Row>);
  const int worker = int(threadIdx.x) / Row::threads;
  Row row(place.memory, place.warp, lane);
  float4* const sums = reinterpret_cast<float4*>(place.memory + convolution_row_bytes<Row>) + lane;
  uint4* const kept = call.kept + Index(blockIdx.x) * spectrum_units<Row> + lane;
  ComplexPair in_registers[Row::warps == 1 ? Row::portions : 1][Row::pairs];
  const uint4* const units = call.spectrum.units + Index(channel) * spectrum_units<Row> + lane;
  const float kernel_scale = call.spectrum.scale[channel];
  // Asked for anew by each part of the work: constants of all parts are too many for the registers.
  const auto roots = [&] { return StoredRoots{arch::made_anew(call.spectrum.roots), lane}; };

  const int runs = call.sums_of_channel * Row::rows_per_block, each = (call.batch + runs - 1) / runs;
  const int begin = (block * Row::rows_per_block + worker) * each, end = min(call.batch, begin + each);
  for (int portion = place.warp; portion < Row::portions; portion += Row::warps)
#pragma unroll
    for (int i = 0; i < Row::pairs; ++i) sums[sum_place<Row>(portion, i)] = {};
  float skip = 0;
#pragma unroll 1
  for (int batch = begin; batch < end; ++batch) {
    float of_x;
    {
      const StoredRoots now = roots();
      const PartForward<History> part(now);
      const ScaledRow<Row, T, History, Way> tokens(row, call.x, call.history, batch, channel, place.memory);
      of_x = tokens.inverse;
      row.forward(part, tokens);
      row.template middle<true, false>(now, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
        for (int i = 0; i < Row::pairs; i += 2) {
          if constexpr (Row::warps == 1)
            in_registers[portion][i] = z[i], in_registers[portion][i + 1] = z[i + 1];
          else
            kept[16 * (portion * Row::pairs + i)] = unit_of(z[i], z[i + 1]);
        }
      });
    }
    const StoredRoots now = roots();
    const PartForward<false> part(now);
    const ScaledRow<Row, T, false, Way> tokens(row, call.grad_y, {}, batch, channel, place.memory);
    row.forward(part, tokens);
    const float of_both = of_x * tokens.inverse;
    if (call.gradient.skip.data)
      skip += product_of_rows<Row::threads>(call.x, call.grad_y, batch, channel, row.thread());
    row.template middle<true, true>(now, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
      for (int i = 0; i < Row::pairs; i += 2) {
        ComplexPair x[2];
        if constexpr (Row::warps == 1)
          x[0] = in_registers[portion][i], x[1] = in_registers[portion][i + 1];
        else
          take_unit(kept[16 * (portion * Row::pairs + i)], x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float4& sum = sums[sum_place<Row>(portion, i + e)];
          const float4 p = product_with_conjugate(z[i + e], x[e]), s = sum;
          sum = {fmaf(of_both, p.x, s.x), fmaf(of_both, p.y, s.y), fmaf(of_both, p.z, s.z), fmaf(of_both, p.w, s.w)};
        }
      }
      multiply_by_kernel<true>(z, units + 16 * portion * Row::pairs);
    });
    RowResults<T, Row::own> results, of_history;
    const float factor = tokens.inverse * kernel_scale;
    row.template backward<History>(now, [&](int c, const float(&re)[2][4], const float(&im)[2][4]) {
      results.take(c, re, factor);
      if constexpr (History) of_history.take(c, im, -factor);
    });
    if (call.grad_x.data) put_row<Way>(row, results, call.grad_x, batch, channel, place.memory);
    if constexpr (History) {
      if (call.history_gradient.rows.data)
        put_history(row, of_history, call.history_gradient, batch, channel, place.memory);
    }
    if constexpr (Way != RowWay::runs || History) row.sync();
  }

  const auto of_worker = [&](int w, int place_of_row) {
    return place.memory + w * gradient_row_bytes<Row> + place_of_row;
  };
  constexpr int skip_place = convolution_row_bytes<Row> + 16 * sum_units<Row>;
  skip = row.sum(skip);
  if (row.thread() == 0) *reinterpret_cast<float*>(of_worker(0, skip_place)) = skip;
  __syncthreads();
  if (worker > 0) return;
  const auto sum_of_workers = [&](int at) {
    float4 sum = sums[at];
#pragma unroll
    for (int w = 1; w < Row::rows_per_block; ++w)
      sum = sum + *reinterpret_cast<const float4*>(of_worker(w, convolution_row_bytes<Row> + 16 * (at + lane)));
    return sum;
  };
#pragma unroll
  for (int w = 1; w < Row::rows_per_block; ++w) skip += *reinterpret_cast<const float*>(of_worker(w, skip_place));
  if (call.sums_of_channel == 1) {
    if (call.gradient.skip.data && row.thread() == 0) call.gradient.skip(channel) = skip;
    return finish_gradient(row, roots(), sum_of_workers, call.gradient, channel, place.warp, place.memory);
  }
  if (row.thread() == 0) call.skips[blockIdx.x] = skip;
  float4* const to = call.sums + Index(blockIdx.x) * sum_units<Row> + lane;
  for (int portion = place.warp; portion < Row::portions; portion += Row::warps)
#pragma unroll
    for (int i = 0; i < Row::pairs; ++i) {
      const int at = sum_place<Row>(portion, i);
      to[at] = sum_of_workers(at);
    }
}

struct HalfGradientSumCall {
  const float4* sums = nullptr;  ///< as above
  const float* skips = nullptr;
  const uint4* roots = nullptr;
  int channels = 0, sums_of_channel = 1;
  HalfTapsGradient gradient = {};
};

/// The sum of all blocks' sums, and back to taps.
template <class Row>
__global__ void __launch_bounds__(32 * Row::warps * Row::rows_per_block)
    half_gradient_sum_kernel(const __grid_constant__ HalfGradientSumCall call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const RowPlace<Row> place(reinterpret_cast<char*>(shared), convolution_row_bytes<Row>);
  if (place.row >= call.channels) return;
  const int channel = place.row, lane = int(threadIdx.x) % 32;
  Row row(place.memory, place.warp, lane);
  const float4* const sums = call.sums + Index(channel) * call.sums_of_channel * sum_units<Row> + lane;
  const auto sum = [&](int at) {
    float4 total = sums[at];
    for (int block = 1; block < call.sums_of_channel; ++block) total = total + sums[at + Index(block) * sum_units<Row>];
    return total;
  };
  if (call.gradient.skip.data && row.thread() == 0) {
    float skip = 0;
    for (int block = 0; block < call.sums_of_channel; ++block)
      skip += call.skips[channel * call.sums_of_channel + block];
    call.gradient.skip(channel) = skip;
  }
  finish_gradient(row, StoredRoots{call.roots, lane}, sum, call.gradient, channel, place.warp, place.memory);
}

}  // namespace chela::cuda::detail
