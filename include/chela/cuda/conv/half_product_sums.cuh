#pragma once
// Sums over the batch of products of spectra, in __half: the products of a few rows, each with its own scale, which are
// added in float once there are no more.
#include "chela/cuda/conv/half_spectrum.cuh"

namespace chela::cuda::detail {

/// The most rows of the batch that one worker sums: few enough for many workers and for sums in __half, and enough that
/// sums of spectra in memory are the smaller part of the traffic.
inline constexpr int rows_of_worker = 8;

/// What products of spectra are multiplied by before they are summed, a power of two. Tokens are under 1 (PowerOfTwo), a
/// point of a real row's spectrum then under 0.91 N, 2 sqrt(2) / pi being the mean cosine over a quarter of the circle, and
/// with a history under twice that. Rows whose spectra are as small as they can be, of a single token each, have products
/// of 2^-17 for the longest transform: 128 times the smallest half.
template <class Row, bool History>
inline constexpr float product_scale = [] {
  const float most = (History ? 2 : 1) * rows_of_worker * 0.83f * float(Row::points) * float(Row::points);
  float scale = 1;
  while (scale * most > 65000.f) scale /= 2;
  return scale;
}();

/// Sums of the products of a row's spectrum with the conjugate of another's, a thread's part: `scale` times what lies in
/// memory, which has the largest of the rows' scales.
template <class Row, bool History>
class ProductSums {
 public:
  /// `units` has the lane's first of spectrum_units; the thread has every `step`-th portion from `first` on.
  __device__ ProductSums(uint4* units, int first, int step) : units_(units), first_(first), step_(step) {}
  __device__ float scale() const { return scale_ / product_scale<Row, History>; }

  __device__ void clear() {
    for_units([](uint4& unit) { unit = {}; });
  }
  /// Rows' `scale`, a power of two, comes before what `add` adds of them.
  __device__ __forceinline__ void begin_row(float scale) {
    if (empty_) {
      scale_ = scale;
    } else if (scale > scale_) {
      const __half2 factor = __float2half2_rn(scale_ / scale);
      for_units([&](uint4& unit) {
        ComplexPair a, b;
        take_unit(unit, a, b);
        unit = unit_of({__hmul2(a.re, factor), __hmul2(a.im, factor)}, {__hmul2(b.re, factor), __hmul2(b.im, factor)});
      });
      scale_ = scale;
    }
    factor_ = __float2half2_rn(scale == scale_ ? product_scale<Row, History>
                                               : product_scale<Row, History> * (scale / scale_));
  }
  /// z times the conjugate of x.
  __device__ __forceinline__ void add(int portion, const ComplexPair (&z)[Row::pairs],
                                      const ComplexPair (&x)[Row::pairs]) {
#pragma unroll
    for (int i = 0; i < Row::pairs; i += 2) {
      uint4& unit = units_[16 * (portion * Row::pairs + i)];
      ComplexPair sum[2] = {};
      if (!empty_) take_unit(unit, sum[0], sum[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const __half2 re = __hmul2(x[i + e].re, factor_), im = __hmul2(x[i + e].im, factor_);
        sum[e].re = __hfma2(z[i + e].re, re, __hfma2(z[i + e].im, im, sum[e].re));
        sum[e].im = __hfma2(z[i + e].im, re, __hfma2(__hneg2(z[i + e].re), im, sum[e].im));
      }
      unit = unit_of(sum[0], sum[1]);
    }
  }
  __device__ void end_row() { empty_ = false; }

 private:
  template <class F>
  __device__ __forceinline__ void for_units(const F& f) const {
    for (int portion = first_; portion < Row::portions; portion += step_)
#pragma unroll
      for (int i = 0; i < Row::pairs; i += 2) f(units_[16 * (portion * Row::pairs + i)]);
  }

  uint4* units_;
  int first_, step_;
  float scale_ = 0;
  __half2 factor_ = {};
  bool empty_ = true;
};

/// Two pairs of points of a spectrum, as re, im, re, im.
struct PointSums {
  float4 of[2] = {};
  __device__ void add(uint4 unit, float scale) {
    ComplexPair pairs[2];
    take_unit(unit, pairs[0], pairs[1]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float2 re = __half22float2(pairs[e].re), im = __half22float2(pairs[e].im);
      of[e] = {fmaf(scale, re.x, of[e].x), fmaf(scale, im.x, of[e].y), fmaf(scale, re.y, of[e].z),
               fmaf(scale, im.y, of[e].w)};
    }
  }
  __device__ void add(float4 first, float4 second) {
    const auto plus = [](float4& a, float4 b) { a = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; };
    plus(of[0], first), plus(of[1], second);
  }
};

template <class Row>
inline constexpr int sum_units = 2 * spectrum_units<Row>;

}  // namespace chela::cuda::detail
