#pragma once
// Transforms of rows that a thread block holds, and what is done between forward and inverse: the kernel that every use
// of the transform goes through.
#include "chela/cuda/conv/float_transform_ends.cuh"
#include "chela/cuda/conv/float_transform_size.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

/// Transforms longer than a block's are cut at their root in `columns` rows. Points and spectra lie as [channel,
/// sequence, column, point], channels counted within the group of a call; a spectrum's points are in the order in which
/// threads hold them.
///
///   from   real rows; or `points_from`; or `sum_from`, spectra to be summed over the sequences
///   then   forward, unless it was a spectrum
///   then   `correlate`, spectra, become this one times their conjugates
///   then   multiplied by `kernel` [channel, column, point] plus skip, or by the conjugate of that
///   to     `spectrum_to`; or inverse, and `points_to` or real rows; or nowhere, after `correlate`
///
/// Whatever is absent is left out. Memory may be the same on both sides.
struct FloatRowsCall {
  RealRows<const float> from = {};
  RealRows<float> to = {};
  const float2 *points_from = nullptr, *sum_from = nullptr, *kernel = nullptr;
  float2 *points_to = nullptr, *spectrum_to = nullptr, *correlate = nullptr;
  TensorView<const float, 1> skip = {};
  bool conjugate = false, discard = false;
  ServedSequences sequences = {};
  Index first_channel = 0, channels = 0;
  Index sequences_between = 1;        ///< of points and spectra, from one channel to the next
  int columns = 1, column_nodes = 1;  ///< column_nodes: the largest power of two that divides columns

  constexpr Index served() const { return sum_from ? 1 : sequences.all.size(); }
  constexpr Index rows() const { return channels * columns * served(); }
};

template <class S>
__global__ void __launch_bounds__(S::block_threads, S::resident_blocks)
    float_transform_rows_kernel(const __grid_constant__ FloatRowsCall call) {
  extern __shared__ float2 float_transform_exchange[];
  constexpr int points = S::points, threads = S::threads, per_thread = S::per_thread;
  const RowThread<S> thread{int(threadIdx.x) % threads};
  const int t = thread.t;
  float2* shared = float_transform_exchange + int(threadIdx.x) / threads * S::padded(points);
  const auto barrier = [] {
    if constexpr (threads <= 32)
      __syncwarp();
    else
      __syncthreads();
  };

  const Index number = Index(blockIdx.x) * S::rows + int(threadIdx.x) / threads, served = call.served();
  const Index row = number < call.rows() ? number : 0;
  const Index sequence = row % served, column = row / served % call.columns, channel = row / served / call.columns;
  const Sequence tokens = sequence_inside(call.sequences.all, sequence);
  const bool active = number < call.rows() && (call.sum_from || call.sequences.has(tokens));
  if (S::rows == 1 && !active) return;
  const Index place = ((channel * call.sequences_between + sequence) * call.columns + column) * points;

  float2 x[per_thread];
  if (call.sum_from) {
    for_constants<per_thread>([&](auto e) { x[e] = {0, 0}; });
    for (Index i = 0; i < call.sequences.all.size(); ++i) {
      if (!call.sequences.has(sequence_inside(call.sequences.all, i))) continue;
      const float2* from = call.sum_from + place + i * call.columns * points + t;
      for_constants<per_thread>([&](auto e) {
        const float2 term = from[e * threads];
        x[e] = {x[e].x + term.x, x[e].y + term.y};
      });
    }
  } else {
    if (call.points_from) {
      const float2* from = call.points_from + place + t;
      for_constants<per_thread>([&](auto e) { x[e] = active ? from[e * threads] : float2{0, 0}; });
    } else {
      const RealRow<const float> from(call.from, tokens, sequence, call.first_channel + channel, points);
      from.load(x, t, threads);
    }
    float angle = 0.25f;
    if (call.columns > 1) {
      const int nodes = call.column_nodes, odd = call.columns / nodes, c = int(column);
      angle =
          (0.25f + float(c / nodes)) / float(odd * nodes) + float(arch::reversed_bits(unsigned(c % nodes))) * 0x1p-32f;
    }
    transform_row(thread, x, shared, angle, barrier);
  }

  if (call.correlate && active) {
    float2* with = call.correlate + place + t;
    for_constants<per_thread>([&](auto e) { with[e * threads] = times_conjugate(x[e], with[e * threads]); });
  }
  if (call.kernel) {
    const float2* kernel = call.kernel + (channel * call.columns + column) * points + t;
    const float skip = call.skip.present()
                           ? call.skip(call.first_channel + channel) * (1.0f / (float(points) * float(call.columns)))
                           : 0.0f;
    for_constants<per_thread>([&](auto e) {
      float2 k = kernel[e * threads];
      k.x += skip;
      if (call.conjugate) k.y = -k.y;
      x[e] = times(x[e], k);
    });
  }
  if (call.spectrum_to) {
    float2* to = call.spectrum_to + place + t;
    for_constants<per_thread>([&](auto e) {
      if (active) to[e * threads] = x[e];
    });
    return;
  }
  if (call.discard) return;

  transform_row_back(thread, x, shared, barrier);
  if (!active) return;
  if (call.points_to) {
    float2* to = call.points_to + place + t;
    for_constants<per_thread>([&](auto e) { to[e * threads] = x[e]; });
  } else {
    const Sequence target = call.sum_from ? Sequence{0, 0, call.to.ahead.extents[1]} : tokens;  // of taps, all
    const RealRow<float> to(call.to, target, sequence, call.first_channel + channel, points);
    to.store(x, t, threads, float(t) * (1.0f / threads));
  }
}

inline Status transform_rows(const FloatRowsCall& call, int points, cudaStream_t stream) {
  return with_row_size(points, [&]<class S>(S) {
    const Index blocks = ceil_div(call.rows(), S::rows);
    if (blocks == 0) return Status{};
    if (blocks >= Index(1) << 31)
      return Status{Code::unsupported, "too many rows for one call on the GPU; call with fewer sequences"};
    return launch(float_transform_rows_kernel<S>, dim3(unsigned(blocks)), S::block_threads, S::shared_bytes, stream,
                  call);
  });
}

}  // namespace chela::cuda::detail
