#pragma once
// Linear attention on warpgroups (sm_90a), one block per head and tile of value columns. The chunk step of
// chunk/step.hpp,
//
//   O^T  = S^T Q^T + V^T P^T,   P = scores kept where the key is not after the query
//   S^T += V^T K
//
// with S^T in registers: its accumulators, rounded, are the register operand of the next chunk's first product, so the
// state never goes through shared memory. Warpgroup 0 makes the scores, one chunk ahead of the others; each other
// warpgroup has 64 value columns of S^T and of O^T; warps beside them move data and make decay weights
// (warpgroup_service.cuh). What is not on the chain from one chunk's state to the next's is kept away from it: where
// there are few heads its length is all that counts.
#include "chela/cuda/arch/warpgroup.cuh"
#include "chela/cuda/attention/decay_sums.cuh"
#include "chela/cuda/attention/warpgroup_service.cuh"

namespace chela::cuda::detail {

/// This lane's scores, weighed by a scalar decay. Those that its warp's queries do not see come out as anything. Weights
/// are loaded `Ahead` of their use where there are registers for them.
template <class W, bool Ahead>
__device__ void weigh_scores(float (&scores)[32], const ScoreWeights& chunk, int warp, int lane) {
  const int row = 16 * warp + lane / 4;
  const float rows[2] = {chunk.row(row), chunk.row(row + 8)}, sums[2] = {chunk.sum(row), chunk.sum(row + 8)};
  const auto of_keys = [&](int j) { return chunk.key_pair(warp, 8 * j + 2 * (lane % 4)); };
  [[maybe_unused]] float2 loaded[8];
  if constexpr (Ahead) {
#pragma unroll
    for (int j = 0; j < 8; ++j) loaded[j] = of_keys(j);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (!Ahead && (W::reversed ? j / 2 < warp : j / 2 > warp)) continue;
    const bool own = j / 2 == warp;
    const float2 pair = Ahead ? loaded[j] : of_keys(j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float of_key = i % 2 ? pair.y : pair.x, of_query = sums[i / 2];
      scores[4 * j + i] *= !own          ? rows[i / 2] * of_key
                           : W::reversed ? ChunkGates::weight(of_key, of_query)
                                         : ChunkGates::weight(of_query, of_key);
    }
  }
}

/// Warpgroup 0: P of every chunk, into two buffers in turn.
template <class T, class D, class W, int KeyDim, class Tiles>
__device__ void make_scores(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                            const Place& place, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const int row = 16 * warp + lane / 4;  // this lane's query tokens: row and row + 8
  RingPosition at, buffer;
  const int count = place.end_chunk - place.first_chunk;
  const bool own_apart = W::may_sum && args.pass.sums.rows;
  for (int step = 0; step < count; ++step) {
    int reach[2] = {row, row + 8};  // how many other tokens a query sees
    if constexpr (W::reversed) {
      const int tokens = min(place.tokens - (place.end_chunk - 1 - step) * chunk_len, chunk_len);
      reach[0] = tokens - 1 - row, reach[1] = reach[0] - 8;
    }
    // Not before the product below: it would compete with those on the chain from chunk to chunk, and now runs while
    // the state's warpgroups are busy with an output.
    arch::wait_barrier(arch::shared_address(&barriers.taken[buffer.place]), buffer.parity ^ 1);
    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    float scores[32];  // [64 queries, 64 keys]
    const auto q = arch::operand<arch::Major::sum>(tiles.queries(at.place));
    const auto k = arch::operand<arch::Major::sum>(tiles.keys(at.place));
    arch::fence_products();
#pragma unroll
    for (int i = 0; i < KeyDim / 16; ++i) {
      const int offset = i / 4 * Tiles::panel + i % 4 * 32;
      arch::start_product<T, arch::Major::sum, arch::Major::sum>(scores, arch::further(q, offset),
                                                                 arch::further(k, offset), i > 0);
    }
    arch::commit_products();
    arch::wait_products<0>();
    arch::pin(scores);
    if constexpr (D::decays) {
      arch::wait_barrier(arch::shared_address(&barriers.gated[at.place]), at.parity);
      const ScoreWeights chunk = tiles.score_weights(at.place);
#pragma unroll
      for (int i = 0; i < 2; ++i) reach[i] = min(reach[i], chunk.reach(row + 8 * i));
      weigh_scores<W, !W::loads_beside>(scores, chunk, warp, lane);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int query = row + 8 * (i % 4 / 2), key = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      const int apart = W::reversed ? key - query : query - key;
      bool seen = unsigned(apart) <= unsigned(reach[i % 4 / 2]) && !(W::joins && apart == 0);
      if constexpr (!D::decays && !W::reversed) seen = key <= query;
      scores[i] = seen ? scores[i] : 0.f;
    }
    if constexpr (W::may_sum) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!own_apart || j / 2 != warp) continue;
#pragma unroll
        for (int i = 2 * (j % 2); i < 2 * (j % 2) + 2;
             ++i) {  // of rows 8 j + lane / 4, columns 8 j + 2 (lane % 4) + i % 2
          if (lane / 4 != 2 * (lane % 4) + i % 2) continue;
          arch::store_shared_float(tiles.own_scores(buffer.place) + 4u * unsigned(8 * j + lane / 4), scores[4 * j + i]);
          scores[4 * j + i] = 0;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* s = scores + 4 * j;
      arch::store_matrices(
          tiles.scores(buffer.place) +
              unsigned(arch::swizzled<chunk_len>(16 * warp + lane / 8 % 2 * 8 + lane % 8, j + lane / 16)),
          arch::pack<T>(s[0], s[1]), arch::pack<T>(s[2], s[3]), arch::pack<T>(s[4], s[5]), arch::pack<T>(s[6], s[7]));
    }
    arch::fence_copies();
    arch::arrive(arch::shared_address(&barriers.scored[buffer.place]));
    at.advance(tiles.stages);
    buffer.advance(2);
  }
}

/// O^T [64 value columns, 64 tokens] of a warpgroup, on its way out: turned and staged in shared memory, from where the
/// copy engine takes it; or stored row by row where the chunk is shared with the next sequence.
template <class T>
__device__ void hand_over_output(const WarpgroupPass<T>& args, const float (&output_t)[32], std::uint32_t staged,
                                 const Place& place, int chunk, bool shared, float scale, int group, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const auto pack = [&](int i) { return arch::pack<T>(scale * output_t[i], scale * output_t[i + 1]); };
#pragma unroll
  for (int j = 0; j < 8; j += 2)
    arch::store_matrices_transposed(
        staged + unsigned(arch::swizzled<chunk_len>(8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2)),
        pack(4 * j), pack(4 * j + 2), pack(4 * j + 4), pack(4 * j + 6));
  arch::fence_copies();
  if (!shared) return;
  arch::sync_threads(1 + group, 128);
  if (!args.output.present()) return;
  const int token = place.first_token + chunk * chunk_len, column = place.value_begin + 64 * group;
  const int rows = place.tokens % chunk_len;
  for (int unit = thread; unit < 8 * rows; unit += 128)
    *reinterpret_cast<uint4*>(&args.output(place.batch, token + unit / 8, place.head, column + 8 * (unit % 8))) =
        arch::load_shared_unit(staged + unsigned(arch::swizzled<chunk_len>(unit / 8, unit % 8)));
}

/// Tokens (columns) of O^T times what each still sees of the earlier state: sum_t = enter * seen_t (+ sum_t).
template <bool Add>
__device__ void enter_queries(float (&sum_t)[32], const float (&seen_t)[32], const SharedGates& gates, int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 enter = gates.enter_pair(8 * j + 2 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = i % 2 ? enter.y : enter.x;
      sum_t[4 * j + i] = Add ? fmaf(weight, seen_t[4 * j + i], sum_t[4 * j + i]) : weight * seen_t[4 * j + i];
    }
  }
}

/// Ends O^T of a warpgroup whose tokens' own terms were kept apart: leaves the sums over this warp's columns of products
/// with `primal`, the tile of what O is the gradient of, then adds them.
template <class T, class Tiles>
__device__ void end_gradient(float (&output_t)[32], const Tiles& tiles, std::uint32_t values, std::uint32_t primal,
                             int group, int buffer, int staged, int warp, int lane) {
  const std::uint32_t own_scores = tiles.own_scores(buffer);
  const int row = lane / 16 * 8 + lane % 8, unit = 2 * warp + lane / 8 % 2;
  float sums[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned at = unsigned(arch::swizzled<chunk_len>(16 * i + row, unit));
    std::uint32_t v[4], x[4];
    arch::load_matrices_transposed(x, primal + at);
    arch::load_matrices_transposed(v, values + at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 2 * i + half;
      const float2 own = arch::load_shared_float2(own_scores + 4u * unsigned(8 * j + 2 * (lane % 4)));
      float* const o = output_t + 4 * j;
      const float2 x0 = arch::unpack<T>(x[2 * half]), x1 = arch::unpack<T>(x[2 * half + 1]);
      sums[2 * j] = x0.x * o[0] + x1.x * o[2], sums[2 * j + 1] = x0.y * o[1] + x1.y * o[3];
      const float2 v0 = arch::unpack<T>(v[2 * half]), v1 = arch::unpack<T>(v[2 * half + 1]);
      o[0] = fmaf(own.x, v0.x, o[0]), o[1] = fmaf(own.y, v0.y, o[1]);
      o[2] = fmaf(own.x, v1.x, o[2]), o[3] = fmaf(own.y, v1.y, o[3]);
    }
  }
  const float2 sum = sum_over_rows(sums, lane);
  arch::store_shared_float2(tiles.row_sums(group, staged, warp) + 8u * unsigned(lane), sum.x, sum.y);
}

/// O^T of a warpgroup times the scale, added to the outputs that lie in `earlier`.
template <class T>
__device__ void join_output(float (&output_t)[32], std::uint32_t earlier, float scale, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t x[4];
    arch::load_matrices_transposed(
        x, earlier + unsigned(arch::swizzled<chunk_len>(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = arch::unpack<T>(x[j]);
      float* const o = output_t + 8 * i + 2 * j;
      o[0] = fmaf(scale, o[0], pair.x), o[1] = fmaf(scale, o[1], pair.y);
    }
  }
}

/// Warpgroups 1 and on: outputs and states of 64 value columns each. Where registers are `Roomy` and there is a decay,
/// S^T Q^T and V^T P^T have sums of their own, so that the second need not wait for the first to be weighed.
template <class T, class D, class W, int KeyDim, bool Roomy, class Tiles>
__device__ void carry_state(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                            const Place& place, int group, int thread) {
  using arch::Major;
  constexpr bool two_sums = D::decays && Roomy;
  const LinearPass& pass = args.pass;
  const int warp = thread / 32, lane = thread % 32;
  const int value = place.value_begin + 64 * group + 16 * warp + lane / 4;
  float state_t[KeyDim / 2];  // [64 value columns, KeyDim]
  load_first_state(state_t, pass, place, value, lane);
  std::uint32_t rounded[KeyDim / 4];
  const auto round_state = [&] {
#pragma unroll
    for (int i = 0; i < KeyDim / 4; ++i) rounded[i] = arch::pack<T>(state_t[2 * i], state_t[2 * i + 1]);
    arch::pin(rounded);
  };
  round_state();

  const int shared = shared_chunk(pass, place), count = place.end_chunk - place.first_chunk;
  const bool saves = saves_states(pass);
  const bool sums_rows = W::may_sum && pass.sums.rows;
  if constexpr (!W::reversed) {
    if (saves && place.segment == 0) save_state(state_t, pass, place, 0, value, lane);
  }
  RingPosition at, buffer, staged;
  for (int step = 0; step < count; ++step) {
    const int chunk = W::reversed ? place.end_chunk - 1 - step : place.first_chunk + step;
    if constexpr (W::may_sum && !W::reversed) {
      if (sums_rows) keep_state(state_t, pass, place, chunk * chunk_len, value, lane);
    }
    const std::uint32_t k = tiles.keys(at.place), v = tiles.values(at.place, group);
    const auto q_columns = arch::operand<Major::sum>(tiles.queries(at.place));
    const auto k_rows = arch::operand<Major::side>(k), v_rows = arch::operand<Major::side>(v);
    const auto p_columns = arch::operand<Major::sum>(tiles.scores(buffer.place));
    const std::uint32_t scored = arch::shared_address(&barriers.scored[buffer.place]);
    const SharedGates gates = tiles.gates(at.place);
    if constexpr (D::decays) {  // before any product is under way: the compiler would wait for it
      arch::wait_barrier(arch::shared_address(&barriers.gated[at.place]), at.parity);
      const float age = gates.age();
#pragma unroll
      for (int i = 0; i < KeyDim / 2; ++i) state_t[i] *= age;
      arch::pin(state_t);
    }
    arch::wait_barrier(arch::shared_address(&barriers.loaded[at.place]), at.parity);
    if (chunk == shared) clear_other_tokens<KeyDim>(k, v, place.tokens - chunk * chunk_len, 1 + group, thread);

    [[maybe_unused]] std::uint32_t values_t[4][4];
    if constexpr (two_sums) load_values_transposed(values_t, v, warp, lane);
    float sums_t[two_sums ? 2 : 1][32];  // [64 value columns, 64 tokens]
    float(&output_t)[32] = sums_t[0], (&seen_t)[32] = sums_t[two_sums ? 1 : 0];
    arch::fence_products();
#pragma unroll
    for (int i = 0; i < KeyDim / 16; ++i)
      arch::start_product<T, Major::sum>(seen_t, rounded + 4 * i,
                                         arch::further(q_columns, i / 4 * Tiles::panel + i % 4 * 32), i > 0);
    arch::commit_products();
    if constexpr (D::decays) {
      if constexpr (!two_sums) load_values_transposed(values_t, v, warp, lane);
      weigh_values<T>(values_t, [&](int j) { return gates.leave_pair(8 * j + 2 * (lane % 4)); });
      arch::fence_products();
#pragma unroll
      for (int i = 0; i < 4; ++i)
        arch::start_product<T, Major::side>(state_t, values_t[i], arch::further(k_rows, 2048 * i), true);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        arch::start_product<T, Major::side, Major::side>(state_t, arch::further(v_rows, 2048 * i),
                                                         arch::further(k_rows, 2048 * i), true);
    }
    arch::commit_products();
    if constexpr (D::decays && !two_sums) {
      arch::wait_products<1>();
      arch::pin(output_t);
      enter_queries<false>(output_t, output_t, gates, lane);
    }
    arch::wait_barrier(scored, buffer.parity);
    arch::fence_products();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      arch::start_product<T, Major::side, Major::sum>(output_t, arch::further(v_rows, 2048 * i),
                                                      arch::further(p_columns, 32 * i), !two_sums || i > 0);
    arch::commit_products();
    arch::wait_products<1>();
    arch::pin(state_t);
    if constexpr (D::decays) {
#pragma unroll
      for (int i = 0; i < 4; ++i) arch::keep(values_t[i]);
    }
    if (!sums_rows) round_state();  // or later, when there are registers again
    arch::wait_products<0>();
    arch::pin(output_t);
    if constexpr (two_sums) {
      arch::pin(seen_t);
      enter_queries<true>(output_t, seen_t, gates, lane);
    }
    const std::uint32_t output = tiles.output(group, staged.place);
    if constexpr (W::may_sum) {
      if (sums_rows) {  // what the output is the gradient of lies where the output will: a warp overwrites what only it reads
        arch::wait_barrier(arch::shared_address(&barriers.beside[group][staged.place]), staged.parity);
        end_gradient<T>(output_t, tiles, v, output, group, buffer.place, staged.place, warp, lane);
        round_state();
      }
    }
    if constexpr (W::joins) {  // likewise
      arch::wait_barrier(arch::shared_address(&barriers.beside[group][staged.place]), staged.parity);
      join_output<T>(output_t, output, pass.scale, warp, lane);
    }
    arch::arrive(arch::shared_address(&barriers.released[at.place]));
    arch::arrive(arch::shared_address(&barriers.taken[buffer.place]));
    arch::wait_barrier(arch::shared_address(&barriers.cleared[group][staged.place]), staged.parity ^ 1);
    hand_over_output(args, output_t, output, place, chunk, chunk == shared, W::joins ? 1.f : pass.scale, group, thread);
    arch::arrive(arch::shared_address(&barriers.staged[group][staged.place]));
    if constexpr (W::may_sum && W::reversed) {
      if (pass.sums.anchors) store_anchor(state_t, pass, place, chunk * chunk_len, value, lane);
    }
    if constexpr (!W::reversed) {
      if (saves) save_state(state_t, pass, place, (chunk + 1) * chunk_len, value, lane);
    }
    at.advance(tiles.stages);
    buffer.advance(2);
    staged.advance(Tiles::staging);
  }
  store_last_state(state_t, pass, place, value, lane);
}

/// Warpgroups of a block: of scores, of states, and one that serves the others.
template <int ValueGroups>
inline constexpr int pass_threads = 128 * (2 + ValueGroups);

/// Registers of a thread, by what its warpgroup does.
struct RegisterShares {
  int scores, states, service;
};
/// Together what the launch gives: 168 a thread to three warpgroups, 128 to four, 80 to three of which two blocks are to
/// fit on a multiprocessor.
CHELA_HOST_DEVICE constexpr RegisterShares register_shares(bool decays, bool loads_beside, int value_groups,
                                                           int blocks) {
  if (value_groups == 2 && decays) return loads_beside ? RegisterShares{72, 200, 40} : RegisterShares{96, 192, 32};
  if (value_groups == 2) return {72, 208, 24};
  if (blocks == 2) return decays ? RegisterShares{72, 136, 32} : RegisterShares{80, 136, 24};
  return {128, 240, 56};
}

/// Changes the registers that this warpgroup was given.
template <int From, int To>
__device__ void share_registers() {
  if constexpr (To > From) arch::take_registers<To>();
  if constexpr (To < From) arch::give_registers<To>();
}

/// The pass of one block of pass_threads<ValueGroups>, for 64 ValueGroups value columns. So many `Blocks` are to fit on a
/// multiprocessor.
template <class T, class D, class W, int KeyDim, int ValueGroups, int Blocks = 1>
__device__ void run_warpgroups(const WarpgroupPass<T>& args, char* memory, WarpgroupBarriers& barriers, Place& place,
                               unsigned block) {
  using Tiles = WarpgroupTiles<KeyDim, ValueGroups, true, D::decays, W::loads_beside>;
  const Tiles tiles(memory, args.pass.stages);
  if (threadIdx.x == 0) place = place_of_block(args.pass, 64 * ValueGroups, block, W::reversed);
  init_barriers(barriers, tiles.stages, ValueGroups);
  constexpr int given = 65536 / (Blocks * pass_threads<ValueGroups>) / 8 * 8;
  constexpr RegisterShares shares = register_shares(D::decays, W::loads_beside, ValueGroups, Blocks);
  static_assert(shares.scores + ValueGroups * shares.states + shares.service <= (2 + ValueGroups) * given);
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), thread = int(threadIdx.x) % 128;
  if (warpgroup == 0) {
    share_registers<given, shares.scores>();
    make_scores<T, D, W, KeyDim>(args, tiles, barriers, place, thread);
  } else if (warpgroup <= ValueGroups) {
    share_registers<given, shares.states>();
    constexpr bool roomy = KeyDim / 2 + 160 <= shares.states;
    carry_state<T, D, W, KeyDim, roomy>(args, tiles, barriers, place, warpgroup - 1, thread);
  } else {
    share_registers<given, shares.service>();
    serve_chunks<T, D, W, ValueGroups>(args, tiles, barriers, place, thread / 32, thread % 32);
  }
}

/// One pass.
template <class T, class D, int KeyDim, int ValueGroups, class W = InTime>
__global__ void __launch_bounds__(pass_threads<ValueGroups>, 1)
    warpgroup_pass(const __grid_constant__ WarpgroupPass<T> args) {
  if constexpr (arch::has_warpgroups) {
    extern __shared__ char memory[];
    __shared__ WarpgroupBarriers barriers;
    __shared__ Place place;
    run_warpgroups<T, D, W, KeyDim, ValueGroups>(args, memory, barriers, place, blockIdx.x);
  }
}

/// Two passes of the same sizes that read the same tensors, their blocks side by side: what one reads, the other finds in
/// the cache.
template <class T>
struct WarpgroupPair {
  WarpgroupPass<T> passes[2];
};
/// Blocks of a pair that are to fit on a multiprocessor: small ones, of which there are many, wait less for each other.
template <int KeyDim, int ValueGroups>
inline constexpr int pair_blocks = KeyDim == 64 && ValueGroups == 1 ? 2 : 1;

template <class T, class D, int KeyDim, int ValueGroups, class W>
__global__ void __launch_bounds__(pass_threads<ValueGroups>, pair_blocks<KeyDim, ValueGroups>)
    warpgroup_pair(const __grid_constant__ WarpgroupPair<T> args) {
  if constexpr (arch::has_warpgroups) {
    extern __shared__ char memory[];
    __shared__ WarpgroupBarriers barriers;
    __shared__ Place place;
    run_warpgroups<T, D, W, KeyDim, ValueGroups, pair_blocks<KeyDim, ValueGroups>>(args.passes[blockIdx.x % 2], memory,
                                                                                   barriers, place, blockIdx.x / 2);
  }
}

}  // namespace chela::cuda::detail
