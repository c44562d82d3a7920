#pragma once
// Linear attention with a decay per key on warps (sm_80 instructions), for the dimensions and devices that
// key_decay_pass.cuh is not for: its step in blocks of 16 tokens, put together as in warp_pass.cuh. Warps of their own
// prepare the blocks, one ahead, 64 keys each.
#include <new>

#include "chela/cuda/attention/key_decay.cuh"
#include "chela/cuda/attention/warp_pass.cuh"

namespace chela::cuda::detail {

/// The tiles of a block of tokens (WarpTiles), and behind them, in two buffers in turn, what is prepared beside them.
template <int KeyClass, int ValueWarps, int Stages>
struct KeyDecayWarpTiles : WarpTiles<false, KeyClass, ValueWarps, KeyClass / block_keys, block_tokens, Stages> {
  using Ring = WarpTiles<false, KeyClass, ValueWarps, KeyClass / block_keys, block_tokens, Stages>;
  static constexpr int panels = KeyClass / block_keys, panel = block_tokens * 128;
  static constexpr int sum_bytes = panel_sum_bytes(panels);

  /// Dynamic shared memory, with room to begin at a multiple of 128.
  static constexpr int bytes = 128 + Ring::bytes + 2 * panels * panel + 2 * KeyClass * int(sizeof(float)) + sum_bytes;

  __device__ std::uint32_t low_keys(int chunk) const {
    return this->base + unsigned(Ring::bytes + chunk % 2 * panels * panel);
  }
  __device__ std::uint32_t ages(int chunk) const {
    return this->base + unsigned(Ring::bytes + 2 * panels * panel + chunk % 2 * KeyClass * int(sizeof(float)));
  }
  /// For sum_over_panels.
  __device__ std::uint32_t panel_sums(int chunk) const {
    return ages(0) + unsigned(2 * KeyClass * int(sizeof(float)) + chunk % 2 * (sum_bytes / 2));
  }
  __device__ KeyBlock block(int chunk, int key_panel) const {
    const unsigned rows = unsigned(key_panel * panel);
    return {.queries = this->queries(chunk) + rows,
            .keys = this->keys(chunk) + rows,
            .low = low_keys(chunk) + rows,
            .scores = this->scores(chunk),
            .score_unit = 0,
            .ages = ages(chunk) + unsigned(key_panel * block_keys) * unsigned(sizeof(float))};
  }
};

/// One block of tokens by the warp that has value columns 16 `warp` and on of the tile: outputs into shared memory, added
/// to earlier(row, unit) if the walk joins; and the state after.
template <class T, class W, int Registers, class Tiles, class Earlier>
__device__ void step_block(const Tiles& tiles, const LinearPass& pass, float (&state_t)[Registers], int chunk, int warp,
                           int lane, Earlier earlier) {
  const auto place = [=](std::uint32_t tile, int row, int unit) {
    return tile + unsigned(arch::swizzled<block_tokens>(row, unit));
  };
  const std::uint32_t q = tiles.queries(chunk), p = tiles.scores(chunk);
  float output[8] = {};  // [16 tokens, 16 value columns]
#pragma unroll
  for (int i = 0; i < Registers / 8; ++i) {  // O = Q S
    const float* s = state_t + 8 * i;
    std::uint32_t a[4];
    arch::load_matrices(a, place(q, lane % 16, 2 * i + lane / 16));
    arch::multiply_add<T>(output, a, arch::pack<T>(s[0], s[1]), arch::pack<T>(s[4], s[5]));
    arch::multiply_add<T>(output + 4, a, arch::pack<T>(s[2], s[3]), arch::pack<T>(s[6], s[7]));
  }
  std::uint32_t values_t[4];
  arch::load_matrices_transposed(values_t,
                                 place(tiles.values(chunk), lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2));
  std::uint32_t scores[4];
  arch::load_matrices(scores, place(p, lane % 16, lane / 16));
  arch::multiply_add<T>(output, scores, values_t[0], values_t[2]);  // O += P V
  arch::multiply_add<T>(output + 4, scores, values_t[1], values_t[3]);
  stage_output<T, Tiles>(tiles.output(chunk), 0, warp, lane, [&](int i) {
    const float x = output[2 * i], y = output[2 * i + 1];
    if constexpr (W::joins) {
      const float2 sum = earlier(lane / 4 + i % 2 * 8, 2 * warp + i / 2);
      return float2{fmaf(pass.scale, x, sum.x), fmaf(pass.scale, y, sum.y)};
    }
    return float2{pass.scale * x, pass.scale * y};
  });

  age_state(state_t, tiles.ages(chunk) + 8u * unsigned(lane % 4));
  const auto add_products = [&](std::uint32_t keys) {  // S^T += V^T K
#pragma unroll
    for (int j = 0; j < Registers / 4; j += 2) {
      std::uint32_t b[4];
      arch::load_matrices_transposed(b, place(keys, lane % 16, j + lane / 16));
      arch::multiply_add<T>(state_t + 4 * j, values_t, b[0], b[1]);
      arch::multiply_add<T>(state_t + 4 * j + 4, values_t, b[2], b[3]);
    }
  };
  add_products(tiles.keys(chunk));
  add_products(tiles.low_keys(chunk));
}

/// Blocks of Tiles::threads threads for 16 ValueWarps value columns and up to KeyClass keys.
template <class T, int KeyClass, int ValueWarps, int Stages, class W = InTime>
__global__ void __launch_bounds__(32 * (ValueWarps + KeyClass / block_keys), 1)
    key_decay_warp_pass(const __grid_constant__ WarpPass<T> args) {
  static_assert(!W::may_sum && !(W::reversed && W::joins));
  using Tiles = KeyDecayWarpTiles<KeyClass, ValueWarps, Stages>;
  using Ring = typename Tiles::Ring;
  extern __shared__ char memory[];
  __shared__ Place place;
  __shared__ alignas(WarpRows<T>) char rows_memory[sizeof(WarpRows<T>)];
  const LinearPass& pass = args.pass;
  if (threadIdx.x == 0) {
    place = place_of_block(pass, 16 * ValueWarps, blockIdx.x, W::reversed);
    new (rows_memory) WarpRows<T>{{args.q, place, place.query_head, 0},
                                  {args.k, place, place.key_head, 0},
                                  {args.v, place, place.value_head, place.value_begin},
                                  {args.o, place, place.head, place.value_begin},
                                  {args.primal, place, place.head, place.value_begin},
                                  {args.earlier, place, place.head, place.value_begin}};
  }
  __syncthreads();
  const auto& rows = *reinterpret_cast<const WarpRows<T>*>(rows_memory);

  const Tiles tiles{{(arch::shared_address(memory) + 127u) & ~127u}};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = (place.tokens + block_tokens - 1) / block_tokens;
  const auto load = [&](int step) {
    if (step < chunks)
      load_chunk<Ring, T, WithoutDecay>(pass, rows, tiles, place, step, chunk_of<W>(step, chunks), thread);
    arch::commit_copies();
  };
  const auto store = [&](int step) { store_chunk<Ring>(rows, tiles, place, step, chunk_of<W>(step, chunks), thread); };
  const auto next_is_here = [&] {
    arch::wait_copies<Stages - 3>();
    __syncthreads();
  };
  const auto turn = [&](int step) {  // what every warp does while a block is prepared and the last one is consumed
    load(step + Stages - 1);
    if (step > 0) store(step - 1);
  };
  for (int i = thread; i < 2 * Tiles::score_tile / 16; i += Tiles::threads)
    arch::store_shared_unit(tiles.scores(i % 2) + 16u * unsigned(i / 2), uint4{0, 0, 0, 0});
  for (int step = 0; step < Stages - 1; ++step) load(step);
  arch::wait_copies<Stages - 2>();
  __syncthreads();

  if (warp >= ValueWarps) {
    const int key_panel = warp - ValueWarps, key_of_lane = key_panel * block_keys + 2 * lane;
    const int key = key_of_lane < pass.key_dim ? key_of_lane : 0;  // where there is none, queries and keys are zero
    const GateSource source = gates_of(pass, place);
    constexpr int stride = W::reversed ? -block_tokens : block_tokens;
    BlockGates gates;
    gates.fetch(source, key, chunk_of<W>(0, chunks) * block_tokens);
    const auto prepare = [&](int step) {
      if (step >= chunks) return;
      const int first = chunk_of<W>(step, chunks) * block_tokens;
      const KeyBlock block = tiles.block(step, key_panel);
      BlockScores scores = prepare_block<T, W::reversed, !W::joins>(block, gates, place.tokens - first, lane,
                                                                    [&] { gates.fetch(source, key, first + stride); });
      if constexpr (Tiles::panels > 1)
        sum_over_panels<Tiles::panels>(scores, tiles.panel_sums(step), key_panel, 1, lane);
      if (key_panel == 0) store_scores<T, W::reversed>(scores, block, lane);
    };
    prepare(0);
    for (int step = 0; step < chunks; ++step) next_is_here(), turn(step), prepare(step + 1);
  } else {
    float state_t[KeyClass / 2];  // [16 value columns, KeyClass]
    const int value = place.value_begin + 16 * warp + lane / 4;
    load_first_state(state_t, pass, place, value, lane);
    const bool saves = !W::reversed && saves_states(pass);
    if (saves) save_state(state_t, pass, place, 0, value, lane);
    for (int step = 0; step < chunks; ++step) {
      const int first = chunk_of<W>(step, chunks) * block_tokens;
      next_is_here(), turn(step);
      step_block<T, W>(tiles, pass, state_t, step, warp, lane, [&](int row, int unit) {
        return load_pair(rows.earlier, first + row, place.tokens, unit, lane % 4);
      });
      if (saves) save_state(state_t, pass, place, first + block_tokens, value, lane);
    }
    store_last_state(state_t, pass, place, value, lane);
  }
  __syncthreads();
  if (chunks > 0) store(chunks - 1);
}

}  // namespace chela::cuda::detail
