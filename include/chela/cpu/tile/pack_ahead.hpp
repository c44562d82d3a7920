#pragma once
// Packing of the next tile inside the loop that computes on this one. A loop bound by its multiply-adds has loads, stores and
// issue slots to spare; and a head's rows are a few cache lines each, heads * dim elements apart, too short and too far for
// the hardware to see coming, so each copy also fetches what is to be copied one tile later.
#include <algorithm>

#include "chela/cpu/tile/register_rows.hpp"

namespace chela::cpu {

/// Some neighbouring registers of each row of a matrix to pack or to fetch, a row with each call.
template <class S>
struct ColumnCopy {
  using Packet = typename Eigen::internal::packet_traits<S>::type;
  const S* source = nullptr;  ///< null for nothing to do
  Index stride = 0;
  Index fetched = 0;  ///< registers to fetch if nothing is packed
  S* to = nullptr;    ///< null to fetch only
  Index to_stride = 0;
  Index to_next_register = 0;  ///< 0 if there is only one
  const S* factor = nullptr;   ///< null for nothing
  Index factor_stride = 0;
  Index ahead = 0;  ///< from what is packed to what is packed one tile later, and fetched

  CHELA_ALWAYS_INLINE void operator()() {
    constexpr Index lanes = Eigen::internal::packet_traits<S>::size;
    if (!source) return;
    if (to) {
      pack(source, to);
      if (to_next_register) pack(source + lanes, to + to_next_register);
      to += to_stride, factor += factor_stride;
    } else {
      for (Index i = 0; i < fetched; ++i) __builtin_prefetch(source + i * lanes, 0, 2);
    }
    source += stride;
  }

 private:
  CHELA_ALWAYS_INLINE void pack(const S* from, S* packed) const {
    using namespace Eigen::internal;
    __builtin_prefetch(from + ahead, 0, 2);
    Packet x = ploadu<Packet>(from);
    if (factor) x = pmul(x, pset1<Packet>(*factor));
    pstoreu(packed, x);
  }
};

/// Up to `capacity` matrices to pack or to fetch. The computing loop takes a column of registers at a time, `finish` does what is left.
template <class S>
class PackAhead {
 public:
  static constexpr int capacity = 8;

  /// Queues `source` [rows, count], to be packed into panels with zeros behind its columns, up to `columns` of them. `later` are the
  /// rows of the tile after that. What is not whole registers of the accumulator type is packed at once. Where `packed` is null that
  /// has been done already, and `later` is fetched.
  template <class T>
  void pack(TensorView<const T, 2> source, TensorView<const T, 2> later, RowFactors<S> factors, S* packed,
            Panels panels, Index columns) {
    if constexpr (std::is_same_v<T, S>) {
      if (packed && whole_registers<S>(source, columns)) {
        const Index ahead = later.present() ? later.data - source.data : 0;
        return queue({source.data, source.strides[0], source.extents[0], columns, ahead, packed, panels, factors});
      }
    }
    if (packed) pack_panels(source, factors, packed, panels, columns);
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

  /// Tells how many columns will be asked for: each is two registers wide if one were too few.
  void spread_over(Index columns) {
    Index registers = 0;
    for (int i = part_; i < count_; ++i)
      registers += parts_[i].packed ? parts_[i].width / lanes : ceil_div(parts_[i].width, most_fetched * lanes);
    most_packed_ = registers > columns ? 2 : 1;
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
  static constexpr Index most_fetched = 4;

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
    const Index registers = std::min(part.packed ? most_packed_ : most_fetched, (part.width - column_) / lanes);
    ColumnCopy<S> copy{part.source + column_, part.stride, registers};
    if (part.packed) {
      const Index at = part.panels.at(0, column_);
      copy.to = part.packed + at, copy.to_stride = part.panels.width;
      if (registers > 1) copy.to_next_register = part.panels.at(0, column_ + lanes) - at;
      copy.factor = part.factors.rows, copy.factor_stride = part.factors.stride;
      copy.ahead = part.ahead;
    }
    column_ += registers * lanes;
    if (column_ == part.width) ++part_, column_ = 0;
    return copy;
  }

  Part parts_[capacity];
  int count_ = 0, part_ = 0;
  Index column_ = 0, most_packed_ = 1;
};

/// For tiles that follow no other.
struct PackNothing {
  CHELA_ALWAYS_INLINE auto next(Index) const {
    return [] {};
  }
};

}  // namespace chela::cpu
