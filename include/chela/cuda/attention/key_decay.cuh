#pragma once
// Decays per key on the GPU, a block of 16 tokens and 64 keys at a time, by one warp. With a_t = exp(log_decay_t) in
// [0, 1] and b the inclusive sums of log-decays inside the block, G the last of them, a decay enters in four places:
//
//   score   p_ts = sum over keys of q_t k_s exp(b_t - b_s)   what a query sees of a token inside the block, s <= t
//           q_t *= exp(b_t)                                  what it still sees of the state before the block
//           k_s *= exp(G - b_s)                              what is left of a token at the end of the block
//   age     exp(G)                                           on the earlier state
//
// Scores by halving: two tokens s < t are parted by one of the cuts of 16 into 8 and 8, of these into 4 and 4, and so
// on. With every query after a cut decayed from the cut, every key before it decayed up to the cut, and these as rows
// of one matrix X, the scores across all cuts of one size are entries of X X^T, and the same numbers serve for the next
// larger cuts once they are decayed over half a block more. All factors are products of the a, so no exponential but
// the a themselves is formed, nothing can overflow, and a reset (a = 0) is no special case.
//
// Back in time, where a query sees its own token and later ones, queries and keys change places: q_s *= exp(G - b_s),
// k_t *= exp(b_t), and the scores are those above with the names exchanged, that is, transposed.
//
// Rounding: X is cut to 10 bits behind the point (with __half it loses no more than rounding to __half would). Queries
// and keys leave as 16-bit elements, keys in two parts so that what is written into the state loses nothing.
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
  int score_unit;        ///< ... this one and the next
  std::uint32_t ages;    ///< 64 floats
};

/// A block's log-decays on their way from global memory: a lane has its key and the next. Zero past the last token.
class BlockGates {
 public:
  /// `source` begins at key 0 of the sequence's first token. Nothing is fetched from before it.
  __device__ void fetch(const GateSource& source, int key, int first_token) {
    if (first_token < 0) return;
    const float* at = source.data + key + first_token * source.token_stride;
    if (first_token + block_tokens <= source.tokens) {
#pragma unroll
      for (int t = 0; t < block_tokens; ++t, at += source.token_stride) log_decays_[t] = load(at);
    } else {
#pragma unroll
      for (int t = 0; t < block_tokens; ++t, at += source.token_stride)
        log_decays_[t] = first_token + t < source.tokens ? load(at) : float2{0, 0};
    }
  }

  /// The decays, and the logarithm (of base 2) of their product. A sum is better than a product here: decays next to 1
  /// are held with few bits, and ages meet again and again.
  __device__ float2 decays(float2 (&a)[block_tokens], int lane) const {
    // By way of another lane, or the compiler would let the work before this wait for the log-decays.
    const float log2_e = __shfl_sync(~0u, lane == 0 ? 1.44269504f : 0.f, 0);
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
  static __device__ float2 load(const float* at) { return __ldg(reinterpret_cast<const float2*>(at)); }

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

/// Addresses of one lane, of its keys 2 l and 2 l + 1 in row 0: as a pair of 16-bit elements of the queries and of the
/// keys; or, where a row of X takes their places, as float l of the first 32 (keys with an even number) and of the
/// others. Here and in what follows queries are what comes later in time.
struct BlockLane {
  std::uint32_t queries, keys;
  std::uint32_t query_matrix, key_matrix;  ///< its row for load_matrices

  __device__ BlockLane(std::uint32_t queries_, std::uint32_t keys_, int lane)
      : queries(queries_ + 4u * unsigned(lane)),
        keys(keys_ + 4u * unsigned(lane)),
        query_matrix(queries_ + unsigned(matrix(lane))),
        key_matrix(keys_ + unsigned(matrix(lane))) {}

  /// The same place in another row.
  static __device__ std::uint32_t row(std::uint32_t in_row_0, int row) {
    return (in_row_0 ^ (unsigned(row & 7) << 4)) + 128u * unsigned(row);
  }

 private:
  static __device__ int matrix(int lane) { return arch::swizzled<block_tokens>(lane % 16, lane / 16); }
};

/// What a lane has of a block's scores. X has the queries after cuts in its first 8 rows, the keys before them in the
/// others, so that all scores across cuts of one size come out of one product [8, 8] of which the lane has query lane /
/// 4 and keys 2 (lane % 4) and the next. Only where both are beside the same cut is it one of the scores. Of a token
/// with the next and with itself the lanes with lane / 8 == lane % 4 have one score each.
struct BlockScores {
  static constexpr int count = 9;
  /// Across cuts into 8 tokens (two scores), 4 (two), 2 (two) and 1 (one); with itself, of a token up to 7 and one from
  /// 8 on.
  float x[count];
};

/// Scores of queries with keys of their own token: there is no decay between them.
template <class T>
__device__ void meet_themselves(BlockScores& scores, const BlockLane& at, int lane) {
  float early[4] = {}, late[4] = {};
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    std::uint32_t q[4], k[4];
    arch::load_matrices(q, at.query_matrix ^ (i << 5));
    arch::load_matrices(k, at.key_matrix ^ (i << 5));
    arch::multiply_add<T>(early, q, k[0], k[2]);
    arch::multiply_add<T>(late, q, k[1], k[3]);
  }
  const bool odd = lane / 4 % 2 != 0;
  scores.x[7] = odd ? early[1] : early[0], scores.x[8] = odd ? late[3] : late[2];
}

/// Scores across the cuts into `Half` tokens. The product cuts floats to 10 bits behind the point. That is three more
/// than bfloat16 has, but for __half queries must be rounded to them, and keys come a second time with what was cut
/// off.
template <class T, int Half>
__device__ void meet_across(BlockScores& scores, const float2 (&q)[block_tokens], const float2 (&k)[block_tokens],
                            const BlockLane& at, int lane) {
  constexpr bool two_parts = std::is_same_v<T, __half>;
  constexpr std::uint32_t cut_off = (1u << 13) - 1;
  const auto store = [&](int t, std::uint32_t x, std::uint32_t y) {
    const int row = t / (2 * Half) * Half + t % Half + (t & Half ? 0 : 8);
    arch::store_shared_word(BlockLane::row(at.queries, row), x);
    arch::store_shared_word(BlockLane::row(at.keys, row), y);
  };
  float sums[2][4] = {};  // two, since each product waits for the one before
  const auto add_products = [&] {
    __syncwarp();
#pragma unroll
    for (unsigned i = 0; i < 8; ++i) {
      std::uint32_t x[4];
      arch::load_matrices(x, (i < 4 ? at.query_matrix : at.key_matrix) ^ (i % 4 << 5));
      arch::multiply_add_floats(sums[i % 2], x, x[1], x[3]);
    }
    __syncwarp();
  };
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    const float2 x = t & Half ? q[t] : k[t];
    constexpr std::uint32_t up = two_parts ? (cut_off + 1) / 2 : 0;
    const std::uint32_t rounding = t & Half ? up : 0;
    store(t, __float_as_uint(x.x) + rounding, __float_as_uint(x.y) + rounding);
  }
  add_products();
  if constexpr (two_parts) {
    const auto rest = [](float x) { return __float_as_uint(x - __uint_as_float(__float_as_uint(x) & ~cut_off)); };
#pragma unroll
    for (int t = 0; t < block_tokens; ++t)
      if (!(t & Half)) store(t, rest(k[t].x), rest(k[t].y));
    add_products();
  }
  const float first = sums[0][0] + sums[1][0], second = sums[0][1] + sums[1][1];
  if constexpr (Half == 1) {
    scores.x[6] = lane / 4 % 2 ? second : first;
  } else {
    constexpr int place = Half == 8 ? 0 : Half == 4 ? 2 : 4;
    scores.x[place] = first, scores.x[place + 1] = second;
  }
}

/// Writes a block's scores [16 queries, 16 keys], except for those of keys that their query does not see: these places
/// must hold zeros already. Back in time the rows are what else are keys.
template <class T, bool Reversed = false>
__device__ void store_scores(const BlockScores& scores, const KeyBlock& block, int lane) {
  const int query = lane / 4, column = lane % 4;
  const auto place = [&](int query, int key) {
    const int row = Reversed ? key : query, in_row = Reversed ? query : key;
    return block.scores + unsigned(arch::swizzled<block_tokens>(row, block.score_unit + in_row / 8) + in_row % 8 * 2);
  };
  const auto store = [&](int query, int key, float x) {
    arch::store_shared_half_word(place(query, key), arch::pack<T>(x, 0));
  };
  const auto store_pair = [&](int half, int i) {
    const int q = query / half * 2 * half + half + query % half, k = 2 * column / half * 2 * half + 2 * column % half;
    if constexpr (Reversed)
      store(q, k, scores.x[i]), store(q, k + 1, scores.x[i + 1]);
    else
      arch::store_shared_word(place(q, k), arch::pack<T>(scores.x[i], scores.x[i + 1]));
  };
  store_pair(8, 0);
  if (query / 4 == column / 2) store_pair(4, 2);
  if (query / 2 == column) {
    store_pair(2, 4);
    store(2 * query + 1, 2 * query, scores.x[6]);
    store(query, query, scores.x[7]), store(query + 8, query + 8, scores.x[8]);
  }
}

/// Sums the scores over all panels of 64 keys: those of panel 0 are complete after. `memory` holds the others' parts
/// and must be another for the next block. All warps of a block of tokens, at a barrier of their own.
template <int Panels>
__device__ void sum_over_panels(BlockScores& scores, std::uint32_t memory, int key_panel, int barrier, int lane) {
  constexpr int row = 32 * int(sizeof(float));
  memory += 4u * unsigned(lane);
  if (key_panel > 0) {
#pragma unroll
    for (int i = 0; i < BlockScores::count; ++i)
      arch::store_shared_word(memory + unsigned(((key_panel - 1) * BlockScores::count + i) * row),
                              __float_as_uint(scores.x[i]));
  }
  arch::sync_threads(barrier, 32 * Panels);
  if (key_panel == 0) {
#pragma unroll
    for (int i = 0; i < (Panels - 1) * BlockScores::count; ++i)
      scores.x[i % BlockScores::count] += arch::load_shared_float(memory + unsigned(i * row));
  }
}
/// Bytes of that memory, for two blocks in turn.
constexpr int panel_sum_bytes(int panels) { return 2 * (panels - 1) * BlockScores::count * 32 * int(sizeof(float)); }

/// Two keys rounded, and what rounding took from them.
template <class T>
__device__ void store_key(float2 k, std::uint32_t to, std::uint32_t low_to) {
  const std::uint32_t high = arch::pack<T>(k.x, k.y);
  const float2 taken = arch::unpack<T>(high);
  arch::store_shared_word(to, high);
  arch::store_shared_word(low_to, arch::pack<T>(k.x - taken.x, k.y - taken.y));
}

/// Makes of a block's queries and keys what the step needs, in place, and returns the scores over its 64 keys; those of
/// tokens with themselves are zero if they are not to be `SeesOwn`. Keys past the first `tokens` tokens count as zero. The
/// whole warp; what it wrote is not yet shown to others. meanwhile() is called once the gates are no longer needed, with
/// much of the work still to come.
template <class T, bool Reversed = false, bool SeesOwn = true, class F>
__device__ BlockScores prepare_block(const KeyBlock& block, const BlockGates& gates, int tokens, int lane,
                                     F meanwhile) {
  const BlockLane at(Reversed ? block.keys : block.queries, Reversed ? block.queries : block.keys, lane);
  float2 q[block_tokens], k[block_tokens];
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    k[t] = arch::unpack<T>(arch::load_shared_word(BlockLane::row(at.keys, t)));
    q[t] = arch::unpack<T>(arch::load_shared_word(BlockLane::row(at.queries, t)));
  }
  if (tokens < block_tokens) {
#pragma unroll
    for (int t = 0; t < block_tokens; ++t)
      if (t >= tokens) (Reversed ? q : k)[t] = {0, 0};
  }
  BlockScores scores{};
  if constexpr (SeesOwn) meet_themselves<T>(scores, at, lane);
  __syncwarp();

  float2 decays[block_tokens];
  const float2 log2_age = gates.decays(decays, lane);
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) multiply(q[t], decays[t]);
  float2 twos[8], fours[4], eights[2];
  meet_across<T, 1>(scores, q, k, at, lane), widen<1, true>(q, decays);
  widen<1, false>(k, decays), join<1>(twos, decays);
  meanwhile();
  meet_across<T, 2>(scores, q, k, at, lane), widen<2, true>(q, twos);
  widen<2, false>(k, twos), join<2>(fours, twos);
  meet_across<T, 4>(scores, q, k, at, lane), widen<4, true>(q, fours);
  widen<4, false>(k, fours), join<4>(eights, fours);
  meet_across<T, 8>(scores, q, k, at, lane), widen<8, true>(q, eights);
  widen<8, false>(k, eights);

  const std::uint32_t low = block.low + 4u * unsigned(lane);
#pragma unroll
  for (int t = 0; t < block_tokens; ++t) {
    const std::uint32_t to_queries = BlockLane::row(at.queries, t), to_keys = BlockLane::row(at.keys, t);
    const float2 read = Reversed ? k[t] : q[t];
    arch::store_shared_word(Reversed ? to_keys : to_queries, arch::pack<T>(read.x, read.y));
    store_key<T>(Reversed ? q[t] : k[t], Reversed ? to_queries : to_keys, BlockLane::row(low, t));
  }
  arch::store_shared_float2(block.ages + 8u * unsigned(lane), arch::exp2_flushed(log2_age.x),
                            arch::exp2_flushed(log2_age.y));
  return scores;
}

/// Columns (keys) of a lane's part of S^T, in the layout of products, times their ages, of which the address is that of
/// the lane's first key, 2 (lane % 4).
template <int Registers>
__device__ void age_state(float (&state_t)[Registers], std::uint32_t ages_from_key) {
#pragma unroll
  for (int j = 0; j < Registers / 4; ++j) {
    const float2 age = arch::load_shared_float2(ages_from_key + unsigned(32 * j));
    state_t[4 * j] *= age.x, state_t[4 * j + 1] *= age.y;
    state_t[4 * j + 2] *= age.x, state_t[4 * j + 3] *= age.y;
  }
}

}  // namespace chela::cuda::detail
