#pragma once
// Taps of the kernel parameterisations of chela/conv/kernels.hpp, each written out for one tap, and the moving average as its
// recurrence.
#include <algorithm>
#include <cmath>

#include "chela/core/tensor.hpp"

namespace chela::reference {

inline void squash_taps(TensorView<const double, 2> weights, double threshold, TensorView<double, 2> taps) {
  for (Index d = 0; d < weights.extents[0]; ++d)
    for (Index j = 0; j < weights.extents[1]; ++j) {
      const double w = weights(d, j);
      taps(d, j) = std::copysign(std::max(std::abs(w) - threshold, 0.0), w);
    }
}

/// `weights` [scale, channel, width]; `norm` [channel], or absent for one.
inline void sgconv_taps(TensorView<const double, 3> weights, TensorView<const double, 1> norm, double decay,
                        TensorView<double, 2> taps) {
  const Index width = weights.extents[2];
  for (Index d = 0; d < taps.extents[0]; ++d)
    for (Index j = 0; j < taps.extents[1]; ++j) {
      Index scale = 0, begin = 0;  // the sub-kernel that holds tap j
      while (j >= begin + (width << scale)) begin += width << scale++;
      const double at = (double(j - begin) + 0.5) / double(Index(1) << scale) - 0.5;
      const double inside = std::clamp(at, 0.0, double(width - 1));
      const Index low = Index(std::floor(inside)), high = std::min(low + 1, width - 1);
      const double value =
          weights(scale, d, low) + (inside - double(low)) * (weights(scale, d, high) - weights(scale, d, low));
      taps(d, j) = std::pow(decay, double(scale)) * value / (norm.present() ? norm(d) : 1.0);
    }
}

/// Of the raw parameters alpha and delta.
inline double logistic(double a) { return 1 / (1 + std::exp(-a)); }

/// All parameters [channel, n]; alpha and delta raw.
inline void ema_taps(TensorView<const double, 2> alpha, TensorView<const double, 2> delta,
                     TensorView<const double, 2> beta, TensorView<const double, 2> eta, TensorView<double, 2> taps) {
  for (Index d = 0; d < taps.extents[0]; ++d)
    for (Index j = 0; j < taps.extents[1]; ++j) {
      taps(d, j) = 0;
      for (Index n = 0; n < alpha.extents[1]; ++n) {
        const double phi = 1 - logistic(alpha(d, n)) * logistic(delta(d, n));
        taps(d, j) += eta(d, n) * logistic(alpha(d, n)) * beta(d, n) * std::pow(phi, double(j));
      }
    }
}

/// x and y [batch, token, channel]; `state` [batch, channel, n] is read and written.
inline void ema(TensorView<const double, 3> x, TensorView<const double, 2> alpha, TensorView<const double, 2> delta,
                TensorView<const double, 2> beta, TensorView<const double, 2> eta, TensorView<double, 3> y,
                TensorView<double, 3> state) {
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index t = 0; t < x.extents[1]; ++t)
      for (Index d = 0; d < x.extents[2]; ++d) {
        y(b, t, d) = 0;
        for (Index n = 0; n < alpha.extents[1]; ++n) {
          const double a = logistic(alpha(d, n));
          state(b, d, n) = (1 - a * logistic(delta(d, n))) * state(b, d, n) + x(b, t, d);
          y(b, t, d) += eta(d, n) * a * beta(d, n) * state(b, d, n);
        }
      }
}

}  // namespace chela::reference
