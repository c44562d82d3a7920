#pragma once
// The walks of dq and dk under a decay per key (key_gradient_block.cuh): one block of threads for each head, tile of keys and
// segment, on warps (sm_80 instructions) that have 16 keys each and all values of them. A block of tokens goes through a ring
// of stages: copied, worked on while the next ones come, and its outputs stored one block later, in whole rows.
#include "chela/cuda/attention/key_gradient_tiles.cuh"

namespace chela::cuda::detail {

/// A lane's places in tiles, that of a warp with keys 16 `warp` and on.
struct LanePlaces {
  unsigned rows, block_column, block_row, gates;
  unsigned own_rows, state_rows;  ///< the warp's keys as columns of rows of tokens, and as rows of a state

  template <class Tiles>
  __device__ static LanePlaces of(int warp, int lane) {
    return {unsigned(arch::swizzled<16>(lane % 16, lane / 16)),
            column_of_block(warp, lane),
            row_of_block(warp, lane),
            unsigned(2 * (lane % 4) * Tiles::float_row + 4 * (16 * warp + lane / 4)),
            unsigned(arch::swizzled<16>(lane % 16, 2 * warp + lane / 16)),
            unsigned(arch::swizzled<8 * Tiles::key_units>(16 * warp + lane % 16, lane / 16))};
  }
};

/// One block of tokens by the warp that has keys 16 `warp` and on of the tile: what is to be stored, into shared memory, and
/// the state after. `last`: the sequence's last token, counted in the block.
template <class T, bool Reversed, bool Values, int Registers, class Tiles>
__device__ void step_keys(const Tiles& tiles, const LanePlaces& at, const Cuts& cuts, float (&state)[Registers],
                          float scale, bool sums_decays, int step, int last, int warp, int lane) {
  const std::uint32_t stage = tiles.read(step), rows = stage + at.rows;
  const auto rows_of = [&](int tile, int i) { return (rows ^ unsigned(i % 4 << 5)) + unsigned(tile + i / 4 * 2048); };
  ReadersByWriters scores = {};
  KeysByTokens seen = {}, read, written, decays, sums;
  using OfValues = typename Tiles::OfValues;
#pragma unroll
  for (int i = 0; i < Registers / 8; ++i) {
    std::uint32_t reads[4], writes[4];
    arch::load_matrices(reads, rows_of(0, i));
    arch::load_matrices(writes, rows_of(Tiles::writing, i));
    const float* const s = state + 8 * i;
    const std::uint32_t rounded[4] = {arch::pack<T>(s[0], s[1]), arch::pack<T>(s[2], s[3]), arch::pack<T>(s[4], s[5]),
                                      arch::pack<T>(s[6], s[7])};
    if constexpr (Values)
      arch::store_matrices(
          ((tiles.values() + at.state_rows) ^ unsigned(i % 4 << 5)) + unsigned(i / 4 * 8 * Tiles::key_units * 128),
          rounded[0], rounded[1], rounded[2], rounded[3]);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      arch::multiply_add<T>(scores[t], reads, writes[t], writes[2 + t]);
      arch::multiply_add<T>(seen[t], rounded, reads[t], reads[2 + t]);
    }
  }
  float ages[2];
  load_decays(decays, ages, stage + Tiles::log_decays + at.gates, Tiles::float_row);
  const std::uint32_t column = stage + at.block_column;
  load_block<T>(written, column + Tiles::written);
  KeysByTokens keys;
  if constexpr (Values) {
    load_block<T>(keys, column + Tiles::primal);
    ValueScores<T> of_values(stage + Tiles::primal + at.own_rows, stage + Tiles::written + at.own_rows, cuts);
    sum_block<T, Reversed>(sums, read, written, seen, scores, cuts, decays, lane, [&](auto half) {
      of_values.template add_across<decltype(half)::value>(keys, read, written, cuts);
    });
    of_values.store(tiles.values() + unsigned(OfValues::scores + warp * OfValues::warp_scores), lane);
    KeysByTokens entering;
    for_each_number([&](int t, int i) { entering[t][i] = keys[t][i] * read[t][i]; });
    store_block<T>(entering, 1, tiles.values() + OfValues::keys + at.block_row);
  } else {
    sum_block<T, Reversed>(sums, read, written, seen, scores, cuts, decays, lane, [](auto) {});
  }

  KeysByTokens own;
  load_block<T>(own, column + Tiles::written);
  if (sums_decays) {
    if constexpr (Reversed) {
      KeysByTokens queries;
      load_block<T>(queries, column + Tiles::queries);
      if constexpr (!Values) load_block<T>(keys, column + Tiles::primal);
      const std::uint32_t terms = tiles.terms(step) + at.gates;
      for_each_number([&](int t, int i) {
        const int token = 8 * t + i % 2, key = 8 * (i / 2);
        const float of_key = token + 2 * (lane % 4) >= last ? 0.f : keys[t][i] * sums[t][i];
        const float term = fmaf(own[t][i], queries[t][i], -of_key);
        arch::store_shared_float(terms + unsigned(token * Tiles::float_row + 4 * key),
                                 decays[t][i] == 0 ? reset_mark() : term);
      });
    } else {
      store_block<T>(sums, 1, tiles.output(step) + Tiles::key_tile + at.block_row);
    }
  }
  add_own<T>(sums, own, scores, cuts);
  store_block<T>(sums, scale, tiles.output(step) + at.block_row);

  if (!Reversed && last < 16) {  // the state that the last token reads, kept for the log-decays' gradient
    for_each_number([&](int t, int i) {
      if (8 * t + 2 * (lane % 4) + i % 2 >= last) written[t][i] = 0;
    });
  }
  std::uint32_t high[4], low[4];
  split_block<T>(high, low, written);
#pragma unroll
  for (int i = 0; i < Registers; ++i) state[i] *= ages[i / 2 % 2];
#pragma unroll
  for (int i = 0; i < Registers / 8; ++i) {  // S += K^T V
    std::uint32_t b[4];
    arch::load_matrices_transposed(b, rows_of(Tiles::writing, i));
    arch::multiply_add<T>(state + 8 * i, high, b[0], b[1]);
    arch::multiply_add<T>(state + 8 * i + 4, high, b[2], b[3]);
    arch::multiply_add<T>(state + 8 * i, low, b[0], b[1]);
    arch::multiply_add<T>(state + 8 * i + 4, low, b[2], b[3]);
  }
}

/// Blocks of Tiles::threads threads for KeyTile keys and up to ReadClass values. Back in time with dv if Values.
template <class T, int ReadClass, int KeyTile, int Stages, bool Reversed, bool Values = false>
__global__ void __launch_bounds__(2 * KeyTile, 1) key_gradient_pass(const __grid_constant__ KeyGradientPass<T> args) {
  static_assert(Reversed || !Values);
  using Tiles = KeyGradientTiles<ReadClass, KeyTile, Stages, Reversed, Values>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Place place;
  const LinearPass& pass = args.pass;
  const KeyDecayGradient<T>& decay = args.decay;
  if (threadIdx.x == 0) place = place_of_block(pass, KeyTile, blockIdx.x, Reversed);
  __syncthreads();

  const Tiles tiles{arch::shared_address(memory)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row = place.value_begin + 16 * warp;
  const bool has_keys = row < pass.value_dim, sums_decays = decay.queries.present();
  const BlockRange blocks(place);
  BlockLoads<T, Tiles, Reversed> loads(args, place, blocks, thread);
  for (int step = 0; step < Stages - 1; ++step) loads.load_next(tiles.read(step));
  BlockStores<T, Tiles, Reversed, Values> stores(args, place, blocks, thread);

  float state[ReadClass / 2];  // [16 keys, ReadClass]
  load_first_state(state, pass, place, row + lane / 4, lane);
  const auto store_anchors = [&](const float(&sums)[2]) {
    if (lane % 4 == 0)
      for (int r = 0; r < 2; ++r)
        arch::store_shared_float(tiles.anchors() + unsigned(4 * (16 * warp + lane / 4 + 8 * r)), sums[r]);
  };
  [[maybe_unused]] GradientSums<Tiles> sums;
  if (Reversed && sums_decays) {
    float anchors[2] = {};
    if (has_keys && blocks.count > 0)
      multiply_state_after(anchors, state, pass, decay, place, blocks.has_end(), row, lane);
    store_anchors(anchors);
    __syncthreads();
    sums.begin(tiles, blocks.token_at<Reversed>(0) + 16, thread);
  }

  // Of a block, what all warps have to be done with: dv, for which each has left its share, and the log-decays' gradient. Then
  // its stage is free.
  const auto end_block = [&](int step) {
    const int token = blocks.token_at<Reversed>(step);
    const bool ends = sums_decays && (token % key_window == 0 || step + 1 == blocks.count);
    if constexpr (Values)
      step_values<T, ReadClass, KeyTile>(tiles.values(), tiles.read(step) + Tiles::writing, pass.scale, warp, lane);
    if constexpr (Reversed) {
      if (sums_decays) sums.add_block(tiles, token, step, ends);
      if (Values || ends) __syncthreads();
      if (ends) sums.store_window(tiles, decay, place, pass.value_dim, pass.scale, token, step, thread);
    }
  };

  const Cuts cuts(Reversed, lane);
  const LanePlaces at = LanePlaces::of<Tiles>(warp, lane);
  const bool keeps = !Reversed && sums_decays && writes_states(pass, place);
  // Window by window: the loop over blocks is to leave the state in its registers.
  for (int step = 0; step < blocks.count;) {
    if (keeps && has_keys) {
      const int token = blocks.token_at<Reversed>(step);
      if (token > 0 && token % key_window == 0)
        keep_keys<T>(kept_state<ReadClass / 2>(decay, pass, place, token, row, lane), state);
    }
    for (const int end = blocks.end_of_window<Reversed>(step); step < end; ++step) {
      arch::wait_copies<Stages - 2>();
      __syncthreads();  // this block is here; the last one is done with, and what it left is in shared memory
      if (step > 0) end_block(step - 1);
      loads.load_next(tiles.read(step + Stages - 1));
      if (step > 0) stores.store_next(tiles, step - 1);
      step_keys<T, Reversed, Values>(tiles, at, cuts, state, pass.scale, sums_decays, step,
                                     place.tokens - 1 - blocks.token_at<Reversed>(step), warp, lane);
    }
    if (Reversed && sums_decays) {
      float anchors[2] = {};
      if (has_keys)
        multiply_state_before(anchors, state, pass, decay, place, blocks.token_at<Reversed>(step - 1), row, lane);
      store_anchors(anchors);
    }
  }
  __syncthreads();
  if (blocks.count > 0) end_block(blocks.count - 1), stores.store_next(tiles, blocks.count - 1);
  if (!has_keys) return;
  if (keeps && !decay.ends_at_zero && blocks.has_end())
    keep_keys<float>(kept_end<ReadClass / 2>(decay, pass, place, row, lane), state);
  if constexpr (Values) store_last_state(state, pass, place, row + lane / 4, lane);
}

}  // namespace chela::cuda::detail
