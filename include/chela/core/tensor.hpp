#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <new>

#include "chela/core/large_pages.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// An owned row-major host array, 64-byte aligned and filled at birth. Operators take views; this is for those who call
/// them: tests, examples, activations kept for a backward pass.
template <class T, int Rank>
class Tensor {
 public:
  Tensor() = default;

  template <std::convertible_to<Index>... I>
  requires(sizeof...(I) == Rank) explicit Tensor(I... extents)
      : Tensor(std::array<Index, Rank>{static_cast<Index>(extents)...}) {}

  explicit Tensor(const std::array<Index, Rank>& extents, T fill = T(0)) {
    Index stride = 1;
    for (int a = Rank - 1; a >= 0; --a) {
      view_.extents[a] = extents[a];
      view_.strides[a] = stride;
      stride *= extents[a];
    }
    const std::size_t bytes = sizeof(T) * std::size_t(std::max<Index>(stride, 1));
    memory_.reset(static_cast<T*>(::operator new(bytes, alignment)));
    detail::prefer_large_pages(memory_.get(), bytes);
    view_.data = memory_.get();
    std::uninitialized_fill_n(view_.data, stride, fill);
  }

  Tensor(const Tensor& other) : Tensor(other.extents()) { std::copy(other.begin(), other.end(), begin()); }
  Tensor(Tensor&& other) noexcept : view_(other.view_), memory_(std::move(other.memory_)) { other.view_ = {}; }
  Tensor& operator=(Tensor other) noexcept {
    std::swap(view_, other.view_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Tensor() = default;

  TensorView<T, Rank> view() { return view_; }
  TensorView<const T, Rank> view() const { return view_; }
  operator TensorView<T, Rank>() { return view_; }
  operator TensorView<const T, Rank>() const { return view_; }

  template <class... I>
  T& operator()(I... i) {
    return view_(i...);
  }
  template <class... I>
  const T& operator()(I... i) const {
    return view_(i...);
  }

  std::array<Index, Rank> extents() const {
    std::array<Index, Rank> copy;
    std::copy(std::begin(view_.extents), std::end(view_.extents), copy.begin());
    return copy;
  }
  Index size() const { return view_.size(); }
  T* data() { return view_.data; }
  const T* data() const { return view_.data; }
  T* begin() { return view_.data; }
  T* end() { return view_.data + size(); }
  const T* begin() const { return view_.data; }
  const T* end() const { return view_.data + size(); }
  void fill(T value) { std::fill(begin(), end(), value); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  TensorView<T, Rank> view_;
  std::unique_ptr<T, Free> memory_;
};

/// A tensor of T with the extents of a view.
template <class T, class U, int Rank>
Tensor<T, Rank> tensor_like(TensorView<U, Rank> view) {
  return Tensor<T, Rank>(std::to_array(view.extents));
}

}  // namespace chela
