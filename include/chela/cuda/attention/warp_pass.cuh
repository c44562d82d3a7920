#pragma once
// Linear attention on warps (sm_80 instructions), one block per head and tile of value columns, the chunk step of
// chunk/step.hpp with S^T in registers: a warp has 16 value columns of it, and its accumulators, rounded, are an
// operand of
//
//   O    = Q S + P V,   P = scores kept where the key is not after the query
//   S^T += V^T K
//
// P goes through shared memory, one chunk ahead, so that a chunk needs a single barrier of the block; outputs leave one
// chunk late, in whole rows (32 bytes of a row at a time would hold the memory back).
#include <new>

#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/attention/decay_sums.cuh"

namespace chela::cuda::detail {

template <class T>
struct WarpPass {
  TensorView<const T, 4> q, k, v;
  TensorView<T, 4> o;  ///< absent when not wanted
  LinearPass pass;
  TensorView<const T, 4> primal = {};   ///< what the output is the gradient of; used for pass.sums
  TensorView<const T, 4> earlier = {};  ///< what the output of a joining walk is added to, or absent; may be the output
};

/// Sizes of one instance. Tiles are panels [Tokens][64 columns] (arch::swizzled<Tokens>).
template <bool Decays, int KeyClass, int ValueWarps, int ScoreWarps, int Tokens, int Stages, bool MaySum = false>
struct WarpTiles {
  static_assert(Stages >= 3, "scores are made one chunk ahead: at least three chunks must be in flight");
  static constexpr int tokens = Tokens, stages = Stages, value_warps = ValueWarps, score_warps = ScoreWarps;
  static constexpr int threads = 32 * (ValueWarps + ScoreWarps);
  static constexpr int key_units = KeyClass / 8, value_units = 2 * ValueWarps;  // of 16 bytes, per token
  static constexpr int key_tile = Tokens * key_units * 16, value_tile = Tokens * value_units * 16;
  static constexpr int gate_tile = Decays ? chunk_len * int(sizeof(float)) : 0;
  static constexpr int stage = 2 * key_tile + value_tile + gate_tile, score_tile = Tokens * 128;
  static constexpr int gates_end =
      Stages * stage + 2 * (score_tile + value_tile) + (Decays ? 2 * SharedGates::bytes : 0);
  static constexpr int column_bytes = Tokens * int(sizeof(float));
  static constexpr int bytes = gates_end + (MaySum ? 2 * (1 + ValueWarps) * column_bytes : 0);

  std::uint32_t base;

  // Chunks are counted here as the pass walks.
  __device__ std::uint32_t queries(int chunk) const { return base + unsigned(chunk % Stages * stage); }
  __device__ std::uint32_t keys(int chunk) const { return queries(chunk) + key_tile; }
  __device__ std::uint32_t values(int chunk) const { return queries(chunk) + 2 * key_tile; }
  __device__ std::uint32_t log_decays(int chunk) const { return values(chunk) + value_tile; }
  __device__ std::uint32_t scores(int chunk) const { return base + unsigned(Stages * stage + chunk % 2 * score_tile); }
  __device__ std::uint32_t output(int chunk) const {
    return base + unsigned(Stages * stage + 2 * score_tile + chunk % 2 * value_tile);
  }
  __device__ SharedGates gates(int chunk) const {
    return SharedGates(base +
                       unsigned(Stages * stage + 2 * (score_tile + value_tile) + chunk % 2 * SharedGates::bytes));
  }
  /// Scores of tokens with themselves.
  __device__ std::uint32_t own_scores(int chunk) const { return base + unsigned(gates_end + chunk % 2 * column_bytes); }
  /// Sums of one warp of outputs times what they are the gradient of, by token.
  __device__ std::uint32_t row_sums(int chunk, int warp) const {
    return own_scores(0) + unsigned((2 + chunk % 2 * value_warps + warp) * column_bytes);
  }
};

/// The rows of one head of q, k, v or o, from a sequence's first token on.
template <class T>
struct HeadRows {
  T* data;
  Index stride;  ///< from one token to the next
  int units;     ///< of 16 bytes, per row

  __device__ HeadRows(TensorView<T, 4> view, const Place& place, int head, int column)
      : data(view.present() ? &view(place.batch, place.first_token, head, column) : nullptr),
        stride(view.strides[1]),
        units(int(view.extents[3] - column) / 8) {}
};

/// What a block reads and writes, in shared memory like its place.
template <class T>
struct WarpRows {
  HeadRows<const T> q, k, v;
  HeadRows<T> o;
  HeadRows<const T> primal, earlier;
};

/// The row of a token, counted from the sequence's first of so many: elements 8 unit + 2 pair and the next, zero where there
/// are none.
template <class T>
__device__ float2 load_pair(const HeadRows<const T>& rows, int token, int tokens, int unit, int pair) {
  if (token >= tokens || unit >= rows.units) return {0, 0};
  return arch::unpack<T>(
      *reinterpret_cast<const std::uint32_t*>(rows.data + token * rows.stride + 8 * unit + 2 * pair));
}

/// The chunk that a pass comes to in its `step`, of so many.
template <class W>
__device__ int chunk_of(int step, int chunks) {
  return W::reversed ? chunks - 1 - step : step;
}

/// Calls f(row, unit, address) for this thread's share of a tile with `Units` units of 16 bytes per row.
template <class Tiles, int Units, class T, class F>
__device__ void for_each_unit(const HeadRows<T>& rows, int first, int thread, F f) {
  constexpr int step = Tiles::threads / Units;  // rows from one of this thread's units to its next
  static_assert(Tiles::threads % Units == 0);
  const int unit = thread % Units;
  int row = thread / Units;
  T* at = rows.data + (first + row) * rows.stride + 8 * unit;
  const Index advance = step * rows.stride;
#pragma unroll
  for (int i = 0; i < (Tiles::tokens + step - 1) / step; ++i, row += step, at += advance)
    if (Tiles::tokens % step == 0 || row < Tiles::tokens) f(row, unit, at);
}

/// Starts the copies of one chunk, with zeros for tokens past the end and columns past the last. All threads.
template <class Tiles, class T, class D>
__device__ void load_chunk(const LinearPass& pass, const WarpRows<T>& rows, const Tiles& tiles, const Place& place,
                           int step, int chunk, int thread) {
  const int first = chunk * Tiles::tokens, left = place.tokens - first;
  const auto load = [&](std::uint32_t tile, int units) {
    return [=](int row, int unit, const T* from) {
      arch::copy_async_16(tile + unsigned(arch::swizzled<Tiles::tokens>(row, unit)), from, row < left && unit < units);
    };
  };
  for_each_unit<Tiles, Tiles::key_units>(rows.q, first, thread, load(tiles.queries(step), rows.q.units));
  for_each_unit<Tiles, Tiles::key_units>(rows.k, first, thread, load(tiles.keys(step), rows.k.units));
  for_each_unit<Tiles, Tiles::value_units>(rows.v, first, thread, load(tiles.values(step), rows.v.units));
  if constexpr (D::decays) {
    if (thread < chunk_len) {
      const GateSource source = gates_of(pass, place);
      arch::copy_async_4(tiles.log_decays(step) + 4u * unsigned(thread),
                         source.data + (first + thread) * source.token_stride,
                         thread < Tiles::tokens && source.has(first + thread));
    }
  }
}

/// P of one chunk by warp `part` of `Parts`: rows of 16 queries, shared out by columns where there are more warps than
/// rows.
template <class T, class D, class W, int Parts, class Tiles>
__device__ void make_scores(const Tiles& tiles, int chunk, int part, int lane, bool own_apart) {
  constexpr int rows = Tiles::tokens / 16, shares = Parts / rows < rows ? Parts / rows : rows;
  constexpr int columns = Tiles::tokens / shares / 8;  // matrices of 8 columns
  const int first_row = part % rows * 16, first_column = part / rows * 8 * columns;
  const auto unseen = [=](int column, int count) {  // by all of this warp's queries
    return W::reversed ? column + count <= first_row : column >= first_row + 16;
  };
  if (unseen(first_column, 8 * columns)) return;
  const std::uint32_t q = tiles.queries(chunk), k = tiles.keys(chunk), p = tiles.scores(chunk);
  const int row = first_row + lane / 4;

  float scores[4 * columns];
#pragma unroll
  for (int i = 0; i < 4 * columns; ++i) scores[i] = 0;
#pragma unroll
  for (int i = 0; i < Tiles::key_units / 2; ++i) {
    std::uint32_t a[4];
    arch::load_matrices(a, q + unsigned(arch::swizzled<Tiles::tokens>(first_row + lane % 16, 2 * i + lane / 16)));
#pragma unroll
    for (int j = 0; j < columns; j += 2) {
      if (unseen(first_column + 8 * j, 16)) continue;
      std::uint32_t b[4];
      arch::load_matrices(b, k + unsigned(arch::swizzled<Tiles::tokens>(first_column + 8 * j + lane / 16 * 8 + lane % 8,
                                                                        2 * i + lane / 8 % 2)));
      arch::multiply_add<T>(scores + 4 * j, a, b[0], b[1]);
      arch::multiply_add<T>(scores + 4 * j + 4, a, b[2], b[3]);
    }
  }
  int reach[2] = {row, row + 8};  // how many other tokens a query sees
  if constexpr (W::reversed) reach[0] = Tiles::tokens - 1 - row, reach[1] = reach[0] - 8;
  if constexpr (D::decays) {
    const ChunkGates gates(arch::load_shared_float2(tiles.log_decays(chunk) + 8u * unsigned(lane)), lane);
    if (part == 0) tiles.gates(chunk).write(gates, lane, W::reversed);
    float row_sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_sums[i] = gates.sum(row + 8 * i);
      reach[i] = W::reversed ? gates.reach_ahead(row + 8 * i) : gates.reach(row + 8 * i);
    }
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const float2 sums = gates.sums_of_columns(first_column / 8 + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float query = row_sums[i / 2], key = i % 2 ? sums.y : sums.x;
        scores[4 * j + i] *= W::reversed ? ChunkGates::weight(key, query) : ChunkGates::weight(query, key);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    if (unseen(first_column + 8 * j, 8)) continue;
    const int key = first_column + 8 * j + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto kept = [&](int e) {
        const int apart = W::reversed ? key + e - row - 8 * i : row + 8 * i - key - e;
        const float score = scores[4 * j + 2 * i + e];
        if (W::joins && apart == 0) return 0.f;
        if (W::may_sum && own_apart && apart == 0) {
          arch::store_shared_float(tiles.own_scores(chunk) + 4u * unsigned(key + e), score);
          return 0.f;
        }
        return unsigned(apart) <= unsigned(reach[i]) ? score : 0.f;
      };
      arch::store_shared_word(
          p + unsigned(arch::swizzled<Tiles::tokens>(row + 8 * i, first_column / 8 + j) + 4 * (lane % 4)),
          arch::pack<T>(kept(0), kept(1)));
    }
  }
}

/// Ends an output tile [16 tokens, 16 value columns] of a warp whose tokens' own terms were kept apart: leaves the sums
/// over these columns of products with what it is the gradient of, then adds them unless the walk leaves them out. `first`:
/// the chunk's first token.
template <class T, class W, class Tiles>
__device__ void end_gradient(float (&output)[8], const Tiles& tiles, const HeadRows<const T>& primal, int tokens,
                             int first, int row, int chunk, int warp, int lane) {
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = row + lane / 4 + i % 2 * 8, unit = 2 * warp + i / 2;
    const float2 x = load_pair(primal, first + token, tokens, unit, lane % 4);
    float* const o = output + 2 * i;
    sums[i % 2] += x.x * o[0] + x.y * o[1];
    if constexpr (!W::joins) {
      const float own = arch::load_shared_float(tiles.own_scores(chunk) + 4u * unsigned(token));
      const float2 v = arch::unpack<T>(__float_as_uint(arch::load_shared_float(
          tiles.values(chunk) + unsigned(arch::swizzled<Tiles::tokens>(token, unit) + 4 * (lane % 4)))));
      o[0] = fmaf(own, v.x, o[0]), o[1] = fmaf(own, v.y, o[1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
    sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
    if (lane % 4 == 0)
      arch::store_shared_float(tiles.row_sums(chunk, warp) + 4u * unsigned(row + lane / 4 + 8 * i), sums[i]);
  }
}

/// O = Q S, [16 tokens, 16 value columns] each.
template <class T, class Tiles, int Registers>
__device__ void read_state(float (&output)[Tiles::tokens / 16][8], const float (&state_t)[Registers], std::uint32_t q,
                           int lane) {
  constexpr int rows = Tiles::tokens / 16;
#pragma unroll
  for (int m = 0; m < rows; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) output[m][i] = 0;
#pragma unroll
  for (int i = 0; i < Tiles::key_units / 2; ++i) {
    const float* s = state_t + 8 * i;
    const std::uint32_t low[2] = {arch::pack<T>(s[0], s[1]), arch::pack<T>(s[4], s[5])};
    const std::uint32_t high[2] = {arch::pack<T>(s[2], s[3]), arch::pack<T>(s[6], s[7])};
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      std::uint32_t a[4];
      arch::load_matrices(a, q + unsigned(arch::swizzled<Tiles::tokens>(16 * m + lane % 16, 2 * i + lane / 16)));
      arch::multiply_add<T>(output[m], a, low[0], low[1]);
      arch::multiply_add<T>(output[m] + 4, a, high[0], high[1]);
    }
  }
}

/// V^T of a warp's 16 value columns as register operands, 16 tokens each.
template <class Tiles>
__device__ void load_values_transposed(std::uint32_t (&values_t)[Tiles::tokens / 16][4], std::uint32_t v, int warp,
                                       int lane) {
#pragma unroll
  for (int i = 0; i < Tiles::tokens / 16; ++i)
    arch::load_matrices_transposed(values_t[i], v + unsigned(arch::swizzled<Tiles::tokens>(
                                                        16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)));
}

/// S^T += V^T K.
template <class T, class Tiles, int Registers>
__device__ void write_state(float (&state_t)[Registers], const std::uint32_t (&values_t)[Tiles::tokens / 16][4],
                            std::uint32_t k, int lane) {
#pragma unroll
  for (int i = 0; i < Tiles::tokens / 16; ++i)
#pragma unroll
    for (int j = 0; j < Registers / 4; j += 2) {
      std::uint32_t b[4];
      arch::load_matrices_transposed(b, k + unsigned(arch::swizzled<Tiles::tokens>(16 * i + lane % 16, j + lane / 16)));
      arch::multiply_add<T>(state_t + 4 * j, values_t[i], b[0], b[1]);
      arch::multiply_add<T>(state_t + 4 * j + 4, values_t[i], b[2], b[3]);
    }
}

/// A warp's 16 columns of 16 tokens of the output, from row `first` of its tile on. value(i): the lane's pair of token
/// lane / 4 + 8 (i % 2) and 16-byte unit i / 2.
template <class T, class Tiles, class Value>
__device__ void stage_output(std::uint32_t tile, int first, int warp, int lane, Value value) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = value(i);
    arch::store_shared_word(
        tile + unsigned(arch::swizzled<Tiles::tokens>(first + lane / 4 + i % 2 * 8, 2 * warp + i / 2) + 4 * (lane % 4)),
        arch::pack<T>(pair.x, pair.y));
  }
}

/// One chunk by the warp that has value columns 16 `warp` and on of the tile: outputs into shared memory, each 16 tokens
/// after end(output, first row), added to earlier(row, unit) if the walk joins; and the state after.
template <class T, class D, class W, int Registers, class Tiles, class End, class Earlier>
__device__ void step(const Tiles& tiles, const LinearPass& pass, float (&state_t)[Registers], int chunk, int warp,
                     int lane, End end, Earlier earlier) {
  constexpr int rows = Tiles::tokens / 16;
  const std::uint32_t k = tiles.keys(chunk), v = tiles.values(chunk), p = tiles.scores(chunk);
  const SharedGates gates = tiles.gates(chunk);

  float output[rows][8];
  read_state<T, Tiles>(output, state_t, tiles.queries(chunk), lane);
  if constexpr (D::decays) {
#pragma unroll
    for (int m = 0; m < rows; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float enter = gates.enter(16 * m + 8 * half + lane / 4);
        output[m][2 * half] *= enter, output[m][2 * half + 1] *= enter;
        output[m][2 * half + 4] *= enter, output[m][2 * half + 5] *= enter;
      }
  }
  std::uint32_t values_t[rows][4];
  load_values_transposed<Tiles>(values_t, v, warp, lane);
#pragma unroll
  for (int m = 0; m < rows; ++m)  // O += P V
#pragma unroll
    for (int i = W::reversed ? m : 0; i < (W::reversed ? rows : m + 1); ++i) {
      std::uint32_t a[4];
      arch::load_matrices(a, p + unsigned(arch::swizzled<Tiles::tokens>(16 * m + lane % 16, 2 * i + lane / 16)));
      arch::multiply_add<T>(output[m], a, values_t[i][0], values_t[i][2]);
      arch::multiply_add<T>(output[m] + 4, a, values_t[i][1], values_t[i][3]);
    }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    end(output[m], 16 * m);
    stage_output<T, Tiles>(tiles.output(chunk), 16 * m, warp, lane, [&](int i) {
      const float x = output[m][2 * i], y = output[m][2 * i + 1];
      if constexpr (W::joins) {
        const float2 sum = earlier(16 * m + lane / 4 + i % 2 * 8, 2 * warp + i / 2);
        return float2{fmaf(pass.scale, x, sum.x), fmaf(pass.scale, y, sum.y)};
      }
      return float2{pass.scale * x, pass.scale * y};
    });
  }

  if constexpr (D::decays) {
    weigh_values<T>(values_t, [&](int j) { return gates.leave_pair(8 * j + 2 * (lane % 4)); });
    const float age = gates.age();
#pragma unroll
    for (int i = 0; i < Registers; ++i) state_t[i] *= age;
  }
  write_state<T, Tiles>(state_t, values_t, k, lane);
}

/// Stores the outputs of one chunk, which lie in shared memory. All threads.
template <class Tiles, class T>
__device__ void store_chunk(const WarpRows<T>& rows, const Tiles& tiles, const Place& place, int step, int chunk,
                            int thread) {
  const int first = chunk * Tiles::tokens, left = place.tokens - first, units = rows.o.units;
  const std::uint32_t tile = tiles.output(step);
  if (!rows.o.data) return;
  for_each_unit<Tiles, Tiles::value_units>(rows.o, first, thread, [=](int row, int unit, T* to) {
    if (row < left && unit < units)
      *reinterpret_cast<uint4*>(to) = arch::load_shared_unit(tile + unsigned(arch::swizzled<Tiles::tokens>(row, unit)));
  });
}

/// Stores the row sums of one chunk, over all warps' columns.
template <class Tiles>
__device__ void store_row_sums(float* to, const Tiles& tiles, const Place& place, int step, int chunk, int thread) {
  const int token = chunk * Tiles::tokens + thread;
  if (thread >= Tiles::tokens || token >= place.tokens) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < Tiles::value_warps; ++warp)
    sum += arch::load_shared_float(tiles.row_sums(step, warp) + 4u * unsigned(thread));
  to[token] = sum;
}

/// Blocks of Tiles::threads threads for 16 ValueWarps value columns and up to KeyClass keys. With ScoreWarps, warps of
/// their own make P; without, all do.
template <class T, class D, int KeyClass, int ValueWarps, int ScoreWarps, int Tokens, int Stages, class W = InTime>
__global__ void __launch_bounds__(32 * (ValueWarps + ScoreWarps), 1)
    warp_pass(const __grid_constant__ WarpPass<T> args) {
  using Tiles = WarpTiles<D::decays, KeyClass, ValueWarps, ScoreWarps, Tokens, Stages, W::may_sum>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Place place;
  __shared__ alignas(WarpRows<T>) char rows_memory[sizeof(WarpRows<T>)];
  const LinearPass& pass = args.pass;
  if (threadIdx.x == 0) {
    place = place_of_block(pass, 16 * ValueWarps, blockIdx.x, W::reversed);
    new (rows_memory) WarpRows<T>{{args.q, place, place.query_head, 0},
                                  {args.k, place, place.key_head, 0},
                                  {args.v, place, place.value_head, place.value_begin},
                                  {args.o, place, place.head, place.value_begin},
                                  {args.primal, place, place.head / pass.heads.outputs_per_primal, place.value_begin},
                                  {args.earlier, place, place.head, place.value_begin}};
  }
  __syncthreads();
  const auto& rows = *reinterpret_cast<const WarpRows<T>*>(rows_memory);

  const Tiles tiles{arch::shared_address(memory)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = (place.tokens + Tokens - 1) / Tokens;
  const bool has_state = warp < ValueWarps, sums_rows = W::may_sum && pass.sums.rows;
  constexpr int score_parts = ScoreWarps ? ScoreWarps : ValueWarps;
  const int score_part = ScoreWarps ? warp - ValueWarps : warp;
  const auto load = [&](int step) {
    if (step < chunks) load_chunk<Tiles, T, D>(pass, rows, tiles, place, step, chunk_of<W>(step, chunks), thread);
    arch::commit_copies();
  };
  const auto scores = [&](int step) {
    if (step < chunks && score_part >= 0) make_scores<T, D, W, score_parts>(tiles, step, score_part, lane, sums_rows);
  };
  const auto store = [&](int done) {
    const int chunk = chunk_of<W>(done, chunks);
    store_chunk<Tiles>(rows, tiles, place, done, chunk, thread);
    if constexpr (W::may_sum) {
      if (sums_rows)
        store_row_sums(row_sums(pass, place, place.value_begin / (16 * ValueWarps)), tiles, place, done, chunk, thread);
    }
  };

  for (int ahead = 0; ahead < Stages - 1; ++ahead) load(ahead);
  float state_t[KeyClass / 2];  // [16 value columns, KeyClass]
  const int value = place.value_begin + 16 * warp + lane / 4;
  if (has_state) load_first_state(state_t, pass, place, value, lane);
  if constexpr (!W::reversed) {
    if (has_state && saves_states(pass)) save_state(state_t, pass, place, 0, value, lane);
  }
  arch::wait_copies<Stages - 2>();
  __syncthreads();
  scores(0);
  for (int done = 0; done < chunks; ++done) {
    arch::wait_copies<Stages - 3>();
    __syncthreads();  // the next chunk is here; this one's scores and the last one's outputs are in shared memory
    load(done + Stages - 1);
    if (done > 0) store(done - 1);
    scores(done + 1);
    if (!has_state) continue;
    const int first = chunk_of<W>(done, chunks) * Tokens;
    if constexpr (W::may_sum && !W::reversed) {
      if (sums_rows) keep_state(state_t, pass, place, first, value, lane);
    }
    const auto end = [&](float(&output)[8], int row) {
      if constexpr (W::may_sum) {
        if (sums_rows) end_gradient<T, W>(output, tiles, rows.primal, place.tokens, first, row, done, warp, lane);
      }
    };
    const auto earlier = [&](int row, int unit) {
      return load_pair(rows.earlier, first + row, place.tokens, unit, lane % 4);
    };
    step<T, D, W>(tiles, pass, state_t, done, warp, lane, end, earlier);
    if constexpr (W::may_sum && W::reversed) {
      if (pass.sums.anchors) store_anchor(state_t, pass, place, first, value, lane);
    }
    if constexpr (!W::reversed) {
      if (saves_states(pass)) save_state(state_t, pass, place, first + Tokens, value, lane);
    }
  }
  __syncthreads();
  if (chunks > 0) store(chunks - 1);
  if (has_state) store_last_state(state_t, pass, place, value, lane);
}

}  // namespace chela::cuda::detail
