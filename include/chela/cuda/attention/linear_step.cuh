#pragma once
// One token of linear attention on NVIDIA GPUs, every decay and both rules (attention/linear.hpp has the equations and
// the argument struct). Any element type; states are float or 16 bits. Everything is summed in float.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/step_states.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda {

namespace detail {

template <class T, DecayKind D, RuleKind R, AttentionForm F>
StepCall<T, StateOf<T, F>> step_call(const LinearAttentionStepArgs<T, D, R, F>& args, const LinearAttentionShape& s) {
  using S = StateOf<T, F>;
  StepCall<T, S> call{.q = args.q, .k = args.k, .v = args.v, .o = args.o, .states = args.state};
  if constexpr (D != DecayKind::none) call.log_decay = slice_axis<1>(spread_log_decay(as_pass(args).log_decay, s), 0);
  if constexpr (R == RuleKind::delta) call.beta = args.beta;
  call.slots = args.state_slots;
  call.heads = {int(s.output_heads()), int(s.output_heads() / s.query_heads), int(s.output_heads() / s.state_heads()),
                int(s.state_heads() / s.key_heads), int(s.state_heads() / s.value_heads)};
  call.state_heads = int(s.state_heads()), call.key_dim = int(s.key_dim), call.value_dim = int(s.value_dim);
  call.scale = attention_scale(args.scale, s);
  const TensorView<S, 4>& states = args.state;
  call.whole_units = unit_last_stride(states) && states.extents[3] % 4 == 0 &&
                     reinterpret_cast<std::uintptr_t>(states.data) % (4 * sizeof(S)) == 0;
  for (int axis = 0; axis < 3; ++axis)
    call.whole_units = call.whole_units && (states.extents[axis] <= 1 || states.strides[axis] % 4 == 0);
  return call;
}

/// Launches with one block for every state head and `value_tile` of its columns.
template <class T, class S>
Status launch_step(void (*kernel)(StepCall<T, S>), StepCall<T, S> call, Index sequences, int value_tile, int threads,
                   cudaStream_t stream) {
  call.value_tiles = int(ceil_div(call.value_dim, value_tile));
  const Index blocks = sequences * call.state_heads * call.value_tiles;
  if (blocks == 0) return {};
  constexpr Index most_blocks = (Index(1) << 31) - 1;
  if (blocks > most_blocks)
    return {Code::unsupported, "sequences times heads must stay below 2^31 blocks on the GPU; call in pieces"};
  return launch(kernel, dim3(unsigned(blocks)), threads, 0, stream, call);
}

}  // namespace detail

/// Queues the step on `stream` and returns: reads a token into every sequence's state, in place, and writes its output.
/// Allocates nothing, waits for nothing, can be captured into a graph. key_dim is at most 256, value_dim anything; any
/// strides, but states whose rows are whole aligned units of four elements move fastest. state_slots are device memory,
/// read by the kernel and not checked; no two sequences may have the same slot. The same arguments give the same bits
/// on every run. Bound by memory: the state is read once and written once.
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
Status linear_attention_step(const LinearAttentionStepArgs<T, D, R, F>& args, cudaStream_t stream) {
  static_assert(!std::is_same_v<T, double>, "the GPU's step has float and 16-bit elements; convert before");
  static_assert(takes_inputs_as_given<F>,
                "the GPU's step takes log-decays, betas, queries and keys as they are: make them of logits before");
  using S = StateOf<T, F>;
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionShape shape = [&] {
    const auto pass = as_pass(args);
    return linear_attention_shape(pass.q, pass.k, pass.v);
  }();
  if (shape.key_dim > detail::most_step_keys)
    return {Code::unsupported, "key_dim must be at most 256 in a step on the GPU; split keys and queries over heads"};
  const Index sequences = args.q.extents[0];
  const detail::StepCall<T, S> call = detail::step_call(args, shape);

  if constexpr (F::state_layout == StateLayout::value_major) {
    constexpr int warps = detail::step_warps, rows = detail::step_rows;
    return shape.key_dim <= 128
               ? launch_step(detail::step_value_major<T, S, D, R, 1>, call, sequences, warps * rows, 32 * warps, stream)
               : launch_step(detail::step_value_major<T, S, D, R, 2>, call, sequences, warps * rows / 2, 32 * warps,
                             stream);
  } else {
    const int groups = int(ceil_div(std::max<Index>(shape.key_dim, 1), detail::step_rows));
    const auto with_lanes = [&]<int Lanes>() {
      const int threads = int(round_up(groups * Lanes, 32));
      return launch_step(detail::step_key_major<T, S, D, R, Lanes>, call, sequences, 4 * Lanes, threads, stream);
    };
    return shape.value_dim <= 64 || shape.key_dim > 128 ? with_lanes.template operator()<16>()
                                                        : with_lanes.template operator()<32>();
  }
}

}  // namespace chela::cuda
