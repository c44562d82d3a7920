#pragma once
// Shared memory of the warpgroup kernels: a ring of chunks that the copy engine fills, and what warpgroups hand to each
// other.
#include "chela/cuda/arch/tensor_copy.cuh"
#include "chela/cuda/attention/linear_pass.cuh"
#include "chela/cuda/attention/score_weights.cuh"

namespace chela::cuda::detail {

/// What the copy engine is told, and where outputs go: nowhere if absent.
template <class T>
struct WarpgroupPass {
  CUtensorMap q, k, v, o;
  TensorView<T, 4> output;
  LinearPass pass;
  CUtensorMap beside = {};  ///< what the output is the gradient of, for pass.sums; or added to, where the walk joins
};

/// Most chunks in flight.
inline constexpr int most_stages = 8;

/// Barriers of a block. They are static so that a kernel which was not compiled for sm_90a shows by having none.
struct WarpgroupBarriers {
  std::uint64_t loaded[most_stages];    ///< a place of the ring has its chunk
  std::uint64_t released[most_stages];  ///< and is free again
  std::uint64_t gated[most_stages];     ///< a chunk's decay weights are there, in the place's own buffer
  std::uint64_t scored[2];              ///< by buffer of scores
  std::uint64_t taken[2];
  std::uint64_t beside[2][3];  ///< [warpgroup with a state, staging tile]
  std::uint64_t staged[2][3];  ///< likewise: an output is on its way
  std::uint64_t cleared[2][3];
};

/// Position in a ring: which place, and the parity of how often it came round.
struct RingPosition {
  int place = 0;
  std::uint32_t parity = 0;

  __device__ void advance(int places) {
    if (++place == places) place = 0, parity ^= 1;
  }
};

/// Where things lie. Tiles are panels [64 tokens][64 columns] (arch::swizzled<64>) of `panel` bytes.
template <int KeyDim, int ValueGroups, bool Outputs, bool Decays, bool LoadsBeside = false>
struct WarpgroupTiles {
  static constexpr bool outputs = Outputs;
  static constexpr int panel = chunk_len * 128;
  static constexpr int key_tile = KeyDim / 64 * panel, value_tile = ValueGroups * panel;
  static constexpr int stage = (Outputs ? 2 : 1) * key_tile + value_tile;
  static constexpr int gate_rings = !Decays ? 0 : Outputs ? 1 : 4 * ValueGroups;
  static constexpr int ring_bytes = gate_rings * GateRing::bytes;
  static constexpr int gate_bytes = Decays && Outputs ? SharedGates::bytes + ScoreWeights::bytes : 0;  ///< of a chunk
  static constexpr int column_bytes = chunk_len * int(sizeof(float));
  static constexpr int staging = !Outputs ? 0 : LoadsBeside ? 3 : 2;  ///< tiles of outputs on their way, per warpgroup
  static constexpr int own_bytes = LoadsBeside ? (2 + 4 * staging * ValueGroups) * column_bytes : 0;

  /// Dynamic shared memory, with room to begin at a multiple of 1024.
  static constexpr int bytes(int stages) {
    return 1024 + stages * (stage + gate_bytes) + (Outputs ? 2 * panel : 0) + staging * value_tile + ring_bytes +
           own_bytes;
  }

  std::uint32_t base;
  int stages;

  __device__ WarpgroupTiles(const void* memory, int stages_)
      : base((arch::shared_address(memory) + 1023u) & ~1023u), stages(stages_) {}
  __device__ std::uint32_t keys(int place) const { return base + unsigned(place * stage); }
  __device__ std::uint32_t queries(int place) const { return keys(place) + key_tile + value_tile; }
  __device__ std::uint32_t values(int place, int group) const {
    return keys(place) + unsigned(key_tile + group * panel);
  }
  __device__ std::uint32_t scores(int buffer) const { return base + unsigned(stages * stage + buffer * panel); }
  __device__ std::uint32_t output(int group, int buffer) const { return scores(2 + staging * group + buffer); }
  __device__ std::uint32_t gate_ring(int warp) const {
    return scores(Outputs ? 2 + staging * ValueGroups : 0) + unsigned(warp * GateRing::bytes);
  }
  __device__ SharedGates gates(int place) const {
    return SharedGates(gate_ring(gate_rings) + unsigned(place * gate_bytes));
  }
  __device__ ScoreWeights score_weights(int place) const {
    return ScoreWeights(gate_ring(gate_rings) + unsigned(place * gate_bytes + SharedGates::bytes));
  }
  /// Scores of tokens with themselves.
  __device__ std::uint32_t own_scores(int buffer) const {
    return gate_ring(gate_rings) + unsigned(stages * gate_bytes + buffer * column_bytes);
  }
  /// Sums of one warp of outputs times what they are the gradient of, by token.
  __device__ std::uint32_t row_sums(int group, int staged, int warp) const {
    return own_scores(2) + unsigned((4 * (staging * group + staged) + warp) * column_bytes);
  }
};

/// The loading side of the ring of chunks, driven by one thread, which knows when the next place is free.
template <class T, class Tiles, bool Reversed = false>
class ChunkLoader {
 public:
  /// Only the thread that `loads` starts copies.
  __device__ ChunkLoader(const WarpgroupPass<T>& args, const Tiles& tiles, WarpgroupBarriers& barriers,
                         const Place& place, bool loads)
      : args_(args),
        tiles_(tiles),
        barriers_(barriers),
        place_(place),
        chunk_(Reversed ? place.end_chunk - 1 : place.first_chunk),
        left_(loads ? place.end_chunk - place.first_chunk : 0) {}

  __device__ void load_next() {
    if (left_ == 0) return;
    const std::uint32_t loaded = arch::shared_address(&barriers_.loaded[at_]);
    arch::arrive_expecting(loaded, Tiles::stage);
    const int token = place_.first_token + chunk_ * chunk_len, batch = place_.batch;
    if constexpr (Tiles::outputs)
      arch::load_tensor(tiles_.queries(at_), &args_.q, loaded, 0, token, 0, place_.query_head, batch);
    arch::load_tensor(tiles_.keys(at_), &args_.k, loaded, 0, token, 0, place_.key_head, batch);
    arch::load_tensor(tiles_.values(at_, 0), &args_.v, loaded, 0, token, place_.value_begin / 64, place_.value_head,
                      batch);
    if (++at_ == tiles_.stages) at_ = 0;
    chunk_ += Reversed ? -1 : 1;
    --left_;
  }

 private:
  const WarpgroupPass<T>& args_;
  const Tiles& tiles_;
  WarpgroupBarriers& barriers_;
  const Place& place_;
  int chunk_, left_, at_ = 0;
};

/// One thread prepares all barriers; every thread calls. A place is released by each warp with a state.
__device__ inline void init_barriers(WarpgroupBarriers& barriers, int stages, int value_groups) {
  if (threadIdx.x == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) {
      arch::init_barrier(arch::shared_address(&barrier), arrivals);
    };
    for (int i = 0; i < stages; ++i) {
      init(barriers.loaded[i], 1);
      init(barriers.released[i], 128 * value_groups);
      init(barriers.gated[i], 32);
    }
    for (int i = 0; i < 2; ++i) init(barriers.scored[i], 128), init(barriers.taken[i], 128 * value_groups);
    for (int i = 0; i < 6; ++i) {
      init(barriers.beside[i / 3][i % 3], 1);
      init(barriers.staged[i / 3][i % 3], 128);
      init(barriers.cleared[i / 3][i % 3], 1);
    }
    arch::fence_barriers();
  }
  __syncthreads();
}

/// The chunk that holds tokens of the next sequence behind its own, or -1: the last one of a sequence in a ragged
/// batch.
__device__ inline int shared_chunk(const LinearPass& pass, const Place& place) {
  return pass.sequences.cu_seqlens.present() && place.tokens % chunk_len != 0 ? place.tokens / chunk_len : -1;
}

/// Zeros the tokens past the first `tokens` of a shared chunk's keys and of a warpgroup's values. At the end of a
/// tensor the copy engine brings zeros by itself.
template <int KeyDim>
__device__ void clear_other_tokens(std::uint32_t keys, std::uint32_t values, int tokens, int barrier, int thread) {
  const auto clear = [&](std::uint32_t tile, int units) {
    for (int i = thread; i < (chunk_len - tokens) * units; i += 128)
      arch::store_shared_unit(tile + unsigned(arch::swizzled<chunk_len>(tokens + i / units, i % units)),
                              uint4{0, 0, 0, 0});
  };
  clear(keys, KeyDim / 8);
  clear(values, 8);
  arch::fence_copies();
  arch::sync_threads(barrier, 128);
}

/// V^T of a warpgroup's 64 value columns as register operands, 16 tokens each.
__device__ inline void load_values_transposed(std::uint32_t (&values_t)[4][4], std::uint32_t tile, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    arch::load_matrices_transposed(
        values_t[i],
        tile + unsigned(arch::swizzled<chunk_len>(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)));
}

}  // namespace chela::cuda::detail
