#pragma once
// dv beside dk (key_gradient_pass.cuh), where one block of threads has all keys of a head: both walk back in time with the
// same state and inputs. With the factors of key_gradient_block.cuh inside the block,
//
//   dv_s = X^T (exp(G - b_s) k_s)  +  sum_{t >= s} (sum over keys of k_s q_t exp(b_t - b_s)) dO_t
//
// Warps have keys of X, but the sums are over all keys: each warp leaves its keys' share of the scores in shared memory, and
// X and the decayed k, rounded. At the next block, each takes 16 values. sm_90a: the memory that this takes is to be had
// there, and matrices are stored at once.
#include "chela/cuda/attention/key_gradient_block.cuh"

namespace chela::cuda::detail {

/// Where these lie, in bytes from `state`: the state [keys][values], the decayed keys [16][keys], the scores, dv [16][values].
template <int ReadClass, int KeyTile, bool Values>
struct ValueGradientTiles {
  static_assert(!Values || ReadClass == KeyTile, "a warp has as many values as it has keys: 16");
  static constexpr int warps = KeyTile / 16, warp_scores = 3 * 32 * int(sizeof(float2));
  static constexpr int keys = KeyTile * ReadClass * 2, scores = keys + 16 * KeyTile * 2,
                       output = scores + warps * warp_scores, bytes = Values ? output + 16 * ReadClass * 2 : 0;
};

/// One warp's share of a block's scores of readers (k) with writers (q): a lane has those of reader lane / 4 with writers
/// 2 (lane % 4) and the next in the first 8 tokens, of it with the last 8, and of reader 8 + lane / 4 with the last 8.
template <class T>
class ValueScores {
 public:
  /// Products of tokens with themselves, from rows of tokens.
  __device__ ValueScores(std::uint32_t keys, std::uint32_t queries, const Cuts& cuts) {
    std::uint32_t k[4], q[4];
    arch::load_matrices(k, keys);
    arch::load_matrices(q, queries);
    add<0>(k, q[0], q[2], q[1], q[3], cuts);
  }

  /// Across cuts into `Half` tokens: keys decayed to the cut, queries from it.
  template <int Half>
  __device__ void add_across(const KeysByTokens& keys, const KeysByTokens& to_reader, const KeysByTokens& queries,
                             const Cuts& cuts) {
    std::uint32_t k[4] = {}, q[2][2];
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* const key = keys[t] + 2 * r;
        const float* const decay = to_reader[t] + 2 * r;
        const float* const query = queries[t] + 2 * r;
        if (Half < 8 || t == 0)
          k[t + 2 * r] = arch::transpose_matrix(arch::pack<T>(key[0] * decay[0], key[1] * decay[1]));
        if (Half < 8 || t == 1) q[t][r] = arch::transpose_matrix(arch::pack<T>(query[0], query[1]));
      }
    add<Half>(k, q[0][0], q[0][1], q[1][0], q[1][1], cuts);
  }

  __device__ void store(std::uint32_t at, int lane) const {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      arch::store_shared_float2(at + unsigned((32 * i + lane) * int(sizeof(float2))), __uint_as_float(x_[i][0]),
                                __uint_as_float(x_[i][1]));
  }

 private:
  template <int Half>
  __device__ void add(const std::uint32_t (&k)[4], std::uint32_t q00, std::uint32_t q01, std::uint32_t q10,
                      std::uint32_t q11, const Cuts& cuts) {
    float early[4] = {}, late[4] = {};
    if (Half < 8) arch::multiply_add<T>(early, k, q00, q01);
    arch::multiply_add<T>(late, k, q10, q11);
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // of each score, one cut is its own
      if (Half == 8) {
        x_[1][e] = __float_as_uint(late[e]);
      } else {
        const std::uint32_t kept = cuts.kept<Half>(e);
        x_[0][e] |= __float_as_uint(early[e]) & kept, x_[2][e] |= __float_as_uint(late[2 + e]) & kept;
      }
    }
  }

  std::uint32_t x_[3][2] = {};
};

/// The sum of all warps' shares, as left operand of a product with rows of dO.
template <class T, int Warps>
__device__ void load_value_scores(std::uint32_t (&scores)[4], std::uint32_t at, int lane) {
  float2 sums[3] = {};
#pragma unroll
  for (int warp = 0; warp < Warps; ++warp)
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const float2 x = arch::load_shared_float2(at + unsigned((32 * (3 * warp + i) + lane) * int(sizeof(float2))));
      sums[i].x += x.x, sums[i].y += x.y;
    }
  scores[0] = arch::pack<T>(sums[0].x, sums[0].y), scores[1] = 0;
  scores[2] = arch::pack<T>(sums[1].x, sums[1].y), scores[3] = arch::pack<T>(sums[2].x, sums[2].y);
}

/// dv of a block by the warp that has values 16 `warp` and on, into shared memory. `grad_o`: the rows of dO.
template <class T, int ReadClass, int KeyTile>
__device__ void step_values(std::uint32_t state, std::uint32_t grad_o, float scale, int warp, int lane) {
  using Tiles = ValueGradientTiles<ReadClass, KeyTile, true>;
  std::uint32_t scores[4], b[4] = {};
  float sums[2][8] = {};  // [16 tokens, 16 values], in two parts, since each product waits for the one before
  const auto add = [&](int part, const std::uint32_t(&a)[4]) {
    arch::multiply_add<T>(sums[part], a, b[0], b[1]);
    arch::multiply_add<T>(sums[part] + 4, a, b[2], b[3]);
  };
#pragma unroll
  for (int i = 0; i < KeyTile / 16; ++i) {
    std::uint32_t keys[4];
    arch::load_matrices(keys, state + unsigned(Tiles::keys + arch::swizzled<16>(lane % 16, 2 * i + lane / 16)));
    arch::load_matrices_transposed(b,
                                   state + unsigned(arch::swizzled<KeyTile>(16 * i + lane % 16, 2 * warp + lane / 16)));
    add(i % 2, keys);
  }
  load_value_scores<T, Tiles::warps>(scores, state + Tiles::scores, lane);
  const unsigned own = unsigned(arch::swizzled<16>(lane % 16, 2 * warp + lane / 16));
  arch::load_matrices_transposed(b, grad_o + own);
  add(0, scores);
  const auto pack = [&](int i) {
    return arch::pack<T>(scale * (sums[0][i] + sums[1][i]), scale * (sums[0][i + 1] + sums[1][i + 1]));
  };
  arch::store_matrices(state + Tiles::output + own, pack(0), pack(2), pack(4), pack(6));
}

}  // namespace chela::cuda::detail
