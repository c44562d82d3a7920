#pragma once
// Linear attention with a decay per key on warpgroups (sm_90a), one block of threads per head and tile of value columns.
// The state advances by blocks of 16 tokens (key_decay.cuh):
//
//   O^T  = S^T Q^T + V^T P^T
//   S^T  = S^T age + V^T K
//
// with queries, keys and scores decayed and S^T in registers, where ages are factors of its columns. Warpgroup 0 prepares
// the blocks one chunk ahead of the others and starts the copies; each other warpgroup has 64 value columns. In chunks of
// 64 tokens there would be a quarter of these steps, but six more products between blocks, and queries and keys would be
// wanted both from their block's and from their chunk's beginning or end.
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/attention/key_decay_tiles.cuh"
#include "chela/cuda/attention/warpgroup_pass.cuh"

namespace chela::cuda::detail {

/// The copies of chunks to come, started by one thread, which knows when a place of the ring is free.
template <class T, bool Outputs, class Tiles>
class KeyDecayLoader {
 public:
  __device__ KeyDecayLoader(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                            const Place& place, bool loads)
      : args_(args),
        tiles_(tiles),
        barriers_(barriers),
        place_(place),
        chunk_(loads ? place.first_chunk : place.end_chunk) {}

  __device__ void load_next() {
    if (chunk_ >= place_.end_chunk) return;
    const std::uint32_t loaded = arch::shared_address(&barriers_.loaded[at_.place]);
    arch::arrive_expecting(loaded, Tiles::stage);
    const int token = place_.first_token + chunk_ * chunk_len, batch = place_.batch;
    if constexpr (Outputs)
      arch::load_tensor(tiles_.queries(at_.place), &args_.q, loaded, 0, token, 0, place_.query_head, batch);
    arch::load_tensor(tiles_.keys(at_.place), &args_.k, loaded, 0, token, 0, place_.key_head, batch);
    arch::load_tensor(tiles_.values(at_.place, 0), &args_.v, loaded, 0, token, place_.value_begin / 64,
                      place_.value_head, batch);
    at_.advance(tiles_.stages);
    ++chunk_;
  }

 private:
  const WarpgroupPass<T>& args_;
  const Tiles& tiles_;
  KeyDecayBarriers& barriers_;
  const Place& place_;
  int chunk_;
  RingPosition at_;
};

/// What a segment leaves of an earlier state, from the sums over blocks that each warp of warpgroup 0 has seen.
template <int KeyDim>
__device__ void store_segment_age(float2 log2_age, float (&sums)[4][block_keys], const LinearPass& pass,
                                  const Place& place, int thread) {
  constexpr int panels = KeyDim / 64;
  const int warp = thread / 32, lane = thread % 32;
  sums[warp][2 * lane] = log2_age.x, sums[warp][2 * lane + 1] = log2_age.y;
  arch::sync_threads(3, 128);
  if (thread >= KeyDim || place.value_begin != 0) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4 / panels; ++i) sum += sums[thread / 64 + i * panels][thread % 64];
  const Index state =
      (Index(place.segment) * pass.segment_states.extents[1] + place.sequence) * pass.segment_states.extents[2] +
      place.state_head;
  pass.segment_ages[state * KeyDim + thread] = arch::exp2_flushed(sum);
}

/// Warpgroup 0: each warp takes the blocks of one panel of keys, every fourth or second of them.
template <class T, int KeyDim, bool Outputs, class Tiles>
__device__ float2 prepare_keys(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                               const Place& place, int thread) {
  constexpr int panels = KeyDim / 64, parallel_blocks = Tiles::parallel_blocks, turns = chunk_blocks / parallel_blocks;
  constexpr int stride = parallel_blocks * block_tokens;
  constexpr int ahead = Outputs ? 1 : turns;  // log-decays in flight: as many as there are registers for
  const int warp = thread / 32, lane = thread % 32, key_panel = warp % panels;
  KeyDecayLoader<T, Outputs, Tiles> loader(args, tiles, barriers, place, thread == 0);
  for (int i = 0; i < tiles.stages; ++i) loader.load_next();
  const GateSource source = gates_of(args.pass, place);
  const int key = key_panel * block_keys + 2 * lane;
  const int first_block = warp / panels;
  BlockGates gates[ahead];
#pragma unroll
  for (int i = 0; i < ahead; ++i)
    gates[i].fetch(source, key, place.first_chunk * chunk_len + first_block * block_tokens + i * stride);

  float2 segment_age = {0, 0};
  RingPosition at, buffer;
  for (int chunk = place.first_chunk; chunk < place.end_chunk; ++chunk) {
    arch::wait_barrier(arch::shared_address(&barriers.released[buffer.place]), buffer.parity ^ 1);
    if (chunk >= place.first_chunk + 2) loader.load_next();
    __syncwarp();
#pragma unroll ahead
    for (int turn = 0; turn < turns; ++turn) {
      const int block = first_block + turn * parallel_blocks;
      const int first = chunk * chunk_len + block * block_tokens;
      BlockGates& given = gates[ahead > 1 ? turn : 0];
      float2 decays[block_tokens];
      const float2 age = given.decays(decays);
      segment_age.x += age.x, segment_age.y += age.y;
      arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
      const KeyBlock rows = tiles.block(at.place, buffer.place, block, key_panel);
      BlockScores scores = prepare_block<T, Outputs>(rows, decays, age, place.tokens - first, lane,
                                                     [&] { given.fetch(source, key, first + ahead * stride); });
      if constexpr (Outputs && panels > 1)
        sum_over_panels<panels>(scores, tiles.panel_sums(first_block, turn), key_panel, 4 + first_block, lane);
      if (Outputs && key_panel == 0) store_scores<T>(scores, rows, lane);
      arch::fence_copies();
      __syncwarp();
      if (lane == 0) arch::arrive(arch::shared_address(&barriers.prepared[buffer.place][block]));
    }
    at.advance(tiles.stages);
    buffer.advance(2);
  }
  return segment_age;
}

/// O^T [64 value columns, 16 tokens] of one block, turned and staged in the rows of its tokens.
template <class T>
__device__ void stage_output(const float (&output_t)[8], std::uint32_t rows, float scale, int warp, int lane) {
  const auto pack = [&](int i) { return arch::pack<T>(scale * output_t[i], scale * output_t[i + 1]); };
  arch::store_matrices_transposed(
      rows + unsigned(arch::swizzled<chunk_len>(8 * (lane / 16) + lane % 8, 2 * warp + lane / 8 % 2)), pack(0), pack(2),
      pack(4), pack(6));
}

/// The staged outputs of a chunk, on their way out as in store_output (warpgroup_pass.cuh).
template <class T>
__device__ void store_staged_output(const WarpgroupPass<T>& args, std::uint32_t staged, const Place& place, int chunk,
                                    bool shared, int group, int thread) {
  arch::fence_copies();
  if (thread == 0) arch::wait_stores_read();
  arch::sync_threads(1 + group, 128);
  const int token = place.first_token + chunk * chunk_len, column = place.value_begin + 64 * group;
  if (!shared) {
    if (thread == 0) arch::store_tensor(&args.o, staged, 0, token, column / 64, place.head, place.batch);
  } else {
    const int rows = place.tokens % chunk_len;
    for (int unit = thread; unit < 8 * rows; unit += 128)
      *reinterpret_cast<uint4*>(&args.output(place.batch, token + unit / 8, place.head, column + 8 * (unit % 8))) =
          arch::load_shared_unit(staged + unsigned(arch::swizzled<chunk_len>(unit / 8, unit % 8)));
  }
}

/// Warpgroups 1 and on: states, and outputs, of 64 value columns each.
template <class T, int KeyDim, bool Outputs, class Tiles>
__device__ void carry_aged_state(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                                 const Place& place, int group, int thread) {
  using arch::Major;
  const LinearPass& pass = args.pass;
  const int warp = thread / 32, lane = thread % 32;
  const int value = place.value_begin + 64 * group + 16 * warp + lane / 4;
  float state_t[KeyDim / 2];  // [64 value columns, KeyDim]
  if constexpr (Outputs) {
    load_first_state(state_t, pass, place, value, lane);
  } else {
#pragma unroll
    for (int i = 0; i < KeyDim / 2; ++i) state_t[i] = 0;
  }

  const int shared = shared_chunk(pass, place), end = place.end_chunk;
  [[maybe_unused]] const bool keeps_boundaries = pass.boundary_states.present();
  RingPosition at, buffer;
  for (int chunk = place.first_chunk; chunk < end; ++chunk) {
    const std::uint32_t v = tiles.values(at.place, group);
    const auto v_rows = arch::operand<Major::side>(v);
    const auto k_rows = arch::operand<Major::side>(tiles.keys(at.place));
    const auto low_k_rows = arch::operand<Major::side>(tiles.low_keys(buffer.place));
    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    if (chunk == shared) clear_other_tokens<0>(0, v, place.tokens - chunk * chunk_len, 1 + group, thread);

    [[maybe_unused]] const std::uint32_t staged = tiles.output(group, buffer.place);
#pragma unroll 1
    for (int block = 0; block < chunk_blocks; ++block) {
      const int rows = block * Tiles::block_rows;
      arch::wait_barrier(arch::shared_address(&barriers.prepared[buffer.place][block]), buffer.parity);
      [[maybe_unused]] float output_t[8];  // [64 value columns, 16 tokens]
      [[maybe_unused]] std::uint32_t rounded[Outputs ? KeyDim / 4 : 1];
      if constexpr (Outputs) {
#pragma unroll
        for (int i = 0; i < KeyDim / 4; ++i) rounded[i] = arch::pack<T>(state_t[2 * i], state_t[2 * i + 1]);
        arch::pin(rounded);
      }
      age_state(state_t, tiles.ages(buffer.place, block), lane);
      arch::pin(state_t);

      arch::fence_products();
      if constexpr (Outputs) {
        const auto q_columns = arch::operand<Major::sum>(tiles.queries(at.place) + unsigned(rows));
#pragma unroll
        for (int i = 0; i < KeyDim / 16; ++i)
          arch::start_product<T, Major::sum>(output_t, rounded + 4 * i,
                                             arch::further(q_columns, i / 4 * Tiles::panel + i % 4 * 32), i > 0);
        const auto p_columns = arch::operand<Major::sum>(tiles.scores(buffer.place));
        arch::start_product<T, Major::side, Major::sum>(output_t, arch::further(v_rows, rows),
                                                        arch::further(p_columns, 16 * Tiles::score_unit(block)), true);
      }
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, rows),
                                                       arch::further(k_rows, rows), true);
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, rows),
                                                       arch::further(low_k_rows, rows), true);
      arch::commit_products();
      arch::wait_products<0>();
      arch::pin(state_t);
      if constexpr (Outputs) {
        arch::pin(output_t);
        arch::keep(rounded);
        stage_output<T>(output_t, staged + unsigned(rows), pass.scale, warp, lane);
      }
    }
    arch::arrive(arch::shared_address(&barriers.released[buffer.place]));
    if constexpr (Outputs) {
      store_staged_output(args, staged, place, chunk, chunk == shared, group, thread);
      if (keeps_boundaries) store_boundary_state(state_t, pass, place, (chunk + 1) * chunk_len, value, lane);
    }
    at.advance(tiles.stages);
    buffer.advance(2);
  }
  if constexpr (Outputs) {
    store_last_state(state_t, pass, place, value, lane);
    if (thread == 0) arch::wait_stores();
  } else {
    for_each_state_element<KeyDim / 2>(
        state_of(slice(pass.segment_states, place.segment), place.sequence, place.state_head), value, lane,
        [&](int i, float& x) { x = state_t[i]; });
  }
}

/// Blocks of 128 (1 + ValueGroups) threads, each for 64 ValueGroups value columns. Without Outputs: what each segment but
/// the last adds to the state, and what it leaves of an earlier one; heads are state heads then.
template <class T, int KeyDim, int ValueGroups, bool Outputs>
__global__ void __launch_bounds__(128 * (1 + ValueGroups), 1)
    key_decay_pass(const __grid_constant__ WarpgroupPass<T> args) {
  if constexpr (arch::has_warpgroups) {
    using Tiles = KeyDecayTiles<KeyDim, ValueGroups, Outputs>;
    extern __shared__ char memory[];
    __shared__ KeyDecayBarriers barriers;
    __shared__ Place place;
    const Tiles tiles(memory, args.pass.stages);
    if (threadIdx.x == 0) {
      place = place_of_block(args.pass, 64 * ValueGroups);
      const auto init = [](std::uint64_t& barrier, int arrivals) {
        arch::init_barrier(arch::shared_address(&barrier), arrivals);
      };
      for (int i = 0; i < tiles.stages; ++i) init(barriers.loaded[i], 1);
      for (int i = 0; i < 2; ++i) {
        init(barriers.released[i], 128 * ValueGroups);
        for (int block = 0; block < chunk_blocks; ++block) init(barriers.prepared[i][block], KeyDim / 64);
      }
      arch::fence_barriers();
    }
    if constexpr (Outputs) {
      for (int i = int(threadIdx.x); i < 2 * Tiles::score_bytes / 16; i += int(blockDim.x))
        arch::store_shared_unit(tiles.scores(i % 2) + 16u * unsigned(i / 2), uint4{0, 0, 0, 0});
      arch::fence_copies();
    }
    __syncthreads();

    // Three warpgroups are given 168 registers a thread at launch: less than preparing needs.
    constexpr bool three = ValueGroups == 2;
    const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
    if (warpgroup == 0) {
      if constexpr (three) arch::take_registers<200>();
      const float2 age = prepare_keys<T, KeyDim, Outputs>(args, tiles, barriers, place, thread);
      if constexpr (!Outputs) {
        __shared__ float ages[4][block_keys];
        store_segment_age<KeyDim>(age, ages, args.pass, place, thread);
      }
    } else {
      if constexpr (three) arch::give_registers<152>();
      carry_aged_state<T, KeyDim, Outputs>(args, tiles, barriers, place, warpgroup - 1, thread);
    }
  }
}

}  // namespace chela::cuda::detail
