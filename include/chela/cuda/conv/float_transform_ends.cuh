#pragma once
// Where the points of a transform come from and go to: rows of real numbers in the caller's tensors.
#include "chela/cuda/conv/float_transform_trees.cuh"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// The sequences that transforms of one size serve: by their numbers of tokens, which for packed sequences only the
/// device knows. A thread block that comes to another one leaves it alone.
struct ServedSequences {
  SequenceBatch all = {};
  Index more_than = 0, at_most = 0;

  __device__ bool has(const Sequence& s) const { return s.count > more_than && s.count <= at_most; }
};

/// Rows as a transform of N points sees them: row n of a sequence is the real part of point n, and row r of the R that
/// lie behind it (earlier inputs, taps that look ahead) is minus the imaginary part of point N - R + r.
template <class T>
struct RealRows {
  TensorView<T, 3> ahead = {};   ///< [batch, row, channel]
  TensorView<T, 3> behind = {};  ///< [sequence, row, channel], or absent
  TensorView<T, 1> first = {};   ///< [channel], written only: row 0 alone, or absent
  float factor = 1;              ///< of points on their way in or out
  bool add = false;              ///< results are added to what is there
};

/// Those of one sequence and channel.
template <class T>
struct RealRow {
  T *ahead = nullptr, *behind = nullptr, *first = nullptr;
  Index step = 0, behind_step = 0;
  int count = 0, behind_from = 0;
  float factor;
  bool add;

  __device__ RealRow(const RealRows<T>& rows, const Sequence& s, Index sequence, Index channel, int points)
      : count(int(s.count)), behind_from(points), factor(rows.factor), add(rows.add) {
    if (rows.ahead.present()) ahead = &rows.ahead(s.batch, s.begin, channel), step = rows.ahead.strides[1];
    if (rows.behind.present()) {
      behind = &rows.behind(sequence, 0, channel), behind_step = rows.behind.strides[1];
      behind_from = points - int(rows.behind.extents[1]);
    }
    if (rows.first.present()) first = &rows.first(channel);
  }

  __device__ float2 load(int n) const {
    float2 x{0, 0};
    if (n < count) x.x = factor * static_cast<float>(ahead[n * step]);
    if (n >= behind_from) x.y = -factor * static_cast<float>(behind[(n - behind_from) * behind_step]);
    return x;
  }
  __device__ void store(int n, float2 x) const {
    if (n < count && ahead) put(ahead[n * step], x.x);
    if (n >= behind_from) put(behind[(n - behind_from) * behind_step], -x.y);
    if (n == 0 && first) put(*first, x.x);
  }

 private:
  __device__ void put(T& to, float x) const { to = T(add ? fmaf(factor, x, static_cast<float>(to)) : factor * x); }
};

/// Calls store(e, point) for E points that lie N / E apart after the inverse passes, from place j on, turned by
/// exp(-i pi n / 2N). `place` is j E / N.
template <int E, class Store>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void turn_outputs(const float2 (&x)[E], float place, const Store& store) {
  const float2 base = turn_of(place * (-0.5f / E));
  for_constants<E>([&](auto e) { store(int(e), times(x[e], turned<-e, 2 * E>(base))); });
}

}  // namespace chela::cuda::detail
