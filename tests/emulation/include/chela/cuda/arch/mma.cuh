#pragma once
// Products of the tensor cores, d += a b, with the operands in registers as arch/mma.cuh has them, summed in float.
#include "block.hpp"
#include "chela/cuda/arch/numbers.cuh"

namespace chela::cuda::arch {

/// A product 16 by 8 by 16 in the layout of mma.sync.
template <class T>
void multiply_add(float* d, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t own[] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulation::LaneWords& words = emulation::block().exchange(own, 6);
  const std::size_t lane = std::size_t(emulation::block().lane()), row = lane / 4, column = lane % 4 * 2;
  for (std::size_t below = 0; below < 2; ++below)
    for (std::size_t right = 0; right < 2; ++right) {
      float sum = 0;
      for (std::size_t half = 0; half < 2; ++half)
        for (std::size_t k = 0; k < 4; ++k) {
          const float2 x = unpack<T>(words[4 * row + k][below + 2 * half]),
                       y = unpack<T>(words[4 * (column + right) + k][4 + half]);
          sum += x.x * y.x + x.y * y.y;
        }
      d[2 * below + right] += sum;
    }
}
inline void multiply_add_halves(float (&d)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  multiply_add<__half>(d, {a.x, a.y, a.z, a.w}, b0, b1);
}
inline void multiply_add_halves(std::uint32_t (&d)[2], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  const float2 first = unpack<__half>(d[0]), second = unpack<__half>(d[1]);
  float sums[4] = {first.x, first.y, second.x, second.y};
  multiply_add_halves(sums, a, b0, b1);
  d[0] = pack<__half>(sums[0], sums[1]), d[1] = pack<__half>(sums[2], sums[3]);
}
inline void multiply_halves(std::uint32_t (&d)[2], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  d[0] = d[1] = 0;
  multiply_add_halves(d, a, b0, b1);
}

}  // namespace chela::cuda::arch
