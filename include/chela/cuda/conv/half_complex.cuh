#pragma once
// Pairs of complex numbers in 16-bit registers, roots of unity, and transforms of a few points of them.
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "chela/core/host_device.hpp"

namespace chela::cuda::detail {

/// Two complex numbers: their real parts in one register, their imaginary parts in another.
struct ComplexPair {
  __half2 re, im;
};

__device__ inline std::uint32_t bits(__half2 x) { return reinterpret_cast<const std::uint32_t&>(x); }
__device__ inline __half2 halves(std::uint32_t x) { return reinterpret_cast<const __half2&>(x); }
__device__ inline ComplexPair complex_pair(std::uint32_t re, std::uint32_t im) { return {halves(re), halves(im)}; }

__device__ inline ComplexPair operator+(ComplexPair a, ComplexPair b) {
  return {__hadd2(a.re, b.re), __hadd2(a.im, b.im)};
}
__device__ inline ComplexPair operator-(ComplexPair a, ComplexPair b) {
  return {__hsub2(a.re, b.re), __hsub2(a.im, b.im)};
}
__device__ inline ComplexPair operator*(ComplexPair a, ComplexPair b) {
  return {__hfma2(__hneg2(a.im), b.im, __hmul2(a.re, b.re)), __hfma2(a.im, b.re, __hmul2(a.re, b.im))};
}
/// a times the conjugate of b.
__device__ inline ComplexPair times_conjugate(ComplexPair a, ComplexPair b) {
  return {__hfma2(a.im, b.im, __hmul2(a.re, b.re)), __hfma2(__hneg2(a.re), b.im, __hmul2(a.im, b.re))};
}
template <bool Conjugate>
__device__ ComplexPair times(ComplexPair a, ComplexPair b) {
  if constexpr (Conjugate)
    return times_conjugate(a, b);
  else
    return a * b;
}

/// cos(2 pi k / n) at compile time.
CHELA_HOST_DEVICE constexpr double cosine(int k, int n) {
  k = ((k % n) + n) % n;
  if (2 * k > n) k = n - k;
  const double sign = 4 * k > n ? -1 : 1;
  const double x = 6.283185307179586477 * (4 * k > n ? n - 2 * k : 2 * k) / (2.0 * n);
  double term = 1, sum = 1;
  for (int i = 1; i < 16; ++i) sum += term *= -x * x / ((2 * i - 1) * (2 * i));
  return sign * sum;
}
CHELA_HOST_DEVICE constexpr double sine(int k, int n) { return cosine(4 * k - n, 4 * n); }

/// The bits of x, rounded to __half, in both halves of a register. |x| is at most 1; under 2^-14 it is zero.
CHELA_HOST_DEVICE constexpr std::uint32_t doubled_half(double x) {
  const double size = x < 0 ? -x : x;
  if (size < 0x1p-14) return 0;
  int exponent = 15;
  double mantissa = size;
  while (mantissa < 1) mantissa *= 2, --exponent;
  const auto low =
      std::uint32_t((mantissa - 1) * 1024 + 0.5) + (std::uint32_t(exponent) << 10) + (x < 0 ? 0x8000u : 0u);
  return low | low << 16;
}

/// Calls f with the constants 0, 1, ..., N - 1.
template <int N, class F>
__device__ __forceinline__ void for_constants(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

/// cos(2 pi k / n) and sin(2 pi k / n) as constants, in both halves.
template <int K, int N>
__device__ __forceinline__ ComplexPair constant_root() {
  constexpr std::uint32_t re = doubled_half(cosine(K, N)), im = doubled_half(sine(K, N));
  return complex_pair(re, im);
}

/// X[j] = sum_k e^(Sign 2 pi i j k / N) x[Step k], for N a power of two times an odd number.
template <int N, int Sign, int Step = 1>
__device__ __forceinline__ void small_transform(const ComplexPair* x, ComplexPair* X) {
  if constexpr (N == 1) {
    X[0] = x[0];
  } else if constexpr (N % 2 == 1) {
    constexpr int pairs = (N - 1) / 2;
    ComplexPair sum[pairs], difference[pairs];
    X[0] = x[0];
#pragma unroll
    for (int k = 1; k <= pairs; ++k) {
      sum[k - 1] = x[k * Step] + x[(N - k) * Step], difference[k - 1] = x[k * Step] - x[(N - k) * Step];
      X[0] = X[0] + sum[k - 1];
    }
    for_constants<pairs>([&](auto j_of) {
      constexpr int j = decltype(j_of)::value + 1;
      ComplexPair even = x[0], odd = {};
      for_constants<pairs>([&](auto k_of) {
        constexpr int k = decltype(k_of)::value;
        const ComplexPair root = constant_root<Sign * j*(k + 1), N>(), a = sum[k], b = difference[k];
        even = {__hfma2(root.re, a.re, even.re), __hfma2(root.re, a.im, even.im)};
        if constexpr (k == 0)
          odd = {__hmul2(root.im, b.re), __hmul2(root.im, b.im)};
        else
          odd = {__hfma2(root.im, b.re, odd.re), __hfma2(root.im, b.im, odd.im)};
      });
      X[j] = {__hsub2(even.re, odd.im), __hadd2(even.im, odd.re)};
      X[N - j] = {__hadd2(even.re, odd.im), __hsub2(even.im, odd.re)};
    });
  } else {
    ComplexPair even[N / 2], odd[N / 2];
    small_transform<N / 2, Sign, 2 * Step>(x, even);
    small_transform<N / 2, Sign, 2 * Step>(x + Step, odd);
    for_constants<N / 2>([&](auto k_of) {
      constexpr int k = decltype(k_of)::value;
      const ComplexPair a = even[k], b = odd[k];
      if constexpr (k == 0) {
        X[0] = a + b, X[N / 2] = a - b;
      } else if constexpr (4 * k == N) {  // b turned by a right angle
        const ComplexPair ahead = {__hsub2(a.re, b.im), __hadd2(a.im, b.re)},
                          behind = {__hadd2(a.re, b.im), __hsub2(a.im, b.re)};
        X[k] = Sign > 0 ? ahead : behind, X[k + N / 2] = Sign > 0 ? behind : ahead;
      } else {
        const ComplexPair root = constant_root<Sign * k, N>(), minus = {__hneg2(root.re), __hneg2(root.im)};
        X[k] = {__hfma2(minus.im, b.im, __hfma2(root.re, b.re, a.re)),
                __hfma2(root.im, b.re, __hfma2(root.re, b.im, a.im))};
        X[k + N / 2] = {__hfma2(root.im, b.im, __hfma2(minus.re, b.re, a.re)),
                        __hfma2(minus.im, b.re, __hfma2(minus.re, b.im, a.im))};
      }
    });
  }
}

/// The same in place for each of `Between` transforms whose points alternate: x[Between k + i] is point k of the i-th.
template <int N, int Sign, int Between>
__device__ __forceinline__ void small_transforms(ComplexPair (&x)[N * Between]) {
  if constexpr (N > 1) {
#pragma unroll
    for (int i = 0; i < Between; ++i) {
      ComplexPair from[N], to[N];
#pragma unroll
      for (int k = 0; k < N; ++k) from[k] = x[Between * k + i];
      small_transform<N, Sign>(from, to);
#pragma unroll
      for (int k = 0; k < N; ++k) x[Between * k + i] = to[k];
    }
  }
}

/// e^(2 pi i k / n) to the accuracy of the special function unit, far below a 16-bit rounding.
__device__ inline float2 unit_root(int k, int n) {
  k %= n;
  if (2 * k > n) k -= n;
  float2 root;
  __sincosf(6.283185307f * (float(k) / float(n)), &root.y, &root.x);
  return root;
}

}  // namespace chela::cuda::detail
