#pragma once
// A sequence shared by several blocks: each first sums what its segment adds to the state (warpgroup_segment_sums), a
// scan turns these into the state at the beginning of each segment (scan_segments), and the pass with outputs begins
// there. K and V are read twice, which pays where there are too few heads to fill the device otherwise.
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/attention/warpgroup_tiles.cuh"

namespace chela::cuda::detail {

/// What each segment but the last of the walk adds to the state, and what it leaves of an earlier one. Heads are state heads here.
/// Blocks of 128 ValueGroups threads.
template <class T, class D, int KeyDim, int ValueGroups, bool Reversed>
__global__ void __launch_bounds__(128 * ValueGroups, 1)
    warpgroup_segment_sums(const __grid_constant__ WarpgroupPass<T> args) {
  if constexpr (arch::has_warpgroups) {
    using Tiles = WarpgroupTiles<KeyDim, ValueGroups, false, D::decays>;
    extern __shared__ char memory[];
    __shared__ WarpgroupBarriers barriers;
    __shared__ Place place;
    const LinearPass& pass = args.pass;
    const Tiles tiles(memory, pass.stages);
    if (threadIdx.x == 0) place = place_of_block(pass, 64 * ValueGroups, blockIdx.x, Reversed);
    init_barriers(barriers, tiles.stages, ValueGroups);

    const int group = int(threadIdx.x) / 128, thread = int(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
    ChunkLoader<T, Tiles, Reversed> loader(args, tiles, barriers, place, threadIdx.x == 0);
    for (int i = 0; i < tiles.stages - 1; ++i) loader.load_next();
    GateSource source;
    if constexpr (D::decays) source = gates_of(pass, place);
    [[maybe_unused]] auto gates_ahead = [&] {
      if constexpr (D::decays)
        return GateRing(tiles.gate_ring(4 * group + warp), source, place.first_chunk, place.end_chunk, lane, Reversed);
      else
        return 0;
    }();

    float state_t[KeyDim / 2];
#pragma unroll
    for (int i = 0; i < KeyDim / 2; ++i) state_t[i] = 0;
    float segment_age = 1;
    const int shared = shared_chunk(pass, place), count = place.end_chunk - place.first_chunk;
    int chunk = Reversed ? place.end_chunk - 1 : place.first_chunk;
    RingPosition at, freed;
    // Into the place of the chunk before.
    const auto load_next = [&](int step) {
      if (step > 0) {
        if (threadIdx.x == 0) arch::wait_barrier(arch::shared_address(&barriers.released[freed.place]), freed.parity);
        freed.advance(tiles.stages);
      }
      loader.load_next();
      __syncwarp();
    };
    for (int step = 0; step < count; ++step, chunk += Reversed ? -1 : 1) {
      const std::uint32_t k = tiles.keys(at.place), v = tiles.values(at.place, group);
      const auto k_rows = arch::operand<arch::Major::side>(k);
      [[maybe_unused]] float2 leave[8];
      if constexpr (D::decays) {
        const ChunkGates gates = gates_ahead.take();
        const float2 own = Reversed ? gates.enter() : gates.leave();
        const float age = gates.age();
#pragma unroll
        for (int j = 0; j < 8; ++j) leave[j] = gates.leave_of_columns(own, j);
#pragma unroll
        for (int i = 0; i < KeyDim / 2; ++i) state_t[i] *= age;
        arch::pin(state_t);
        segment_age *= age;
      }
      arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
      if (chunk == shared) clear_other_tokens<KeyDim>(k, v, place.tokens - chunk * chunk_len, 1 + group, thread);
      if constexpr (D::decays) {
        std::uint32_t values_t[4][4];
        load_values_transposed(values_t, v, warp, lane);
        weigh_values<T>(values_t, [&](int j) { return leave[j]; });
        arch::fence_products();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          arch::start_product<T, arch::Major::side>(state_t, values_t[i], arch::further(k_rows, 2048 * i), true);
        arch::commit_products();
        load_next(step);
        arch::wait_products<0>();
        arch::pin(state_t);
#pragma unroll
        for (int i = 0; i < 4; ++i) arch::keep(values_t[i]);
      } else {
        arch::fence_products();
#pragma unroll
        for (int i = 0; i < 4; ++i)
          arch::start_product<T, arch::Major::side, arch::Major::side>(
              state_t, arch::further(arch::operand<arch::Major::side>(v), 2048 * i), arch::further(k_rows, 2048 * i),
              true);
        arch::commit_products();
        load_next(step);
        arch::wait_products<0>();
        arch::pin(state_t);
      }
      arch::arrive(arch::shared_address(&barriers.released[at.place]));
      at.advance(tiles.stages);
    }
    for_each_state_element<KeyDim / 2>(
        state_of(slice(pass.segment_states, place.segment), place.sequence, place.state_head),
        place.value_begin + 64 * group + 16 * warp + lane / 4, lane, [&](int i, float& x) { x = state_t[i]; });
    if (threadIdx.x == 0 && place.value_begin == 0)
      pass.segment_ages[(Index(place.segment) * pass.segment_states.extents[1] + place.sequence) *
                            pass.segment_states.extents[2] +
                        place.state_head] = segment_age;
  }
}

/// Turns segment_states from what each segment adds into the state at its beginning. With one segment: a copy of the
/// initial states, for passes whose final states go to the same memory while other blocks still read. One thread per
/// state element.
template <class D>
__global__ void scan_segments(const __grid_constant__ LinearPass pass) {
  const auto& states = pass.segment_states;
  const Index element = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index of_state = Index(pass.key_dim) * pass.value_dim, heads = states.extents[2];
  const Index state = element / of_state, within = element % of_state, sequence = state / heads, head = state % heads;
  if (sequence >= states.extents[1]) return;
  const Index key = within % pass.key_dim, value = within / pass.key_dim;
  float sum = 0;
  if (const int given = pass.heads.states_per_given; pass.initial_state.present() && head % given == 0)
    sum = pass.initial_factor * pass.initial_state(pass.state_slots.present() ? pass.state_slots[sequence] : sequence,
                                                   head / given, key, value);
#pragma unroll 8
  for (int segment = 0; segment < pass.segments; ++segment) {
    float& place = states(segment, sequence, head, key, value);
    const float added = segment + 1 < pass.segments ? place : 0.f;
    place = sum;
    if constexpr (D::decays) {
      const Index before = segment * states.extents[1] * heads + state;
      if (segment + 1 < pass.segments)
        sum *= pass.segment_ages[std::is_same_v<D, KeyDecay> ? before * pass.key_dim + key : before];
    }
    sum += added;
  }
}

}  // namespace chela::cuda::detail
