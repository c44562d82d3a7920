#pragma once
// Linear attention over a bidirectional span without decay, on warps (sm_80 instructions): all queries of a sequence of n
// tokens read the same state,
//
//   O = scale Q S / n,   S = S_0 + K^T V
//
// so that there is no order to keep. Blocks sum the products of a segment of the tokens each (sum_products), one kernel adds
// them up (total_states), and blocks with a share of the queries read the total (read_total). Every tensor moves once; on an
// H100 (2026-11-24) at 0.76 of a copy's pace for 4 x 4096 tokens, 32 heads, dims of 128.
//
// Gradients are the same with the roles of q, k, v and dO exchanged, but what is divided by n is the sum of products, to
// which the final state's gradient is added, and not what is read.
#include <new>

#include "chela/cuda/attention/warp_pass.cuh"

namespace chela::cuda::detail {

/// What the sequence's length divides.
enum class MeanOver { reads, sums };

/// One call of the three kernels. Heads of the sum are state heads; segment_states are there, and the total takes the first
/// one's place.
template <class T>
struct TotalStatePass {
  WarpPass<T> walk;
  MeanOver mean = MeanOver::reads;
};

/// Tiles of tokens [Tokens][64 columns] (arch::swizzled<Tokens>) in a ring: keys and values, or queries alone; and behind it
/// two outputs in turn.
template <int KeyClass, int ValueWarps, bool Reads>
struct TotalStateTiles {
  static constexpr int tokens = KeyClass <= 64 ? 64 : 32, value_warps = ValueWarps, threads = 32 * ValueWarps;
  static constexpr int key_units = KeyClass / 8, value_units = 2 * ValueWarps;
  static constexpr int key_tile = tokens * key_units * 16, value_tile = tokens * value_units * 16;
  static constexpr int stages = 4, stage = Reads ? key_tile : key_tile + value_tile;
  static constexpr int bytes = stages * stage + (Reads ? 2 * value_tile : 0);
  static constexpr int blocks = KeyClass <= 128 ? 2 : 1;  ///< that are to fit on a multiprocessor

  std::uint32_t base;

  __device__ std::uint32_t keys(int step) const { return base + unsigned(step % stages * stage); }
  __device__ std::uint32_t values(int step) const { return keys(step) + key_tile; }
  __device__ std::uint32_t output(int step) const { return base + unsigned(stages * stage + step % 2 * value_tile); }
};

/// The tokens of a block: tiles of its segment.
struct TileRange {
  int first, end;

  __device__ TileRange(const Place& place, int tile)
      : first(place.first_chunk * (chunk_len / tile)),
        end(min(place.end_chunk * (chunk_len / tile), (place.tokens + tile - 1) / tile)) {}
};

/// Starts the copies of one tile of rows, with zeros for tokens past the end and columns past the last. All threads.
template <class Tiles, int Units, class T>
__device__ void load_rows(const HeadRows<const T>& rows, std::uint32_t tile, int first, int tokens, int thread) {
  for_each_unit<Tiles, Units>(rows, first, thread, [&](int row, int unit, const T* from) {
    arch::copy_async_16(tile + unsigned(arch::swizzled<Tiles::tokens>(row, unit)), from,
                        first + row < tokens && unit < rows.units);
  });
}

/// What each segment adds to the state. Blocks of threads for 16 ValueWarps value columns and up to KeyClass keys, segments
/// along y.
template <class T, int KeyClass, int ValueWarps>
__global__ void __launch_bounds__(32 * ValueWarps, TotalStateTiles<KeyClass, ValueWarps, false>::blocks)
    sum_products(const __grid_constant__ TotalStatePass<T> args) {
  using Tiles = TotalStateTiles<KeyClass, ValueWarps, false>;
  extern __shared__ __align__(128) char memory[];
  const LinearPass& pass = args.walk.pass;
  const Place place = place_of_block(pass, 16 * ValueWarps);
  const HeadRows<const T> keys(args.walk.k, place, place.key_head, 0),
      values(args.walk.v, place, place.value_head, place.value_begin);
  const Tiles tiles{arch::shared_address(memory)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const TileRange range(place, Tiles::tokens);
  const int count = range.end - range.first;
  const auto load = [&](int step) {
    const int first = (range.first + step) * Tiles::tokens;
    if (step < count) {
      load_rows<Tiles, Tiles::key_units>(keys, tiles.keys(step), first, place.tokens, thread);
      load_rows<Tiles, Tiles::value_units>(values, tiles.values(step), first, place.tokens, thread);
    }
    arch::commit_copies();
  };
  for (int ahead = 0; ahead < Tiles::stages - 1; ++ahead) load(ahead);
  float state_t[KeyClass / 2] = {};  // [16 value columns, KeyClass]
  for (int step = 0; step < count; ++step) {
    arch::wait_copies<Tiles::stages - 2>();
    __syncthreads();
    load(step + Tiles::stages - 1);
    std::uint32_t values_t[Tiles::tokens / 16][4];
    load_values_transposed<Tiles>(values_t, tiles.values(step), warp, lane);
    write_state<T, Tiles>(state_t, values_t, tiles.keys(step), lane);
  }
  for_each_state_element<KeyClass / 2>(
      state_of(slice(pass.segment_states, place.segment), place.sequence, place.state_head),
      place.value_begin + 16 * warp + lane / 4, lane, [&](int i, float& x) { x = state_t[i]; });
}

/// A sequence's length as a divisor.
__device__ inline float divisor_of(const SequenceBatch& sequences, Index sequence) {
  return float(max(int(sequences[sequence].count), 1));
}

/// The total from what the segments add, and the final state. One thread per state element.
template <class T>
__global__ void total_states(const __grid_constant__ TotalStatePass<T> args) {
  const LinearPass& pass = args.walk.pass;
  const auto& states = pass.segment_states;
  const Index element = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index of_state = Index(pass.key_dim) * pass.value_dim, heads = states.extents[2];
  const Index state = element / of_state, within = element % of_state, sequence = state / heads, head = state % heads;
  if (sequence >= states.extents[1]) return;
  const Index key = within % pass.key_dim, value = within / pass.key_dim;
  const Index entry = pass.state_slots.present() ? pass.state_slots[sequence] : sequence;
  float sum = 0;
#pragma unroll 8
  for (int segment = 0; segment < pass.segments; ++segment) sum += states(segment, sequence, head, key, value);
  if (args.mean == MeanOver::sums) sum /= divisor_of(pass.sequences, sequence);
  if (const int given = pass.heads.states_per_given; pass.initial_state.present() && head % given == 0)
    sum = fmaf(pass.initial_factor, pass.initial_state(entry, head / given, key, value), sum);
  states(0, sequence, head, key, value) = sum;
  if (pass.final_state.present()) pass.final_state(entry, head, key, value) = pass.final_factor * sum;
}

/// O = scale Q S, with S the total, or its mean. Blocks as for sum_products, but for output heads.
template <class T, int KeyClass, int ValueWarps>
__global__ void __launch_bounds__(32 * ValueWarps, TotalStateTiles<KeyClass, ValueWarps, true>::blocks)
    read_total(const __grid_constant__ TotalStatePass<T> args) {
  using Tiles = TotalStateTiles<KeyClass, ValueWarps, true>;
  extern __shared__ __align__(128) char memory[];
  __shared__ Place place;
  __shared__ alignas(WarpRows<T>) char rows_memory[sizeof(WarpRows<T>)];
  const LinearPass& pass = args.walk.pass;
  if (threadIdx.x == 0) {
    place = place_of_block(pass, 16 * ValueWarps);
    new (rows_memory) WarpRows<T>{{args.walk.q, place, place.query_head, 0},
                                  {args.walk.k, place, place.key_head, 0},
                                  {args.walk.v, place, place.value_head, place.value_begin},
                                  {args.walk.o, place, place.head, place.value_begin},
                                  {{}, place, place.head, 0},
                                  {{}, place, place.head, 0}};
  }
  __syncthreads();
  const auto& rows = *reinterpret_cast<const WarpRows<T>*>(rows_memory);
  const Tiles tiles{arch::shared_address(memory)};
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const TileRange range(place, Tiles::tokens);
  const int count = range.end - range.first;
  const auto load = [&](int step) {
    if (step < count)
      load_rows<Tiles, Tiles::key_units>(rows.q, tiles.keys(step), (range.first + step) * Tiles::tokens, place.tokens,
                                         thread);
    arch::commit_copies();
  };
  const auto store = [&](int step) { store_chunk<Tiles>(rows, tiles, place, step, range.first + step, thread); };
  for (int ahead = 0; ahead < Tiles::stages - 1; ++ahead) load(ahead);

  float state_t[KeyClass / 2] = {};  // [16 value columns, KeyClass]
  const float share = args.mean == MeanOver::reads ? 1 / divisor_of(pass.sequences, place.sequence) : 1.f;
  for_each_state_element<KeyClass / 2>(state_of(slice(pass.segment_states, 0), place.sequence, place.state_head),
                                       place.value_begin + 16 * warp + lane / 4, lane,
                                       [&](int i, float& x) { state_t[i] = share * x; });
  for (int step = 0; step < count; ++step) {
    arch::wait_copies<Tiles::stages - 2>();
    __syncthreads();
    load(step + Tiles::stages - 1);
    if (step > 0) store(step - 1);
    float output[Tiles::tokens / 16][8];
    read_state<T, Tiles>(output, state_t, tiles.keys(step), lane);
#pragma unroll
    for (int m = 0; m < Tiles::tokens / 16; ++m)
      stage_output<T, Tiles>(tiles.output(step), 16 * m, warp, lane, [&](int i) {
        return float2{pass.scale * output[m][2 * i], pass.scale * output[m][2 * i + 1]};
      });
  }
  __syncthreads();
  if (count > 0) store(count - 1);
}

}  // namespace chela::cuda::detail
