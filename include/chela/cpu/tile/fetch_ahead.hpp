#pragma once
// Software prefetch of strided rows. A head's rows are a few cache lines each, heads * dim elements apart: too short and too
// far for the hardware to see coming, so a pass fetches the next tile while it computes on this one.
#include <cstdint>

#include "chela/core/tensor_view.hpp"

namespace chela::cpu {

/// Walks the cache lines of up to `capacity` matrices in order, one line per call.
class FetchAhead {
 public:
  static constexpr int capacity = 4;

  /// Queues the rows of a matrix. Rows that are not contiguous are left to the hardware.
  template <class T>
  void add(TensorView<T, 2> rows) {
    if (!unit_last_stride(rows) || rows.size() == 0 || count_ == capacity) return;
    parts_[count_++] = {reinterpret_cast<std::uintptr_t>(rows.data), std::uintptr_t(rows.strides[0]) * sizeof(T),
                        std::uintptr_t(rows.extents[1]) * sizeof(T), rows.extents[0]};
    if (count_ == 1) begin_row(parts_[0].row);
  }

  void operator()() {
    if (part_ == count_) return;
    __builtin_prefetch(reinterpret_cast<const void*>(line_), 0, 3);
    line_ += line_bytes;
    if (line_ < row_end_) return;
    Part& part = parts_[part_];
    part.row += part.row_stride;
    if (--part.rows_left == 0 && ++part_ == count_) return;
    begin_row(parts_[part_].row);
  }

 private:
  static constexpr std::uintptr_t line_bytes = 64;
  struct Part {
    std::uintptr_t row, row_stride, row_bytes;
    Index rows_left;
  };

  void begin_row(std::uintptr_t row) {
    line_ = row / line_bytes * line_bytes;
    row_end_ = row + parts_[part_].row_bytes;
  }

  Part parts_[capacity];
  int count_ = 0, part_ = 0;
  std::uintptr_t line_ = 0, row_end_ = 0;
};

/// For tiles that follow no other.
struct FetchNothing {
  void operator()() const {}
};

}  // namespace chela::cpu
