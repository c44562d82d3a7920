#pragma once
// The one rule for how close is close enough: a function of the element type and of how many terms were summed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "chela/core/index.hpp"

namespace chela::test {

/// Unit roundoff of values stored as T. 16-bit types are told apart by what survives a round trip.
template <class T>
double unit_roundoff() {
  if constexpr (std::is_floating_point_v<T>) {
    return double(std::numeric_limits<T>::epsilon()) / 2;
  } else {
    double u = 0.5;  // halved until 1 + u is no longer seen
    while (static_cast<float>(T(1.0f + static_cast<float>(u))) != 1.0f) u /= 2;
    return u;
  }
}

/// Largest relative root-mean-square error allowed against a double reference on the same (rounded) inputs. Storage rounds
/// each output once; a sum of n terms in the accumulator adds about sqrt(n) roundoffs of random sign.
template <class T>
double tolerance(Index summed_terms) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const double storage = std::is_floating_point_v<T> ? 0.0 : unit_roundoff<T>();
  return storage + 4 * unit_roundoff<Sum>() * (2 + std::sqrt(double(std::max<Index>(summed_terms, 1))));
}

/// The same where operands of products are rounded to T on the way (scores, states, weighted values), as on tensor
/// cores: each of these roundings and that of the output have random sign and about 0.4 roundoffs, and two of them meet
/// in an output.
template <class T>
double tensor_core_tolerance() {
  return 0.75 * unit_roundoff<T>();
}

/// Over a bidirectional span with a decay the outputs of one direction are rounded, too, before the other's are added. 0.003
/// with bfloat16.
template <class T>
double tensor_core_two_way_tolerance() {
  return 0.768 * unit_roundoff<T>();
}

/// Likewise for gradients: parts of heads that share are rounded before they are summed. The gradient of a log-decay is a
/// sum along as many as a thousand tokens, whose roundings it gathers.
template <class T>
double tensor_core_gradient_tolerance() {
  return 1.25 * unit_roundoff<T>();
}
template <class T>
double tensor_core_decay_gradient_tolerance() {
  return 2.5 * unit_roundoff<T>();
}

/// Float data whose operands tensor cores round to 10 bits behind the point.
inline double tf32_tolerance() { return 0.75 / 1024; }

/// The absolute error that an element may have besides, where it is a sum over a chunk of 64 tokens that begins with a
/// strong decay: operands weighted to less than T's smallest number, 2^-24 in half precision, are lost.
template <class T>
double tensor_core_flushed() {
  double least = 1;
  while (static_cast<float>(T(static_cast<float>(least / 2))) != 0.0f) least /= 2;
  return 64 * least;
}

/// Long convolutions on a GPU: 16-bit data may pass through transforms with 16-bit intermediate results, floats through
/// transforms in float.
template <class T>
double long_conv_tolerance() {
  return std::is_floating_point_v<T> ? 2e-6 : 0.004;
}

/// Gradients of a short convolution before such a long one: that of the activation between them is rounded to T on its
/// way back.
template <class T>
double short_long_conv_gradient_tolerance() {
  return std::is_floating_point_v<T> ? 4e-6 : 0.006;
}

/// Largest relative error of a hand-written gradient against central differences in double.
inline constexpr double gradient_tolerance = 1e-6;

}  // namespace chela::test
