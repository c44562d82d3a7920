#pragma once
// Included before all else where a CUDA source is compiled for the CPU: its keywords, and those functions of the device
// that CUDA's headers do not define for the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "block.hpp"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __maxnreg__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__

#define threadIdx chela::emulation::block().thread_index()
#define blockIdx chela::emulation::block().index()
#define blockDim chela::emulation::block().dim()
#define gridDim chela::emulation::grid()

using std::max;
using std::min;
inline long min(int a, long b) { return std::min<long>(a, b); }
inline long min(long a, int b) { return std::min<long>(a, b); }
inline long max(int a, long b) { return std::max<long>(a, b); }
inline long max(long a, int b) { return std::max<long>(a, b); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned places) {
  const std::uint64_t bytes = low | std::uint64_t(high) << 32;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) y |= unsigned(bytes >> 8 * (places >> 4 * i & 7) & 0xff) << 8 * i;
  return y;
}
inline unsigned __vcmpeq2(unsigned a, unsigned b) {
  const unsigned apart = a ^ b;
  return (apart & 0xffffu ? 0 : 0xffffu) | (apart & 0xffff0000u ? 0 : 0xffff0000u);
}
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline float __fdividef(float a, float b) { return a / b; }
inline void __sincosf(float x, float* sine, float* cosine) { *sine = std::sin(x), *cosine = std::cos(x); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T x) {
  *to = x;
}
inline unsigned atomicInc(unsigned* x, unsigned most) {
  const unsigned before = *x;
  *x = before >= most ? 0 : before + 1;
  return before;
}

inline void __syncthreads() { chela::emulation::block().barrier(0, int(blockDim.x)); }
inline void __syncwarp() { chela::emulation::block().exchange(nullptr, 0); }
inline unsigned __ballot_sync(unsigned, bool x) {
  const std::uint32_t word = x;
  unsigned y = 0;
  const chela::emulation::LaneWords& all = chela::emulation::block().exchange(&word, 1);
  for (std::size_t i = 0; i < all.size(); ++i) y |= all[i][0] << i;
  return y;
}
inline bool __any_sync(unsigned, bool x) { return __ballot_sync(~0u, x) != 0; }
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  unsigned y = 0;
  for (const auto& words : chela::emulation::block().exchange(&x, 1)) y = std::max(y, words[0]);
  return y;
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  std::uint32_t words[2] = {};
  std::memcpy(words, &x, sizeof(T));
  std::memcpy(&x, chela::emulation::block().exchange(words, 2)[std::size_t(lane % 32)].data(), sizeof(T));
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return __shfl_sync(~0u, x, chela::emulation::block().lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int apart) {
  const int lane = chela::emulation::block().lane();
  return __shfl_sync(~0u, x, lane < apart ? lane : lane - apart);
}
