#pragma once
// The states of a long convolution, the same whichever way its outputs are evaluated: the final state is a copy of the
// last inputs, and what flows into it flows to them.
#include <algorithm>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// What a block of threads moves in one step: rows by channels of one sequence, some elements a thread.
inline constexpr int state_rows = 64, state_channels = 32, state_threads = 256;
inline constexpr int state_elements = state_rows * state_channels / state_threads;

/// The rows of all states, [sequence, row, channel], by blocks that walk through `rows_each` of them.
struct StateBlocks {
  Index sequences = 0, rows = 0, channels = 0, rows_each = 1;
  bool rows_first = false;  ///< neighbouring threads have neighbouring rows, not channels

  CHELA_HOST_DEVICE constexpr Index runs() const { return ceil_div(rows, rows_each); }
  CHELA_HOST_DEVICE constexpr Index groups() const { return ceil_div(channels, state_channels); }
  CHELA_HOST_DEVICE constexpr Index size() const { return sequences * runs() * groups(); }
};

/// One block's part.
struct StateWalk {
  Index sequence, first, last, first_channel, channels;
  bool rows_first;

  __device__ explicit StateWalk(const StateBlocks& all) : channels(all.channels), rows_first(all.rows_first) {
    const Index part = blockIdx.x / all.groups(), run = part % all.runs();
    sequence = part / all.runs(), first_channel = blockIdx.x % all.groups() * state_channels;
    first = run * all.rows_each, last = min(all.rows, first + all.rows_each);
  }

  /// Calls f(i, row, channel) for this thread's elements i of the step that begins with row `begin`.
  template <class F>
  __device__ void step(Index begin, F f) const {
#pragma unroll
    for (int i = 0; i < state_elements; ++i) {
      const int e = int(threadIdx.x) + i * state_threads;
      const Index row = begin + (rows_first ? e % state_rows : e / state_channels);
      const Index channel = first_channel + (rows_first ? e / state_rows : e % state_channels);
      if (row < last && channel < channels) f(i, row, channel);
    }
  }
};

template <class T>
struct FinalStateCall {
  TensorView<const T, 3> x = {}, initial_state = {};
  TensorView<T, 3> final_state = {};
  SequenceBatch sequences = {};
  StateBlocks blocks = {};
};

/// A step's rows are read before they are written, and rows move towards the first: with all rows in one block the
/// final state may be the initial state's memory.
template <class T>
__global__ void __launch_bounds__(state_threads) final_state_kernel(const __grid_constant__ FinalStateCall<T> call) {
  const StateWalk walk(call.blocks);
  const Sequence tokens = sequence_inside(call.sequences, walk.sequence);
  for (Index begin = walk.first; begin < walk.last; begin += state_rows) {
    T kept[state_elements];
    walk.step(begin, [&](int i, Index row, Index channel) {
      const Index t = tokens.count - call.blocks.rows + row;
      kept[i] = t >= 0                         ? call.x(tokens.batch, tokens.begin + t, channel)
                : call.initial_state.present() ? call.initial_state(walk.sequence, row + tokens.count, channel)
                                               : T(0.0f);
    });
    __syncthreads();
    walk.step(begin, [&](int i, Index row, Index channel) { call.final_state(walk.sequence, row, channel) = kept[i]; });
  }
}

template <class T>
struct StateGradientCall {
  TensorView<const T, 3> grad_final_state = {};
  TensorView<T, 3> grad_x = {}, grad_initial_state = {};
  SequenceBatch sequences = {};
  StateBlocks blocks = {};
  Index met = 0;  ///< the last rows of grad_initial_state, which the outputs have written where there are any
};

/// What flows into the final state is added to the gradients of the inputs it is made of. Rows of the initial state
/// that no output meets begin with zero.
template <class T>
__global__ void __launch_bounds__(state_threads)
    state_gradient_kernel(const __grid_constant__ StateGradientCall<T> call) {
  const StateWalk walk(call.blocks);
  const Sequence tokens = sequence_inside(call.sequences, walk.sequence);
  const Index history = call.blocks.rows;
  const bool flows = call.grad_final_state.present();
  for (Index begin = walk.first; begin < walk.last; begin += state_rows)
    walk.step(begin, [&](int, Index row, Index channel) {
      if (call.grad_initial_state.present()) {
        T& gradient = call.grad_initial_state(walk.sequence, row, channel);
        const bool met = tokens.count > 0 && row >= history - call.met;
        float sum = met ? static_cast<float>(gradient) : 0.0f;
        if (flows && row >= tokens.count)
          sum += static_cast<float>(call.grad_final_state(walk.sequence, row - tokens.count, channel));
        gradient = T(sum);
      }
      const Index t = tokens.count - history + row;
      if (flows && t >= 0 && call.grad_x.present()) {
        T& gradient = call.grad_x(tokens.batch, tokens.begin + t, channel);
        gradient =
            T(static_cast<float>(gradient) + static_cast<float>(call.grad_final_state(walk.sequence, row, channel)));
      }
    });
}

template <class T>
StateBlocks state_blocks(const LongConvShape& s, TensorView<T, 3> state) {
  constexpr Index rows_each = 512;
  return {s.sequences.size(), s.history(), s.channels, rows_each, state.strides[1] == 1 && state.strides[2] != 1};
}

template <class Call>
Status launch_states(void (*kernel)(Call), const Call& call, cudaStream_t stream) {
  const Index blocks = call.blocks.size();
  if (blocks == 0) return {};
  if (blocks >= Index(1) << 31)
    return {Code::unsupported, "states are too large for one call on the GPU; call with fewer sequences"};
  return launch(kernel, dim3(unsigned(blocks)), state_threads, 0, stream, call);
}

template <class T>
Status store_final_states(const LongConvArgs<T>& a, const LongConvShape& s, cudaStream_t stream) {
  if (!a.final_state.present()) return {};
  FinalStateCall<T> call{a.x, a.initial_state, a.final_state, s.sequences, state_blocks(s, a.final_state)};
  if (a.final_state.data == a.initial_state.data) call.blocks.rows_each = std::max<Index>(s.history(), 1);
  return launch_states(final_state_kernel<T>, call, stream);
}

template <class T>
Status add_state_gradients(const LongConvBackwardArgs<T>& a, const LongConvShape& s, Index met, cudaStream_t stream) {
  if (!a.grad_initial_state.present() && !(a.grad_final_state.present() && a.grad_x.present())) return {};
  const StateBlocks blocks =
      a.grad_initial_state.present() ? state_blocks(s, a.grad_initial_state) : state_blocks(s, a.grad_final_state);
  return launch_states(state_gradient_kernel<T>,
                       {a.grad_final_state, a.grad_x, a.grad_initial_state, s.sequences, blocks, met}, stream);
}

}  // namespace chela::cuda::detail
