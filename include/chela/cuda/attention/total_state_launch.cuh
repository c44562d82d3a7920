#pragma once
// The launches of linear attention over a bidirectional span without decay (total_state.cuh).
#include <algorithm>

#include "chela/attention/linear_shape.hpp"
#include "chela/cuda/attention/linear_policy.cuh"
#include "chela/cuda/attention/total_state.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

inline Status check_total_state_policy(LinearPolicy policy) {
  return require(
      policy.instructions != Instructions::warpgroup, Code::unsupported,
      "a bidirectional span without decay has kernels of Instructions::warp alone: Instructions::automatic takes "
      "them");
}

/// Blocks that share the tokens of a sequence: as many as fill the device, if each has some chunks.
inline int total_state_segments(Index sequences, Index heads, const LinearAttentionShape& shape, int multiprocessors,
                                LinearPolicy policy) {
  constexpr Index blocks_at_once = 2, fewest_chunks = 8;
  if (policy.segments > 0) return policy.segments;
  const Index blocks = std::max<Index>(sequences * heads * ceil_div(shape.value_dim, 128), 1);
  const Index chunks = shape.batch * shape.tokens / chunk_len / std::max<Index>(sequences, 1);
  return int(
      std::clamp<Index>(blocks_at_once * multiprocessors / blocks, 1, std::max<Index>(chunks / fewest_chunks, 1)));
}

/// Calls f<KeyClass, ValueWarps>().
template <class F>
Status for_total_state_sizes(Index key_dim, F f) {
  if (key_dim <= 64) return f.template operator()<64, 4>();
  if (key_dim <= 128) return f.template operator()<128, 8>();
  return f.template operator()<256, 8>();
}

/// The total into the place of the first of segment_states, and the final states.
template <class T>
Status launch_total_states(TotalStatePass<T> args, Index states, cudaStream_t stream) {
  LinearPass& pass = args.walk.pass;
  constexpr int threads = 256;
  const Index elements = pass.sequences.size() * states * pass.key_dim * pass.value_dim;
  TotalStatePass<T> sums = args;
  sums.walk.pass.heads.outputs = int(states), sums.walk.pass.heads.outputs_per_state = 1;
  const Status summed = for_total_state_sizes(pass.key_dim, [&]<int KeyClass, int ValueWarps>() {
    using Tiles = TotalStateTiles<KeyClass, ValueWarps, false>;
    sums.walk.pass.value_tiles = int(ceil_div(Index(pass.value_dim), 16 * ValueWarps));
    const dim3 blocks(unsigned(pass.sequences.size() * states * sums.walk.pass.value_tiles), unsigned(pass.segments));
    return launch(sum_products<T, KeyClass, ValueWarps>, blocks, Tiles::threads, Tiles::bytes, stream, sums);
  });
  if (!summed.ok()) return summed;
  return launch(total_states<T>, dim3(unsigned(ceil_div(elements, threads))), threads, 0, stream, args);
}

/// The outputs of all output heads from the total.
template <class T>
Status launch_reads(TotalStatePass<T> args, cudaStream_t stream) {
  LinearPass& pass = args.walk.pass;
  return for_total_state_sizes(pass.key_dim, [&]<int KeyClass, int ValueWarps>() {
    using Tiles = TotalStateTiles<KeyClass, ValueWarps, true>;
    pass.value_tiles = int(ceil_div(Index(pass.value_dim), 16 * ValueWarps));
    const dim3 blocks(unsigned(pass.sequences.size() * pass.heads.outputs * pass.value_tiles), unsigned(pass.segments));
    return launch(read_total<T, KeyClass, ValueWarps>, blocks, Tiles::threads, Tiles::bytes, stream, args);
  });
}

}  // namespace chela::cuda::detail
