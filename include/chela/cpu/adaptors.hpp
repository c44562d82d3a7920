#pragma once
// Views of arrays that the caller already has, and Eigen maps of views. Nothing is copied in either direction, and what could
// not be written to before cannot be written to through the result.
//
//   as_view(matrix)        Eigen matrix, array, map, block or transpose: [row, column]; [entry] if it is a vector by its type
//   as_view(range)         span, vector, array: [entry]
//   as_view(range, r, c)   the same memory as r rows of c entries each
//   as_eigen(view)         Eigen::Map of a view of rank 1 or 2
#include <Eigen/Core>
#include <cassert>
#include <concepts>
#include <ranges>
#include <span>
#include <type_traits>

#include "chela/core/element.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu {

namespace detail {

template <class D>
concept EigenDense = std::derived_from<std::remove_cvref_t<D>, Eigen::DenseBase<std::remove_cvref_t<D>>>;

/// Whether the memory outlives the object: a map or a block may be a temporary, a matrix may not.
template <class D>
concept OutlivesCall = std::is_lvalue_reference_v<D> ||
    !std::derived_from<std::remove_cvref_t<D>, Eigen::PlainObjectBase<std::remove_cvref_t<D>>>;

template <class D>
concept EigenView = EigenDense<D> && OutlivesCall<D> && Element<typename std::remove_cvref_t<D>::Scalar> &&
    bool(std::remove_cvref_t<D>::Flags& Eigen::DirectAccessBit);

template <class R>
concept ElementRange = std::ranges::contiguous_range<R> && std::ranges::sized_range<R> &&
                       std::ranges::borrowed_range<R> && !EigenDense<R> &&
                       Element<std::ranges::range_value_t<R>>;

template <class T, int Columns, int Options>
using EigenLike =
    std::conditional_t<std::is_const_v<T>, const Eigen::Matrix<std::remove_const_t<T>, -1, Columns, Options>,
                       Eigen::Matrix<T, -1, Columns, Options>>;

}  // namespace detail

/// Any strides and either storage order; rank 1 if the type has one row or one column, else rank 2.
template <detail::EigenView D>
auto as_view(D&& dense) {
  using T = std::remove_pointer_t<decltype(dense.data())>;
  if constexpr (std::remove_cvref_t<D>::IsVectorAtCompileTime) {
    return TensorView<T, 1>{dense.data(), {dense.size()}, {dense.innerStride()}};
  } else {
    return TensorView<T, 2>{dense.data(), {dense.rows(), dense.cols()}, {dense.rowStride(), dense.colStride()}};
  }
}

template <detail::ElementRange R>
auto as_view(R&& range) {
  return contiguous(std::ranges::data(range), std::ranges::ssize(range));
}

/// Row-major; the range must hold rows * columns elements at least.
template <detail::ElementRange R>
auto as_view(R&& range, Index rows, Index columns) {
  assert(rows >= 0 && columns >= 0 && rows * columns <= Index(std::ranges::ssize(range)));
  return contiguous(std::ranges::data(range), rows, columns);
}

/// Strides of zero or more.
template <Element T>
auto as_eigen(TensorView<T, 1> view) {
  using Stride = Eigen::InnerStride<>;
  return Eigen::Map<detail::EigenLike<T, 1, Eigen::ColMajor>, Eigen::Unaligned, Stride>(view.data, view.extents[0],
                                                                                        Stride(view.strides[0]));
}

template <Element T>
auto as_eigen(TensorView<T, 2> view) {
  using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  return Eigen::Map<detail::EigenLike<T, Eigen::Dynamic, Eigen::RowMajor>, Eigen::Unaligned, Stride>(
      view.data, view.extents[0], view.extents[1], Stride(view.strides[0], view.strides[1]));
}

}  // namespace chela::cpu
