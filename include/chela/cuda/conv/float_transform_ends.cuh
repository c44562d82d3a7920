#pragma once
// Where the points of a transform come from and go to: rows of real numbers in the caller's tensors.
#include <algorithm>

#include "chela/cuda/conv/float_transform_trees.cuh"
#include "chela/cuda/conv/sequence_tiles.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// The sequences that transforms of one size serve: by their numbers of tokens, which for packed sequences only the
/// device knows. A thread block that comes to another one leaves it alone. Each has a place of its own in the points
/// that lie in memory.
struct ServedSequences {
  SequenceBatch all = {};
  Index more_than = 0, at_most = 0;  ///< tokens

  __device__ bool has(const Sequence& s) const { return s.count > more_than && s.count <= at_most; }

  /// Places that serve all of them: packed sequences that begin within more_than tokens of each other are not both here.
  constexpr Index places() const {
    return all.cu_seqlens.present() ? std::min(all.size(), packed_places()) : all.size();
  }
  __device__ Index place(const Sequence& s, Index i) const {
    return all.cu_seqlens.present() && packed_places() < all.size() ? s.begin / (more_than + 1) : i;
  }

 private:
  CHELA_HOST_DEVICE constexpr Index packed_places() const { return all.tokens / (more_than + 1) + 1; }
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

  /// Points n, n + spacing and so on.
  template <int E>
  __device__ void load(float2 (&x)[E], int n, int spacing) const {
    const T* from = ahead + n * step;
    const Index between = spacing * step;
    for_each_constant<E>([&](auto e) {
      x[e] = {n + e * spacing < count ? static_cast<float>(*from) : 0, 0};
      from += between;
    });
    if (factor != 1) for_each_constant<E>([&](auto e) { x[e].x *= factor; });
    if (!behind) return;
    for_each_constant<E>([&](auto e) {
      const int from = n + e * spacing - behind_from;
      if (from >= 0) x[e].y = -factor * static_cast<float>(behind[from * behind_step]);
    });
  }

  /// The points n + e spacing after the inverse passes, which are turned by exp(i pi (turn - e / 2E)) on their way: by
  /// exp(-i pi n / 2N), N being E times spacing, and the rest that `turn` has.
  template <int E>
  __device__ void store(const float2 (&x)[E], int n, int spacing, float turn) const {
    float2 base = turn_of(turn);
    base.x *= factor, base.y *= factor;
    if (ahead && !add && !first && !behind) {
      T* to = ahead + n * step;
      const Index between = spacing * step;
      for_each_constant<E>([&](auto e) {
        const float2 turn = turned<-e, 2 * E>(base);
        if (n + e * spacing < count) *to = T(fmaf(x[e].x, turn.x, -x[e].y * turn.y));
        to += between;
      });
      return;
    }
    for_each_constant<E>(
        [&](auto less) {  // from the last: in the same order, work on both ways is done before, and kept
          constexpr int e = E - 1 - less;
          const int at = n + e * spacing;
          const float2 point = times(x[e], turned<-e, 2 * E>(base));
          if (at < count && ahead) put(ahead[at * step], point.x);
          if (at >= behind_from) put(behind[(at - behind_from) * behind_step], -point.y);
          if (at == 0 && first) put(*first, point.x);
        });
  }

 private:
  __device__ void put(T& to, float x) const { to = T(add ? static_cast<float>(to) + x : x); }
};

}  // namespace chela::cuda::detail
