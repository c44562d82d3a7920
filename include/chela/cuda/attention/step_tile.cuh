#pragma once
// A state in the registers of one block, for a step of one token. A warp has a tile of 32 keys and 32 values; the warps
// of a block share its 32 values and have all keys between them. In memory a tile is 32 rows of 32 contiguous elements:
//
//   key-major     a row is a key      a lane has 8 keys    (4 i + lane / 8) and 4 values, side by side
//   value-major   a row is a value    a lane has 8 values  (4 i + lane / 8) and 4 keys, side by side
//
// so that 8 lanes read or write a row of the tile, 16 bytes each of a float state, and all rows are under way at once.
// Vectors of 32 keys or values are held one element per lane.
#include <concepts>

#include "chela/core/tensor_view.hpp"
#include "chela/cuda/arch/numbers.cuh"

namespace chela::cuda::detail {

inline constexpr int step_tile = 32;  ///< keys, and values, of a warp

/// Four elements side by side, aligned to their size.
template <class S>
__device__ float4 load_four(const S* from) {
  if constexpr (std::same_as<S, float>) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    const float2 low = arch::unpack<S>(pairs.x), high = arch::unpack<S>(pairs.y);
    return {low.x, low.y, high.x, high.y};
  }
}
template <class S>
__device__ void store_four(S* to, float4 x) {
  if constexpr (std::same_as<S, float>)
    *reinterpret_cast<float4*>(to) = x;
  else
    *reinterpret_cast<uint2*>(to) = {arch::pack<S>(x.x, x.y), arch::pack<S>(x.z, x.w)};
}

/// Sums of x[d] over the N lanes `Apart` from one to the next, each left with the one whose d is its own place among
/// them. In one order, whatever the lane.
template <int N, int Apart>
__device__ float sum_over_lanes(float (&x)[N], int lane) {
#pragma unroll
  for (int half = N / 2; half >= 1; half /= 2) {
    const bool upper = (lane / Apart & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(~0u, given, half * Apart);
    }
  }
  return x[0];
}

/// `Fours`: rows are contiguous, and each group of four of their elements is aligned and all inside or all outside.
template <bool KeyMajor, bool Fours>
struct StepTile {
  static constexpr int rows = 8, columns = 4;  // of a lane
  static constexpr int keys = KeyMajor ? rows : columns, values = KeyMajor ? columns : rows;

  float state[keys][values];

  static __device__ int row(int lane, int i) { return 4 * i + lane / 8; }
  static __device__ int column(int lane, int j) { return Fours ? 4 * (lane % 8) + j : lane % 8 + 8 * j; }
  static __device__ int key(int lane, int i) { return KeyMajor ? row(lane, i) : column(lane, i); }
  static __device__ int value(int lane, int j) { return KeyMajor ? column(lane, j) : row(lane, j); }

  /// Elements outside of the state are zero. `first_key` and `first_value` are those of the tile.
  template <class S>
  __device__ void load(TensorView<S, 2> from, int first_key, int first_value, int lane) {
    for_each_four<S>(from, first_key, first_value, lane, [&](int i, S* at, Index next, int inside) {
      if constexpr (Fours) {
        const float4 x = inside > 0 ? load_four(at) : float4{};
        element(i, 0) = x.x, element(i, 1) = x.y, element(i, 2) = x.z, element(i, 3) = x.w;
      } else {
#pragma unroll
        for (int j = 0; j < columns; ++j) element(i, j) = j < inside ? static_cast<float>(at[j * next]) : 0.f;
      }
    });
  }

  template <class S>
  __device__ void store(TensorView<S, 2> to, int first_key, int first_value, int lane) {
    to.data = arch::made_anew(to.data);
    for_each_four<S>(to, first_key, first_value, lane, [&](int i, S* at, Index next, int inside) {
      if constexpr (Fours) {
        if (inside > 0) store_four(at, {element(i, 0), element(i, 1), element(i, 2), element(i, 3)});
      } else {
#pragma unroll
        for (int j = 0; j < columns; ++j)
          if (j < inside) at[j * next] = S(element(i, j));
      }
    });
  }

  /// The elements that a lane needs of a vector of keys, held one per lane.
  static __device__ void take_keys(float (&own)[keys], float of_lane, int lane) {
#pragma unroll
    for (int i = 0; i < keys; ++i) own[i] = __shfl_sync(~0u, of_lane, key(lane, i));
  }
  static __device__ void take_values(float (&own)[values], float of_lane, int lane) {
#pragma unroll
    for (int j = 0; j < values; ++j) own[j] = __shfl_sync(~0u, of_lane, value(lane, j));
  }

  /// S = Diag(factors) S.
  __device__ void multiply_keys(const float (&factors)[keys]) {
#pragma unroll
    for (int i = 0; i < keys; ++i)
#pragma unroll
      for (int j = 0; j < values; ++j) state[i][j] *= factors[i];
  }

  /// S += k u^T.
  __device__ void write(const float (&k)[keys], const float (&u)[values]) {
#pragma unroll
    for (int i = 0; i < keys; ++i)
#pragma unroll
      for (int j = 0; j < values; ++j) state[i][j] = fmaf(k[i], u[j], state[i][j]);
  }

  /// S^T x over the tile's keys, for one value per lane: that of `read_value(lane)`.
  __device__ float read(const float (&x)[keys], int lane) const {
    float sums[values];
#pragma unroll
    for (int j = 0; j < values; ++j) {
      sums[j] = x[0] * state[0][j];
#pragma unroll
      for (int i = 1; i < keys; ++i) sums[j] = fmaf(x[i], state[i][j], sums[j]);
    }
    return sum_over_lanes < values, KeyMajor ? 8 : 1 > (sums, lane);
  }
  static __device__ int read_value(int lane) { return value(lane, KeyMajor ? lane / 8 : lane % 8); }

 private:
  __device__ float& element(int row, int column) { return KeyMajor ? state[row][column] : state[column][row]; }

  /// Calls f(row of the lane, first of its columns, distance of columns, how many of them are inside) for every row.
  template <class S, class F>
  static __device__ void for_each_four(TensorView<S, 2> at, int first_key, int first_value, int lane, F f) {
    constexpr int row_axis = KeyMajor ? 0 : 1, column_axis = 1 - row_axis;
    const int first_row = (KeyMajor ? first_key : first_value) + row(lane, 0);
    const int first_column = (KeyMajor ? first_value : first_key) + column(lane, 0);
    const int rows_left = int(at.extents[row_axis]) - first_row;
    const int columns_left = int(at.extents[column_axis]) - first_column;
    const int inside = Fours ? columns_left : (columns_left + 7) / 8;  // without fours, a lane's columns are 8 apart
    const Index next_row = 4 * at.strides[row_axis], next_column = (Fours ? 1 : 8) * at.strides[column_axis];
    S* const first = at.data + first_row * at.strides[row_axis] + first_column * at.strides[column_axis];
#pragma unroll
    for (int i = 0; i < rows; ++i) f(i, first + i * next_row, next_column, 4 * i < rows_left ? inside : 0);
  }
};

}  // namespace chela::cuda::detail
