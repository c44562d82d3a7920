#pragma once
// Gradients of long convolutions of 16-bit tokens, of the kernel and of the inputs at once:
// grad_taps[j] = sum over rows and t of grad_y[t] x[t - j] is the product of one's spectrum with the conjugate of the
// other's, and grad_x that with the conjugate of the kernel's. A worker, which is a warp or a block as the organisation of
// a row has it, transforms both rows, meets both spectra at once, and sums products of a few rows of the batch in __half
// in shared memory. Sums of workers are added in float, in their order.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_convolution.cuh"
#include "chela/cuda/conv/half_product_sums.cuh"

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

/// From a spectrum, sum(unit) for each of the units of the thread's lane, to the gradient of a channel's taps. By one row's
/// threads.
template <class Row, class Sum>
__device__ __forceinline__ void finish_gradient(Row& row, const StoredRoots& roots, const Sum& sum,
                                                const HalfTapsGradient& gradient, int channel, int warp, char* memory) {
  float most = 0;
  for (int portion = warp; portion < Row::portions; portion += Row::warps)
#pragma unroll
    for (int i = 0; i < Row::pairs; i += 2) {
      const PointSums sums = sum(16 * (portion * Row::pairs + i));
      for (const float4 x : sums.of)
        most = fmaxf(fmaxf(fmaxf(most, fabsf(x.x)), fmaxf(fabsf(x.y), fabsf(x.z))), fabsf(x.w));
    }
  const PowerOfTwo scale(row.largest(most));
  const float factor = scale.factor / float(Row::normalisation);
  row.template middle<false, true>(roots, [&](int portion, ComplexPair(&z)[Row::pairs]) {
#pragma unroll
    for (int i = 0; i < Row::pairs; i += 2) {
      const PointSums sums = sum(16 * (portion * Row::pairs + i));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 x = sums.of[e];
        z[i + e] = {__floats2half2_rn(factor * x.x, factor * x.z), __floats2half2_rn(factor * x.y, factor * x.w)};
      }
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

/// The way there of a row, with its history as imaginary parts. Returns the inverse of its scale.
template <RowWay Way, bool History, class Row, class T>
__device__ __forceinline__ float transform_row(Row& row, const StoredRoots& roots, const TokenRows<const T>& x,
                                               const HistoryRows<const T>& history, int batch, int channel,
                                               char* memory) {
  const PartForward<History> part(roots);
  const ScaledRow<Row, T, History, Way> tokens(row, x, history, batch, channel, memory);
  row.forward(part, tokens);
  return tokens.inverse;
}

/// How a block works on gradients: its workers, and the memory of each. A worker that is a block with long rows has two
/// teams, one for x and one for grad_y: what is done of the next x goes on beside the way back of grad_x.
template <class Row>
struct HalfGradientPlan {
  static constexpr int teams = Row::warps > 1 && Row::pairs > 4 ? 2 : 1;
  static constexpr int threads = 32 * Row::warps * Row::rows_per_block * teams;
  static constexpr int blocks_per_multiprocessor = [] {
    if (Row::warps == 1) return Row::residues <= 4 ? 4 : 2;
    return Row::pairs <= 4 ? 4 : Row::pairs <= 8 ? 2 : 1;
  }();

  // From a worker's first byte on: the row of grad_y; that of x, which a warp has in registers; sums; and four numbers.
  static constexpr int x = Row::warps > 1 ? convolution_row_bytes<Row> : 0;
  static constexpr int sums = x + convolution_row_bytes<Row>;
  static constexpr int numbers = sums + 16 * spectrum_units<Row>;
  static constexpr int bytes = numbers + 16;
};

/// The numbers: scales of the rows at work and of the sum, and the skip's gradient.
struct HalfGradientNumbers {
  float of_x, of_grad_y, of_sum, skip;
};

/// A block has one channel, and a run of the batch for each of its workers. Rows of blocks are on their way while others
/// are worked on.
template <class Row, class T, bool History, RowWay Way>
__global__ void __launch_bounds__(HalfGradientPlan<Row>::threads, HalfGradientPlan<Row>::blocks_per_multiprocessor)
    half_gradient_kernel(const __grid_constant__ HalfGradientCall<T> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  using Plan = HalfGradientPlan<Row>;
  constexpr int teams = Plan::teams;
  constexpr bool ahead = Row::warps > 1;
  const int channel = int(blockIdx.x) / call.sums_of_channel;
  const int block = int(blockIdx.x) - channel * call.sums_of_channel;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32 % Row::warps;
  const int group = int(threadIdx.x) / Row::threads, team = teams > 1 ? group : 0, worker = teams > 1 ? 0 : group;
  const bool has_x = teams == 1 || team == 0, has_grad_y = teams == 1 || team == 1;
  char* const memory = reinterpret_cast<char*>(shared) + worker * Plan::bytes;
  char* const memory_of_x = memory + Plan::x;
  const int barrier = teams > 1 ? 1 + team : 0;
  Row row(memory, warp, lane, barrier), row_of_x(memory_of_x, warp, lane, barrier);
  ProductSums<Row, History> sums(reinterpret_cast<uint4*>(memory + Plan::sums) + lane, Row::warps * team + warp,
                                 teams * Row::warps);
  HalfGradientNumbers& numbers = *reinterpret_cast<HalfGradientNumbers*>(memory + Plan::numbers);
  const uint4* const units = call.spectrum.units + Index(channel) * spectrum_units<Row> + lane;
  const float kernel_scale = call.spectrum.scale[channel];
  // Asked for anew by each part of the work: constants of all parts are too many for the registers.
  const auto roots = [&] { return StoredRoots{arch::made_anew(call.spectrum.roots), lane}; };

  const auto fetch = [&](const TokenRows<const T>& rows, int batch, char* to) {
    if constexpr (ahead)
      fetch_row<Row::residues, Row::threads>(to, rows.row(batch, channel), rows.tokens, rows.in_units, row.thread());
  };
  const auto wait = [&] {
    if constexpr (ahead) arch::wait_copies<0>(), row.sync();
  };
  constexpr RowWay way_in = ahead ? RowWay::tile : Way;

  const int runs = call.sums_of_channel * Row::rows_per_block, each = (call.batch + runs - 1) / runs;
  const int begin = (block * Row::rows_per_block + worker) * each, end = min(call.batch, begin + each);
  if (begin >= end) sums.clear();
  if (begin < end && has_x) fetch(call.x, begin, memory_of_x);
  if (begin < end && teams > 1 && has_grad_y) fetch(call.grad_y, begin, memory);
  float skip = 0;
#pragma unroll 1
  for (int batch = begin; batch < end; ++batch) {
    const bool goes_on = batch + 1 < end;
    wait();
    float of_x, of_grad_y;
    StoredRoots now = roots();
    if constexpr (teams == 1) {
      fetch(call.grad_y, batch, memory);
      of_x = transform_row<way_in, History>(row_of_x, now, call.x, call.history, batch, channel, memory_of_x);
      wait();
      now = roots();
      of_grad_y = transform_row<way_in, false>(row, now, call.grad_y, {}, batch, channel, memory);
    } else {
      char* const from = has_x ? memory_of_x : memory;
      Row of_team(from, warp, lane, barrier);
      const TokenRows<const T>& rows = has_x ? call.x : call.grad_y;
      const float scale = History && has_x
                              ? transform_row<way_in, History>(of_team, now, rows, call.history, batch, channel, from)
                              : transform_row<way_in, false>(of_team, now, rows, {}, batch, channel, from);
      if (row.thread() == 0) (has_x ? numbers.of_x : numbers.of_grad_y) = scale;
      __syncthreads();
      now = roots();
      of_x = numbers.of_x, of_grad_y = numbers.of_grad_y;
    }
    if (call.gradient.skip.data && has_x)
      skip += product_of_rows<Row::threads>(call.x, call.grad_y, batch, channel, row.thread());
    sums.begin_row(of_x * of_grad_y);
    row.middle_with(row_of_x, now, Row::warps * team + warp, teams * Row::warps,
                    [&](int portion, ComplexPair(&z)[Row::pairs], const ComplexPair(&x)[Row::pairs]) {
                      sums.add(portion, z, x);
                      multiply_by_kernel<true>(z, units + 16 * portion * Row::pairs);
                    });
    sums.end_row();
    if constexpr (teams > 1)
      __syncthreads();
    else
      row.sync();
    if (has_x && goes_on) fetch(call.x, batch + 1, memory_of_x);
    if (!has_grad_y) continue;
    RowResults<T, Row::own> results, of_history;
    const float factor = of_grad_y * kernel_scale;
    row.template backward<History>(now, [&](int c, const float(&re)[2][4], const float(&im)[2][4]) {
      results.take(c, re, factor);
      if constexpr (History) of_history.take(c, im, -factor);
    });
    if (call.grad_x.data) put_row<Way>(row, results, call.grad_x, batch, channel, memory);
    if constexpr (History) {
      if (call.history_gradient.rows.data) put_history(row, of_history, call.history_gradient, batch, channel, memory);
    }
    if constexpr (teams > 1) {
      row.sync();
      if (goes_on) fetch(call.grad_y, batch + 1, memory);
    } else if constexpr (Way != RowWay::runs) {
      row.sync();
    }
  }

  if (has_x) {
    skip = row_of_x.sum(skip);
    if (row.thread() == 0) numbers.of_sum = sums.scale(), numbers.skip = skip;
  }
  __syncthreads();
  if (worker > 0 || !has_grad_y) return;
  const auto of_worker = [&](int w, int place) { return memory + w * Plan::bytes + place; };
  const auto numbers_of = [&](int w) {
    return *reinterpret_cast<const HalfGradientNumbers*>(of_worker(w, Plan::numbers));
  };
  const auto sum_of_workers = [&](int unit) {
    PointSums sum;
#pragma unroll
    for (int w = 0; w < Row::rows_per_block; ++w)
      sum.add(reinterpret_cast<const uint4*>(of_worker(w, Plan::sums))[unit + lane], numbers_of(w).of_sum);
    return sum;
  };
  skip = 0;
#pragma unroll
  for (int w = 0; w < Row::rows_per_block; ++w) skip += numbers_of(w).skip;
  if (call.sums_of_channel == 1) {
    if (call.gradient.skip.data && row.thread() == 0) call.gradient.skip(channel) = skip;
    return finish_gradient(row, roots(), sum_of_workers, call.gradient, channel, warp, memory);
  }
  if (row.thread() == 0) call.skips[blockIdx.x] = skip;
  float4* const to = call.sums + Index(blockIdx.x) * sum_units<Row> + lane;
  for (int portion = warp; portion < Row::portions; portion += Row::warps)
#pragma unroll
    for (int i = 0; i < Row::pairs; i += 2) {
      const int unit = 16 * (portion * Row::pairs + i);
      const PointSums sum = sum_of_workers(unit);
      to[2 * unit] = sum.of[0], to[2 * unit + 32] = sum.of[1];
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
  const auto sum = [&](int unit) {
    PointSums total;
    for (int block = 0; block < call.sums_of_channel; ++block) {
      const float4* const from = sums + Index(block) * sum_units<Row> + 2 * unit;
      total.add(from[0], from[32]);
    }
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
