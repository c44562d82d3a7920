#pragma once
// Gradients of the long convolution on NVIDIA GPUs. See cuda/conv/long.cuh.
#include "chela/cuda/conv/long.cuh"

namespace chela::cuda {

namespace detail {

/// Zeros where no tap of the policy is, and everywhere if there are no tokens.
template <class T>
struct ZeroTapsCall {
  TensorView<T, 2> gradient = {};
};

template <class T>
__global__ void __launch_bounds__(256) zero_taps_kernel(const __grid_constant__ ZeroTapsCall<T> call) {
  const Index columns = call.gradient.extents[1], size = call.gradient.size();
  for (Index i = Index(blockIdx.x) * 256 + threadIdx.x; i < size; i += Index(gridDim.x) * 256)
    call.gradient(i / columns, i % columns) = T(0);
}

template <class T>
Status zero_taps(TensorView<T, 2> gradient, Index begin, cudaStream_t stream) {
  if (!gradient.present() || gradient.extents[0] == 0 || begin >= gradient.extents[1]) return {};
  gradient = run(gradient, 1, begin, gradient.extents[1] - begin);
  const Index blocks = std::min<Index>(ceil_div(gradient.size(), 256), 4096);
  return launch(zero_taps_kernel<T>, dim3(unsigned(blocks)), 256, 0, stream, {gradient});
}

template <class T>
Status zero_unmet_taps(const LongConvBackwardArgs<T>& a, Index taps, Index back_taps, cudaStream_t stream) {
  if (Status s = zero_taps(a.grad_taps, taps, stream); !s.ok()) return s;
  if (Status s = zero_taps(a.grad_back_taps, back_taps, stream); !s.ok()) return s;
  const TensorView<Accumulator<T>, 2> skip{a.grad_skip.data, {a.grad_skip.extents[0], 1}, {a.grad_skip.strides[0], 1}};
  return taps == 0 ? zero_taps(skip, 0, stream) : Status{};
}

}  // namespace detail

/// Queues those gradients of `long_conv` that are present, under its conditions. What flows into the final state is
/// added to the inputs' gradients after these are rounded to T.
template <LongConvPolicy P = LongConvPolicy{}, Element T>
Status long_conv_backward(const LongConvBackwardArgs<T>& args, PreparedKernel kernel, Workspace workspace,
                          cudaStream_t stream) {
  detail::require_long_conv_on_gpu<P, T>();
  if (Status s = check(args); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(args);
  const bool outputs = detail::has_outputs(shape);
  const LongConvBackwardArgs<T> met = detail::within_reach(P, args);
  const LongConvShape met_shape = long_conv_shape(met);
  if (outputs) {
    const Status status = detail::with_strategy<P, T>(met, [&]<class S>(S) {
      if (Status s = detail::check_memory<P, S>(met, kernel, workspace); !s.ok()) return s;
      return S::backward(P, met, kernel.data, workspace, stream);
    });
    if (!status.ok()) return status;
  }
  if (Status s = detail::zero_unmet_taps(args, outputs ? met_shape.taps : 0, outputs ? met_shape.back_taps : 0, stream);
      !s.ok())
    return s;
  return detail::add_state_gradients(args, shape, met_shape.history(), stream);
}

/// The same with taps that are prepared by this call, in the workspace.
template <LongConvPolicy P = LongConvPolicy{}, Element T>
Status long_conv_backward(const LongConvBackwardArgs<T>& args, Workspace workspace, cudaStream_t stream) {
  if (Status s = check_workspace(workspace, workspace_bytes<P>(args)); !s.ok()) return s;
  const auto [kernel, rest] = detail::cut_workspace(workspace, prepared_kernel_bytes<P>(args));
  if (Status s = prepare_kernel<P>(args, kernel, stream); !s.ok()) return s;
  return long_conv_backward<P>(args, kernel, rest, stream);
}

}  // namespace chela::cuda
