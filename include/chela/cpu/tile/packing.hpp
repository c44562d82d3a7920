#pragma once
// Rows of strided tensors in and out of packed tiles: contiguous, in the accumulator type, padded with zeros to whole
// registers. A head's rows lie heads * dim elements apart, often a power of two, so that unpacked they would fight over a
// handful of cache sets.
#include <Eigen/Core>
#include <type_traits>

#include "chela/core/element.hpp"
#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela::cpu {

/// A packed tile [rows, columns] as panels: runs of `width` columns, each with all of its rows together. What a block of registers
/// reads is then one stretch of memory. Where the rows of a tile are whole rows of a matrix, the parts that a block reads lie a row
/// apart, too far for the first-level cache to hold those of all rows.
struct Panels {
  Index rows, width;

  constexpr Index at(Index row, Index column) const { return (column / width * rows + row) * width + column % width; }
  /// Elements of a tile; its last panel may hold fewer columns than there is room for.
  constexpr Index size(Index columns) const { return rows * round_up(columns, width); }
};

namespace detail {

/// dst[0, padded) = factor * src[0, count), then zeros.
template <class T, class S>
CHELA_ALWAYS_INLINE void pack_row(const T* src, Index stride, Index count, S factor, S* dst, Index padded) {
  Index i = 0;
  if (stride == 1) {
    if constexpr (std::is_same_v<T, S>) {
      using Packet = typename Eigen::internal::packet_traits<S>::type;
      constexpr int lanes = Eigen::internal::packet_traits<S>::size;
      const Packet f = Eigen::internal::pset1<Packet>(factor);
      for (; i + lanes <= count; i += lanes)
        Eigen::internal::pstoreu(dst + i, Eigen::internal::pmul(Eigen::internal::ploadu<Packet>(src + i), f));
    }
    for (; i < count; ++i) dst[i] = factor * static_cast<S>(src[i]);
  }
  for (; i < count; ++i) dst[i] = factor * static_cast<S>(src[i * stride]);
  for (; i < padded; ++i) dst[i] = S(0);
}

/// dst[0, count) = src[0, count), converted.
template <class S, class T>
CHELA_ALWAYS_INLINE void unpack_row(const S* src, Index count, T* dst, Index stride) {
  Index i = 0;
  if (stride == 1) {
    if constexpr (std::is_same_v<T, S>) {
      using Packet = typename Eigen::internal::packet_traits<S>::type;
      constexpr int lanes = Eigen::internal::packet_traits<S>::size;
      for (; i + lanes <= count; i += lanes)
        Eigen::internal::pstoreu(dst + i, Eigen::internal::ploadu<Packet>(src + i));
    }
    for (; i < count; ++i) dst[i] = static_cast<T>(src[i]);
  }
  for (; i < count; ++i) dst[i * stride] = static_cast<T>(src[i]);
}

}  // namespace detail

/// Packs `source` [rows, count] times `factor` into rows of `padded` elements.
template <class T, class S>
void pack_rows(TensorView<const T, 2> source, S factor, S* packed, Index padded) {
  for (Index r = 0; r < source.extents[0]; ++r)
    detail::pack_row(source.data + r * source.strides[0], source.strides[1], source.extents[1], factor,
                     packed + r * padded, padded);
}

/// The reverse: the first columns of each packed row go to `target`.
template <class S, class T>
void unpack_rows(const S* packed, Index padded, TensorView<T, 2> target) {
  for (Index r = 0; r < target.extents[0]; ++r)
    detail::unpack_row(packed + r * padded, target.extents[1], target.data + r * target.strides[0], target.strides[1]);
}

}  // namespace chela::cpu
