#pragma once
// One token of linear attention per sequence: the state is read once, and written once.
//
//   S' = Diag(a) S      u = v, or by the delta rule beta (v - S'^T k)      S = S' + k u^T      o = scale S^T q
//
// A block has 32 value columns of one state, and walks through the output heads that read it.
#include <cmath>
#include <type_traits>

#include "chela/attention/l2_norm.hpp"
#include "chela/attention/member.hpp"
#include "chela/core/index_view.hpp"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/attention/linear_pass.cuh"
#include "chela/cuda/attention/step_tile.cuh"

namespace chela::cuda::detail {

/// What the kernel reads and writes. States are seen key-major whatever their layout; what is given for fewer axes is
/// broadcast.
template <class T, AttentionForm F>
struct StepCall {
  TensorView<const T, 3> q = {}, k = {}, v = {};           ///< [sequence, head, dim]
  TensorView<T, 3> o = {};                                 ///< [sequence, output_head, value_dim]
  TensorView<StateOf<T, F>, 4> state = {};                 ///< [sequence or slot, state_head, key_dim, value_dim]
  TensorView<const LogDecayOf<T, F>, 3> log_decay = {};    ///< [sequence, state_head, key_dim]
  TensorView<const BetaOf<T, F>, 2> beta = {};             ///< [sequence, state_head]
  TensorView<const Accumulator<T>, 1> gate_log_rate = {};  ///< [state_head], or absent
  TensorView<const Accumulator<T>, 2> gate_bias = {};      ///< [state_head, key_dim], or absent
  IndexView state_slots = {};                              ///< [sequence], or absent
  HeadSharing heads = {};
  int state_heads = 1, key_dim = 0, value_dim = 0, value_tiles = 1;
  float scale = 1;
};

/// Keys of a state: the threads of a block that may have 128 registers each.
inline constexpr int most_step_keys = 512;

/// Calls combine(x, other lane's x) until every lane has what all 32 give together, the same bits in each.
template <class F>
__device__ float over_warp(float x, F combine) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = combine(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}

/// sqrt(sum x^2 + epsilon), by a whole warp. Where squares leave the range of float, relative to the largest entry.
template <class T>
__device__ float row_length(TensorView<const T, 1> x, int lane) {
  constexpr float epsilon = float(L2NormArgs<T>{}.epsilon), least = 0x1p-103f, most = 0x1.fffffep127f;
  const auto sum_of = [&](auto term) {
    float sum = 0;
    for (int i = lane; i < int(x.extents[0]); i += 32) sum += term(static_cast<float>(x(i)));
    return over_warp(sum, [](float a, float b) { return a + b; });
  };
  const float square = sum_of([](float e) { return e * e; }) + epsilon;
  if ((square >= least && square <= most) || square != square) return sqrtf(square);
  float largest = 0;
  for (int i = lane; i < int(x.extents[0]); i += 32) largest = fmaxf(largest, fabsf(static_cast<float>(x(i))));
  largest = over_warp(largest, [](float a, float b) { return fmaxf(a, b); });
  return largest * sqrtf(sum_of([&](float e) { return e / largest * (e / largest); }) + epsilon / largest / largest);
}

/// Entry `key` of a query or key, of unit length where the form asks for it; zero past the end. A whole warp at once.
template <AttentionForm F, class T>
__device__ float key_entry(TensorView<const T, 1> x, int key, int lane) {
  const float entry = key < int(x.extents[0]) ? static_cast<float>(x(key)) : 0.f;
  if constexpr (F::unit_queries_and_keys)
    return entry / row_length(x, lane);
  else
    return entry;
}

/// The decay a of one key.
template <class T, AttentionForm F>
__device__ float decay_of(const StepCall<T, F>& call, int sequence, int head, int key) {
  using Gate = typename F::LogDecayGate;
  float z = static_cast<float>(call.log_decay(sequence, head, key)), rate = 1;
  if constexpr (Gate::takes_parameters) {
    if (call.gate_bias.present()) z += call.gate_bias(head, key);
    if (call.gate_log_rate.present()) rate = expf(call.gate_log_rate(head));
  }
  return expf(Gate::log_decay(z, rate));
}

/// Sums over the keys of a block: each warp brings its part, and each gets the whole, summed in one order. Two rooms in
/// turn, so that one barrier is enough.
class BlockSum {
 public:
  __device__ BlockSum(float* memory, int warp, int lane) : memory_(memory), warp_(warp), lane_(lane) {}

  /// `part` is of value `of_value`; the answer, of value `lane`.
  __device__ float operator()(float part, int of_value) {
    const int warps = int(blockDim.x) / 32;
    float* const room = memory_ + turn_ * warps * 32;
    turn_ ^= 1;
    room[32 * warp_ + of_value] = part;
    __syncthreads();
    float sum = room[lane_];
    for (int w = 1; w < warps; ++w) sum += room[32 * w + lane_];
    return sum;
  }
  static constexpr int bytes_per_warp = 2 * 32 * int(sizeof(float));

 private:
  float* memory_;
  int warp_, lane_, turn_ = 0;
};

/// Registers of a thread. Loads are in flight for as many warps as there are registers for: on an H100 a hundred and
/// more cost up to 15% of the bandwidth, and the spills that 64 force, up to 25% for the delta rule.
template <bool Fours>
inline constexpr int step_registers = Fours ? 72 : 128;

/// Blocks of one warp for each 32 keys, in x: value tiles of a state side by side, then state heads, then sequences.
template <class T, bool Decays, RuleKind R, AttentionForm F, bool Fours>
__global__ void __maxnreg__(step_registers<Fours>) step_kernel(const __grid_constant__ StepCall<T, F> call) {
  using Tile = StepTile<F::state_layout == StateLayout::key_major, Fours>;
  auto* const step_sums = arch::dynamic_shared<float>();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, first_key = step_tile * warp;
  const unsigned head_of_all = blockIdx.x / unsigned(call.value_tiles);
  const int first_value = step_tile * int(blockIdx.x % unsigned(call.value_tiles));
  const int sequence = int(head_of_all / unsigned(call.state_heads)),
            head = int(head_of_all % unsigned(call.state_heads));
  const int key = first_key + lane, value = first_value + lane;
  const auto row_of = [&](const auto& x, int head_of_x) { return slice(slice(x, sequence), head_of_x); };

  const Index entry = call.state_slots.present() ? call.state_slots[sequence] : sequence;
  const TensorView<StateOf<T, F>, 2> state = slice(slice(call.state, entry), head);
  Tile tile;
  tile.load(state, first_key, first_value, lane);

  const int first_output = head * call.heads.outputs_per_state;
  const auto query_of = [&](int output) {
    return call.scale * key_entry<F>(row_of(call.q, output / call.heads.outputs_per_query), key, lane);
  };
  float query = query_of(first_output);
  const float k = key_entry<F>(row_of(call.k, head / call.heads.states_per_key), key, lane);
  float written =
      value < call.value_dim ? static_cast<float>(call.v(sequence, head / call.heads.states_per_value, value)) : 0.f;

  BlockSum block_sum(step_sums, warp, lane);
  float own_keys[Tile::keys];
  if constexpr (Decays) {
    Tile::take_keys(own_keys, key < call.key_dim ? decay_of(call, sequence, head, key) : 1.f, lane);
    tile.multiply_keys(own_keys);
  }
  Tile::take_keys(own_keys, k, lane);
  if constexpr (R == RuleKind::delta) {
    const float beta = F::BetaRate::beta(static_cast<float>(call.beta(sequence, head)));
    written = beta * (written - block_sum(tile.read(own_keys, lane), Tile::read_value(lane)));
  }
  float own_values[Tile::values];
  Tile::take_values(own_values, written, lane);
  tile.write(own_keys, own_values);
  tile.store(state, first_key, first_value, lane);

  for (int i = 0; i < call.heads.outputs_per_state; ++i) {
    Tile::take_keys(own_keys, query, lane);
    if (i + 1 < call.heads.outputs_per_state) query = query_of(first_output + i + 1);
    const float output = block_sum(tile.read(own_keys, lane), Tile::read_value(lane));
    if (warp == i % (int(blockDim.x) / 32) && value < call.value_dim)
      call.o(sequence, first_output + i, value) = T(output);
  }
}

}  // namespace chela::cuda::detail
