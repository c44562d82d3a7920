#pragma once
// What tests of linear attention on a GPU have in common: policies beside the default, and shapes.
#include "chela/cuda/attention/linear_policy.cuh"
#include "chela/cuda/workspace.cuh"
#include "support/attention.hpp"

namespace chela::test {

using cuda::Instructions;
using cuda::LinearPolicy;
using cuda::Workspace;

inline constexpr LinearPolicy on_warps{.instructions = Instructions::warp};
inline constexpr LinearPolicy in_segments{.segments = 3};
inline constexpr LinearPolicy narrow{.value_tile = 64, .stages = 3, .segments = 1};
inline constexpr LinearPolicy in_order{.segments = 1};

inline Shape shape_of(Index tokens, Index key_dim, Index value_dim, Index heads = 2) {
  return {.batch = 1,
          .tokens = tokens,
          .query_heads = heads,
          .key_heads = heads,
          .value_heads = heads,
          .key_dim = key_dim,
          .value_dim = value_dim};
}

}  // namespace chela::test
