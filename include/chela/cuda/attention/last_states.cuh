#pragma once
// The states after each of a sequence's last tokens, for taking back tokens that were only guessed. Passes advance by whole
// chunks: they leave the state at the chunk's beginning before these tokens in the place of the first, and the final state in
// that of the last. From the one a recurrence by tokens leads to the others, in float.
#include "chela/cuda/attention/linear_pass.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

template <class T>
struct LastStates {
  TensorView<const T, 4> k, v;
  LinearPass pass;
};

inline constexpr int last_states_threads = 256;

/// One thread per element of a state; blocks of one state side by side.
template <class T, class D>
__global__ void __launch_bounds__(last_states_threads) fill_last_states(const __grid_constant__ LastStates<T> args) {
  const LinearPass& pass = args.pass;
  const TensorView<float, 5>& states = pass.last_states;
  const unsigned of_state = unsigned(pass.key_dim * pass.value_dim), heads = unsigned(states.extents[2]);
  const unsigned blocks = (of_state + last_states_threads - 1) / last_states_threads, state = blockIdx.x / blocks;
  const unsigned element = blockIdx.x % blocks * last_states_threads + threadIdx.x;
  if (element >= of_state) return;
  const bool keys_first = states.strides[3] == 1;  // neighbours in memory, neighbours in a warp
  const int inner = keys_first ? pass.key_dim : pass.value_dim, fast = int(element) % inner,
            slow = int(element) / inner;
  const int key = keys_first ? fast : slow, value = keys_first ? slow : fast, head = int(state % heads);

  const Index sequence_index = state / heads;
  const Sequence sequence = pass.sequences[sequence_index];
  const T* k = &args.k(sequence.batch, sequence.begin, head / pass.heads.states_per_key, key);
  const T* v = &args.v(sequence.batch, sequence.begin, head / pass.heads.states_per_value, value);
  const float* g = nullptr;
  if constexpr (D::decays) g = &pass.log_decay(sequence.batch, sequence.begin, head);
  if constexpr (std::is_same_v<D, KeyDecay>) g += key;

  const int tokens = int(sequence.count), count = int(states.extents[1]), first = tokens - (count - 1);
  float* to = &states(sequence_index, 0, head, key, value);
  float sum = *to;
  int token = last_states_origin(tokens, count);
  const auto advance = [&] {
    if constexpr (D::decays) sum *= arch::exp2_flushed(log2_e * __ldg(g + token * pass.log_decay.strides[1]));
    sum = fmaf(float(__ldg(k + token * args.k.strides[1])), float(__ldg(v + token * args.v.strides[1])), sum);
    ++token;
  };
#pragma unroll 8
  while (token < first) advance();
  for (int i = 0; i + 1 < count; ++i, to += states.strides[1]) {
    if (token < first + i) advance();
    *to = sum;
  }
}

/// After the pass. Nothing if it keeps no such states, or the final ones alone.
template <class T, class D>
Status launch_last_states(const LastStates<T>& args, cudaStream_t stream) {
  const LinearPass& pass = args.pass;
  if (pass.last_states.extents[1] < 2) return {};
  const Index of_state = Index(pass.key_dim) * pass.value_dim,
              states = pass.sequences.size() * pass.last_states.extents[2];
  const Index blocks = states * ((of_state + last_states_threads - 1) / last_states_threads);
  if (blocks == 0) return {};
  return launch(fill_last_states<T, D>, dim3(unsigned(blocks)), last_states_threads, 0, stream, args);
}

}  // namespace chela::cuda::detail
