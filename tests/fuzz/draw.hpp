#pragma once
// What a fuzzer's bytes are read as: numbers, and tensors of any strides with guarded memory around and between their
// elements.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "support/tensors.hpp"

namespace chela::test {

/// Choices, one byte each. Where no bytes are left all are 0, by convention the ordinary one.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  unsigned byte() { return at_ < size_ ? data_[at_++] : 0; }
  /// A number from 0 to most.
  Index upto(Index most) { return Index(byte()) % (most + 1); }
  /// True for one byte in n, never for 0.
  bool once_in(Index n) { return upto(n - 1) == n - 1; }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

/// Ends the run with what is wrong.
inline void demand(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

/// A tensor in memory of exactly the size that its strides need, so that a step outside is seen by the address
/// sanitizer; what lies between its elements keeps a value of its own.
template <class T, int Rank>
class Placed {
 public:
  Placed() = default;
  /// Axes in a drawn order, some padded, some reversed, and one in `broadcast_one_in` of stride 0.
  Placed(const std::array<Index, Rank>& extents, Bytes& bytes, Index broadcast_one_in) {
    std::array<int, Rank> order;
    std::iota(order.begin(), order.end(), 0);
    if (bytes.once_in(3)) std::swap(order[std::size_t(bytes.upto(Rank - 1))], order[std::size_t(bytes.upto(Rank - 1))]);
    Index size = 1, first = 0;
    for (int place = Rank - 1; place >= 0; --place) {
      const int axis = order[std::size_t(place)];
      const Index extent = extents[std::size_t(axis)];
      Index stride = size + (bytes.once_in(4) ? bytes.upto(2) : 0);
      if (bytes.once_in(6)) stride = -stride;
      if (bytes.once_in(broadcast_one_in)) stride = 0;
      view_.extents[axis] = extent, view_.strides[axis] = stride;
      const Index reach = std::max<Index>(extent - 1, 0) * std::abs(stride);
      if (stride < 0) first += reach;
      if (stride != 0) size = std::max(size + reach, std::abs(stride));
    }
    memory_.assign(std::size_t(size), guard());
    view_.data = memory_.data() + first;
  }
  Placed(const Placed&) = delete;
  Placed(Placed&&) = default;
  Placed& operator=(Placed&&) = default;

  TensorView<T, Rank> view() const { return view_; }
  bool present() const { return view_.present(); }
  /// Whether elements share their place.
  bool broadcast() const {
    bool shared = false;
    for (int axis = 0; axis < Rank; ++axis) shared = shared || (view_.extents[axis] > 1 && view_.strides[axis] == 0);
    return shared && view_.size() != 0;
  }
  operator TensorView<T, Rank>() const { return view_; }
  operator TensorView<const T, Rank>() const { return view_; }

  /// Every element from `value()`.
  template <class F>
  void fill(F&& value) {
    for_each_index(view_, [&](auto... i) { view_(i...) = T(value()); });
  }

  static T guard() { return T(-77777); }
  bool untouched() const {
    return std::all_of(memory_.begin(), memory_.end(), [](T x) { return x == guard(); });
  }
  /// Whether only elements of the tensor were written.
  bool guards_intact() const {
    std::vector<char> own(memory_.size(), 0);
    for_each_index(view_, [&](auto... i) { own[std::size_t(&view_(i...) - memory_.data())] = 1; });
    for (std::size_t i = 0; i < memory_.size(); ++i)
      if (!own[i] && memory_[i] != guard()) return false;
    return true;
  }

 private:
  std::vector<T> memory_;
  TensorView<T, Rank> view_ = {};
};

}  // namespace chela::test
