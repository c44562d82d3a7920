#pragma once
// Borrowed arrays of rank 1 to 5 with any strides, and the index tricks that save copies: a slice, a run of one axis, time
// run backwards, two axes exchanged.
#include <concepts>
#include <type_traits>

#include "chela/core/index.hpp"

namespace chela {

/// A borrowed rank-`Rank` array. Copying it copies the view, never the elements. Views that an operator treats as optional
/// are absent when `data` is null.
template <class T, int Rank>
struct TensorView {
  static_assert(Rank >= 1 && Rank <= 5, "TensorView has rank 1 to 5; fold further axes into one by their strides");
  static constexpr int rank = Rank;
  using Value = T;

  T* data = nullptr;
  Index extents[Rank] = {};
  Index strides[Rank] = {};  ///< in elements, not bytes; 0 broadcasts, negative runs backwards

  template <std::convertible_to<Index>... I>
  requires(sizeof...(I) == Rank) CHELA_HOST_DEVICE constexpr T& operator()(I... i) const {
    Index offset = 0;
    int axis = 0;
    ((offset += static_cast<Index>(i) * strides[axis++]), ...);
    return data[offset];
  }

  CHELA_HOST_DEVICE constexpr bool present() const { return data != nullptr; }

  CHELA_HOST_DEVICE constexpr Index size() const {
    Index n = 1;
    for (Index extent : extents) n *= extent;
    return n;
  }

  /// A view that only reads. A template, because nvcc warns of conversions to a class's own type.
  template <std::same_as<const T> U>
  requires(!std::is_const_v<T>) CHELA_HOST_DEVICE constexpr operator TensorView<U, Rank>() const {
    TensorView<U, Rank> view{data};
    for (int a = 0; a < Rank; ++a) view.extents[a] = extents[a], view.strides[a] = strides[a];
    return view;
  }
};

/// Row-major view: the last axis is contiguous.
template <class T, std::convertible_to<Index>... I>
CHELA_HOST_DEVICE constexpr TensorView<T, sizeof...(I)> contiguous(T* data, I... extents) {
  TensorView<T, sizeof...(I)> view{data, {static_cast<Index>(extents)...}};
  Index stride = 1;
  for (int a = int(sizeof...(I)) - 1; a >= 0; --a) {
    view.strides[a] = stride;
    stride *= view.extents[a];
  }
  return view;
}

/// Fixes the leading axis: `view[index, ...]`.
template <class T, int Rank>
requires(Rank > 1) CHELA_HOST_DEVICE constexpr TensorView<T, Rank - 1> slice(TensorView<T, Rank> view, Index index) {
  TensorView<T, Rank - 1> out{view.data + index * view.strides[0]};
  for (int a = 1; a < Rank; ++a) out.extents[a - 1] = view.extents[a], out.strides[a - 1] = view.strides[a];
  return out;
}

/// Fixes axis `Axis` at `index` and drops it.
template <int Axis, class T, int Rank>
requires(Rank > 1 && Axis >= 0 && Axis < Rank) CHELA_HOST_DEVICE
    constexpr TensorView<T, Rank - 1> slice_axis(TensorView<T, Rank> view, Index index) {
  TensorView<T, Rank - 1> out{view.data + index * view.strides[Axis]};
  for (int a = 0, to = 0; a < Rank; ++a)
    if (a != Axis) out.extents[to] = view.extents[a], out.strides[to++] = view.strides[a];
  return out;
}

/// `count` entries of one axis from `begin` on.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr TensorView<T, Rank> run(TensorView<T, Rank> view, int axis, Index begin, Index count) {
  view.data += begin * view.strides[axis];
  view.extents[axis] = count;
  return view;
}

/// The same elements with one axis walked from its end: an anticausal pass is a causal one over reversed views.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr TensorView<T, Rank> reversed(TensorView<T, Rank> view, int axis) {
  if (view.extents[axis] > 0) view.data += (view.extents[axis] - 1) * view.strides[axis];
  view.strides[axis] = -view.strides[axis];
  return view;
}

/// The same elements with two axes exchanged.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr TensorView<T, Rank> transposed(TensorView<T, Rank> view, int a, int b) {
  const Index extent = view.extents[a], stride = view.strides[a];
  view.extents[a] = view.extents[b], view.strides[a] = view.strides[b];
  view.extents[b] = extent, view.strides[b] = stride;
  return view;
}

template <class T, class U, int Rank>
CHELA_HOST_DEVICE constexpr bool same_extents(TensorView<T, Rank> a, TensorView<U, Rank> b) {
  for (int i = 0; i < Rank; ++i)
    if (a.extents[i] != b.extents[i]) return false;
  return true;
}

/// Whether the view has exactly these extents.
template <class T, int Rank, std::convertible_to<Index>... I>
requires(sizeof...(I) == Rank) CHELA_HOST_DEVICE constexpr bool has_extents(TensorView<T, Rank> view, I... extents) {
  int axis = 0;
  return ((view.extents[axis++] == static_cast<Index>(extents)) && ...);
}

/// Whether the last axis is contiguous, or has at most one entry so that its stride is never used.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr bool unit_last_stride(TensorView<T, Rank> view) {
  return view.strides[Rank - 1] == 1 || view.extents[Rank - 1] <= 1;
}

/// Whether the view can be read: every extent is zero or more, and there is data unless it is empty.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr bool readable(TensorView<T, Rank> view) {
  for (Index extent : view.extents)
    if (extent < 0) return false;
  return view.present() || view.size() == 0;
}

/// Whether every element has a place of its own as far as one axis can tell: no broadcast axis that writes would collide on.
template <class T, int Rank>
CHELA_HOST_DEVICE constexpr bool writable(TensorView<T, Rank> view) {
  for (int a = 0; a < Rank && view.size() != 0; ++a)
    if (view.extents[a] > 1 && view.strides[a] == 0) return false;
  return readable(view);
}

}  // namespace chela
