#pragma once
// Scalar log-decays on the GPU, a chunk of 64 tokens at a time. With b the inclusive sums of log-decays inside the
// chunk and G the last of them, a decay enters in four places (chunk/decay.hpp):
//
//   weigh   exp(b_i - b_j)   on the scores, j <= i
//   enter   exp(b_i)         on what a query reads of the earlier state
//   leave   exp(G - b_j)     on what a token leaves in the state
//   age     exp(G)           on the earlier state
//
// Back in time, where a query sees its own token and later ones, scores weigh exp(b_j - b_i), j >= i, and enter and leave
// change places.
//
// Every exponent evaluated is <= 0. A decay under 2^-126, -infinity included, is a reset: it counts as 0 in the sums,
// and what lies before the last reset has weight 0, so that no difference of infinities is ever formed and sums stay
// short.
#include <cstdint>

#include "chela/core/index.hpp"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/arch/shared.cuh"

namespace chela::cuda::detail {

/// Decay policies of the kernels.
struct WithoutDecay {
  static constexpr bool decays = false;
};
struct ScalarDecay {
  static constexpr bool decays = true;
};
struct KeyDecay {  // key_decay.cuh
  static constexpr bool decays = true;
};

/// Tokens of one chunk.
inline constexpr int chunk_len = 64;

/// Log-decays are held as powers of two, and those under 2^-126 are resets.
inline constexpr float log2_e = 1.44269504f;
__device__ constexpr bool is_reset(float power_of_two) { return power_of_two < -126.f; }

/// The log-decays of one chunk, held by a warp: lane l has tokens 2 l and 2 l + 1. All members are for the whole warp
/// at once.
class ChunkGates {
 public:
  __device__ ChunkGates(float2 log_decay, int lane) : lane_(lane) {
    float x = log_decay.x * log2_e, y = log_decay.y * log2_e;
    even_resets_ = __ballot_sync(~0u, is_reset(x));
    odd_resets_ = __ballot_sync(~0u, is_reset(y));
    if (is_reset(x)) x = 0;
    if (is_reset(y)) y = 0;
    float sum = x + y;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float before = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += before;
    }
    sums_ = {sum - y, sum};
    total_ = __shfl_sync(~0u, sum, 31);
  }

  /// b of the lane's own tokens.
  __device__ float2 sums() const { return sums_; }
  /// b of tokens 8 j + 2 (lane % 4) and the next: the columns of a lane in a row of 8x8 matrices.
  __device__ float2 sums_of_columns(int j) const { return columns(sums_, j); }
  __device__ float sum(int token) const {
    const float even = __shfl_sync(~0u, sums_.x, token / 2), odd = __shfl_sync(~0u, sums_.y, token / 2);
    return token % 2 ? odd : even;
  }
  /// How many earlier tokens a query still sees: those since the last reset.
  __device__ int reach(int token) const {
    const int last = last_reset(token);
    return token - (last > 0 ? last : 0);
  }

  /// As reach, back in time: how many later tokens, those before the next reset.
  __device__ int reach_ahead(int token) const {
    const unsigned even = even_resets_ & (~0u << (token / 2) << 1);
    const unsigned odd = odd_resets_ & (~0u << (token / 2) << (token % 2));
    const int next_even = even ? 2 * (__ffs(int(even)) - 1) : chunk_len;
    const int next_odd = odd ? 2 * __ffs(int(odd)) - 1 : chunk_len;
    return (next_even < next_odd ? next_even : next_odd) - 1 - token;
  }

  __device__ float2 enter() const { return {enter(sums_.x, 2 * lane_), enter(sums_.y, 2 * lane_ + 1)}; }
  __device__ float2 leave() const {
    const int last = last_reset(chunk_len - 1);
    return {2 * lane_ >= last ? weight(total_, sums_.x) : 0.f, 2 * lane_ + 1 >= last ? weight(total_, sums_.y) : 0.f};
  }
  __device__ float2 leave_of_columns(float2 own, int j) const { return columns(own, j); }
  __device__ float age() const { return enter(total_, chunk_len - 1); }

  static __device__ float weight(float later, float earlier) { return arch::exp2_flushed(fminf(later - earlier, 0.f)); }

 private:
  __device__ float2 columns(float2 own, int j) const {
    const int from = 4 * j + lane_ % 4;
    return {__shfl_sync(~0u, own.x, from), __shfl_sync(~0u, own.y, from)};
  }
  __device__ float enter(float sum, int token) const {
    return last_reset(token) < 0 ? arch::exp2_flushed(fminf(sum, 0.f)) : 0.f;
  }
  /// The last reset at or before a token, or -1.
  __device__ int last_reset(int token) const {
    if ((even_resets_ | odd_resets_) == 0) return -1;
    const unsigned even = even_resets_ & (~0u >> (31 - token / 2));
    const unsigned odd = token > 0 ? odd_resets_ & (~0u >> (31 - (token - 1) / 2)) : 0u;
    const int last_even = even ? 2 * (31 - __clz(int(even))) : -1, last_odd = odd ? 2 * (31 - __clz(int(odd))) + 1 : -1;
    return last_even > last_odd ? last_even : last_odd;
  }

  int lane_;
  unsigned even_resets_, odd_resets_;
  float2 sums_;
  float total_;
};

/// Log-decays of one sequence and head: those of tokens from `first` on, zero for earlier and later ones.
struct GateSource {
  const float* data = nullptr;
  Index token_stride = 0;
  int first = 0, tokens = 0;

  __device__ bool has(int token) const { return token >= first && token < tokens; }
};

/// The log-decays of the chunks to come, on their way into shared memory: a ring that belongs to one warp, which is far
/// ahead of its use because a chunk's decays are needed before anything else of the chunk.
class GateRing {
 public:
  static constexpr int chunks = 4, bytes = chunks * chunk_len * int(sizeof(float));

  __device__ GateRing(std::uint32_t memory, GateSource source, int first_chunk, int end_chunk, int lane,
                      bool reversed = false)
      : memory_(memory + 8 * std::uint32_t(lane)),
        source_(source),
        chunk_(reversed ? end_chunk - 1 : first_chunk),
        step_(reversed ? -1 : 1),
        count_(end_chunk - first_chunk),
        lane_(lane) {
    for (int i = 0; i < chunks - 1; ++i) fetch();
  }

  /// The next chunk's.
  __device__ ChunkGates take() {
    fetch();
    arch::wait_copies<chunks - 1>();
    return {arch::load_shared_float2(place(fetched_ - chunks)), lane_};
  }

 private:
  __device__ std::uint32_t place(int index) const {
    return memory_ + std::uint32_t((index & (chunks - 1)) * chunk_len * int(sizeof(float)));
  }
  __device__ void fetch() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = chunk_ * chunk_len + 2 * lane_ + i;
      const bool valid = fetched_ < count_ && source_.has(token);
      arch::copy_async_4(place(fetched_) + 4u * unsigned(i), source_.data + (valid ? token * source_.token_stride : 0),
                         valid);
    }
    arch::commit_copies();
    chunk_ += step_;
    ++fetched_;
  }

  std::uint32_t memory_;
  GateSource source_;
  int chunk_, step_, count_, lane_, fetched_ = 0;
};

/// The weights of one chunk in shared memory, written by one warp and read by others.
class SharedGates {
 public:
  static constexpr int bytes = (2 * chunk_len + 4) * int(sizeof(float));

  __device__ explicit SharedGates(std::uint32_t memory) : memory_(memory) {}
  __device__ void write(const ChunkGates& gates, int lane, bool reversed = false) const {
    const float2 enter = reversed ? gates.leave() : gates.enter(), leave = reversed ? gates.enter() : gates.leave();
    arch::store_shared_float2(memory_ + 8u * unsigned(lane), enter.x, enter.y);
    arch::store_shared_float2(memory_ + 4 * chunk_len + 8u * unsigned(lane), leave.x, leave.y);
    const float age = gates.age();
    if (lane == 0) arch::store_shared_float2(memory_ + 8 * chunk_len, age, age);
  }
  __device__ float2 enter_pair(int token) const { return arch::load_shared_float2(memory_ + 4u * unsigned(token)); }
  __device__ float enter(int token) const { return arch::load_shared_float(memory_ + 4u * unsigned(token)); }
  __device__ float leave(int token) const {
    return arch::load_shared_float(memory_ + 4u * unsigned(chunk_len + token));
  }
  __device__ float2 leave_pair(int token) const {
    return arch::load_shared_float2(memory_ + 4u * unsigned(chunk_len + token));
  }
  __device__ float age() const { return arch::load_shared_float(memory_ + 8 * chunk_len); }

 private:
  std::uint32_t memory_;
};

/// Columns (tokens) of V^T, as operands of products of 16 tokens each, times what each token leaves behind. leave(j):
/// weights of tokens 8 j + 2 (lane % 4) and the next.
template <class T, int Products, class Leave>
__device__ void weigh_values(std::uint32_t (&values_t)[Products][4], Leave leave) {
#pragma unroll
  for (int i = 0; i < Products; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 weights = leave(2 * i + half);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        std::uint32_t& pair = values_t[i][2 * half + row];
        const float2 v = arch::unpack<T>(pair);
        pair = arch::pack<T>(v.x * weights.x, v.y * weights.y);
      }
    }
}

}  // namespace chela::cuda::detail
