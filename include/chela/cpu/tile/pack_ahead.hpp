#pragma once
// Packing of the next tile inside the loop that computes on this one. A loop bound by its multiply-adds has loads, stores and
// issue slots to spare; and a head's rows are a few cache lines each, heads * dim elements apart, too short and too far for
// the hardware to see coming, so each copy also fetches what is to be copied one tile later.
#include <algorithm>
#include <utility>

#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

/// What packed rows are multiplied by: row t by rows[t * stride].
template <class S>
struct RowFactors {
  const S* rows = nullptr;  ///< null for nothing
  Index stride = 0;
};

/// Packs at once.
template <class T, class S>
void pack_panels(TensorView<const T, 2> source, RowFactors<S> factors, S* packed, Panels panels, Index columns) {
  for (Index r = 0; r < source.extents[0]; ++r) {
    const S factor = factors.rows ? factors.rows[r * factors.stride] : S(1);
    for (Index c = 0; c < columns; c += panels.width)
      detail::pack_row(&source.data[r * source.strides[0] + c * source.strides[1]], source.strides[1],
                       std::clamp<Index>(source.extents[1] - c, 0, panels.width), factor, packed + panels.at(r, c),
                       panels.width);
  }
}

/// Whether rows are whole registers of S, which can be read where they are.
template <class S, class T>
bool whole_registers(TensorView<T, 2> rows, Index columns) {
  constexpr Index lanes = Eigen::internal::packet_traits<S>::size;
  return std::is_same_v<std::remove_const_t<T>, S> && rows.strides[1] == 1 && rows.extents[1] == columns &&
         columns % lanes == 0;
}

/// Where registers of columns begin: rows of a matrix, or of a packed tile.
template <class S>
struct RegisterColumns {
  const S* data;
  Index row_stride, panel_width, panel_stride;

  const S* begin(Index column) const { return data + column / panel_width * panel_stride + column % panel_width; }
};

/// Rows where they are if they are whole registers, or else packed.
template <class T, class S>
RegisterColumns<S> pack_or_view(TensorView<const T, 2> rows, S* packed, Panels panels, Index columns) {
  if constexpr (std::is_same_v<T, S>)
    if (whole_registers<S>(rows, columns)) return {rows.data, rows.strides[0], panels.width, panels.width};
  pack_panels(rows, RowFactors<S>{}, packed, panels, columns);
  return {packed, panels.width, panels.width, panels.rows * panels.width};
}

/// One register of each row of a matrix, to pack or to fetch, a row with each call.
template <class S>
struct ColumnCopy {
  using Packet = typename Eigen::internal::packet_traits<S>::type;
  const S* source = nullptr;  ///< null for nothing to do
  Index stride = 0, ahead = 0;
  S* to = nullptr;  ///< null to fetch only
  Index to_stride = 0;
  const S* factor = nullptr;  ///< null for nothing
  Index factor_stride = 0;

  CHELA_ALWAYS_INLINE void operator()() {
    using namespace Eigen::internal;
    if (!source) return;
    __builtin_prefetch(source + ahead, 0, 2);
    if (to) {
      Packet x = ploadu<Packet>(source);
      if (factor) x = pmul(x, pset1<Packet>(*factor));
      pstoreu(to, x);
      to += to_stride;
    }
    source += stride, factor += factor_stride;
  }
};

/// Up to `capacity` matrices to pack or to fetch. The computing loop takes a column of registers at a time, `finish` does what is left.
template <class S>
class PackAhead {
 public:
  static constexpr int capacity = 8;

  /// Queues `source` [rows, count], to be packed into panels with zeros behind its columns, up to `columns` of them. `later` are the
  /// rows of the tile after that. What is not whole registers of the accumulator type is packed at once.
  template <class T>
  void pack(TensorView<const T, 2> source, TensorView<const T, 2> later, RowFactors<S> factors, S* packed,
            Panels panels, Index columns) {
    if constexpr (std::is_same_v<T, S>) {
      if (whole_registers<S>(source, columns)) {
        const Index ahead = later.present() ? later.data - source.data : 0;
        return queue({source.data, source.strides[0], source.extents[0], columns, ahead, packed, panels, factors});
      }
    }
    pack_panels(source, factors, packed, panels, columns);
    if (later.present()) fetch(later);
  }

  /// Queues rows that are only brought near, to be read or written by others. Those that are not whole registers are left to
  /// the hardware.
  template <class T>
  void fetch(TensorView<T, 2> rows) {
    constexpr Index unit = sizeof(S), size = sizeof(T);
    const Index stride = rows.strides[0] * size, width = rows.extents[1] * size;
    if (rows.strides[1] == 1 && stride % unit == 0 && width % (lanes * unit) == 0)
      queue({reinterpret_cast<const S*>(rows.data), stride / unit, rows.extents[0], width / unit, 0, nullptr, {}, {}});
  }

  /// The next column, or nothing if none has so many rows.
  ColumnCopy<S> next(Index rows) {
    if (part_ == count_ || parts_[part_].rows != rows) return {};
    return take();
  }

  void finish() {
    while (part_ < count_) {
      const Index rows = parts_[part_].rows;
      ColumnCopy<S> copy = take();
      for (Index r = 0; r < rows; ++r) copy();
    }
    part_ = count_ = 0;
  }

 private:
  static constexpr Index lanes = Eigen::internal::packet_traits<S>::size;

  struct Part {
    const S* source;
    Index stride, rows, width;
    Index ahead;  ///< from a row to that of the tile after
    S* packed;    ///< null to fetch only
    Panels panels;
    RowFactors<S> factors;
  };

  void queue(const Part& part) {
    if (part.rows > 0 && part.width > 0 && count_ < capacity) parts_[count_++] = part;
  }
  ColumnCopy<S> take() {
    const Part& part = parts_[part_];
    const Index column = std::exchange(column_, column_ + lanes);
    if (column_ == part.width) ++part_, column_ = 0;
    ColumnCopy<S> copy{part.source + column, part.stride, part.ahead};
    if (part.packed) copy.to = part.packed + part.panels.at(0, column), copy.to_stride = part.panels.width;
    copy.factor = part.factors.rows, copy.factor_stride = part.factors.stride;
    return copy;
  }

  Part parts_[capacity];
  int count_ = 0, part_ = 0;
  Index column_ = 0;
};

/// For tiles that follow no other.
struct PackNothing {
  CHELA_ALWAYS_INLINE auto next(Index) const {
    return [] {};
  }
};

}  // namespace chela::cpu
