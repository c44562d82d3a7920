#pragma once
// Modules under test: parameters in a buffer of their own, and an executor whose tasks run in another order.
#include "chela/block/parameters.hpp"
#include "chela/core/executor.hpp"
#include "support/tensors.hpp"

namespace chela::test {

/// Parameters or gradients of a module.
template <class Module, class T>
struct Owned {
  Tensor<T, 1> values;
  typename Module::Shape shape;

  explicit Owned(const typename Module::Shape& s, T fill = std::numeric_limits<T>::quiet_NaN())
      : values({parameter_count<Module>(s)}, fill), shape(s) {}
  static Owned random(const typename Module::Shape& s, unsigned seed) {
    Owned owned(s, T(0));
    fill_random(owned.values.view(), seed);
    return owned;
  }
  auto write() { return bind_parameters<Module, T>(shape, values.data()); }
  auto read() const { return bind_parameters<Module, const T>(shape, values.data()); }
};

/// Uniform in [-size, size); scales and gains around 1, as they begin: attention outputs far below the epsilon of their
/// norm would bend so sharply that finite differences fail.
template <class Module, class T>
Owned<Module, T> random_parameters(const typename Module::Shape& s, unsigned seed, double size = 0.6) {
  auto p = Owned<Module, T>::random(s, seed);
  for (T& value : p.values) value *= T(size);
  for (const ParameterInfo& leaf : describe_parameters<Module>(s))
    if (leaf.name.ends_with("_scale") || leaf.name.ends_with("gain"))
      for (Index i = 0; i < leaf.count(); ++i) p.values(leaf.offset + i) += T(1);
  return p;
}

/// As `n` workers would do it, last task first: results must be the bits of SerialExecutor.
struct BackwardsExecutor {
  int n = 3;
  int workers() const { return n; }
  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index task = tasks - 1; task >= 0; --task) f(task, int(task % n));
  }
};

template <class T, int Rank>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace chela::test
