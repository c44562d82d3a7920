#pragma once
// The short depthwise convolution on NVIDIA GPUs (conv/short.hpp has the equation and the argument structs). Elements
// are __nv_bfloat16, __half or float; everything is computed in float and rounded once where it is stored.
//
// Any strides and any channel count. What lies in aligned vectors of 16 bytes is moved in vectors: channels where their
// count and the other strides are multiples of 16 bytes, tokens where the other strides are. Anything else moves
// element by element, and gives the same bits. Offsets, slots and positions are device memory, read by the kernels and
// not checked: offsets that do not fit give results of no meaning but reach no other memory, and a sequence whose slot
// lies outside of the states reads zeros and writes no state.
#include <cuda_runtime.h>

#include "chela/cuda/conv/short_launch.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda {

/// Queues the pass on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph. The
/// same arguments give the same bits on every run, however a sequence is cut into calls that pass the state on, and in
/// steps.
template <int Width, Activation A = Activation::none, Element T>
Status short_conv(const ShortConvArgs<T>& args, cudaStream_t stream) {
  static_assert(detail::ShortConvElement<T>, "the GPU has elements __nv_bfloat16, __half and float");
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (sequences_of(args).size() == 0) return {};
  if (args.x.size() > 0)
    if (Status s = detail::launch_short_conv<Width, A>(args, stream); !s.ok()) return s;
  if constexpr (Width > 1)
    if (args.final_state.present()) return detail::launch_final_states<Width>(args, stream);
  return {};
}

/// Queues one token per sequence on `stream`, as the pass; the state is a ring that is written in place. y may be x's
/// memory.
template <int Width, Activation A = Activation::none, Element T>
Status short_conv_step(const ShortConvStepArgs<T>& args, cudaStream_t stream) {
  static_assert(detail::ShortConvElement<T>, "the GPU has elements __nv_bfloat16, __half and float");
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (args.x.size() == 0) return {};
  return detail::launch_short_conv_step<Width, A>(args, stream);
}

/// Bytes of scratch that short_conv_backward(args, ...) needs: one copy of the taps and the bias for every 512 tokens,
/// or none where neither's gradient is wanted.
template <Element T>
std::size_t workspace_bytes(const ShortConvBackwardArgs<T>& args) {
  return check(args, args.taps.extents[1]).ok() ? detail::part_bytes(args) : 0;
}

/// Queues the gradients on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph.
/// The same arguments give the same bits on every run.
template <int Width, Activation A = Activation::none, Element T>
Status short_conv_backward(const ShortConvBackwardArgs<T>& args, Workspace workspace, cudaStream_t stream) {
  static_assert(detail::ShortConvElement<T>, "the GPU has elements __nv_bfloat16, __half and float");
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_workspace(workspace, workspace_bytes(args)); !s.ok()) return s;
  return detail::launch_short_conv_gradients<Width, A>(args, static_cast<float*>(workspace.data), stream);
}

}  // namespace chela::cuda
