#pragma once
// What the kernels of linear attention share: how a problem is cut into blocks, and states in and out of registers.
#include "chela/chunk/ragged.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cuda/attention/gates.cuh"

namespace chela::cuda::detail {

/// How heads share: head h of the larger count reads head h / ratio of the smaller.
struct HeadSharing {
  int outputs = 1;            ///< output heads
  int outputs_per_query = 1;  ///< output heads that read one head of q
  int outputs_per_state = 1;
  int states_per_key = 1;
  int states_per_value = 1;
  int states_per_given = 1;  ///< states that share the log-decays and initial state given for one: gradients of a state
                             ///< are summed from those of its output heads, of which the first begins with it
  int outputs_per_primal = 1;  ///< output heads that are gradients of one head
};

/// What passes of gradients leave behind for the gradient of log-decays (decay_gradient.cuh). Absent where null.
struct DecaySums {
  float* rows = nullptr;         ///< [part of the columns, batch, head, token]
  float* kept_states = nullptr;  ///< [window, state head, 16 columns, fragment]: states at the windows' beginnings
  float* anchors = nullptr;      ///< [window, head, 16 columns]
  int window = 0;                ///< tokens of a window
  TensorView<const float, 4> first_states = {};  ///< [sequence, state head, key, value] of the pass back in time
};

/// One pass over all heads, sequences and segments. States are seen key-major whatever their layout.
struct LinearPass {
  SequenceBatch sequences;
  HeadSharing heads;
  int key_dim = 0, value_dim = 0;
  int value_tiles = 1;  ///< blocks that share the value columns of a head
  int segments = 1;     ///< blocks that share the chunks of a sequence
  int stages = 2;       ///< chunks in flight
  float scale = 1;
  TensorView<const float, 3> log_decay = {};  ///< [batch, token, state_head]
  int log_decay_lag = 0;  ///< a token has the log-decay of the one so many before it, or zero where there is none
  TensorView<const float, 4> initial_state = {};  ///< [sequence or slot, state_head, key_dim, value_dim], or absent
  TensorView<float, 4> final_state = {};          ///< likewise
  IndexView state_slots = {};                     ///< [sequence], or absent
  TensorView<float, 5> boundary_states = {};      ///< [sequence, boundary, state_head, key_dim, value_dim], or absent
  int boundary_every = 1;                         ///< tokens from one boundary to the next
  /// [sequence, n, state_head, key_dim, value_dim], or absent: the states after the last n tokens (last_states.cuh)
  TensorView<float, 5> last_states = {};
  TensorView<float, 5> segment_states = {};    ///< [segment, sequence, state_head, key_dim, value_dim], or absent: the
                                               ///< states at the segments' beginnings
  float* segment_ages = nullptr;               ///< [segment, sequence, state_head], with a decay per key also
                                               ///< [key_dim]: what is left of an earlier state
  float initial_factor = 1, final_factor = 1;  ///< of the initial state as it enters, and of the final one
  DecaySums sums = {};
};

/// How a pass walks. In time, a query sees its own token and earlier ones; reversed, its own and later ones. A pass that may
/// be asked for DecaySums keeps apart from its products, while it is, what a token does to itself. The second pass of a
/// bidirectional span joins the first: its queries do not see their own tokens, and its outputs are added to those there.
template <bool Reversed, bool MaySum, bool Joins = false>
struct Walk {
  static constexpr bool reversed = Reversed, may_sum = MaySum, joins = Joins;
  static constexpr bool loads_beside = MaySum || Joins;  ///< something that belongs to each tile of the output
};
using InTime = Walk<false, false>;
using JoiningBack = Walk<true, false, true>;

/// A block's share of the problem. Kept in shared memory: most of it is used once per chunk, and registers are scarce.
struct Place {
  int sequence, batch, first_token, tokens;
  int head, state_head, given_head, query_head, key_head, value_head;
  int value_begin;                      ///< first value column
  int segment, first_chunk, end_chunk;  ///< segments are counted in the order of the walk
};

/// Block x: value tiles of a head side by side, then heads, then sequences. Block y: segments.
__device__ inline Place place_of_block(const LinearPass& pass, int value_tile, unsigned block, bool reversed) {
  Place place;
  const unsigned head_of_all = block / unsigned(pass.value_tiles);
  place.value_begin = int(block % unsigned(pass.value_tiles)) * value_tile;
  place.sequence = int(head_of_all / unsigned(pass.heads.outputs));
  const Sequence sequence = pass.sequences[place.sequence];
  place.batch = int(sequence.batch), place.first_token = int(sequence.begin), place.tokens = int(sequence.count);
  place.head = int(head_of_all % unsigned(pass.heads.outputs));
  place.query_head = place.head / pass.heads.outputs_per_query;
  place.state_head = place.head / pass.heads.outputs_per_state;
  place.given_head = place.state_head / pass.heads.states_per_given;
  place.key_head = place.state_head / pass.heads.states_per_key;
  place.value_head = place.state_head / pass.heads.states_per_value;
  place.segment = int(blockIdx.y);
  const int chunks = (place.tokens + chunk_len - 1) / chunk_len, share = (chunks + pass.segments - 1) / pass.segments;
  const int segment = reversed ? pass.segments - 1 - place.segment : place.segment;
  place.first_chunk = min(segment * share, chunks);
  place.end_chunk = min(place.first_chunk + share, chunks);
  return place;
}
__device__ inline Place place_of_block(const LinearPass& pass, int value_tile) {
  return place_of_block(pass, value_tile, blockIdx.x, false);
}

__device__ inline GateSource gates_of(const LinearPass& pass, const Place& place) {
  const Index stride = pass.log_decay.strides[1];
  const float* const first = &pass.log_decay(place.batch, place.first_token, place.given_head);
  return {first - pass.log_decay_lag * stride, stride, pass.log_decay_lag, place.tokens};
}

/// A lane's part of S^T in the layout of products: rows are value columns `row` and `row + 8`, registers 4 j to 4 j + 3
/// hold keys 8 j + 2 (lane % 4) and the next, for each of the two rows. f(register, element) is called for those inside
/// the state.
template <int Registers, class S, class F>
__device__ void for_each_state_element(TensorView<S, 2> state, int row, int lane, F f) {
  const int key = 2 * (lane % 4), keys = int(state.extents[0]), values = int(state.extents[1]);
  S* const first = &state(key, row);
  const Index next_key = state.strides[0], next_row = 8 * state.strides[1];
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {
    if (8 * j + key >= keys) break;
    S* const at = first + 8 * j * next_key;
    if (row < values) f(4 * j, at[0]), f(4 * j + 1, at[next_key]);
    if (row + 8 < values) f(4 * j + 2, at[next_row]), f(4 * j + 3, at[next_row + next_key]);
  }
}

/// The state of an entry of [entry, state_head, key_dim, value_dim].
template <class S>
__device__ TensorView<S, 2> state_of(TensorView<S, 4> states, Index entry, int state_head) {
  return slice(slice(states, entry), state_head);
}

template <int Registers>
__device__ void load_first_state(float (&state_t)[Registers], const LinearPass& pass, const Place& place, int row,
                                 int lane) {
#pragma unroll
  for (int i = 0; i < Registers; ++i) state_t[i] = 0;
  if (pass.segment_states.present()) {
    for_each_state_element<Registers>(
        state_of(slice(pass.segment_states, place.segment), place.sequence, place.state_head), row, lane,
        [&](int i, float& x) { state_t[i] = x; });
  } else if (pass.initial_state.present() && place.state_head % pass.heads.states_per_given == 0) {
    const Index entry = pass.state_slots.present() ? pass.state_slots[place.sequence] : place.sequence;
    for_each_state_element<Registers>(state_of(pass.initial_state, entry, place.given_head), row, lane,
                                      [&](int i, const float& x) { state_t[i] = pass.initial_factor * x; });
  }
}

/// Whether this block is the one that writes the states which its output head shares with others.
__device__ inline bool writes_states(const LinearPass& pass, const Place& place) {
  return place.head % pass.heads.outputs_per_state == 0;
}

/// Where the states after the last `count` of so many tokens are computed from: the chunk's beginning before them.
CHELA_HOST_DEVICE constexpr int last_states_origin(int tokens, int count) {
  const int first = tokens - (count - 1);
  return first > 0 ? first / chunk_len * chunk_len : 0;
}

/// After `tokens` tokens, a whole number of chunks: keeps the state where one is wanted. Of the last states only the one
/// that they begin with, in the place of the first.
template <int Registers>
__device__ void save_state(const float (&state_t)[Registers], const LinearPass& pass, const Place& place, int tokens,
                           int row, int lane) {
  if (tokens > place.tokens || !writes_states(pass, place)) return;
  const int count = int(pass.last_states.extents[1]);
  const bool at_boundary = pass.boundary_states.present() && tokens > 0 && tokens % pass.boundary_every == 0;
  const bool at_origin = count > 1 && tokens == last_states_origin(place.tokens, count);
#pragma unroll 1  // registers are scarce here
  for (int i = at_boundary ? 0 : 1; i < (at_origin ? 2 : 1); ++i) {
    const TensorView<float, 5>& states = i == 0 ? pass.boundary_states : pass.last_states;
    const int index = i == 0 ? tokens / pass.boundary_every - 1 : 0;
    for_each_state_element<Registers>(state_of(slice(states, place.sequence), index, place.state_head), row, lane,
                                      [&](int element, float& x) { x = state_t[element]; });
  }
}
/// Whether a pass has to call it.
__device__ inline bool saves_states(const LinearPass& pass) {
  return pass.boundary_states.present() || pass.last_states.present();
}

template <int Registers>
__device__ void store_last_state(const float (&state_t)[Registers], const LinearPass& pass, const Place& place, int row,
                                 int lane) {
  if (place.segment + 1 != pass.segments || !writes_states(pass, place)) return;
  const auto store = [&](TensorView<float, 4> states, Index entry, float factor) {
    for_each_state_element<Registers>(state_of(states, entry, place.state_head), row, lane,
                                      [&](int i, float& x) { x = factor * state_t[i]; });
  };
  if (pass.final_state.present())
    store(pass.final_state, pass.state_slots.present() ? pass.state_slots[place.sequence] : place.sequence,
          pass.final_factor);
  if (pass.last_states.present()) store(slice(pass.last_states, place.sequence), pass.last_states.extents[1] - 1, 1);
}

}  // namespace chela::cuda::detail
