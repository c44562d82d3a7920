#pragma once
// Linear attention of float data on warps (sm_80 instructions), one block per head and tile of value columns: the chunk step
// of warp_pass.cuh,
//
//   O    = Q S + P V,   P = scores kept where the key is not after the query
//   S^T += V^T K
//
// in products of floats, which tensor cores cut to 10 bits behind the point (FloatProducts). S^T is in registers, 16 value
// columns of it a warp, and its accumulators are an operand as they are: with keys 2 c and 2 c + 1 of each eight taken for
// rows c and c + 4 of the operand, and the queries read likewise, a pair at a time. Tiles are rows with 8 floats to spare, so
// that neither rows nor columns share banks. Tensor cores do not round sums, but cut them: what a chunk adds to the state is
// summed by itself.
#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/attention/linear_pass.cuh"
#include "chela/cuda/attention/linear_policy.cuh"

namespace chela::cuda::detail {

struct FloatPass {
  TensorView<const float, 4> q, k, v;
  TensorView<float, 4> o;
  LinearPass pass;
};

/// Floats as operands: rounded, and if there are to be two parts what rounding took.
template <FloatProducts M, int N>
struct FloatOperand {
  static constexpr bool two_parts = M == FloatProducts::three_tf32;
  std::uint32_t high[N], low[two_parts ? N : 1];

  FloatOperand() = default;
  __device__ explicit FloatOperand(const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      high[i] = arch::rounded_for_products(x[i]);
      if constexpr (two_parts) low[i] = arch::rounded_for_products(x[i] - __uint_as_float(high[i]));
    }
  }
};

/// d [16, 8] += a [16, 8] b [8, 8] (arch::multiply_add_floats), small terms first.
template <FloatProducts M>
__device__ void multiply_add(float* d, const FloatOperand<M, 4>& a, const FloatOperand<M, 2>& b) {
  if constexpr (M == FloatProducts::three_tf32) {
    arch::multiply_add_floats(d, a.low, b.high[0], b.high[1]);
    arch::multiply_add_floats(d, a.high, b.low[0], b.low[1]);
  }
  arch::multiply_add_floats(d, a.high, b.high[0], b.high[1]);
}

/// A place in a tile of floats in shared memory.
struct FloatTile {
  std::uint32_t base;
  int row_floats;

  __device__ std::uint32_t at(int row, int column) const { return base + 4u * unsigned(row * row_floats + column); }
  __device__ float load(int row, int column) const { return arch::load_shared_float(at(row, column)); }
  __device__ float2 load_pair(int row, int column) const { return arch::load_shared_float2(at(row, column)); }

  /// Rows `first` to `first` + 15 and eight columns as operand a, the columns in pairs.
  template <FloatProducts M>
  __device__ FloatOperand<M, 4> rows(int first, int column, int lane) const {
    const float2 x = load_pair(first + lane / 4, column + 2 * (lane % 4));
    const float2 y = load_pair(first + lane / 4 + 8, column + 2 * (lane % 4));
    return FloatOperand<M, 4>({x.x, y.x, x.y, y.y});
  }
};

/// Sizes of one instance: two chunks in flight, and the scores.
template <bool Decays, int KeyClass, int ValueWarps>
struct FloatTiles {
  static constexpr int tokens = KeyClass <= 128 ? 32 : 16, value_warps = ValueWarps, threads = 32 * ValueWarps;
  static constexpr int values = 16 * ValueWarps, key_row = KeyClass + 8, value_row = values + 8, score_row = tokens + 8;
  static constexpr int key_tile = 4 * tokens * key_row, value_tile = 4 * tokens * value_row;
  static constexpr int gate_tile = Decays ? 4 * chunk_len : 0;
  static constexpr int stage = 2 * key_tile + value_tile + gate_tile;
  static constexpr int bytes = 2 * stage + 4 * tokens * score_row + (Decays ? SharedGates::bytes : 0);

  std::uint32_t base;

  __device__ FloatTile queries(int chunk) const { return {base + unsigned(chunk % 2 * stage), key_row}; }
  __device__ FloatTile keys(int chunk) const { return {queries(chunk).base + key_tile, key_row}; }
  __device__ FloatTile values_of(int chunk) const { return {queries(chunk).base + 2 * key_tile, value_row}; }
  __device__ std::uint32_t log_decays(int chunk) const {
    return queries(chunk).base + unsigned(2 * key_tile + value_tile);
  }
  __device__ FloatTile scores() const { return {base + 2u * stage, score_row}; }
  __device__ SharedGates gates() const { return SharedGates(base + unsigned(2 * stage + 4 * tokens * score_row)); }
};

/// Starts the copies of one chunk, with zeros for tokens past the end and columns past the last. All threads.
template <class D, class Tiles>
__device__ void load_chunk(const FloatPass& args, const Tiles& tiles, const Place& place, int chunk, int thread) {
  const int first = chunk * Tiles::tokens, left = place.tokens - first;
  const auto load = [&](TensorView<const float, 4> view, int head, int column, FloatTile tile, auto tile_units) {
    constexpr int units = decltype(tile_units)::value;
    const int columns = int(view.extents[3]) - column;
    const float* const from = &view(place.batch, place.first_token + first, head, column);
    for (int i = thread; i < Tiles::tokens * units; i += Tiles::threads) {
      const int row = i / units, unit = i % units;
      const bool valid = row < left && 4 * unit < columns;
      arch::copy_async_16(tile.at(row, 4 * unit), from + (valid ? row * view.strides[1] + 4 * unit : 0), valid);
    }
  };
  constexpr std::integral_constant<int, (Tiles::key_row - 8) / 4> key_units{};
  constexpr std::integral_constant<int, Tiles::values / 4> value_units{};
  load(args.q, place.query_head, 0, tiles.queries(chunk), key_units);
  load(args.k, place.key_head, 0, tiles.keys(chunk), key_units);
  load(args.v, place.value_head, place.value_begin, tiles.values_of(chunk), value_units);
  if constexpr (D::decays) {
    if (thread < chunk_len) {
      const GateSource source = gates_of(args.pass, place);
      const bool valid = thread < Tiles::tokens && source.has(first + thread);
      arch::copy_async_4(tiles.log_decays(chunk) + 4u * unsigned(thread),
                         source.data + (valid ? (first + thread) * source.token_stride : 0), valid);
    }
  }
  arch::commit_copies();
}

/// P of one chunk, tiles of 16 queries and 8 keys in turn to each warp; and the chunk's decay weights.
template <FloatProducts M, class D, class Tiles>
__device__ void make_scores(const Tiles& tiles, int chunk, int warp, int lane) {
  constexpr int columns = Tiles::tokens / 8, places = Tiles::tokens / 16 * columns;
  const FloatTile q = tiles.queries(chunk), k = tiles.keys(chunk), p = tiles.scores();
  float2 log_decays{};
  if constexpr (D::decays) log_decays = arch::load_shared_float2(tiles.log_decays(chunk) + 8u * unsigned(lane));
  const ChunkGates gates(log_decays, lane);
  if (D::decays && warp == 0) tiles.gates().write(gates, lane);
  for (int place = warp; place < places; place += Tiles::value_warps) {
    const int first_row = place / columns * 16, first_column = place % columns * 8;
    if (first_column >= first_row + 16) continue;
    float scores[4] = {};
#pragma unroll 4
    for (int i = 0; i < Tiles::key_row - 8; i += 8) {
      const float2 key = k.load_pair(first_column + lane / 4, i + 2 * (lane % 4));
      multiply_add<M>(scores, q.template rows<M>(first_row, i, lane), FloatOperand<M, 2>({key.x, key.y}));
    }
    const int key = first_column + 2 * (lane % 4);
    float2 key_sums{};
    if constexpr (D::decays) key_sums = gates.sums_of_columns(first_column / 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      int reach = row;
      float x = scores[2 * i], y = scores[2 * i + 1];
      if constexpr (D::decays) {
        const float sum = gates.sum(row);
        reach = gates.reach(row);
        x *= ChunkGates::weight(sum, key_sums.x), y *= ChunkGates::weight(sum, key_sums.y);
      }
      const auto kept = [&](int apart, float score) { return unsigned(apart) <= unsigned(reach) ? score : 0.f; };
      arch::store_shared_float2(p.at(row, key), kept(row - key, x), kept(row - key - 1, y));
    }
  }
}

/// One chunk by the warp that has value columns 16 `warp` and on of the tile: outputs, given in pairs to
/// store(row, column, pair), and the state after.
template <FloatProducts M, class D, int Registers, class Tiles, class Store>
__device__ void step(const Tiles& tiles, float (&state_t)[Registers], int chunk, int warp, int lane, Store store) {
  constexpr int rows = Tiles::tokens / 16;
  const FloatTile q = tiles.queries(chunk), k = tiles.keys(chunk), v = tiles.values_of(chunk), p = tiles.scores();
  const SharedGates gates = tiles.gates();
  const int column = 16 * warp + lane / 4;

  float output[rows][8] = {};  // [16 tokens, 16 value columns] each
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {  // O = Q S
    const float* s = state_t + 4 * j;
    const FloatOperand<M, 2> low({s[0], s[1]}), high({s[2], s[3]});
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      const FloatOperand<M, 4> a = q.template rows<M>(16 * m, 8 * j, lane);
      multiply_add<M>(output[m], a, low);
      multiply_add<M>(output[m] + 4, a, high);
    }
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    if constexpr (D::decays) {
#pragma unroll
      for (int i = 0; i < 8; ++i) output[m][i] *= gates.enter(16 * m + lane / 4 + i / 2 % 2 * 8);
    }
#pragma unroll
    for (int i = 0; i < 2 * m + 2; ++i) {  // O += P V
      const FloatOperand<M, 4> a = p.template rows<M>(16 * m, 8 * i, lane);
      const int token = 8 * i + 2 * (lane % 4);
      multiply_add<M>(output[m], a, FloatOperand<M, 2>({v.load(token, column), v.load(token + 1, column)}));
      multiply_add<M>(output[m] + 4, a, FloatOperand<M, 2>({v.load(token, column + 8), v.load(token + 1, column + 8)}));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store(16 * m + lane / 4 + i % 2 * 8, 16 * warp + i / 2 * 8 + 2 * (lane % 4),
            float2{output[m][2 * i], output[m][2 * i + 1]});
  }

  FloatOperand<M, 4> values_t[Tiles::tokens / 8];
#pragma unroll
  for (int i = 0; i < Tiles::tokens / 8; ++i) {
    const int token = 8 * i + lane % 4, later = token + 4;
    float x[4] = {v.load(token, column), v.load(token, column + 8), v.load(later, column), v.load(later, column + 8)};
    if constexpr (D::decays) {
      const float weight = gates.leave(token), later_weight = gates.leave(later);
      x[0] *= weight, x[1] *= weight, x[2] *= later_weight, x[3] *= later_weight;
    }
    values_t[i] = FloatOperand<M, 4>(x);
  }
  const float age = D::decays ? gates.age() : 1.f;
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {  // S^T += V^T K
    float added[4] = {};
#pragma unroll
    for (int i = 0; i < Tiles::tokens / 8; ++i) {
      const int token = 8 * i + lane % 4, key = 8 * j + lane / 4;
      multiply_add<M>(added, values_t[i], FloatOperand<M, 2>({k.load(token, key), k.load(token + 4, key)}));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) state_t[4 * j + i] = fmaf(age, state_t[4 * j + i], added[i]);
  }
}

/// Blocks of Tiles::threads threads for 16 ValueWarps value columns and up to KeyClass keys.
template <FloatProducts M, class D, int KeyClass, int ValueWarps>
__global__ void __launch_bounds__(32 * ValueWarps, 1) float_pass(const __grid_constant__ FloatPass args) {
  using Tiles = FloatTiles<D::decays, KeyClass, ValueWarps>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Place place;
  const LinearPass& pass = args.pass;
  if (threadIdx.x == 0) place = place_of_block(pass, 16 * ValueWarps);
  __syncthreads();
  const Tiles tiles{arch::shared_address(memory)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int chunks = (place.tokens + Tiles::tokens - 1) / Tiles::tokens;
  float state_t[KeyClass / 2];  // [16 value columns, KeyClass]
  const int value = place.value_begin + 16 * warp + lane / 4;
  load_first_state(state_t, pass, place, value, lane);
  if (saves_states(pass)) save_state(state_t, pass, place, 0, value, lane);

  if (chunks > 0) load_chunk<D>(args, tiles, place, 0, thread);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    arch::wait_copies<0>();
    __syncthreads();  // the chunk is here, and the other one is done with
    if (chunk + 1 < chunks) load_chunk<D>(args, tiles, place, chunk + 1, thread);
    make_scores<M, D>(tiles, chunk, warp, lane);
    __syncthreads();
    const int first = chunk * Tiles::tokens;
    step<M, D>(tiles, state_t, chunk, warp, lane, [&](int row, int column, float2 pair) {
      if (first + row >= place.tokens || place.value_begin + column >= pass.value_dim) return;
      *reinterpret_cast<float2*>(&args.o(place.batch, place.first_token + first + row, place.head,
                                         place.value_begin + column)) = {pass.scale * pair.x, pass.scale * pair.y};
    });
    if (saves_states(pass)) save_state(state_t, pass, place, first + Tiles::tokens, value, lane);
  }
  store_last_state(state_t, pass, place, value, lane);
}

}  // namespace chela::cuda::detail
