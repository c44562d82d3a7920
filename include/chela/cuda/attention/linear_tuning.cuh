#pragma once
// Measured defaults of linear attention on GPUs.
#include <algorithm>

#include "chela/attention/linear_shape.hpp"
#include "chela/cuda/attention/linear_policy.cuh"

namespace chela::cuda {

/// A policy without zeros, for one call.
struct LinearSchedule {
  int value_tile = 64, stages = 2, segments = 1;
};

/// Warpgroup kernels, by the number of blocks with 64 value columns each. NVIDIA H100 80GB HBM3, 2026-11-24, bf16:
///   blocks                     value tile  stages                  segments
///   more than half of the SMs  128         dims of 64: 4, else: 3  1
///   up to half                 64          4                       1
///   up to a quarter            64          4                       as many as fill the SMs, if each keeps 8 chunks
/// Two stages cost 3% (key and value dims of 128) to 20% (64), and more with a decay.
inline LinearSchedule tuned_warpgroup_schedule(const LinearAttentionShape& shape, Index sequences, int multiprocessors,
                                               LinearPolicy policy) {
  constexpr Index fewest_chunks = 8, fewest_segments = 4;
  const Index chunks = shape.batch * shape.tokens / 64 / std::max<Index>(sequences, 1);
  const Index narrow_blocks = std::max<Index>(sequences * shape.output_heads(), 1) * shape.value_dim / 64;
  const Index segments = std::min(multiprocessors / narrow_blocks, chunks / fewest_chunks);
  const bool few = 2 * narrow_blocks <= multiprocessors;

  LinearSchedule schedule;
  schedule.segments = policy.segments ? policy.segments : segments >= fewest_segments ? int(segments) : 1;
  schedule.value_tile = std::min(policy.value_tile ? policy.value_tile : few ? 64 : 128, int(shape.value_dim));
  const bool small = few || shape.key_dim + schedule.value_tile <= 128;
  schedule.stages = policy.stages ? policy.stages : small ? 4 : 3;
  return schedule;
}

/// The same for a decay per key. Preparing queries and keys is most of the work and would be done anew for each value
/// tile: few heads split the sequence instead. NVIDIA H100 80GB HBM3, 2026-11-24, bf16, ms:
///   8 x 2048 tokens, 16 heads, dims of 64     stages 4: 0.079, 2: 0.095
///   4 x 4096 tokens, 32 heads, dims of 128    stages 3: 0.317, 2: 0.353
///   4096 tokens, 32 heads, dims of 128        4 segments: 0.175, 2 segments of two value tiles: 0.239
inline LinearSchedule tuned_key_decay_schedule(const LinearAttentionShape& shape, Index sequences, int multiprocessors,
                                               LinearPolicy policy) {
  constexpr Index fewest_chunks = 8;
  const Index chunks = shape.batch * shape.tokens / 64 / std::max<Index>(sequences, 1);
  LinearSchedule schedule;
  schedule.value_tile = std::min(policy.value_tile ? policy.value_tile : 128, int(shape.value_dim));
  const Index blocks = std::max<Index>(sequences * shape.output_heads(), 1) * shape.value_dim / schedule.value_tile;
  const Index segments = std::min(multiprocessors / blocks, chunks / fewest_chunks);
  schedule.segments = policy.segments ? policy.segments : int(std::max<Index>(segments, 1));
  schedule.stages = policy.stages ? policy.stages : shape.key_dim + schedule.value_tile <= 128 ? 4 : 3;
  return schedule;
}

}  // namespace chela::cuda
