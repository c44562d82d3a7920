#pragma once
// Points and spectra that lie in memory between two kernels: pairs of float, or pairs of __half with a scale for every
// warp's worth of them, at half the traffic. Scales are powers of two, so that they round nothing, and follow the
// largest number of the warp: what a half cannot hold is 2^-28 of that.
#include <concepts>

#include "chela/cuda/conv/float_transform_trees.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// Rows of points, [channel, sequence, column, point]; the columns of a channel and sequence are one transform. Scales
/// are those of a row's warps, or until the rows are transformed those of runs of neighbouring points, shared by all
/// columns.
template <class Stored>
struct StoredPoints {
  static_assert(std::same_as<Stored, float2> || std::same_as<Stored, __half2>);
  static constexpr bool scaled = std::same_as<Stored, __half2>;
  static constexpr int shortest_run = 4, warp = 32;

  Stored* points = nullptr;
  float *row_scales = nullptr, *run_scales = nullptr;

  constexpr StoredPoints() = default;
  /// In memory of so many transforms, `bytes(transforms, ...)` of it.
  StoredPoints(void* memory, Index transforms, int columns, int row_points)
      : points(static_cast<Stored*>(memory)),
        row_scales(reinterpret_cast<float*>(points + transforms * columns * row_points)),
        run_scales(row_scales + transforms * columns * (row_points / warp)) {}
  static constexpr Index bytes(Index transforms, int columns, int row_points) {
    const Index scales = scaled ? columns * (row_points / warp) + row_points / shortest_run : 0;
    return transforms * (Index(columns) * row_points * Index(sizeof(Stored)) + scales * Index(sizeof(float)));
  }

  constexpr StoredPoints from(Index transform, int columns, int row_points) const {
    StoredPoints rest = *this;
    rest.points += transform * columns * row_points;
    rest.row_scales += transform * columns * (row_points / warp),
        rest.run_scales += transform * (row_points / shortest_run);
    return rest;
  }
  CHELA_HOST_DEVICE constexpr bool present() const { return points != nullptr; }

  __device__ float* row_scale(Index row, int t, int row_points) const {
    return row_scales + row * (row_points / warp) + t / warp;
  }
  __device__ float* run_scale(Index transform, int run, int row_points) const {
    return run_scales + transform * (row_points / shortest_run) + run;
  }
};

/// A power of two that brings numbers into the range of a half, and what undoes it.
struct HalfScale {
  float down, up;

  /// For numbers whose largest absolute value among the warp's `share` is in `largest`; lanes that are equal modulo
  /// `share` have numbers of their own. All lanes of the warp take part.
  __device__ static HalfScale of(float largest, int share) {
    unsigned bits = __float_as_uint(largest);
    for (int distance = 16; distance >= share; distance /= 2)
      bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
    constexpr unsigned mantissa = 23, top = 14, least = 20;  // exponents: of the largest half, and without overflow
    const unsigned exponent = max(bits >> mantissa, least);
    return {__uint_as_float((2 * 127 + top - exponent) << mantissa), __uint_as_float((exponent - top) << mantissa)};
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

/// Puts a thread's share of a row, the points Threads apart from t on. `point(e)` is called twice for halves.
template <int Threads, int E, class Stored, class Point>
__device__ void store_row(const StoredPoints<Stored>& to, Index row, int t, const Point& point) {
  constexpr int row_points = Threads * E;
  HalfScale scale{1, 1};
  if constexpr (StoredPoints<Stored>::scaled) {
    float largest = 0;
    for_each_constant<E>([&](auto e) { largest = larger(largest, point(e)); });
    scale = HalfScale::of(largest, 1);
    if (t % 32 == 0) *to.row_scale(row, t, row_points) = scale.up;
  }
  Stored* at = to.points + row * row_points + t;
  for_each_constant<E>([&](auto e) { at[e * Threads] = stored<Stored>(point(e), scale.down); });
}

/// Calls use(e, point) for the points of a row that store_row put.
template <int Threads, int E, class Stored, class Use>
__device__ void load_row(const StoredPoints<Stored>& from, Index row, int t, const Use& use) {
  constexpr int row_points = Threads * E;
  float up = 1;
  if constexpr (StoredPoints<Stored>::scaled) up = *from.row_scale(row, t, row_points);
  const Stored* at = from.points + row * row_points + t;
  for_each_constant<E>([&](auto e) { use(e, unstored(at[e * Threads], up)); });
}

}  // namespace chela::cuda::detail
