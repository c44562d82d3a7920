#pragma once
// Problems to compute on: random inputs, outputs that start as NaN, and the distance between two answers.
#include <cmath>
#include <limits>
#include <random>

#include "chela/core/tensor.hpp"

namespace chela::test {

/// Calls f(index...) once for each element of a view, last axis fastest.
template <class T, int Rank, class F, class... I>
void for_each_index(const TensorView<T, Rank>& view, F&& f, I... index) {
  if constexpr (sizeof...(I) == Rank) {
    f(index...);
  } else {
    for (Index i = 0; i < view.extents[sizeof...(I)]; ++i) for_each_index(view, f, index..., i);
  }
}

/// Uniform in [low, high), the same on every run. Rounded to T, so a double reference sees exactly what the operator sees.
template <class T, int Rank>
void fill_random(TensorView<T, Rank> view, unsigned seed, double low = -1, double high = 1) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  for_each_index(view, [&](auto... i) { view(i...) = T(static_cast<float>(uniform(generator))); });
}

template <class T, class... I>
Tensor<T, sizeof...(I)> random_tensor(unsigned seed, I... extents) {
  Tensor<T, sizeof...(I)> tensor(std::array<Index, sizeof...(I)>{Index(extents)...});
  fill_random(tensor.view(), seed);
  return tensor;
}

/// For outputs: an element that nobody wrote stays NaN and fails every comparison.
template <class T, class... I>
Tensor<T, sizeof...(I)> nan_tensor(I... extents) {
  return Tensor<T, sizeof...(I)>(std::array<Index, sizeof...(I)>{Index(extents)...},
                                 T(std::numeric_limits<float>::quiet_NaN()));
}

/// A copy with every element converted, for handing the operator's inputs to a double reference.
template <class To, class From, int Rank>
Tensor<To, Rank> converted(TensorView<From, Rank> view) {
  std::array<Index, Rank> extents;
  std::copy(std::begin(view.extents), std::end(view.extents), extents.begin());
  Tensor<To, Rank> out(extents);
  for_each_index(view, [&](auto... i) { out(i...) = static_cast<To>(view(i...)); });
  return out;
}

/// |got - want| / |want| over all elements (Euclidean norms); |got| where want is zero. NaN anywhere in got gives NaN.
template <class A, class B, int Rank>
double relative_error(TensorView<A, Rank> got, TensorView<B, Rank> want) {
  double difference = 0, norm = 0;
  for_each_index(got, [&](auto... i) {
    const double g = static_cast<double>(got(i...)), w = static_cast<double>(want(i...));
    difference += (g - w) * (g - w);
    norm += w * w;
  });
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

template <class A, class B, int Rank>
double relative_error(const Tensor<A, Rank>& got, const Tensor<B, Rank>& want) {
  return relative_error(got.view(), want.view());
}

}  // namespace chela::test
