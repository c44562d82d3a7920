#pragma once
#include <bit>
#include <cmath>
#include <type_traits>

#include "chela/core/host_device.hpp"

namespace chela::cuda::arch {

template <class T>
std::uint32_t pack(float low, float high) {
  return std::bit_cast<std::uint16_t>(T(low)) | std::uint32_t(std::bit_cast<std::uint16_t>(T(high))) << 16;
}
template <class T>
float2 unpack(std::uint32_t word) {
  return {float(std::bit_cast<T>(std::uint16_t(word))), float(std::bit_cast<T>(std::uint16_t(word >> 16)))};
}
inline unsigned reversed_bits(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float reciprocal_flushed(float x) {
  const auto flushed = [](float y) { return std::abs(y) < 0x1p-126f ? std::copysign(0.f, y) : y; };
  return flushed(1 / flushed(x));
}
inline float tanh_approximate(float x) { return std::tanh(x); }

template <class T>
T* made_anew(T* pointer) {
  return pointer;
}

}  // namespace chela::cuda::arch
