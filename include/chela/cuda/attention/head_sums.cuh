#pragma once
// Gradients of heads that several output heads share: sums over runs of neighbouring heads, in order.
#include "chela/core/tensor_view.hpp"
#include "chela/cuda/arch/numbers.cuh"

namespace chela::cuda::detail {

/// sum [batch, token, heads / run, dim] = sum over each run of `parts` [.., heads, ..]. Rows are multiples of 16 bytes.
template <class T>
struct HeadSums {
  TensorView<const T, 4> parts;
  TensorView<T, 4> sum;
  bool adds = false;  ///< to what is there
};

/// One thread per 16 bytes of the sum.
template <class T>
__global__ void sum_heads(const __grid_constant__ HeadSums<T> args) {
  const Index units = args.sum.extents[3] / 8, heads = args.sum.extents[2], tokens = args.sum.extents[1];
  const Index element = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index unit = element % units, head = element / units % heads, row = element / units / heads;
  const Index token = row % tokens, batch = row / tokens;
  if (batch >= args.sum.extents[0]) return;
  const Index run_length = args.parts.extents[2] / heads;
  float sums[8] = {};
  const auto add = [&](const T* from) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    const std::uint32_t words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = arch::unpack<T>(words[i]);
      sums[2 * i] += pair.x, sums[2 * i + 1] += pair.y;
    }
  };
  T* const to = &args.sum(batch, token, head, 8 * unit);
  if (args.adds) add(to);
  for (Index part = 0; part < run_length; ++part) add(&args.parts(batch, token, head * run_length + part, 8 * unit));
  *reinterpret_cast<uint4*>(to) = {arch::pack<T>(sums[0], sums[1]), arch::pack<T>(sums[2], sums[3]),
                                   arch::pack<T>(sums[4], sums[5]), arch::pack<T>(sums[6], sums[7])};
}

/// States [sequence, state_head, key_dim, value_dim]: sums over runs of `parts` [sequence, head, key_dim, value_dim].
struct StateSums {
  TensorView<const float, 4> parts;
  TensorView<float, 4> sum;
};

/// One thread per element of the sum.
template <class = void>
__global__ void sum_states(const __grid_constant__ StateSums args) {
  const auto& to = args.sum;
  const Index element = Index(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index value = element % to.extents[3], key = element / to.extents[3] % to.extents[2];
  const Index state = element / to.extents[3] / to.extents[2], head = state % to.extents[1];
  const Index sequence = state / to.extents[1];
  if (sequence >= to.extents[0]) return;
  const Index run_length = args.parts.extents[1] / to.extents[1];
  float sum = 0;
  for (Index part = 0; part < run_length; ++part) sum += args.parts(sequence, head * run_length + part, key, value);
  to(sequence, head, key, value) = sum;
}

}  // namespace chela::cuda::detail
