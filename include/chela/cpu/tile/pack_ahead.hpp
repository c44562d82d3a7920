#pragma once
// Packing of the next tile inside the loop that computes on this one. A loop bound by its multiply-adds has loads, stores and
// issue slots to spare; and a head's rows are a few cache lines each, heads * dim elements apart, too short and too far for
// the hardware to see coming, so each copy also fetches what is to be copied one tile later.
#include <algorithm>

#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

/// What packed rows are multiplied by: row t by rows[t * row_stride], or, if `by_element`, by rows[t * columns + ...].
template <class S>
struct RowFactors {
  const S* rows = nullptr;  ///< null for nothing
  Index row_stride = 0;
  bool by_element = false;
};

/// Up to `capacity` matrices to pack or to fetch, a register at a time: the computing loop calls it, `finish` does what is left.
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
      if (source.strides[1] == 1 && source.extents[1] == columns && columns % lanes == 0) {
        const Index ahead = later.present() ? later.data - source.data : 0;
        return queue({source.data, source.strides[0], source.extents[0], columns, ahead, packed, panels, factors});
      }
    }
    pack_now(source, factors, packed, panels, columns);
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

  /// Tells in how many calls all should be done: each takes two registers if one were far too few.
  void spread_over(Index calls) { twice_ = 4 * registers_ > 5 * calls; }

  /// Packs or fetches the next registers, if any are left.
  CHELA_ALWAYS_INLINE void operator()() {
    if (!source_) return;
    take_register();
    if (twice_ && source_) take_register();
  }

  void finish() {
    while (source_) take_register();
    part_ = count_ = registers_ = 0;
  }

 private:
  using Packet = typename Eigen::internal::packet_traits<S>::type;
  static constexpr Index lanes = Eigen::internal::packet_traits<S>::size;

  struct Part {
    const S* source;
    Index stride, rows, width;
    Index ahead;  ///< from a row to that of the tile after
    S* packed;    ///< null to fetch only
    Panels panels;
    RowFactors<S> factors;
  };

  CHELA_ALWAYS_INLINE void take_register() {
    using namespace Eigen::internal;
    __builtin_prefetch(source_ + ahead_, 0, 2);
    if (to_) {
      Packet x = ploadu<Packet>(source_);
      if (factor_) x = pmul(x, by_element_ ? ploadu<Packet>(factor_) : pset1<Packet>(*factor_));
      if (by_element_) factor_ += lanes;
      pstoreu(to_, x);
      to_ += lanes;
      if (to_ == panel_end_) next_panel();
    }
    source_ += lanes;
    if (source_ == row_end_) next_row();
  }

  void queue(const Part& part) {
    if (part.rows == 0 || part.width == 0 || count_ == capacity) return;
    parts_[count_++] = part;
    registers_ += part.rows * (part.width / lanes);
    if (count_ == 1) begin_part();
  }
  void begin_part() {
    const Part& part = parts_[part_];
    source_ = part.source, row_end_ = source_ + part.width, ahead_ = part.ahead;
    factor_ = part.factors.rows, by_element_ = part.factors.by_element;
    begin_row(part, part.packed);
  }
  void begin_row(const Part& part, S* packed) { to_ = packed_row_ = packed, panel_end_ = packed + part.panels.width; }
  void next_panel() {
    const Part& part = parts_[part_];
    to_ += (part.panels.rows - 1) * part.panels.width, panel_end_ = to_ + part.panels.width;
  }
  void next_row() {
    Part& part = parts_[part_];
    if (--part.rows == 0) {
      source_ = nullptr;
      if (++part_ < count_) begin_part();
      return;
    }
    source_ += part.stride - part.width, row_end_ += part.stride;
    if (to_) begin_row(part, packed_row_ + part.panels.width);
    if (!by_element_) factor_ += part.factors.row_stride;
  }

  template <class T>
  static void pack_now(TensorView<const T, 2> source, RowFactors<S> factors, S* packed, Panels panels, Index columns) {
    for (Index r = 0; r < source.extents[0]; ++r) {
      const S factor = factors.rows && !factors.by_element ? factors.rows[r * factors.row_stride] : S(1);
      for (Index c = 0; c < columns; c += panels.width) {
        S* to = packed + panels.at(r, c);
        detail::pack_row(&source.data[r * source.strides[0] + c * source.strides[1]], source.strides[1],
                         std::clamp<Index>(source.extents[1] - c, 0, panels.width), factor, to, panels.width);
        const Index count = std::min(panels.width, columns - c);
        for (Index i = 0; factors.by_element && i < count; ++i) to[i] *= factors.rows[r * columns + c + i];
      }
    }
  }

  Part parts_[capacity];
  int count_ = 0, part_ = 0;
  Index registers_ = 0;
  bool twice_ = false;
  // Where packing has come to; `source_` is null when all is done.
  const S *source_ = nullptr, *row_end_ = nullptr, *factor_ = nullptr;
  S *to_ = nullptr, *panel_end_ = nullptr, *packed_row_ = nullptr;
  Index ahead_ = 0;
  bool by_element_ = false;
};

}  // namespace chela::cpu
