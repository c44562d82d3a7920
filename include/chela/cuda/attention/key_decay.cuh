#pragma once
// Decays per key on the GPU, a block of 16 tokens and 64 keys at a time, by one warp. With a_t = exp(log_decay_t) in
// [0, 1] and b the inclusive sums of log-decays inside the block, G the last of them, a decay enters in four places:
//
//   score   p_ts = sum over keys of q_t k_s exp(b_t - b_s)   what a query sees of a token inside the block, s <= t
//           q_t *= exp(b_t)                                  what it still sees of the state before the block
//           k_s *= exp(G - b_s)                              what is left of a token at the end of the block
//   age     exp(G)                                           on the earlier state
//
// Scores by halving: two tokens s < t are parted by one of the cuts of 16 into 8 and 8, of these into 4 and 4, and so on.
// With every query after a cut decayed from the cut, every key before it decayed up to the cut, and these as rows of one
// matrix X, the scores across all cuts of one size are entries of X X^T, and the same numbers serve for the next larger
// cuts once they are decayed over half a block more. All factors are products of the a, so no exponential but the a
// themselves is formed, nothing can overflow, and a reset (a = 0) is no special case.
//
// Rounding: X is cut to 10 bits behind the point. Queries and keys leave as 16-bit elements, keys in two parts so that
// what is written into the state loses nothing.
#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/attention/gates.cuh"

namespace chela::cuda::detail {

/// Tokens and keys of a block. The state advances by blocks.
inline constexpr int block_tokens = 16, block_keys = 64;

/// Where a block lies in shared memory: 16 rows of 128 bytes each for queries and keys, swizzled (arch::swizzled) and
/// aligned to 128. What is made of them takes their places.
struct KeyBlock {
  std::uint32_t queries, keys;
  std::uint32_t low;     ///< rows as those of keys: the second part of the keys
  std::uint32_t scores;  ///< 16 rows of 128 bytes of which the scores are two 16-byte units ...
  int score_unit;        ///< ... this one, an even one, and the next
  std::uint32_t ages;    ///< 64 floats
};

/// A block's log-decays on their way from global memory: lane l has keys 2 l and 2 l + 1. Zero past the end.
class BlockGates {
 public:
  /// `source` begins at key 0 of the sequence's first token; lanes whose keys do not exist pass `exists` = false.
  __device__ void fetch(const GateSource& source, int key, bool exists, int first_token) {
    const float* at = source.data + key + first_token * source.token_stride;
#pragma unroll
    for (int t = 0; t < block_tokens; ++t, at += source.token_stride) {
      log_decays_[t] = {0, 0};
      if (exists && first_token + t < source.tokens) log_decays_[t] = __ldg(reinterpret_cast<const float2*>(at));
    }
  }

  /// The decays, and the logarithm (of base 2) of their product. A sum is better than a product here: decays next to 1
  /// are held with few bits, and ages meet again and again.
  __device__ float2 decays(float2 (&a)[block_tokens]) const {
    constexpr float log2_e = 1.44269504f;
    float2 sum = {0, 0};
#pragma unroll
    for (int t = 0; t < block_tokens; ++t) {
      const float x = log2_e * log_decays_[t].x, y = log2_e * log_decays_[t].y;
      sum.x += x, sum.y += y;
      a[t] = {arch::exp2_flushed(x), arch::exp2_flushed(y)};
    }
    return sum;
  }

 private:
  float2 log_decays_[block_tokens];
};

__device__ inline void multiply(float2& x, float2 by) { x.x *= by.x, x.y *= by.y; }

/// From cuts into `Half` tokens to the next larger ones: x_t decays over the other half where t is in the half
/// (`Later` or not) that is further from the cut to come.
template <int Half, bool Later>
__device__ void widen(float2 (&x)[block_tokens], const float2 (&products)[block_tokens / Half]) {
#pragma unroll
  for (int t = 0; t < block_tokens; ++t)
    if (((t & Half) != 0) == Later) multiply(x[t], products[(t / Half) ^ 1]);
}

/// Products of decays over runs of 2 Half tokens, from those over Half.
template <int Half>
__device__ void join(float2 (&joined)[block_tokens / Half / 2], const float2 (&products)[block_tokens / Half]) {
#pragma unroll
  for (int i = 0; i < block_tokens / Half / 2; ++i) {
    joined[i] = products[2 * i];
    multiply(joined[i], products[2 * i + 1]);
  }
}

/// Scores of one block in the layout of multiply_add: of tokens 0 to 7 among themselves, 8 to 15 among themselves, and
/// of the later ones with the earlier ones.
struct BlockScores {
  float early[2], late[2], across[2];
};

/// The part of this lane in shared memory, for each of its two ways to see a block.
struct BlockLane {
  std::uint32_t pair;          ///< its two keys as 16-bit elements, in row 0
  std::uint32_t float_pair;    ///< the same as floats: keys 0 to 31 in the place of the queries, the others of the keys
  std::uint32_t query_matrix;  ///< its row for load_matrices
  std::uint32_t key_matrix;

  __device__ BlockLane(const KeyBlock& block, int lane)
      : pair(4u * unsigned(lane)),
        float_pair((lane < 16 ? block.queries : block.keys) + 8u * unsigned(lane % 16)),
        query_matrix(block.queries + unsigned(matrix(lane))),
        key_matrix(block.keys + unsigned(matrix(lane))) {}

  /// The same place in another row.
  static __device__ std::uint32_t row(std::uint32_t in_row_0, int t) {
    return (in_row_0 ^ (unsigned(t & 7) << 4)) + 128u * unsigned(t);
  }

 private:
  static __device__ int matrix(int lane) { return arch::swizzled<block_tokens>(lane % 16, lane / 16); }
};

/// Scores of queries with keys of their own token: there is no decay between them.
template <class T>
__device__ BlockScores meet_themselves(const BlockLane& at, int lane) {
  float early[4] = {}, late[4] = {};
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    std::uint32_t q[4], k[4];
    arch::load_matrices(q, at.query_matrix ^ (i << 5));
    arch::load_matrices(k, at.key_matrix ^ (i << 5));
    arch::multiply_add<T>(early, q, k[0], k[2]);
    arch::multiply_add<T>(late, q, k[1], k[3]);
  }
  BlockScores scores{};
#pragma unroll
  for (int e = 0; e < 2; ++e)
    if (lane / 4 == 2 * (lane % 4) + e) scores.early[e] = early[e], scores.late[e] = late[2 + e];
  return scores;
}

/// Scores across the cuts into `Half` tokens.
template <int Half>
__device__ void meet_across(BlockScores& scores, const float2 (&q)[block_tokens], const float2 (&k)[block_tokens],
                            const BlockLane& at, int lane) {
  __syncwarp();
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    const float2 x = t & Half ? q[t] : k[t];
    arch::store_shared_float2(BlockLane::row(at.float_pair, t), x.x, x.y);
  }
  __syncwarp();
  float early[4] = {}, late[4] = {};
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) {
    std::uint32_t x[4];
    arch::load_matrices(x, (i < 4 ? at.query_matrix : at.key_matrix) ^ (i % 4 << 5));
    arch::multiply_add_floats(early, x, x[0], x[2]);
    if constexpr (Half < 8) arch::multiply_add_floats(late, x, x[1], x[3]);
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = lane / 4, key = 2 * (lane % 4) + e;
    if constexpr (Half == 8)
      scores.across[e] = early[2 + e];
    else if (query > key && ((query ^ key) & -Half) == Half)
      scores.early[e] = early[e], scores.late[e] = late[2 + e];
  }
}

template <class T>
__device__ void store_scores(const BlockScores& scores, const KeyBlock& block, int lane) {
  const auto store = [&](int row, int unit, const float(&p)[2]) {
    arch::store_shared_word(
        block.scores + unsigned(arch::swizzled<block_tokens>(row, block.score_unit + unit) + 4 * (lane % 4)),
        arch::pack<T>(p[0], p[1]));
  };
  constexpr float none[2] = {};
  store(lane / 4, 0, scores.early), store(lane / 4, 1, none);
  store(lane / 4 + 8, 0, scores.across), store(lane / 4 + 8, 1, scores.late);
}

/// Makes of a block's queries and keys (only these without Outputs) what the step needs, in place. Keys past the first
/// `tokens` tokens count as zero. The whole warp; what it wrote is not yet shown to others. meanwhile() is called once the
/// decays are no longer needed, with much of the work still to come.
template <class T, bool Outputs, class F>
__device__ void prepare_block(const KeyBlock& block, const float2 (&decays)[block_tokens], float2 log2_age, int tokens,
                              int lane, F meanwhile) {
  const BlockLane at(block, lane);
  float2 q[block_tokens], k[block_tokens];
  std::uint32_t pair[1] = {at.pair};
  const auto load = [&](std::uint32_t tile, int t) {
    return arch::unpack<T>(arch::load_shared_word(BlockLane::row(tile + pair[0], t)));
  };
  const auto store = [&](std::uint32_t tile, int t, std::uint32_t x) {
    arch::store_shared_word(BlockLane::row(tile + pair[0], t), x);
  };
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    k[t] = load(block.keys, t);
    if (t >= tokens) k[t] = {0, 0};
    if constexpr (Outputs) q[t] = load(block.queries, t), multiply(q[t], decays[t]);
  }
  BlockScores scores{};
  if constexpr (Outputs) scores = meet_themselves<T>(at, lane);

  float2 twos[8], fours[4], eights[2];
  if constexpr (Outputs) meet_across<1>(scores, q, k, at, lane), widen<1, true>(q, decays);
  widen<1, false>(k, decays), join<1>(twos, decays);
  meanwhile();
  if constexpr (Outputs) meet_across<2>(scores, q, k, at, lane), widen<2, true>(q, twos);
  widen<2, false>(k, twos), join<2>(fours, twos);
  if constexpr (Outputs) meet_across<4>(scores, q, k, at, lane), widen<4, true>(q, fours);
  widen<4, false>(k, fours), join<4>(eights, fours);
  if constexpr (Outputs) meet_across<8>(scores, q, k, at, lane), widen<8, true>(q, eights);
  widen<8, false>(k, eights);

  __syncwarp();
  arch::pin(pair);  // addresses are made anew: registers are scarce
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    if constexpr (Outputs) store(block.queries, t, arch::pack<T>(q[t].x, q[t].y));
    const std::uint32_t high = arch::pack<T>(k[t].x, k[t].y);
    const float2 taken = arch::unpack<T>(high);
    store(block.keys, t, high);
    store(block.low, t, arch::pack<T>(k[t].x - taken.x, k[t].y - taken.y));
  }
  if constexpr (Outputs) store_scores<T>(scores, block, lane);
  arch::store_shared_float2(block.ages + 8u * unsigned(lane), arch::exp2_flushed(log2_age.x),
                            arch::exp2_flushed(log2_age.y));
}

/// Columns (keys) of a lane's part of S^T, in the layout of products, times their ages.
template <int Registers>
__device__ void age_state(float (&state_t)[Registers], std::uint32_t ages, int lane) {
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {
    const float2 age = arch::load_shared_float2(ages + unsigned(32 * j + 8 * (lane % 4)));
    state_t[4 * j] *= age.x, state_t[4 * j + 1] *= age.y;
    state_t[4 * j + 2] *= age.x, state_t[4 * j + 3] *= age.y;
  }
}

}  // namespace chela::cuda::detail
