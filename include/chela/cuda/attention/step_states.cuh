#pragma once
// The kernels of one token: a block reads its part of a state into registers, all loads under way together, and writes
// it back. Nothing is read twice, so what counts is bytes in flight.
#include "chela/core/index_view.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cuda/attention/linear_pass.cuh"

namespace chela::cuda::detail {

/// One token of every sequence. The state is seen as [.., outer, inner], inner the axis that is contiguous in memory.
template <class T, class S>
struct StepCall {
  TensorView<const T, 3> q, k, v;             ///< [sequence, head, key_dim or value_dim]
  TensorView<T, 3> o;                         ///< [sequence, output_head, value_dim]
  TensorView<S, 4> states = {};               ///< [sequence or slot, state_head, outer, inner]
  TensorView<const float, 3> log_decay = {};  ///< [sequence, state_head, key_dim], broadcast where it depends on less
  TensorView<const float, 2> beta = {};       ///< [sequence, state_head], delta rule only
  IndexView slots = {};                       ///< [sequence], or absent
  HeadSharing heads = {};
  int state_heads = 1, key_dim = 0, value_dim = 0, value_tiles = 1;
  float scale = 1;
  bool whole_units = false;  ///< whether rows of the state are whole aligned units of four elements
};

/// A block's state head and value columns, and where its tensors lie.
template <class T, class S>
struct StepPlace {
  int sequence, state_head, value_begin;
  TensorView<S, 2> state;

  __device__ StepPlace(const StepCall<T, S>& call, int value_tile) {
    const unsigned head_of_all = blockIdx.x / unsigned(call.value_tiles);
    value_begin = int(blockIdx.x % unsigned(call.value_tiles)) * value_tile;
    sequence = int(head_of_all / unsigned(call.state_heads));
    state_head = int(head_of_all % unsigned(call.state_heads));
    state = slice(slice(call.states, call.slots.present() ? call.slots[sequence] : sequence), state_head);
  }
};

/// Four elements of a row of the state, from column `inner` on; those past its end are zero.
template <class S>
__device__ float4 load_unit(TensorView<S, 2> state, int outer, int inner, bool whole) {
  if (outer >= int(state.extents[0]) || inner >= int(state.extents[1])) return {};
  const S* const at = &state(outer, inner);
  if (whole) {
    if constexpr (sizeof(S) == 4) return *reinterpret_cast<const float4*>(at);
    struct alignas(8) Unit {
      S x[4];
    };
    const Unit unit = *reinterpret_cast<const Unit*>(at);
    return {float(unit.x[0]), float(unit.x[1]), float(unit.x[2]), float(unit.x[3])};
  }
  float x[4] = {};
  for (int i = 0; i < 4; ++i)
    if (inner + i < int(state.extents[1])) x[i] = float(at[i * state.strides[1]]);
  return {x[0], x[1], x[2], x[3]};
}

template <class S>
__device__ void store_unit(TensorView<S, 2> state, int outer, int inner, bool whole, float4 x) {
  if (outer >= int(state.extents[0]) || inner >= int(state.extents[1])) return;
  S* const at = &state(outer, inner);
  const float all[] = {x.x, x.y, x.z, x.w};
  if (whole) {
    struct alignas(4 * sizeof(S)) Unit {
      S x[4];
    };
    *reinterpret_cast<Unit*>(at) = {S(all[0]), S(all[1]), S(all[2]), S(all[3])};
    return;
  }
  for (int i = 0; i < 4; ++i)
    if (inner + i < int(state.extents[1])) at[i * state.strides[1]] = S(all[i]);
}

/// Four elements of a vector of `size`; zeros past its end.
template <class T>
__device__ float4 load_four(TensorView<const T, 1> x, int first, int size) {
  const auto at = [&](int i) { return first + i < size ? float(x(first + i)) : 0.f; };
  return {at(0), at(1), at(2), at(3)};
}

__device__ inline float4 operator*(float a, float4 x) { return {a * x.x, a * x.y, a * x.z, a * x.w}; }
__device__ inline float4 operator*(float4 a, float4 x) { return {a.x * x.x, a.y * x.y, a.z * x.z, a.w * x.w}; }
__device__ inline float4 operator-(float4 a, float4 b) { return {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w}; }
/// a x + y
__device__ inline float4 multiply_add(float a, float4 x, float4 y) {
  return {fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w)};
}
/// x . y + sum
__device__ inline float dot(float4 x, float4 y, float sum) {
  return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
}

inline constexpr int step_rows = 8;         ///< rows of the state that a thread holds, four columns of each
inline constexpr int most_step_keys = 256;  ///< of a state
inline constexpr int most_step_threads = 512;
inline constexpr int step_warps = 8;  ///< of a block for value-major states

/// Key-major states: `Lanes` threads side by side have 4 Lanes value columns of every row, and sums over keys go through
/// shared memory, in one order.
template <class T, class S, DecayKind D, RuleKind R, int Lanes>
__global__ void __launch_bounds__(most_step_threads) step_key_major(const __grid_constant__ StepCall<T, S> call) {
  constexpr int columns = 4 * Lanes;
  __shared__ float keys[most_step_keys], queries[most_step_keys], decays[most_step_keys];
  __shared__ float4 parts[most_step_threads];
  __shared__ float4 sums[Lanes];
  const StepPlace<T, S> place(call, columns);
  const int groups = int(blockDim.x) / Lanes, group = int(threadIdx.x) / Lanes, lane = int(threadIdx.x) % Lanes;
  const int column = place.value_begin + 4 * lane, key_dim = call.key_dim;

  float4 state[step_rows];
#pragma unroll
  for (int i = 0; i < step_rows; ++i) state[i] = load_unit(place.state, group + i * groups, column, call.whole_units);

  const auto stage = [&](float* to, auto from) {
    for (int r = int(threadIdx.x); r < step_rows * groups; r += int(blockDim.x)) to[r] = r < key_dim ? from(r) : 0.f;
  };
  const auto k = slice(slice(call.k, place.sequence), place.state_head / call.heads.states_per_key);
  stage(keys, [&](int r) { return float(k(r)); });
  if constexpr (D != DecayKind::none) {
    const auto g = slice(slice(call.log_decay, place.sequence), place.state_head);
    stage(decays, [&](int r) { return expf(g(r)); });
  }
  __syncthreads();
  /// The sum over all rows of `factors` times the state, for this thread's columns.
  const auto sum_over_keys = [&](const float* factors) {
    float4 sum{};
#pragma unroll
    for (int i = 0; i < step_rows; ++i) sum = multiply_add(factors[group + i * groups], state[i], sum);
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0) {
      for (int other = 1; other < groups; ++other) sum = multiply_add(1.f, parts[other * Lanes + lane], sum);
      sums[lane] = sum;
    }
    __syncthreads();
    return sums[lane];
  };

  if constexpr (D != DecayKind::none) {
#pragma unroll
    for (int i = 0; i < step_rows; ++i) state[i] = decays[group + i * groups] * state[i];
  }
  const auto v = slice(slice(call.v, place.sequence), place.state_head / call.heads.states_per_value);
  float4 written = load_four(v, column, call.value_dim);
  if constexpr (R == RuleKind::delta)
    written = call.beta(place.sequence, place.state_head) * (written - sum_over_keys(keys));
#pragma unroll
  for (int i = 0; i < step_rows; ++i) {
    state[i] = multiply_add(keys[group + i * groups], written, state[i]);
    store_unit(place.state, group + i * groups, column, call.whole_units, state[i]);
  }

  for (int i = 0; i < call.heads.outputs_per_state; ++i) {
    const int head = place.state_head * call.heads.outputs_per_state + i;
    const auto q = slice(slice(call.q, place.sequence), head / call.heads.outputs_per_query);
    stage(queries, [&](int r) { return call.scale * float(q(r)); });
    __syncthreads();
    const float4 sum = sum_over_keys(queries);
    if (group == 0) {
      const auto o = slice(slice(call.o, place.sequence), head);
      const float all[] = {sum.x, sum.y, sum.z, sum.w};
      for (int j = 0; j < 4; ++j)
        if (column + j < call.value_dim) o(column + j) = T(all[j]);
    }
  }
}

/// Value-major states: a warp has whole rows, one for each value column, so that sums over keys stay inside of it.
template <class T, class S, DecayKind D, RuleKind R, int Units>
__global__ void __launch_bounds__(32 * step_warps) step_value_major(const __grid_constant__ StepCall<T, S> call) {
  constexpr int rows = step_rows / Units;
  constexpr int warps = step_warps;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const StepPlace<T, S> place(call, warps * rows);
  const int key_dim = call.key_dim;
  const auto row_of = [&](int i) { return place.value_begin + warp + i * warps; };

  float4 state[rows][Units];
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int u = 0; u < Units; ++u)
      state[i][u] = load_unit(place.state, row_of(i), 128 * u + 4 * lane, call.whole_units);

  const auto k = slice(slice(call.k, place.sequence), place.state_head / call.heads.states_per_key);
  float4 keys[Units];
#pragma unroll
  for (int u = 0; u < Units; ++u) keys[u] = load_four(k, 128 * u + 4 * lane, key_dim);
  if constexpr (D != DecayKind::none) {
    const auto g = slice(slice(call.log_decay, place.sequence), place.state_head);
#pragma unroll
    for (int u = 0; u < Units; ++u) {
      const float4 x = load_four(g, 128 * u + 4 * lane, key_dim);
      const float4 decay{expf(x.x), expf(x.y), expf(x.z), expf(x.w)};
#pragma unroll
      for (int i = 0; i < rows; ++i) state[i][u] = decay * state[i][u];
    }
  }
  const auto sum_over_keys = [&](const float4(&factors)[Units], const float4(&row)[Units]) {
    float sum = 0;
#pragma unroll
    for (int u = 0; u < Units; ++u) sum = dot(factors[u], row[u], sum);
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    return sum;
  };

  const auto v = slice(slice(call.v, place.sequence), place.state_head / call.heads.states_per_value);
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    float written = row_of(i) < call.value_dim ? float(v(row_of(i))) : 0.f;
    if constexpr (R == RuleKind::delta)
      written = call.beta(place.sequence, place.state_head) * (written - sum_over_keys(keys, state[i]));
#pragma unroll
    for (int u = 0; u < Units; ++u) {
      state[i][u] = multiply_add(written, keys[u], state[i][u]);
      store_unit(place.state, row_of(i), 128 * u + 4 * lane, call.whole_units, state[i][u]);
    }
  }

  for (int j = 0; j < call.heads.outputs_per_state; ++j) {
    const int head = place.state_head * call.heads.outputs_per_state + j;
    const auto q = slice(slice(call.q, place.sequence), head / call.heads.outputs_per_query);
    float4 queries[Units];
#pragma unroll
    for (int u = 0; u < Units; ++u) queries[u] = call.scale * load_four(q, 128 * u + 4 * lane, key_dim);
    const auto o = slice(slice(call.o, place.sequence), head);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float sum = sum_over_keys(queries, state[i]);
      if (lane == 0 && row_of(i) < call.value_dim) o(row_of(i)) = T(sum);
    }
  }
}

}  // namespace chela::cuda::detail
