#pragma once
// Linear attention on NVIDIA GPUs: additive rule, any decay, causal or bidirectional (attention/linear.hpp has the equations
// and the argument struct).
//
// Elements are __nv_bfloat16 or __half, or float if LinearPolicy::float_products says how to multiply them (causal, decay
// none, per head or per token); log-decays and states are float. Products are of 16-bit operands summed in
// float: queries, keys and values as they are, and scores, states and values (with a decay per key: queries and keys)
// times a decay, rounded to 16 bits. With __half these must stay below 65504; scale multiplies the output, after them.
// final_state, boundary_states and last_states are float throughout.
//
// Over a bidirectional span with a decay, what a token reads of those before it is an output of 16 bits, to which a second
// walk adds what it reads of those after; with a decay per key that walk has warp instructions alone. Without decay all
// tensors move once.
#include <cuda_runtime.h>

#include <cmath>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/key_decay_launch.cuh"
#include "chela/cuda/attention/last_states.cuh"
#include "chela/cuda/attention/linear_float.cuh"
#include "chela/cuda/attention/linear_launch.cuh"
#include "chela/cuda/attention/span_launch.cuh"

namespace chela::cuda {

/// Bytes of scratch that linear_attention<P>(args, ...) needs on the current device. It depends on shapes alone, and on
/// whether final_state shares memory with initial_state.
template <LinearPolicy P = LinearPolicy{}, TensorCoreElement T, DecayKind D, RuleKind R, AttentionForm F>
std::size_t workspace_bytes(const LinearAttentionArgs<T, D, R, F>& args) {
  detail::LinearPlan plan;
  return check(args).ok() && detail::plan_linear<detail::policy_for<P, T>>(args, plan).ok() ? plan.workspace_bytes()
                                                                                            : 0;
}

/// Queues the pass on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph. key_dim
/// and value_dim are multiples of 16 up to 256; last strides are 1, other strides of q, k, v and o multiples of 16 bytes,
/// their data 16-byte aligned. cu_seqlens and state_slots are device memory, read by the kernels and not checked.
/// Log-decays per key have a last stride of 1, other strides even, and are 8-byte aligned. boundary_every is a multiple
/// of 64. Of gates only those <= 0 are legal; -infinity resets the state.
///
/// The same arguments give the same bits on every run. A call is bitwise what calls in pieces of whole chunks of 64
/// tokens give if both have as many segments: LinearPolicy{.segments = 1} makes sure.
template <LinearPolicy P = LinearPolicy{}, TensorCoreElement T, DecayKind D, RuleKind R, AttentionForm F>
Status linear_attention(const LinearAttentionArgs<T, D, R, F>& args, Workspace workspace, cudaStream_t stream) {
  static_assert(R == RuleKind::additive, "the GPU has the additive rule: RuleKind::additive");
  static_assert(std::same_as<StateOf<T, F>, float>, "states are float on the GPU; convert them before or after");
  if (Status s = check(args); !s.ok()) return s;
  if (Status s = detail::check_for_gpu(args); !s.ok()) return s;
  if constexpr (std::same_as<T, float>)
    if (Status s = detail::check_float<P>(args); !s.ok()) return s;
  if (sequences_of(args).size() == 0) return {};
  detail::LinearPlan plan;
  if (Status s = detail::plan_linear<detail::policy_for<P, T>>(args, plan); !s.ok()) return s;
  if (Status s = check_workspace(workspace, plan.workspace_bytes()); !s.ok()) return s;
  const detail::LinearPass pass = detail::make_pass(args, plan, workspace);
  if (Status s = detail::launch_pass<P>(args, plan, pass, stream); !s.ok()) return s;
  return detail::launch_last_states<T, detail::DecayOf<D>>({args.k, args.v, pass}, stream);
}

}  // namespace chela::cuda
