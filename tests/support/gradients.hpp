#pragma once
// Hand-written gradients against central differences in double.
#include <cmath>
#include <functional>

#include "support/tensors.hpp"

namespace chela::test {

/// The relative error (Euclidean norm over all elements) of `gradient` against central differences of `loss` with respect to
/// `input`, which is perturbed in place and restored. `loss` must be smooth; give it as a fixed random weighting of outputs.
template <int Rank>
double gradient_error(const std::function<double()>& loss, TensorView<double, Rank> input,
                      TensorView<const double, Rank> gradient, double step = 1e-5) {
  double difference = 0, norm = 0;
  for_each_index(input, [&](auto... i) {
    const double kept = input(i...);
    input(i...) = kept + step;
    const double above = loss();
    input(i...) = kept - step;
    const double below = loss();
    input(i...) = kept;
    const double numeric = (above - below) / (2 * step);
    difference += (gradient(i...) - numeric) * (gradient(i...) - numeric);
    norm += numeric * numeric;
  });
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

/// sum_i weight_i * output_i: a scalar loss whose gradient with respect to the output is `weight`.
template <int Rank>
double weighted_sum(TensorView<const double, Rank> output, TensorView<const double, Rank> weight) {
  double sum = 0;
  for_each_index(output, [&](auto... i) { sum += output(i...) * weight(i...); });
  return sum;
}

}  // namespace chela::test
