#pragma once
// The sums of the long convolution themselves, each output from the inputs that its kernel meets and from no others.
#include <algorithm>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/element.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// The most products per output for which sums are taken directly.
template <class T>
constexpr int direct_products(const LongConvPolicy& policy) {
  constexpr int measured = std::same_as<T, float> ? 64 : 512;
  return policy.direct_products == LongConvPolicy::as_measured ? measured : policy.direct_products;
}

/// Inputs of one sequence and channel: row t < 0 is the state's.
template <class T>
__device__ float direct_input(TensorView<const T, 3> x, TensorView<const T, 3> state, Index i, const Sequence& rows,
                              Index t, Index channel) {
  if (t >= 0) return t < rows.count ? static_cast<float>(x(rows.batch, rows.begin + t, channel)) : 0.0f;
  const Index row = state.extents[1] + t;
  return state.present() && row >= 0 ? static_cast<float>(state(i, row, channel)) : 0.0f;
}

inline constexpr int direct_tile = 8, direct_group = 32;

template <class T>
__global__ void __launch_bounds__(256) direct_forward_kernel(const __grid_constant__ LongConvArgs<T> a) {
  const LongConvShape s = long_conv_shape(a);
  const Index groups = ceil_div(s.channels, direct_group);
  const SequenceTile tile = SequenceTiles{s.sequences, direct_tile}[blockIdx.x / groups];
  const Index t = tile.first + threadIdx.x / direct_group;
  const Index d = blockIdx.x % groups * direct_group + threadIdx.x % direct_group;
  if (t >= tile.rows.count || d >= s.channels) return;
  float sum = a.skip.present() ? a.skip(d) * static_cast<float>(a.x(tile.rows.batch, tile.rows.begin + t, d)) : 0.0f;
  for (Index j = 0; j < s.taps; ++j)
    sum += a.taps(d, j) * direct_input(a.x, a.initial_state, tile.sequence, tile.rows, t - j, d);
  for (Index j = 0; j < s.back_taps; ++j)
    if (t + 1 + j < tile.rows.count)
      sum += a.back_taps(d, j) * direct_input(a.x, a.initial_state, tile.sequence, tile.rows, t + 1 + j, d);
  a.y(tile.rows.batch, tile.rows.begin + t, d) = T(sum);
}

template <class T>
__global__ void __launch_bounds__(256) direct_input_gradient_kernel(const __grid_constant__ LongConvBackwardArgs<T> a) {
  const LongConvShape s = long_conv_shape(a);
  const Index d = Index(blockIdx.x) * direct_group + threadIdx.x % direct_group, i = blockIdx.y;
  const Sequence rows = sequence_inside(s.sequences, i);
  if (d >= s.channels || rows.count == 0) return;
  for (Index t = -s.history() + Index(threadIdx.x) / direct_group; t < rows.count; t += direct_tile) {
    float sum = 0;
    for (Index j = 0; j < s.taps; ++j)
      if (t + j >= 0 && t + j < rows.count)
        sum += a.taps(d, j) * static_cast<float>(a.grad_y(rows.batch, rows.begin + t + j, d));
    for (Index j = 0; j < s.back_taps; ++j)
      if (t - 1 - j >= 0)
        sum += a.back_taps(d, j) * static_cast<float>(a.grad_y(rows.batch, rows.begin + t - 1 - j, d));
    if (t >= 0) {
      if (a.skip.present()) sum += a.skip(d) * static_cast<float>(a.grad_y(rows.batch, rows.begin + t, d));
      if (a.grad_x.present()) a.grad_x(rows.batch, rows.begin + t, d) = T(sum);
    } else if (a.grad_initial_state.present()) {
      a.grad_initial_state(i, s.history() + t, d) = T(sum);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(256)
    direct_kernel_gradient_kernel(const __grid_constant__ LongConvBackwardArgs<T> a) {
  const LongConvShape s = long_conv_shape(a);
  const Index d = Index(blockIdx.x) * direct_group + threadIdx.x % direct_group;
  const Index lag = Index(blockIdx.y) * direct_tile + threadIdx.x / direct_group - s.back_taps;
  if (d >= s.channels || lag >= s.taps) return;
  float sum = 0;
  for (Index i = 0; i < s.sequences.size(); ++i) {
    const Sequence rows = sequence_inside(s.sequences, i);
    for (Index t = 0; t < rows.count; ++t)
      sum += static_cast<float>(a.grad_y(rows.batch, rows.begin + t, d)) *
             direct_input(a.x, a.initial_state, i, rows, t - lag, d);
  }
  if (lag >= 0 && a.grad_taps.present()) a.grad_taps(d, lag) = sum;
  if (lag == 0 && a.grad_skip.present()) a.grad_skip(d) = sum;
  if (lag < 0 && a.grad_back_taps.present()) a.grad_back_taps(d, -lag - 1) = sum;
}

/// A strategy as in cuda/conv/long_strategy.cuh.
template <class T>
struct DirectLongConv {
  template <class Args>
  static bool serves(const LongConvPolicy&, const Args&) {
    return true;
  }
  template <class Args>
  static std::size_t kernel_bytes(const LongConvPolicy&, const Args&) {
    return 0;
  }
  template <class Args>
  static Status prepare(const LongConvPolicy&, const Args&, void*, cudaStream_t) {
    return {};
  }
  template <class Args>
  static std::size_t workspace_bytes(const LongConvPolicy&, const Args&) {
    return 0;
  }

  static Status forward(const LongConvPolicy&, const LongConvArgs<T>& a, const void*, Workspace, cudaStream_t stream) {
    const LongConvShape s = long_conv_shape(a);
    const Index blocks = SequenceTiles{s.sequences, direct_tile}.size() * ceil_div(s.channels, direct_group);
    return launch(direct_forward_kernel<T>, dim3(unsigned(blocks)), direct_tile * direct_group, 0, stream, a);
  }

  static Status backward(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, const void*, Workspace,
                         cudaStream_t stream) {
    const LongConvShape s = long_conv_shape(a);
    const auto groups = unsigned(ceil_div(s.channels, direct_group));
    constexpr int threads = direct_tile * direct_group;
    if (a.grad_x.present() || a.grad_initial_state.present())
      if (Status status = launch(direct_input_gradient_kernel<T>, dim3(groups, unsigned(s.sequences.size())), threads,
                                 0, stream, a);
          !status.ok())
        return status;
    if (!a.grad_taps.present() && !a.grad_back_taps.present() && !a.grad_skip.present()) return {};
    return launch(direct_kernel_gradient_kernel<T>, dim3(groups, unsigned(ceil_div(s.taps + s.back_taps, direct_tile))),
                  threads, 0, stream, a);
  }
};

}  // namespace chela::cuda::detail
