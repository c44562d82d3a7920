#pragma once
// Transforms of rows that a thread block holds, and what is done between forward and inverse: the kernel that every use
// of the transform goes through.
#include <concepts>

#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/float_transform_ends.cuh"
#include "chela/cuda/conv/float_transform_points.cuh"
#include "chela/cuda/conv/float_transform_size.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

/// Transforms longer than a block's are cut at their root in `columns` rows. Points and spectra lie as [channel, place
/// of the sequence, column, point], channels counted within the group of a call; a spectrum's points are in the order
/// in which threads hold them.
///
///   from   real rows; or `points_from`; or `sum_from`, spectra to be summed over the sequences
///   then   forward, unless it was a spectrum
///   then   `correlate`, spectra, become this one times their conjugates
///   then   multiplied by `kernel` [channel, column, point] plus skip, or by the conjugate of that
///   to     `spectrum_to`; or inverse, and `points_to` or real rows; or nowhere, after `correlate`
///
/// Whatever is absent is left out. Memory may be the same on both sides. Points in halves have rows in half precision
/// (half_points.cuh), which add skip when they make a kernel's spectrum.
template <class Stored>
struct FloatRowsCall {
  RealRows<const float> from = {};
  RealRows<float> to = {};
  StoredPoints<Stored> points_from = {}, sum_from = {}, kernel = {}, points_to = {}, spectrum_to = {}, correlate = {};
  TensorView<const float, 1> skip = {};
  bool conjugate = false, discard = false;
  ServedSequences sequences = {};
  Index first_channel = 0, channels = 0;
  Index places = 1;                   ///< of sequences, in points and spectra
  int columns = 1, column_nodes = 1;  ///< column_nodes: the largest power of two that divides columns
  int run_shift = 0;                  ///< of points_from: 2^run_shift neighbouring points share a scale
  int kernel_run_shift = 0;           ///< the same of the kernel, if it is points; 0 for a spectrum
  const uint4* roots = nullptr;       ///< of rows in half precision

  CHELA_HOST_DEVICE constexpr Index served() const { return sum_from.present() ? 1 : sequences.all.size(); }
  CHELA_HOST_DEVICE constexpr Index rows() const { return channels * columns * served(); }
};

/// Which row a block has, or threads of it.
struct PlaceOfRow {
  Index sequence = 0, column = 0, channel = 0;  ///< the channel counted within the group
  Sequence tokens = {};
  bool active = false;          ///< whether the row is one of this call's
  Index transform = 0, at = 0;  ///< among all transforms' places; among all rows

  template <class Stored>
  __device__ PlaceOfRow(const FloatRowsCall<Stored>& call, unsigned number) {
    const unsigned rows = unsigned(call.rows()), row = number < rows ? number : 0;
    const unsigned served = unsigned(call.served()), columns = unsigned(call.columns);
    sequence = row % served, column = row / served % columns, channel = row / served / columns;
    tokens = sequence_inside(call.sequences.all, sequence);
    active = number < rows && (call.sum_from.present() || call.sequences.has(tokens));
    transform = channel * call.places + (call.sum_from.present() ? 0 : call.sequences.place(tokens, sequence));
    at = transform * call.columns + column;
  }
};

template <class S>
__global__ void __launch_bounds__(S::block_threads, S::resident_blocks)
    float_transform_rows_kernel(const __grid_constant__ FloatRowsCall<float2> call) {
  auto* const float_transform_exchange = arch::dynamic_shared<float2>();
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

  const PlaceOfRow place(call, blockIdx.x * S::rows + threadIdx.x / threads);
  const bool active = place.active;
  if (S::rows == 1 && !active) return;
  const Index column = place.column, channel = place.channel, at = place.at;

  float2 x[per_thread];
  if (call.sum_from.present()) {
    for_each_constant<per_thread>([&](auto e) { x[e] = {0, 0}; });
    for (Index i = 0; i < call.sequences.all.size(); ++i) {
      const Sequence summed = sequence_inside(call.sequences.all, i);
      if (!call.sequences.has(summed)) continue;
      const Index from = at + call.sequences.place(summed, i) * call.columns;
      const float2* const terms = call.sum_from.points + from * points + t;
      for_each_constant<per_thread>([&](auto e) {
        const float2 term = terms[e * threads];
        x[e] = {x[e].x + term.x, x[e].y + term.y};
      });
    }
  } else {
    if (call.points_from.present()) {
      const float2* from = call.points_from.points + at * points + t;
      for_each_constant<per_thread>([&](auto e) { x[e] = active ? from[e * threads] : float2{0, 0}; });
    } else {
      const RealRow<const float> from(call.from, place.tokens, place.sequence, call.first_channel + channel, points);
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

  if (call.correlate.present() && active) {
    float2* const with = call.correlate.points + at * points + t;
    for_each_constant<per_thread>([&](auto e) { with[e * threads] = times_conjugate(x[e], with[e * threads]); });
  }
  if (call.kernel.present()) {
    const float skip = call.skip.present()
                           ? call.skip(call.first_channel + channel) * (1.0f / (float(points) * float(call.columns)))
                           : 0.0f;
    const float2* const kernel = call.kernel.points + (channel * call.columns + column) * points + t;
    for_each_constant<per_thread>([&](auto e) {
      float2 k = kernel[e * threads];
      k.x += skip;
      if (call.conjugate) k.y = -k.y;
      x[e] = times(x[e], k);
    });
  }
  if (call.spectrum_to.present()) {
    float2* const to = call.spectrum_to.points + at * points + t;
    if (active) for_each_constant<per_thread>([&](auto e) { to[e * threads] = x[e]; });
    return;
  }
  if (call.discard) return;

  transform_row_back(thread, x, shared, barrier);
  if (!active) return;
  if (call.points_to.present()) {
    float2* const to = call.points_to.points + at * points + t;
    for_each_constant<per_thread>([&](auto e) { to[e * threads] = x[e]; });
  } else {
    const Sequence target =
        call.sum_from.present() ? Sequence{0, 0, call.to.ahead.extents[1]} : place.tokens;  // of taps, all
    const RealRow<float> to(call.to, target, place.sequence, call.first_channel + channel, points);
    to.store(x, t, threads, float(t) * (-0.5f / points));
  }
}

template <std::same_as<float2> Stored>
Status transform_rows(const FloatRowsCall<Stored>& call, int points, cudaStream_t stream) {
  return with_row_size(points, [&]<class S>(S) {
    const Index blocks = ceil_div(call.rows(), S::rows);
    if (blocks == 0) return Status{};
    if (call.rows() >= Index(1) << 31)
      return Status{Code::unsupported, "too many rows for one call on the GPU; call with fewer sequences"};
    return launch(float_transform_rows_kernel<S>, dim3(unsigned(blocks)), S::block_threads, S::shared_bytes, stream,
                  call);
  });
}

}  // namespace chela::cuda::detail
