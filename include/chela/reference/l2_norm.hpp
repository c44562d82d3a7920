#pragma once
// Rows of unit length by their equations, in double; math in chela/attention/l2_norm.hpp. All [batch, token, head,
// dim].
#include <cmath>

#include "chela/core/tensor_view.hpp"

namespace chela::reference {

namespace detail {

inline double row_length(TensorView<const double, 4> x, Index b, Index t, Index h, double epsilon) {
  double square = epsilon;
  for (Index i = 0; i < x.extents[3]; ++i) square += x(b, t, h, i) * x(b, t, h, i);
  return std::sqrt(square);
}

}  // namespace detail

inline void l2_norm(TensorView<const double, 4> x, double epsilon, TensorView<double, 4> y) {
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index t = 0; t < x.extents[1]; ++t)
      for (Index h = 0; h < x.extents[2]; ++h) {
        const double length = detail::row_length(x, b, t, h, epsilon);
        for (Index i = 0; i < x.extents[3]; ++i) y(b, t, h, i) = x(b, t, h, i) / length;
      }
}

inline void l2_norm_backward(TensorView<const double, 4> x, double epsilon, TensorView<const double, 4> grad_y,
                             TensorView<double, 4> grad_x) {
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index t = 0; t < x.extents[1]; ++t)
      for (Index h = 0; h < x.extents[2]; ++h) {
        const double length = detail::row_length(x, b, t, h, epsilon);
        double along = 0;
        for (Index i = 0; i < x.extents[3]; ++i) along += x(b, t, h, i) / length * grad_y(b, t, h, i);
        for (Index i = 0; i < x.extents[3]; ++i)
          grad_x(b, t, h, i) = (grad_y(b, t, h, i) - x(b, t, h, i) / length * along) / length;
      }
}

}  // namespace chela::reference
