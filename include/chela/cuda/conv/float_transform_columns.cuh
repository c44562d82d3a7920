#pragma once
// The outermost pass of transforms longer than a thread block's rows, through memory: one thread computes a tree (or
// three) over points that lie a whole row apart. With a single column it is a conversion: from tensors of any strides
// and element type to points, and back.
//
// Rows in float are transformed modulo x^M - exp(2 pi i th) with their column's th. Rows in half precision are all
// alike, modulo u^M - i with x = exp(2 pi i (th - 1/4) / M) u: their points are turned on the way there, and come back
// as those of the ordinary inverse transform turned by exp(-i pi j / 2M) and divided by M.
#include <concepts>

#include "chela/cuda/conv/float_transform_ends.cuh"
#include "chela/cuda/conv/float_transform_points.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

/// Points lie as [channel, place of the sequence, column, point], channels counted within the group of a call.
template <class T, class Stored>
struct FloatColumnsCall {
  RealRows<T> rows = {};
  StoredPoints<Stored> points = {};
  ServedSequences sequences = {};
  Index first_channel = 0, channels = 0;
  Index places = 1;  ///< of sequences, in the points
  int row_points = 0;
  int channel_lanes = 1;  ///< neighbouring threads that have neighbouring channels, so that they meet whole sectors

  CHELA_HOST_DEVICE constexpr Index groups() const { return ceil_div(channels, channel_lanes); }
};

inline constexpr int column_threads = 128;

/// Columns of points that a thread computes one after the other, so that finding them costs little.
CHELA_HOST_DEVICE constexpr int column_steps(int columns) { return columns == 1 ? 8 : 1; }

/// th - 1/4 of column E of so many.
template <int E, int Columns>
CHELA_HOST_DEVICE constexpr float column_turn() {
  constexpr int odd = Columns % 3 == 0 ? 3 : 1, tree = Columns / odd;
  return ((0.25f + E / tree) / odd + reversed_bits(E % tree, log2_of(tree))) / tree - 0.25f;
}

/// Rows to points if T is const, points to rows otherwise.
template <int Columns, class T, class Stored>
__global__ void __launch_bounds__(column_threads)
    float_transform_columns_kernel(const __grid_constant__ FloatColumnsCall<T, Stored> call) {
  constexpr int odd = Columns % 3 == 0 ? 3 : 1, tree = Columns / odd, steps = column_steps(Columns);
  const int lanes = call.channel_lanes, step = column_threads / lanes, n = call.row_points;
  const unsigned tiles = unsigned((n + step * steps - 1) / (step * steps)), groups = unsigned(call.groups());
  // Blocks that follow each other have neighbouring tokens, or neighbouring channels where those are neighbours.
  const unsigned rest = blockIdx.x / (lanes == 1 ? tiles : groups), next = blockIdx.x % (lanes == 1 ? tiles : groups);
  const unsigned tile = lanes == 1 ? next : rest % tiles, group = lanes == 1 ? rest % groups : next;
  const Index sequence = rest / (lanes == 1 ? groups : tiles);
  const Index wanted = Index(group) * lanes + int(threadIdx.x) % lanes;
  const bool active = wanted < call.channels;  // the others take part in finding scales
  const Index channel = active ? wanted : call.channels - 1;
  const Sequence tokens = sequence_inside(call.sequences.all, sequence);
  if (!call.sequences.has(tokens)) return;
  const RealRow<T> row(call.rows, tokens, sequence, call.first_channel + channel, n * Columns);
  const Index transform = channel * call.places + call.sequences.place(tokens, sequence);
  Stored* points = call.points.points + transform * Columns * n;
  const int first = int(tile) * step * steps + int(threadIdx.x) / lanes;
#pragma unroll
  for (int j = first; j < min(n, first + step * steps); j += step) {
    float2 x[Columns];
    Stored* point = points + j;
    if constexpr (std::is_const_v<T>) {
      row.load(x, j, n);
      forward_root<odd, tree>(x);
      HalfScale scale{1, 1};
      if constexpr (StoredPoints<Stored>::scaled) {
        const float place = 6.283185307f * (float(j) / float(n));
        float largest = 0;
        for_each_constant<Columns>([&](auto e) {
          constexpr float turn = column_turn<e, Columns>();
          float2 root;
          __sincosf(place * turn, &root.y, &root.x);
          x[e] = times(x[e], root);
        });
        for_each_constant<Columns>([&](auto e) { largest = larger(largest, x[e]); });
        scale = HalfScale::of(largest, lanes);
        if (active && int(threadIdx.x) % 32 < lanes) *call.points.run_scale(transform, j * lanes / 32, n) = scale.up;
      }
      if (!active) continue;
      for_each_constant<Columns>([&](auto e) { *point = stored<Stored>(x[e], scale.down), point += n; });
    } else {
      if (!active) continue;
      for_each_constant<Columns>([&](auto e) {
        float up = 1;
        if constexpr (StoredPoints<Stored>::scaled) up = call.points.row_scales[transform * Columns + e];
        x[e] = unstored(*point, up), point += n;
      });
      const float place = float(j) / float(n);
      inverse_root<odd, tree>(x, place);
      row.store(x, j, n, place * (StoredPoints<Stored>::scaled ? 0.5f - 0.5f / Columns : -0.5f / Columns));
    }
  }
}

/// `OnlyOne`: no other number of columns is compiled.
template <bool OnlyOne, class T, class Stored>
Status transform_columns(const FloatColumnsCall<T, Stored>& call, int columns, cudaStream_t stream) {
  const auto run = [&]<int Columns>(std::integral_constant<int, Columns>) {
    const Index tiles = ceil_div(call.row_points, column_threads / call.channel_lanes * column_steps(Columns));
    const Index blocks = tiles * call.groups() * call.sequences.all.size();
    if (blocks == 0) return Status{};
    if (blocks >= Index(1) << 31)
      return Status{Code::unsupported, "too many rows for one call on the GPU; call with fewer sequences"};
    return launch(float_transform_columns_kernel<Columns, T, Stored>, dim3(unsigned(blocks)), column_threads, 0, stream,
                  call);
  };
  if constexpr (!StoredPoints<Stored>::scaled)
    if (columns == 1) return run(std::integral_constant<int, 1>{});
  if constexpr (OnlyOne) {
    return Status{};
  } else {
    switch (columns) {
      case 3:
        return run(std::integral_constant<int, 3>{});
      case 4:
        return run(std::integral_constant<int, 4>{});
      case 6:
        return run(std::integral_constant<int, 6>{});
      case 8:
        return run(std::integral_constant<int, 8>{});
      case 12:
        return run(std::integral_constant<int, 12>{});
      case 16:
        return run(std::integral_constant<int, 16>{});
      case 24:
        return run(std::integral_constant<int, 24>{});
      case 32:
        return run(std::integral_constant<int, 32>{});
      case 48:
        return run(std::integral_constant<int, 48>{});
      default:
        return run(std::integral_constant<int, 64>{});
    }
  }
}

}  // namespace chela::cuda::detail
