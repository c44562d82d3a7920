#pragma once
// Segments of a sequence with a decay per key (segment_states.cuh): what each adds to the state, and what it leaves of
// an earlier one, for each key. Without outputs there is no need to stop inside a chunk of 64 tokens: every key is
// decayed up to the chunk's end, by products of the decays after it; back in time up to its beginning, by those of the
// decays before it and its own.
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/attention/key_decay_tiles.cuh"

namespace chela::cuda::detail {

/// Sums of log-decays, of each warp's keys over its tokens: of two chunks in turn.
using WarpLogSums = float2[2][4][32];

/// Warpgroup 0: each warp takes one panel of keys, and a half (with two panels) or a quarter of the chunk's tokens.
/// Returns the sum of the warp's log-decays in the segment.
template <class T, int KeyDim, bool Reversed, class Tiles>
__device__ float2 prepare_segment_keys(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                                       const Place& place, WarpLogSums& sums, int thread) {
  constexpr int panels = KeyDim / 64, parts = 4 / panels, tokens = chunk_len / parts;
  const int warp = thread / 32, lane = thread % 32, key_panel = warp % panels, part = warp / panels;
  KeyDecayLoader<T, false, Reversed, Tiles> loader(args, tiles, barriers, place, thread == 0);
  for (int i = 0; i < tiles.stages; ++i) loader.load_next();
  const GateSource source = gates_of(args.pass, place);
  const int chunks = place.end_chunk - place.first_chunk;
  int next = in_walk<Reversed>(0, place.first_chunk, chunks) * chunk_len + part * tokens;  // fetched with t = 0
  const auto fetch = [&](int t) {
    const float* const at = source.data + key_panel * block_keys + 2 * lane + (next + t) * source.token_stride;
    return next >= 0 && next + t < source.tokens ? __ldg(reinterpret_cast<const float2*>(at)) : float2{0, 0};
  };
  float2 log_decays[tokens];
#pragma unroll
  for (int t = 0; t < tokens; ++t) log_decays[t] = fetch(t);

  float2 segment_sum = {0, 0};
  RingPosition at, buffer;
  for (int step = 0; step < chunks; ++step) {
    float2 sum = {0, 0};
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      multiply(log_decays[t], {log2_e, log2_e});
      sum.x += log_decays[t].x, sum.y += log_decays[t].y;
    }
    segment_sum.x += sum.x, segment_sum.y += sum.y;
    sums[buffer.place][warp][lane] = sum;
    arch::wait_barrier(arch::shared_address(&barriers.released[buffer.place]), buffer.parity ^ 1);
    if (step >= 2) loader.load_next();
    __syncwarp();
    arch::sync_threads(3, 128);
    float2 others = {0, 0}, all = {0, 0};  // others: towards which this part's keys are decayed
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      const float2 x = sums[buffer.place][i * panels + key_panel][lane];
      all.x += x.x, all.y += x.y;
      if (Reversed ? i < part : i > part) others.x += x.x, others.y += x.y;
    }
    if (part == 0)
      arch::store_shared_float2(
          tiles.ages(buffer.place, 0) + unsigned((key_panel * block_keys + 2 * lane) * int(sizeof(float))),
          arch::exp2_flushed(all.x), arch::exp2_flushed(all.y));

    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    const int left = place.tokens - next;
    next += Reversed ? -chunk_len : chunk_len;
    const unsigned rows = unsigned(key_panel * Tiles::panel + part * tokens * 128 + 4 * lane);
    const std::uint32_t keys = tiles.keys(at.place) + rows, low = tiles.low_keys(buffer.place) + rows;
    std::uint32_t pairs[tokens];
#pragma unroll
    for (int t = 0; t < tokens; ++t) pairs[t] = arch::load_shared_word(BlockLane::row(keys, t));
    float2 weight = {arch::exp2_flushed(others.x), arch::exp2_flushed(others.y)};
#pragma unroll
    for (int i = 0; i < tokens; ++i) {
      const int t = in_walk<!Reversed>(i, 0, tokens);
      const float2 decay = {arch::exp2_flushed(log_decays[t].x), arch::exp2_flushed(log_decays[t].y)};
      float2 k = arch::unpack<T>(pairs[t]);
      if (Reversed) multiply(weight, decay);
      multiply(k, weight);
      if (t >= left) k = {0, 0};
      store_key<T>(k, BlockLane::row(keys, t), BlockLane::row(low, t));
      if (!Reversed) multiply(weight, decay);
      log_decays[t] = fetch(t);
    }
    arch::fence_copies();
    arch::arrive(arch::shared_address(&barriers.prepared[buffer.place][0]));
    at.advance(tiles.stages);
    buffer.advance(2);
  }
  return segment_sum;
}

/// What the segment leaves of an earlier state, from the sums of each warp of warpgroup 0.
template <int KeyDim>
__device__ void store_segment_ages(float2 segment_sum, WarpLogSums& sums, const LinearPass& pass, const Place& place,
                                   int thread) {
  constexpr int panels = KeyDim / 64;
  arch::sync_threads(3, 128);  // the last chunk's sums have been read
  sums[0][thread / 32][thread % 32] = segment_sum;
  arch::sync_threads(3, 128);
  if (thread >= KeyDim / 2 || place.value_begin != 0) return;
  float2 sum = {0, 0};
#pragma unroll
  for (int i = 0; i < 4 / panels; ++i) {
    const float2 x = sums[0][i * panels + thread / 32][thread % 32];
    sum.x += x.x, sum.y += x.y;
  }
  const Index state =
      (Index(place.segment) * pass.segment_states.extents[1] + place.sequence) * pass.segment_states.extents[2] +
      place.state_head;
  float* const ages = pass.segment_ages + state * KeyDim + 2 * thread;
  ages[0] = arch::exp2_flushed(sum.x), ages[1] = arch::exp2_flushed(sum.y);
}

/// Warpgroups 1 and on: S^T = S^T age + V^T K for 64 value columns each.
template <class T, int KeyDim, bool Reversed, class Tiles>
__device__ void sum_segment_state(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                                  const Place& place, int group, int thread) {
  using arch::Major;
  const LinearPass& pass = args.pass;
  const int warp = thread / 32, lane = thread % 32;
  float state_t[KeyDim / 2] = {};  // [64 value columns, KeyDim]
  const int shared = shared_chunk(pass, place), chunks = place.end_chunk - place.first_chunk;
  RingPosition at, buffer;
  for (int step = 0; step < chunks; ++step) {
    const int chunk = in_walk<Reversed>(step, place.first_chunk, chunks);
    const std::uint32_t v = tiles.values(at.place, group);
    const auto v_rows = arch::operand<Major::side>(v);
    const auto k_rows = arch::operand<Major::side>(tiles.keys(at.place));
    const auto low_k_rows = arch::operand<Major::side>(tiles.low_keys(buffer.place));
    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    if (chunk == shared) clear_other_tokens<0>(0, v, place.tokens - chunk * chunk_len, 1 + group, thread);
    arch::wait_barrier(arch::shared_address(&barriers.prepared[buffer.place][0]), buffer.parity);
    age_state(state_t, tiles.ages(buffer.place, 0) + 8u * unsigned(lane % 4));
    arch::pin(state_t);
    arch::fence_products();
#pragma unroll
    for (int i = 0; i < chunk_blocks; ++i) {
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, Tiles::block_rows * i),
                                                       arch::further(k_rows, Tiles::block_rows * i), true);
      arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, Tiles::block_rows * i),
                                                       arch::further(low_k_rows, Tiles::block_rows * i), true);
    }
    arch::commit_products();
    arch::wait_products<0>();
    arch::pin(state_t);
    arch::arrive(arch::shared_address(&barriers.released[buffer.place]));
    at.advance(tiles.stages);
    buffer.advance(2);
  }
  for_each_state_element<KeyDim / 2>(
      state_of(slice(pass.segment_states, place.segment), place.sequence, place.state_head),
      place.value_begin + 64 * group + 16 * warp + lane / 4, lane, [&](int i, float& x) { x = state_t[i]; });
}

/// Segments but the last; heads are state heads. Blocks of 128 (1 + ValueGroups) threads, each for 64 ValueGroups value
/// columns.
template <class T, int KeyDim, int ValueGroups, bool Reversed = false>
__global__ void __launch_bounds__(128 * (1 + ValueGroups), 1)
    key_decay_segment_sums(const __grid_constant__ WarpgroupPass<T> args) {
  if constexpr (arch::has_warpgroups) {
    using Tiles = KeyDecayTiles<KeyDim, ValueGroups, false>;
    extern __shared__ char memory[];
    __shared__ KeyDecayBarriers barriers;
    __shared__ Place place;
    __shared__ WarpLogSums sums;
    const Tiles tiles(memory, args.pass.stages);
    if (threadIdx.x == 0) place = place_of_block(args.pass, 64 * ValueGroups, blockIdx.x, Reversed);
    init_barriers(barriers, tiles.stages, 128, 128 * ValueGroups);
    const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
    if (warpgroup == 0) {
      const float2 sum = prepare_segment_keys<T, KeyDim, Reversed>(args, tiles, barriers, place, sums, thread);
      store_segment_ages<KeyDim>(sum, sums, args.pass, place, thread);
    } else {
      sum_segment_state<T, KeyDim, Reversed>(args, tiles, barriers, place, warpgroup - 1, thread);
    }
  }
}

}  // namespace chela::cuda::detail
