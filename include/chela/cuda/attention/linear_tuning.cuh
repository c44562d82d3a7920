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

/// Warpgroup kernels. NVIDIA H100 80GB HBM3, 2026-11-24, bf16:
///   blocks                      value tile  stages
///   enough for most SMs         all         D128: 3, D64: 4     within 1% of 2 and 3 without decay, 7% better than 2 with it
///   up to half of the SMs       64          4                   more blocks, each nearer to its latency
/// Fewer blocks still share their sequences, if a segment keeps enough chunks to pay for reading k and v twice.
inline LinearSchedule tuned_warpgroup_schedule(const LinearAttentionShape& shape, Index sequences, int multiprocessors,
                                               LinearPolicy policy) {
  constexpr Index fewest_chunks = 8, fewest_segments = 4;
  const Index heads = std::max<Index>(sequences * shape.output_heads(), 1);
  const Index chunks = shape.batch * shape.tokens / 64 / std::max<Index>(sequences, 1);
  const Index blocks_of_64 = heads * shape.value_dim / 64;

  LinearSchedule schedule;
  const Index segments =
      std::min<Index>(multiprocessors / (heads * ceil_div(shape.value_dim, 128)), chunks / fewest_chunks);
  const bool split = 2 * blocks_of_64 <= multiprocessors && segments >= fewest_segments &&
                     multiprocessors / blocks_of_64 >= fewest_segments;
  schedule.segments = policy.segments ? policy.segments : split ? int(segments) : 1;
  const bool few = schedule.segments == 1 && 2 * blocks_of_64 <= multiprocessors;
  schedule.value_tile = policy.value_tile ? policy.value_tile : few ? 64 : int(shape.value_dim);
  schedule.value_tile = std::min(schedule.value_tile, int(shape.value_dim));
  schedule.stages = policy.stages ? policy.stages : few || shape.key_dim + shape.value_dim <= 128 ? 4 : 3;
  return schedule;
}

}  // namespace chela::cuda
