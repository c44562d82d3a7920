#pragma once
// Long depthwise convolution on NVIDIA GPUs (conv/long.hpp has the equation and the argument struct).
//
// Elements are __nv_bfloat16, __half or float; taps are float. Sums are taken directly (cuda/conv/long_direct.cuh) or
// by transforms, as LongConvPolicy says or by sizes.
//
// Direct sums are strictly causal: with a kernel that looks back only, no output depends on a later input, not even in
// its bits, and a NaN reaches the outputs whose kernel meets it and no others. Transforms cannot promise that: each
// output is a sum over the whole row in which later inputs cancel up to rounding, so that the error of every output is
// relative to the largest inputs of its row, and one infinity or NaN spoils the row.
// LongConvPolicy{.method = LongConvMethod::direct} chooses the direct sums at any size.
#include <cuda_runtime.h>

#include "chela/cuda/conv/long_states.cuh"
#include "chela/cuda/conv/long_strategy.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda {

/// Taps in the form that one way of evaluating multiplies with: the caller's device memory, 16-byte aligned and at least
/// as large as `prepared_kernel_bytes` says.
struct PreparedKernel {
  void* data = nullptr;
  std::size_t bytes = 0;
};

namespace detail {

template <class Args>
using LongConvElement = std::remove_cvref_t<decltype(*std::declval<Args>().x.data)>;

template <LongConvPolicy P, class T>
constexpr void require_long_conv_on_gpu() {
  static_assert(std::same_as<T, float> || HalfElement<T>,
                "a long convolution on the GPU has elements __nv_bfloat16, __half and float");
  static_assert(LongConvPolicyConstant<P>::value.eighths == 8,
                "LongConvPolicy::eighths must be 8 on the GPU; frequency-sparse kernels are on the CPU");
}

constexpr bool has_outputs(const LongConvShape& s) { return s.sequences.size() * s.tokens * s.channels > 0; }

/// What f(strategy, arguments within reach) says, a number of bytes, or 0 for what is refused.
template <LongConvPolicy P, class Args, class F>
std::size_t bytes_of_long_conv(const Args& args, F f) {
  using T = LongConvElement<Args>;
  require_long_conv_on_gpu<P, T>();
  std::size_t bytes = 0;
  if (!check(args).ok() || !has_outputs(long_conv_shape(args))) return bytes;
  const Args met = within_reach(P, args);
  const Status status = with_strategy<P, T>(met, [&]<class S>(S) {
    bytes = f(S{}, met);
    return Status{};
  });
  return status.ok() ? bytes : 0;
}

template <LongConvPolicy P, class Args>
std::size_t kernel_bytes_of_long_conv(const Args& args) {
  return bytes_of_long_conv<P>(
      args, []<class S>(S, const Args& met) { return std::size_t(round_up(Index(S::kernel_bytes(P, met)), 16)); });
}
template <LongConvPolicy P, class Args>
std::size_t scratch_bytes_of_long_conv(const Args& args) {
  return bytes_of_long_conv<P>(args, []<class S>(S, const Args& met) { return S::workspace_bytes(P, met); });
}

template <LongConvPolicy P, class Args>
Status prepare_long_conv_kernel(const Args& args, PreparedKernel kernel, cudaStream_t stream) {
  if (Status s = check(args); !s.ok()) return s;
  if (!has_outputs(long_conv_shape(args))) return {};
  if (Status s = require(kernel.bytes >= kernel_bytes_of_long_conv<P>(args), Code::bad_shape,
                         "kernel is smaller than prepared_kernel_bytes(args) says");
      !s.ok())
    return s;
  const Args met = within_reach(P, args);
  return with_strategy<P, LongConvElement<Args>>(met,
                                                 [&]<class S>(S) { return S::prepare(P, met, kernel.data, stream); });
}

/// Of a call to strategy S with arguments within reach.
template <LongConvPolicy P, class S, class Args>
Status check_memory(const Args& met, PreparedKernel kernel, Workspace workspace) {
  return first_failure(check_workspace(workspace, S::workspace_bytes(P, met)),
                       require(kernel.bytes >= S::kernel_bytes(P, met), Code::bad_shape,
                               "kernel is smaller than prepared_kernel_bytes(args) says"));
}

/// Cuts a workspace in the taps' memory and the rest.
inline std::pair<PreparedKernel, Workspace> cut_workspace(Workspace whole, std::size_t kernel_bytes) {
  if (kernel_bytes > whole.bytes) kernel_bytes = whole.bytes;
  return {{whole.data, kernel_bytes}, {static_cast<char*>(whole.data) + kernel_bytes, whole.bytes - kernel_bytes}};
}

}  // namespace detail

/// The arguments of a pass in either direction.
template <class Args>
concept LongConvCall = std::same_as<Args, LongConvArgs<detail::LongConvElement<Args>>> ||
    std::same_as<Args, LongConvBackwardArgs<detail::LongConvElement<Args>>>;

/// Bytes of scratch that a call with these arguments and no prepared kernel needs on the current device. Like all that is
/// chosen here it depends on sizes, strides and on which arguments are present.
template <LongConvPolicy P = LongConvPolicy{}, LongConvCall Args>
std::size_t workspace_bytes(const Args& args) {
  return detail::kernel_bytes_of_long_conv<P>(args) + detail::scratch_bytes_of_long_conv<P>(args);
}

/// Bytes of the prepared kernel, and of scratch for calls with one.
template <LongConvPolicy P = LongConvPolicy{}, LongConvCall Args>
std::size_t prepared_kernel_bytes(const Args& args) {
  return detail::kernel_bytes_of_long_conv<P>(args);
}
template <LongConvPolicy P = LongConvPolicy{}, LongConvCall Args>
std::size_t workspace_bytes_with_kernel(const Args& args) {
  return detail::scratch_bytes_of_long_conv<P>(args);
}

/// Queues the preparation of the taps and the skip. The kernel serves every later call with these and the same policy,
/// sizes, strides and arguments present.
template <LongConvPolicy P = LongConvPolicy{}, LongConvCall Args>
Status prepare_kernel(const Args& args, PreparedKernel kernel, cudaStream_t stream) {
  return detail::prepare_long_conv_kernel<P>(args, kernel, stream);
}

/// Queues the convolution on `stream` and returns: y and, if wanted, the final state. Allocates nothing, waits for
/// nothing, can be captured into a graph. Any strides. cu_seqlens are device memory, read by the kernels and not
/// checked: whatever they hold, nothing outside of the tensors is touched.
///
/// The same arguments give the same bits on every run.
template <LongConvPolicy P = LongConvPolicy{}, Element T>
Status long_conv(const LongConvArgs<T>& args, PreparedKernel kernel, Workspace workspace, cudaStream_t stream) {
  detail::require_long_conv_on_gpu<P, T>();
  if (Status s = check(args); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(args);
  if (detail::has_outputs(shape)) {
    const LongConvArgs<T> met = detail::within_reach(P, args);
    const Status status = detail::with_strategy<P, T>(met, [&]<class S>(S) {
      if (Status s = detail::check_memory<P, S>(met, kernel, workspace); !s.ok()) return s;
      return S::forward(P, met, kernel.data, workspace, stream);
    });
    if (!status.ok()) return status;
  }
  return detail::store_final_states(args, shape, stream);
}

/// The same with taps that are prepared by this call, in the workspace.
template <LongConvPolicy P = LongConvPolicy{}, Element T>
Status long_conv(const LongConvArgs<T>& args, Workspace workspace, cudaStream_t stream) {
  if (Status s = check_workspace(workspace, workspace_bytes<P>(args)); !s.ok()) return s;
  const auto [kernel, rest] = detail::cut_workspace(workspace, prepared_kernel_bytes<P>(args));
  if (Status s = prepare_kernel<P>(args, kernel, stream); !s.ok()) return s;
  return long_conv<P>(args, kernel, rest, stream);
}

}  // namespace chela::cuda
