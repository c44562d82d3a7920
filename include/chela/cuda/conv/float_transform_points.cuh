#pragma once
// Points and spectra that lie in memory between two kernels: pairs of float, or pairs of __half with scales, at half the
// traffic. Scales are powers of two, so that they round nothing, and follow the largest number that they are shared by:
// what a half cannot hold is 2^-24 of that.
#include <concepts>

#include "chela/cuda/conv/float_transform_trees.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// Rows of points, [channel, sequence, column, point]; the columns of a channel and sequence are one transform. Scales
/// are those of whole rows, or until the rows are transformed those of runs of neighbouring points, shared by all
/// columns.
template <class Stored>
struct StoredPoints {
  static_assert(std::same_as<Stored, float2> || std::same_as<Stored, __half2>);
  static constexpr bool scaled = std::same_as<Stored, __half2>;
  static constexpr int shortest_run = 4;

  Stored* points = nullptr;
  float *row_scales = nullptr, *run_scales = nullptr;

  constexpr StoredPoints() = default;
  /// In memory of so many transforms, `bytes(transforms, ...)` of it.
  StoredPoints(void* memory, Index transforms, int columns, int row_points)
      : points(static_cast<Stored*>(memory)),
        row_scales(reinterpret_cast<float*>(points + transforms * columns * row_points)),
        run_scales(row_scales + transforms * columns) {}
  static constexpr Index bytes(Index transforms, int columns, int row_points) {
    const Index scales = scaled ? columns + row_points / shortest_run : 0;
    return round_up(transforms * (Index(columns) * row_points * Index(sizeof(Stored)) + scales * Index(sizeof(float))),
                    16);
  }

  constexpr StoredPoints from(Index transform, int columns, int row_points) const {
    StoredPoints rest = *this;
    rest.points += transform * columns * row_points;
    rest.row_scales += transform * columns, rest.run_scales += transform * (row_points / shortest_run);
    return rest;
  }
  CHELA_HOST_DEVICE constexpr bool present() const { return points != nullptr; }

  __device__ float* run_scale(Index transform, int run, int row_points) const {
    return run_scales + transform * (row_points / shortest_run) + run;
  }
};

/// A power of two that brings numbers under 2, and what undoes it.
struct HalfScale {
  float down, up;

  /// For numbers whose largest absolute value among the warp's `share` is in `largest`; lanes that are equal modulo
  /// `share` have numbers of their own. All lanes of the warp take part.
  __device__ static HalfScale of(float largest, int share) {
    unsigned bits = __float_as_uint(largest);
    for (int distance = 16; distance >= share; distance /= 2)
      bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    constexpr unsigned mantissa = 23, least = 20, most = 253;  // exponents whose inverses are normal numbers
    const unsigned exponent = min(max(bits >> mantissa, least), most);
    return {__uint_as_float((2 * 127 - exponent) << mantissa), __uint_as_float(exponent << mantissa)};
  }
};

__device__ inline float larger(float largest, float2 x) { return fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y))); }

__device__ inline float2 unstored(float2 x, float) { return x; }
__device__ inline float2 unstored(__half2 x, float up) {
  const float2 pair = __half22float2(x);
  return {pair.x * up, pair.y * up};
}
template <class Stored>
__device__ Stored stored(float2 x, float down) {
  if constexpr (std::same_as<Stored, float2>)
    return x;
  else
    return __floats2half2_rn(x.x * down, x.y * down);
}

}  // namespace chela::cuda::detail
