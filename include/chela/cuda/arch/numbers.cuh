#pragma once
// Pairs of 16-bit elements in a register, and the exponential.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "chela/core/host_device.hpp"

namespace chela::cuda::arch {

/// Two floats rounded to T, the first in the low half.
template <class T>
__device__ inline std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}

template <class T>
__device__ inline float2 unpack(std::uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
}

/// The bits of x in reverse order.
CHELA_HOST_DEVICE inline unsigned reversed_bits(unsigned x) {
#if defined(__CUDA_ARCH__)
  return __brev(x);
#else
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
#endif
}

/// A float rounded to the 10 bits behind the point that products of floats see, as they take it.
__device__ inline std::uint32_t rounded_for_products(float x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

/// 2^x to 2 units in the last place; results under 2^-126 are zero.
__device__ inline float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x to a unit in the last place; numbers under 2^-126 are zero, on both sides.
__device__ inline float reciprocal_flushed(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh(x) to 2^-11 of it.
__device__ inline float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Keeps the compiler from moving work on an array of registers across this point: products that are under way write to
/// them behind its back.
template <int N>
__device__ inline void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

/// As pin for rounded pairs: has them made before this point.
template <int N>
__device__ inline void pin(std::uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

/// Keeps registers that a product under way reads from being used for anything else up to this point.
template <int N>
__device__ inline void keep(const std::uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" ::"r"(x[i]) : "memory");
}

/// The same pointer, which the compiler takes for another: addresses made from it before do not stay in registers until
/// they are needed again.
template <class T>
__device__ inline T* made_anew(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

}  // namespace chela::cuda::arch
