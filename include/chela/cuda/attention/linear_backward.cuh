#pragma once
// Gradients of linear attention on NVIDIA GPUs: causal, additive rule, any decay (attention/linear.hpp has the argument
// struct, cuda/attention/linear_backward_launch.cuh the method).
//
// Elements are __nv_bfloat16 or __half; log-decays, states and their gradients are float. As in the pass of the outputs,
// operands of products are rounded to 16 bits: with __half, gradients of the state divided by the scale must stay below
// 65504. Where output heads share a head of q, k or v, their parts of its gradient are rounded before they are summed.
#include <cuda_runtime.h>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/key_gradient_launch.cuh"
#include "chela/cuda/attention/linear_backward_launch.cuh"

namespace chela::cuda {

/// Bytes of scratch that linear_attention_backward<P>(args, ...) needs on the current device. It depends on shapes, on which
/// gradients are wanted, and on whether those of the initial and the final state share memory.
template <LinearPolicy P = LinearPolicy{}, HalfElement T, DecayKind D, RuleKind R, AttentionForm F>
std::size_t workspace_bytes(const LinearAttentionBackwardArgs<T, D, R, F>& args) {
  detail::GradientPlan plan;
  if (!check(args).ok() || !detail::plan_gradients<P>(args, plan).ok()) return 0;
  return detail::GradientBuffers<T>(args, plan, nullptr).bytes;
}

/// Queues the gradients on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph. What
/// linear_attention asks of q, k, v, o and log-decays goes for their gradients too. cu_seqlens is device memory, read by the
/// kernels and not checked.
///
/// The same arguments give the same bits on every run. A decay below 2^-126 is a reset: the gradient of its logarithm is
/// zero. The gradient of a log-decay per head is a sum over all tokens, accurate relative to its terms' magnitudes: where
/// they cancel, it is less so.
template <LinearPolicy P = LinearPolicy{}, HalfElement T, DecayKind D, RuleKind R, AttentionForm F>
Status linear_attention_backward(const LinearAttentionBackwardArgs<T, D, R, F>& args, Workspace workspace,
                                 cudaStream_t stream) {
  static_assert(R == RuleKind::additive, "the GPU has the additive rule: RuleKind::additive");
  static_assert(std::same_as<StateOf<T, F>, float>, "states are float on the GPU; convert them before or after");
  static_assert(takes_inputs_as_given<F>, "the GPU takes log-decays as they are: apply the form's gate before");
  if (Status s = check(args); !s.ok()) return s;
  if (Status s = detail::check_for_gpu(args); !s.ok()) return s;
  detail::GradientPlan plan;
  if (Status s = detail::plan_gradients<P>(args, plan); !s.ok()) return s;
  const detail::GradientBuffers<T> buffers(args, plan, workspace.data);
  if (Status s = check_workspace(workspace, buffers.bytes); !s.ok()) return s;
  if (plan.sequences == 0) return detail::launch_sums(args, plan, buffers, stream);
  const detail::GradientWalks walks(args, plan, buffers);
  if constexpr (D == DecayKind::per_key) {
    if (Status s = detail::launch_key_gradients<P>(plan, walks, buffers, stream); !s.ok()) return s;
  } else if (Status s = plan.instructions == Instructions::warpgroup
                            ? detail::launch_warpgroup_gradients(plan, walks, stream)
                            : detail::launch_warp_gradients<P>(plan, walks, stream);
             !s.ok())
    return s;
  return detail::launch_sums(args, plan, buffers, stream);
}

}  // namespace chela::cuda
