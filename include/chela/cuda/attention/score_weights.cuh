#pragma once
// What the scores of a chunk are weighed with under a scalar decay, made by one warp and read by those of the scores, of
// which warp w has the queries 16 w to 16 w + 15. Where a key lies outside of the warp's own tokens, with r the sum of
// log-decays at their edge towards it,
//
//   exp(-|b_i - b_j|) = exp(-|b_i - r|) exp(-|r - b_j|)
//
// so that an exponential serves a row or a column of scores; both factors are in [0, 1]. Inside the warp's own tokens the
// left side is taken.
#include "chela/cuda/attention/gates.cuh"

namespace chela::cuda::detail {

class ScoreWeights {
 public:
  static constexpr int bytes = 7 * chunk_len * int(sizeof(float));

  __device__ explicit ScoreWeights(std::uint32_t memory) : memory_(memory) {}

  /// By a whole warp.
  __device__ void write(const ChunkGates& gates, int lane, bool reversed) const {
    const float2 sums = gates.sums();
    float own = 0;  // of this lane's tokens' warp
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) {
      const int edge = reversed ? 16 * warp + 15 : 16 * warp - 1;
      const float at_edge = edge < 0 ? 0.f : gates.sum(edge);
      if (lane / 8 == warp) own = at_edge;
      store(columns(warp), lane, {fall(sums.x, at_edge), fall(sums.y, at_edge)});
    }
    store(rows, lane, {fall(sums.x, own), fall(sums.y, own)});
    store(sums_at, lane, sums);
    const int token = 2 * lane;
    const auto reach = [&](int t) { return reversed ? gates.reach_ahead(t) : gates.reach(t); };
    store(reaches, lane, {__int_as_float(reach(token)), __int_as_float(reach(token + 1))});
  }

  /// Of a query, for keys outside of its warp's tokens.
  __device__ float row(int query) const { return load(rows, query); }
  __device__ float sum(int token) const { return load(sums_at, token); }
  /// Of the keys `key` and `key + 1` for a warp's queries: its factors, or sums where they are its own tokens.
  __device__ float2 key_pair(int warp, int key) const {
    return load_pair(key / 16 == warp ? sums_at : columns(warp), key);
  }
  /// How many other tokens a query sees.
  __device__ int reach(int query) const { return __float_as_int(load(reaches, query)); }

 private:
  // in rows of chunk_len
  static constexpr int rows = 4, sums_at = 5, reaches = 6;
  static __device__ constexpr int columns(int warp) { return warp; }
  static __device__ float fall(float a, float b) { return arch::exp2_flushed(-fabsf(a - b)); }

  __device__ std::uint32_t place(int of, int token) const { return memory_ + 4u * unsigned(of * chunk_len + token); }
  __device__ void store(int of, int lane, float2 pair) const {
    arch::store_shared_float2(place(of, 2 * lane), pair.x, pair.y);
  }
  __device__ float load(int of, int token) const { return arch::load_shared_float(place(of, token)); }
  __device__ float2 load_pair(int of, int token) const { return arch::load_shared_float2(place(of, token)); }

  std::uint32_t memory_;
};

}  // namespace chela::cuda::detail
