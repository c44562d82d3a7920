#pragma once
// Gradients of linear attention on NVIDIA GPUs: additive rule, any decay, causal or, but for decays per key, bidirectional
// (attention/linear.hpp has the argument struct, cuda/attention/linear_backward_launch.cuh the method).
//
// Elements are __nv_bfloat16 or __half; log-decays, states and their gradients are float. As in the pass of the outputs,
// operands of products are rounded to 16 bits: with __half, gradients of the state and, where log-decays per key want
// theirs, of q, divided by the scale, must stay below 65504. Where output heads share a head of q, k or v, their parts of
// its gradient are rounded before they are summed.
#include <cuda_runtime.h>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/two_way_backward.cuh"

namespace chela::cuda {

/// Bytes of scratch that linear_attention_backward<P>(args, ...) needs on the current device. It depends on shapes, on which
/// gradients are wanted, and on whether those of the initial and the final state share memory.
template <LinearPolicy P = LinearPolicy{}, HalfElement T, DecayKind D, RuleKind R, AttentionForm F>
std::size_t workspace_bytes(const LinearAttentionBackwardArgs<T, D, R, F>& args) {
  if (!check(args).ok()) return 0;
  if constexpr (detail::has_two_ways<D>) {
    if (args.span == Span::bidirectional) return detail::two_way_bytes<P>(args);
  }
  return detail::direction_bytes<P>(args);
}

/// Queues the gradients on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph. What
/// linear_attention asks of q, k, v, o and log-decays goes for their gradients too. cu_seqlens is device memory, read by the
/// kernels and not checked.
///
/// Over a bidirectional span with a decay the gradients are those of two walks each, of which the second adds to what the
/// first has rounded; it has warp instructions alone.
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
  if constexpr (detail::has_two_ways<D>) {
    if (args.span == Span::bidirectional) return detail::launch_two_way<P>(args, workspace, stream);
  }
  return detail::launch_direction<P>(args, workspace, stream);
}

}  // namespace chela::cuda
