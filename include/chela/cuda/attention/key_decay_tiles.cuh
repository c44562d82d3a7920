#pragma once
// Shared memory of the warpgroup kernels with a decay per key: a ring of chunks that the copy engine fills and in which
// queries and keys are decayed in place, and what the preparing warpgroup hands over beside them.
#include "chela/cuda/attention/key_decay.cuh"
#include "chela/cuda/attention/warpgroup_tiles.cuh"

namespace chela::cuda::detail {

/// Blocks of one chunk.
inline constexpr int chunk_blocks = chunk_len / block_tokens;

/// The nth chunk, block of a chunk, or other of `count` that a walk comes to.
template <bool Reversed>
__device__ constexpr int in_walk(int n, int first, int count) {
  return Reversed ? first + count - 1 - n : first + n;
}

/// As WarpgroupBarriers, and static for the same reason.
struct KeyDecayBarriers {
  std::uint64_t loaded[most_stages];
  std::uint64_t released[2];
  std::uint64_t prepared[2][chunk_blocks];
};

/// Where things lie. Tiles are panels [64 tokens][64 columns] (arch::swizzled<64>). Beside the ring there are two
/// buffers in turn for what belongs to a chunk: the second parts of its keys, the blocks' scores, the blocks' ages.
template <int KeyDim, int ValueGroups, bool Outputs>
struct KeyDecayTiles {
  static constexpr int panel = chunk_len * 128, block_rows = block_tokens * 128;
  static constexpr int key_tile = KeyDim / 64 * panel, value_tile = ValueGroups * panel;
  static constexpr int stage = (Outputs ? 2 : 1) * key_tile + value_tile;
  static constexpr int score_bytes = Outputs ? block_rows : 0;
  static constexpr int age_bytes = KeyDim * int(sizeof(float));
  static constexpr int buffer_bytes = key_tile + score_bytes + chunk_blocks * age_bytes;
  static constexpr int parallel_blocks = 4 / (KeyDim / 64);  ///< prepared at once, by four warps
  static constexpr int sum_bytes = Outputs ? panel_sum_bytes(KeyDim / 64) : 0;

  /// Dynamic shared memory, with room to begin at a multiple of 1024.
  static constexpr int bytes(int stages) {
    return 1024 + stages * stage + (Outputs ? 2 * value_tile : 0) + 2 * buffer_bytes + parallel_blocks * sum_bytes;
  }

  std::uint32_t base;
  int stages;

  __device__ KeyDecayTiles(const void* memory, int stages_)
      : base((arch::shared_address(memory) + 1023u) & ~1023u), stages(stages_) {}
  __device__ std::uint32_t keys(int place) const { return base + unsigned(place * stage); }
  __device__ std::uint32_t queries(int place) const { return keys(place) + key_tile + value_tile; }
  __device__ std::uint32_t values(int place, int group) const {
    return keys(place) + unsigned(key_tile + group * panel);
  }
  __device__ std::uint32_t output(int group, int buffer) const {
    return base + unsigned(stages * stage + (2 * group + buffer) * panel);
  }
  __device__ std::uint32_t low_keys(int buffer) const {
    return base + unsigned(stages * stage + (Outputs ? 2 * value_tile : 0) + buffer * buffer_bytes);
  }
  /// The scores of a chunk's blocks, side by side in 16 rows.
  __device__ std::uint32_t scores(int buffer) const { return low_keys(buffer) + key_tile; }
  static __device__ constexpr int score_unit(int block) { return 2 * block; }
  __device__ std::uint32_t ages(int buffer, int block) const {
    return low_keys(buffer) + unsigned(key_tile + score_bytes + block * age_bytes);
  }

  /// For sum_over_panels, of the nth of the blocks prepared at once, in two buffers in turn.
  __device__ std::uint32_t panel_sums(int n, int turn) const {
    return low_keys(2) + unsigned(n * sum_bytes + turn % 2 * (sum_bytes / 2));
  }
  __device__ KeyBlock block(int place, int buffer, int block, int key_panel) const {
    const unsigned rows = unsigned(key_panel * panel + block * block_rows);
    return {.queries = queries(place) + rows,
            .keys = keys(place) + rows,
            .low = low_keys(buffer) + rows,
            .scores = scores(buffer),
            .score_unit = score_unit(block),
            .ages = ages(buffer, block) + unsigned(key_panel * block_keys) * unsigned(sizeof(float))};
  }
};

/// The copies of chunks to come, started by one thread, which knows when a place of the ring is free.
template <class T, bool Outputs, bool Reversed, class Tiles>
class KeyDecayLoader {
 public:
  __device__ KeyDecayLoader(const WarpgroupPass<T>& args, const Tiles& tiles, KeyDecayBarriers& barriers,
                            const Place& place, bool loads)
      : args_(args),
        tiles_(tiles),
        barriers_(barriers),
        place_(place),
        chunk_(Reversed ? place.end_chunk - 1 : place.first_chunk),
        left_(loads ? place.end_chunk - place.first_chunk : 0) {}

  __device__ void load_next() {
    if (left_ == 0) return;
    const std::uint32_t loaded = arch::shared_address(&barriers_.loaded[at_.place]);
    arch::arrive_expecting(loaded, Tiles::stage);
    const int token = place_.first_token + chunk_ * chunk_len, batch = place_.batch;
    if constexpr (Outputs)
      arch::load_tensor(tiles_.queries(at_.place), &args_.q, loaded, 0, token, 0, place_.query_head, batch);
    arch::load_tensor(tiles_.keys(at_.place), &args_.k, loaded, 0, token, 0, place_.key_head, batch);
    arch::load_tensor(tiles_.values(at_.place, 0), &args_.v, loaded, 0, token, place_.value_begin / 64,
                      place_.value_head, batch);
    at_.advance(tiles_.stages);
    chunk_ += Reversed ? -1 : 1;
    --left_;
  }

 private:
  const WarpgroupPass<T>& args_;
  const Tiles& tiles_;
  KeyDecayBarriers& barriers_;
  const Place& place_;
  int chunk_, left_;
  RingPosition at_;
};

/// One thread prepares all barriers; every thread calls. A block is prepared and a buffer released by so many
/// threads.
__device__ inline void init_barriers(KeyDecayBarriers& barriers, int stages, int preparing, int releasing) {
  if (threadIdx.x == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) {
      arch::init_barrier(arch::shared_address(&barrier), arrivals);
    };
    for (int i = 0; i < stages; ++i) init(barriers.loaded[i], 1);
    for (int i = 0; i < 2; ++i) {
      init(barriers.released[i], releasing);
      for (int block = 0; block < chunk_blocks; ++block) init(barriers.prepared[i][block], preparing);
    }
    arch::fence_barriers();
  }
  __syncthreads();
}

}  // namespace chela::cuda::detail
