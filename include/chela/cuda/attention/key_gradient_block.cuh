#pragma once
// Gradients of queries and keys under a decay per key, a block of 16 tokens and 16 keys at a time, by one warp. Here the
// decays lie along the outputs: with a_t = exp(log_decay_t) in [0, 1], b the inclusive sums of log-decays inside the block,
// G the last of them, S the state [key, value] before the block and X the gradient of that after it,
//
//   dq_t = exp(b_t) S dO_t       + sum_{s <= t} (dO_t . v_s) k_s exp(b_t - b_s)      S = exp(G) S + sum_t exp(G - b_t) k_t v_t^T
//   dk_s = exp(G - b_s) X v_s    + sum_{t >= s} (dO_t . v_s) q_t exp(b_t - b_s)      X = exp(G) X + sum_t exp(b_t) q_t dO_t^T
//
// factors being taken key by key. A token reads (dq: dO_t, dk: v_s) what others wrote (k_s v_s^T, q_t dO_t^T), and the scores
// dO . v have no decay. As in key_decay.cuh two tokens are parted by one of the cuts of 16 into 8 and 8, of these into 4 and
// 4, and so on: across all cuts of one size, what is written is decayed as far as its cut, multiplied with the scores, and
// decayed from there to its reader. All factors are products of the a: nothing can overflow, and a reset (a = 0) is no
// special case.
#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/attention/gates.cuh"

namespace chela::cuda::detail {

/// What a lane has of a block: [t][2 r + e] belongs to token 8 t + 2 (lane % 4) + e and to key lane / 4 + 8 r of its warp's.
/// So lie the sums of a product [16 keys, 16 tokens], and a left operand of this size.
using KeysByTokens = float[2][4];

/// Calls f(t, i) for each of them.
template <class F>
__device__ void for_each_number(F f) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(t, i);
}

/// Scores [j][2 i + e] of readers 8 i + lane / 4 with writers 8 j + 2 (lane % 4) + e: the sums of a product [16, 16].
using ReadersByWriters = float[2][4];

/// What multiply_add_floats is given for x. With __half rounded to the bits that it takes, else left to be cut.
template <class T>
__device__ std::uint32_t operand_bits(float x) {
  return __float_as_uint(x) + (std::is_same_v<T, __half> ? 1u << 12 : 0u);
}

/// Which scores of a lane are across which cuts, as bits to keep of them: those of a tile with itself, by e. Across the cut
/// into 8 and 8 all are, of one tile with the other.
class Cuts {
 public:
  __device__ Cuts(bool reversed, int lane) {
    const int reader = lane / 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int writer = 2 * (lane % 4) + e, late = reversed ? writer : reader, early = reversed ? reader : writer;
      const auto across = [&](int half) {
        return (late ^ early) < 2 * half && (late & half) != 0 && (early & half) == 0 ? ~0u : 0u;
      };
      fours_ = across(4), twos_ = across(2), ones_[e] = across(1);  // the first two do not depend on e
      own_[e] = reader == writer ? ~0u : 0u;
    }
  }
  /// Across cuts into `Half` tokens, or for 0 of tokens with themselves.
  template <int Half>
  __device__ std::uint32_t kept(int e) const {
    return Half == 8 ? ~0u : Half == 4 ? fours_ : Half == 2 ? twos_ : Half == 1 ? ones_[e] : own_[e];
  }

 private:
  std::uint32_t fours_, twos_, ones_[2], own_[2];
};

/// sums += written [keys, 8 tokens] times scores with 8 readers. Of the product's sum, the first half are the even tokens.
template <class T>
__device__ void add_products(float (&sums)[4], const float (&written)[4], std::uint32_t even_scores,
                             std::uint32_t odd_scores) {
  const std::uint32_t a[4] = {operand_bits<T>(written[0]), operand_bits<T>(written[2]), operand_bits<T>(written[1]),
                              operand_bits<T>(written[3])};
  arch::multiply_add_floats(sums, a, even_scores, odd_scores);
}

/// sums += what is seen across all cuts into `Half` tokens.
template <class T, int Half, bool Reversed>
__device__ void add_across(KeysByTokens& sums, const KeysByTokens& from_cut, const KeysByTokens& to_cut,
                           const ReadersByWriters& scores, const Cuts& cuts) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {  // of readers
    if (Half == 8 && (t == 1) == Reversed) continue;
    const int writers = Half == 8 ? 1 - t : t;
    float part[4] = {};
    add_products<T>(part, to_cut[writers], operand_bits<T>(scores[writers][2 * t]) & cuts.kept<Half>(0),
                    operand_bits<T>(scores[writers][2 * t + 1]) & cuts.kept<Half>(1));
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[t][i] = fmaf(from_cut[t][i], part[i], sums[t][i]);
  }
}

/// sums += what each token sees of itself.
template <class T>
__device__ void add_own(KeysByTokens& sums, const KeysByTokens& written, const ReadersByWriters& scores,
                        const Cuts& cuts) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
    add_products<T>(sums[t], written[t], operand_bits<T>(scores[t][2 * t]) & cuts.kept<0>(0),
                    operand_bits<T>(scores[t][2 * t + 1]) & cuts.kept<0>(1));
}

/// To cuts into runs twice as long, of which the neighbour's half is in lane ^ neighbour: `late` and `early` decay over that
/// half where it lies between them and the cut to come, and `runs`, the decays over the own half for each [t][r], are joined.
__device__ inline void decay_over_neighbours(KeysByTokens& late, KeysByTokens& early, float (&runs)[2][2], int lane,
                                             int neighbour) {
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float other = __shfl_xor_sync(~0u, runs[t][r], neighbour);
      const bool is_late = (lane & neighbour) != 0;
      const float by_late = is_late ? other : 1.f, by_early = is_late ? 1.f : other;
#pragma unroll
      for (int e = 0; e < 2; ++e) late[t][2 * r + e] *= by_late, early[t][2 * r + e] *= by_early;
      runs[t][r] *= other;
    }
}

/// Sums, without own terms, what each token sees of the others' `written` inside the block and, `seen` of it by products alone,
/// of the state before it. `read` becomes what is left of the state when a token reads it, `written` what is left of it for the
/// state after. `decays` of the tokens. meet(Half) is called when both are decayed across cuts into Half tokens, which it is
/// given as a type.
template <class T, bool Reversed, class F>
__device__ void sum_block(KeysByTokens& sums, KeysByTokens& read, KeysByTokens& written, const KeysByTokens& seen,
                          const ReadersByWriters& scores, const Cuts& cuts, const KeysByTokens& decays, int lane,
                          F meet) {
  KeysByTokens &late = Reversed ? written : read, &early = Reversed ? read : written;
  for_each_number([&](int t, int i) {
    read[t][i] = Reversed ? 1.f : decays[t][i];
    if (Reversed) written[t][i] *= decays[t][i];
    sums[t][i] = 0;
  });
  const auto meet_across = [&]<int Half>(std::integral_constant<int, Half> half) {
    add_across<T, Half, Reversed>(sums, read, written, scores, cuts);
    meet(half);
  };
  meet_across(std::integral_constant<int, 1>{});
  float runs[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      late[t][2 * r + 1] *= decays[t][2 * r], early[t][2 * r] *= decays[t][2 * r + 1];
      runs[t][r] = decays[t][2 * r] * decays[t][2 * r + 1];
    }
  meet_across(std::integral_constant<int, 2>{});
  decay_over_neighbours(late, early, runs, lane, 1);
  meet_across(std::integral_constant<int, 4>{});
  decay_over_neighbours(late, early, runs, lane, 2);
  meet_across(std::integral_constant<int, 8>{});
#pragma unroll
  for (int i = 0; i < 4; ++i) late[1][i] *= runs[0][i / 2], early[0][i] *= runs[1][i / 2];
  for_each_number([&](int t, int i) { sums[t][i] = fmaf(read[t][i], seen[t][i], sums[t][i]); });
}

/// A lane's decays, from its place among log-decays in shared memory: that of the first of its tokens and keys, in rows of
/// row_bytes; and, in `ages`, their products over the block. A sum of logarithms is better than a product here: decays next
/// to 1 are held with few bits, and ages meet again and again.
__device__ inline void load_decays(KeysByTokens& decays, float (&ages)[2], std::uint32_t log_decays, int row_bytes) {
  float sums[2] = {};
  for_each_number([&](int t, int i) {
    const int token = 8 * t + i % 2, key = 8 * (i / 2);
    const float x = log2_e * arch::load_shared_float(log_decays + unsigned(token * row_bytes + 4 * key));
    sums[i / 2] += x;
    decays[t][i] = arch::exp2_flushed(x);
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
    sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
    ages[r] = arch::exp2_flushed(sums[r]);
  }
}

/// A lane's numbers from rows of tokens in a tile (arch::swizzled<16>): 16 keys from 16-byte unit 2 `part` on. `at`: the
/// tile's address and the lane's column_of_block.
__device__ inline unsigned column_of_block(int part, int lane) {
  return unsigned(arch::swizzled<16>(lane / 16 * 8 + lane % 8, 2 * part + lane / 8 % 2));
}
template <class T>
__device__ void load_block(KeysByTokens& x, std::uint32_t at) {
  std::uint32_t pairs[4];
  arch::load_matrices_transposed(pairs, at);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = arch::unpack<T>(pairs[i]);
    x[i / 2][2 * (i % 2)] = pair.x, x[i / 2][2 * (i % 2) + 1] = pair.y;
  }
}

/// The reverse. `at`: the tile's address, a multiple of 128, and the lane's row_of_block.
__device__ inline unsigned row_of_block(int part, int lane) {
  return unsigned(arch::swizzled<16>(lane / 4, 2 * part) + 4 * (lane % 4));
}
template <class T>
__device__ void store_block(const KeysByTokens& x, float scale, std::uint32_t at) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const pair = x[i / 2] + 2 * (i % 2);
    arch::store_shared_word((at ^ unsigned(i % 2 << 4)) + unsigned(i / 2 * 1024),
                            arch::transpose_matrix(arch::pack<T>(scale * pair[0], scale * pair[1])));
  }
}

/// Two left operands of multiply_add that together are x, to what 16 bits hold of the second.
template <class T>
__device__ void split_block(std::uint32_t (&high)[4], std::uint32_t (&low)[4], const KeysByTokens& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const pair = x[i / 2] + 2 * (i % 2);
    high[i] = arch::pack<T>(pair[0], pair[1]);
    const float2 taken = arch::unpack<T>(high[i]);
    low[i] = arch::pack<T>(pair[0] - taken.x, pair[1] - taken.y);
  }
}

}  // namespace chela::cuda::detail
