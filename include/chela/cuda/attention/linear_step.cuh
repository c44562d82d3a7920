#pragma once
// One token of linear attention per sequence on NVIDIA GPUs: every member of the family, every form
// (attention/linear.hpp has the equations and the argument struct).
//
// Elements are __nv_bfloat16, __half or float. Everything is computed in float, and rounded once where it is stored.
#include <cuda_runtime.h>

#include <concepts>
#include <cstdint>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/step_kernel.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda {

namespace detail {

/// What a warp loads and stores of a state without looking at single elements.
template <class S>
concept StepState = std::same_as<S, float> || HalfElement<S>;

/// Refuses what the contract allows and the GPU does not.
inline Status check_step_for_gpu(const LinearAttentionShape& s) {
  constexpr Index most_blocks = (Index(1) << 31) - 1;
  return first_failure(
      require(s.key_dim <= most_step_keys, Code::unsupported,
              "key_dim must be up to 512 in a step on the GPU: a block holds all keys of a state"),
      require(s.value_dim <= most_blocks && s.output_heads() <= most_blocks &&
                  s.batch <= most_blocks / (ceil_div(s.value_dim, step_tile) * s.state_heads()),
              Code::unsupported,
              "sequences times state heads times value_dim / 32 must stay below 2^31 on the GPU; call in pieces"));
}

/// Whether the state's rows in memory are made of aligned groups of four elements.
template <class S>
bool has_rows_of_four(TensorView<S, 4> state, int row_axis) {
  const int column_axis = 5 - row_axis;
  bool fits = state.strides[column_axis] == 1 && state.extents[column_axis] % 4 == 0 &&
              reinterpret_cast<std::uintptr_t>(state.data) % (4 * sizeof(S)) == 0;
  for (int axis : {0, 1, row_axis}) fits = fits && (state.extents[axis] <= 1 || state.strides[axis] % 4 == 0);
  return fits;
}

template <class T, DecayKind D, RuleKind R, AttentionForm F>
StepCall<T, F> make_step(const LinearAttentionStepArgs<T, D, R, F>& args, const LinearAttentionShape& s) {
  StepCall<T, F> call{.q = args.q,
                      .k = args.k,
                      .v = args.v,
                      .o = args.o,
                      .state = key_major<F>(args.state),
                      .beta = args.beta,
                      .gate_log_rate = args.gate_log_rate,
                      .state_slots = args.state_slots};
  call.heads = {int(s.output_heads()), int(s.output_heads() / s.query_heads), int(s.output_heads() / s.state_heads()),
                int(s.state_heads() / s.key_heads), int(s.state_heads() / s.value_heads)};
  call.state_heads = int(s.state_heads()), call.key_dim = int(s.key_dim), call.value_dim = int(s.value_dim);
  call.value_tiles = int(ceil_div(s.value_dim, step_tile));
  call.scale = attention_scale(args.scale, s);
  if constexpr (D != DecayKind::none) call.log_decay = slice_axis<1>(spread_log_decay(as_pass(args).log_decay, s), 0);
  if (args.gate_bias.present()) {
    call.gate_bias = {args.gate_bias.data, {s.state_heads(), s.key_dim}, {args.gate_bias.strides[0]}};
    if constexpr (D == DecayKind::per_key) call.gate_bias.strides[1] = args.gate_bias.strides[1];
  }
  return call;
}

}  // namespace detail

/// Queues the step on `stream` and returns. Allocates nothing, waits for nothing, can be captured into a graph. key_dim
/// is up to 512; any strides. State rows (key_dim or value_dim, whichever is last) that are contiguous, a multiple of
/// four long and aligned move in vectors, others element by element. state_slots are device memory, read by the kernel
/// and not checked. Of log-decays only those <= 0 are legal; -infinity resets the state. o may not share memory with
/// q, k or v.
///
/// The same arguments give the same bits on every run.
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
Status linear_attention_step(const LinearAttentionStepArgs<T, D, R, F>& args, cudaStream_t stream) {
  static_assert(detail::StepState<T>, "a step on the GPU has elements __nv_bfloat16, __half and float");
  static_assert(detail::StepState<StateOf<T, F>>, "a step on the GPU has states __nv_bfloat16, __half and float");
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionArgs<T, D, R, F> pass = as_pass(args);
  const LinearAttentionShape shape = linear_attention_shape(pass.q, pass.k, pass.v);
  if (Status s = detail::check_step_for_gpu(shape); !s.ok()) return s;
  if (shape.batch == 0) return {};

  const detail::StepCall<T, F> call = detail::make_step(args, shape);
  const int warps = int(ceil_div(shape.key_dim, detail::step_tile));
  const auto blocks = unsigned(shape.batch * shape.state_heads() * call.value_tiles);
  constexpr bool decays = D != DecayKind::none;
  constexpr int row_axis = F::state_layout == StateLayout::key_major ? 2 : 3;
  const auto kernel = detail::has_rows_of_four(call.state, row_axis) ? detail::step_kernel<T, decays, R, F, true>
                                                                     : detail::step_kernel<T, decays, R, F, false>;
  return launch(kernel, dim3(blocks), 32 * warps, detail::BlockSum::bytes_per_warp * warps, stream, call);
}

}  // namespace chela::cuda
