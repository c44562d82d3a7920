#pragma once
// Branches as they are trained: each convolves the input by itself, is normalised, and adds to the output.
#include <cmath>

#include "chela/core/tensor_view.hpp"

namespace chela::reference {

/// Adds gain (taps * x - mean) / sqrt(variance + eps) + offset to y; shapes as in chela/conv/branches.hpp. Absent gain
/// is 1, absent offset 0, absent mean no norm.
inline void add_branch(TensorView<const double, 3> x, TensorView<const double, 2> taps,
                       TensorView<const double, 1> mean, TensorView<const double, 1> variance,
                       TensorView<const double, 1> gain, TensorView<const double, 1> offset, double eps,
                       TensorView<double, 3> y) {
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index t = 0; t < x.extents[1]; ++t)
      for (Index d = 0; d < x.extents[2]; ++d) {
        double value = 0;
        for (Index j = 0; j < taps.extents[1] && j <= t; ++j) value += taps(d, j) * x(b, t - j, d);
        if (mean.present()) {
          value = (value - mean(d)) / std::sqrt(variance(d) + eps);
          if (gain.present()) value *= gain(d);
          if (offset.present()) value += offset(d);
        }
        y(b, t, d) += value;
      }
}

}  // namespace chela::reference
