#pragma once
// Rows of unit length, for the queries and keys of the delta rule (DeltaNet, arXiv 2406.06484, section 3.3):
//
//   n = sqrt(sum_i x_i^2 + epsilon)       y = x / n
//   dx = (dy - y (y . dy)) / n
//
// over the last axis of [batch, token, head, dim]. A row of zeros gives zeros. Squares may leave the range of the
// accumulator: such a row is measured relative to its largest entry.
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Inputs and outputs of one forward pass; any strides.
template <Element T>
struct L2NormArgs {
  TensorView<const T, 4> x = {};  ///< [batch, token, head, dim]
  TensorView<T, 4> y = {};        ///< like x; may be x's memory if no backward pass follows
  double epsilon = 1e-6;          ///< in the square of x's unit
};

/// Gradient of the same pass; n and y are computed again from x.
template <Element T>
struct L2NormBackwardArgs {
  TensorView<const T, 4> x = {};       ///< as in the forward pass
  TensorView<const T, 4> grad_y = {};  ///< like x
  TensorView<T, 4> grad_x = {};        ///< like x; may be grad_y's memory
  double epsilon = 1e-6;               ///< as in the forward pass
};

namespace detail {

template <class T>
constexpr Status check_l2_norm(TensorView<const T, 4> x, double epsilon) {
  return first_failure(require(readable(x), Code::bad_shape, "x needs data and extents of zero or more"),
                       require(Accumulator<T>(epsilon) > 0, Code::bad_value,
                               "epsilon must be positive in the accumulator type, as 1e-6: a row may be all zero"));
}

}  // namespace detail

/// Refuses arguments that do not fit together; both backends call it first.
template <Element T>
constexpr Status check(const L2NormArgs<T>& a) {
  return first_failure(detail::check_l2_norm(a.x, a.epsilon),
                       require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
                               "y must have the extents of x [batch, token, head, dim], data and no broadcast axes"));
}

template <Element T>
constexpr Status check(const L2NormBackwardArgs<T>& a) {
  return first_failure(detail::check_l2_norm(a.x, a.epsilon),
                       require(same_extents(a.grad_y, a.x) && readable(a.grad_y), Code::bad_shape,
                               "grad_y must have the extents of x [batch, token, head, dim], and data"),
                       require(same_extents(a.grad_x, a.x) && writable(a.grad_x), Code::bad_shape,
                               "grad_x must have the extents of x, data and no broadcast axes"));
}

}  // namespace chela
