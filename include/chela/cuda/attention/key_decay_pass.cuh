#pragma once
// Linear attention with a decay per key on warpgroups (sm_90a), one block of threads per head and tile of value
// columns. The state advances by blocks of 16 tokens (key_decay.cuh):
//
//   O^T  = S^T Q^T + V^T P^T
//   S^T  = S^T age + V^T K
//
// with queries, keys and scores decayed and S^T in registers, where ages are factors of its columns. Warpgroup 0
// prepares the blocks one chunk ahead of the others and starts the copies; each other warpgroup has 64 value columns.
// In chunks of 64 tokens there would be a quarter of these steps, but six more products between blocks, and queries and
// keys would be wanted both from their block's and from their chunk's beginning or end.
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/attention/key_decay_tiles.cuh"
#include "chela/cuda/attention/warpgroup_pass.cuh"

namespace chela::cuda::detail {

/// Warpgroup 0: each warp takes the blocks of one panel of keys, every fourth or second of them.
template <class T, int KeyDim, bool Reversed, class Tiles>
__device__ void prepare_keys(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                             const Place& place, int thread) {
  constexpr int panels = KeyDim / 64, parallel_blocks = Tiles::parallel_blocks, turns = chunk_blocks / parallel_blocks;
  constexpr int stride = (Reversed ? -1 : 1) * parallel_blocks * block_tokens;
  const int warp = thread / 32, lane = thread % 32, key_panel = warp % panels;
  KeyDecayLoader<T, true, Reversed, Tiles> loader(args, tiles, barriers, place, thread == 0);
  for (int i = 0; i < tiles.stages; ++i) loader.load_next();
  const GateSource source = gates_of(args.pass, place);
  const int key = key_panel * block_keys + 2 * lane;
  const int first_block = warp / panels, chunks = place.end_chunk - place.first_chunk;
  BlockGates gates;
  gates.fetch(source, key,
              in_walk<Reversed>(first_block, place.first_chunk * chunk_blocks, chunks * chunk_blocks) * block_tokens);

  RingPosition at, buffer;
  for (int step = 0; step < chunks; ++step) {
    const int chunk = in_walk<Reversed>(step, place.first_chunk, chunks);
    arch::wait_barrier(arch::shared_address(&barriers.released[buffer.place]), buffer.parity ^ 1);
    if (step >= 2) loader.load_next();
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      const int block = in_walk<Reversed>(first_block + turn * parallel_blocks, 0, chunk_blocks);
      const int first = chunk * chunk_len + block * block_tokens;
      arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
      const KeyBlock rows = tiles.block(at.place, buffer.place, block, key_panel);
      BlockScores scores = prepare_block<T, Reversed>(rows, gates, place.tokens - first, lane,
                                                      [&] { gates.fetch(source, key, first + stride); });
      if constexpr (panels > 1)
        sum_over_panels<panels>(scores, tiles.panel_sums(first_block, turn), key_panel, 4 + first_block, lane);
      if (key_panel == 0) store_scores<T, Reversed>(scores, rows, lane);
      arch::fence_copies();
      arch::arrive(arch::shared_address(&barriers.prepared[buffer.place][block]));
    }
    at.advance(tiles.stages);
    buffer.advance(2);
  }
}

/// O^T [64 value columns, 16 tokens] of one block, turned and staged in the rows of its tokens.
template <class T>
__device__ void stage_output(const float (&output_t)[8], std::uint32_t rows, float scale, int warp, int lane) {
  const auto pack = [&](int i) { return arch::pack<T>(scale * output_t[i], scale * output_t[i + 1]); };
  arch::store_matrices_transposed(
      rows + unsigned(arch::swizzled<chunk_len>(8 * (lane / 16) + lane % 8, 2 * warp + lane / 8 % 2)), pack(0), pack(2),
      pack(4), pack(6));
}

/// The staged outputs of a chunk, on their way out as in hand_over_output (warpgroup_pass.cuh).
template <class T>
__device__ void store_staged_output(const WarpgroupPass<T>& args, std::uint32_t staged, const Place& place, int chunk,
                                    bool shared, int group, int thread) {
  arch::fence_copies();
  if (thread == 0) arch::wait_stores_read();
  arch::sync_threads(1 + group, 128);
  if (!args.output.present()) return;
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
template <class T, int KeyDim, bool Reversed, class Tiles>
__device__ void carry_aged_state(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                                 const Place& place, int group, int thread) {
  using arch::Major;
  const LinearPass& pass = args.pass;
  const int warp = thread / 32, lane = thread % 32;
  const int value = place.value_begin + 64 * group + 16 * warp + lane / 4;
  float state_t[KeyDim / 2];  // [64 value columns, KeyDim]
  load_first_state(state_t, pass, place, value, lane);
  std::uint32_t age_column[1] = {8u * unsigned(lane % 4)};
  arch::pin(age_column);  // not to be made anew for each block

  const int shared = shared_chunk(pass, place), chunks = place.end_chunk - place.first_chunk;
  const bool saves = !Reversed && saves_states(pass);
  if (saves && place.segment == 0) save_state(state_t, pass, place, 0, value, lane);
  RingPosition at, buffer;
  for (int step = 0; step < chunks; ++step) {
    const int chunk = in_walk<Reversed>(step, place.first_chunk, chunks);
    const std::uint32_t v = tiles.values(at.place, group);
    const auto v_rows = arch::operand<Major::side>(v);
    const auto k_rows = arch::operand<Major::side>(tiles.keys(at.place));
    const auto low_k_rows = arch::operand<Major::side>(tiles.low_keys(buffer.place));
    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    if (chunk == shared) clear_other_tokens<0>(0, v, place.tokens - chunk * chunk_len, 1 + group, thread);

    const std::uint32_t staged = tiles.output(group, buffer.place);
#pragma unroll 1
    for (int done = 0; done < chunk_blocks; ++done) {
      const int block = in_walk<Reversed>(done, 0, chunk_blocks), rows = block * Tiles::block_rows;
      arch::wait_barrier(arch::shared_address(&barriers.prepared[buffer.place][block]), buffer.parity);
      float output_t[8];  // [64 value columns, 16 tokens]
      std::uint32_t rounded[KeyDim / 4];
#pragma unroll
      for (int i = 0; i < KeyDim / 4; ++i) rounded[i] = arch::pack<T>(state_t[2 * i], state_t[2 * i + 1]);
      arch::pin(rounded);
      age_state(state_t, tiles.ages(buffer.place, block) + age_column[0]);
      arch::pin(state_t);

      arch::fence_products();
      const auto q_columns = arch::operand<Major::sum>(tiles.queries(at.place) + unsigned(rows));
#pragma unroll
      for (int i = 0; i < KeyDim / 16; ++i)
        arch::start_product<T, Major::sum>(output_t, rounded + 4 * i,
                                           arch::further(q_columns, i / 4 * Tiles::panel + i % 4 * 32), i > 0);
      const auto p_columns = arch::operand<Major::sum>(tiles.scores(buffer.place));
      arch::start_product<T, Major::side, Major::sum>(output_t, arch::further(v_rows, rows),
                                                      arch::further(p_columns, 16 * Tiles::score_unit(block)), true);
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, rows),
                                                       arch::further(k_rows, rows), true);
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, rows),
                                                       arch::further(low_k_rows, rows), true);
      arch::commit_products();
      arch::wait_products<0>();
      arch::pin(state_t);
      arch::pin(output_t);
      arch::keep(rounded);
      stage_output<T>(output_t, staged + unsigned(rows), pass.scale, warp, lane);
    }
    arch::arrive(arch::shared_address(&barriers.released[buffer.place]));
    store_staged_output(args, staged, place, chunk, chunk == shared, group, thread);
    if (saves) save_state(state_t, pass, place, (chunk + 1) * chunk_len, value, lane);
    at.advance(tiles.stages);
    buffer.advance(2);
  }
  store_last_state(state_t, pass, place, value, lane);
  if (thread == 0) arch::wait_stores();
}

/// Blocks of 128 (1 + ValueGroups) threads, each for 64 ValueGroups value columns.
template <class T, int KeyDim, int ValueGroups, bool Reversed = false>
__global__ void __launch_bounds__(128 * (1 + ValueGroups), 1)
    key_decay_pass(const __grid_constant__ WarpgroupPass<T> args) {
  if constexpr (arch::has_warpgroups) {
    using Tiles = KeyDecayTiles<KeyDim, ValueGroups, true>;
    extern __shared__ char memory[];
    __shared__ KeyDecayBarriers barriers;
    __shared__ Place place;
    const Tiles tiles(memory, args.pass.stages);
    if (threadIdx.x == 0) place = place_of_block(args.pass, 64 * ValueGroups, blockIdx.x, Reversed);
    for (int i = int(threadIdx.x); i < 2 * Tiles::score_bytes / 16; i += int(blockDim.x))  // see store_scores
      arch::store_shared_unit(tiles.scores(i % 2) + 16u * unsigned(i / 2), uint4{0, 0, 0, 0});
    arch::fence_copies();
    init_barriers(barriers, tiles.stages, 32 * (KeyDim / 64), 128 * ValueGroups);

    // Three warpgroups are given 168 registers a thread at launch: less than preparing needs.
    constexpr bool three = ValueGroups == 2;
    const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
    if (warpgroup == 0) {
      if constexpr (three) arch::take_registers<200>();
      prepare_keys<T, KeyDim, Reversed>(args, tiles, barriers, place, thread);
    } else {
      if constexpr (three) arch::give_registers<152>();
      carry_aged_state<T, KeyDim, Reversed>(args, tiles, barriers, place, warpgroup - 1, thread);
    }
  }
}

}  // namespace chela::cuda::detail
