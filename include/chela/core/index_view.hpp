#pragma once
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "chela/core/tensor_view.hpp"

namespace chela {

/// A borrowed array of 32- or 64-bit integers, whichever the caller has: offsets of packed sequences, slots of a pool.
class IndexView {
 public:
  constexpr IndexView() = default;

  template <class I>
  requires std::same_as<std::remove_const_t<I>, std::int32_t> || std::same_as<std::remove_const_t<I>, std::int64_t>
      CHELA_HOST_DEVICE constexpr IndexView(TensorView<I, 1> x) : IndexView(x.data, x.extents[0], x.strides[0]) {}
  CHELA_HOST_DEVICE constexpr IndexView(const std::int32_t* data, Index size, Index stride = 1)
      : narrow_(data), size_(size), stride_(stride) {}
  CHELA_HOST_DEVICE constexpr IndexView(const std::int64_t* data, Index size, Index stride = 1)
      : wide_(data), size_(size), stride_(stride) {}

  CHELA_HOST_DEVICE constexpr bool present() const { return narrow_ || wide_; }
  CHELA_HOST_DEVICE constexpr Index size() const { return size_; }
  CHELA_HOST_DEVICE constexpr Index operator[](Index i) const {
    return wide_ ? Index(wide_[i * stride_]) : Index(narrow_[i * stride_]);
  }

 private:
  const std::int32_t* narrow_ = nullptr;
  const std::int64_t* wide_ = nullptr;
  Index size_ = 0, stride_ = 1;
};

}  // namespace chela
