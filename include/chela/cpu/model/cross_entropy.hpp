#pragma once
// Softmax and cross-entropy of one row of logits at a time, while it is in cache.
#include <cmath>

#include "chela/core/status.hpp"
#include "chela/cpu/block/rows.hpp"

namespace chela::cpu::rowwise {

/// log(sum_i exp(logits[i])) - logits[target], in nats. With `factor` not zero, the row becomes factor times the
/// gradient of that: (softmax - one at the target). Logits of any size neither overflow nor lose the loss: the maximum
/// is taken off first.
template <class A>
double cross_entropy(A* logits, Index count, Index target, A factor) {
  using namespace Eigen::internal;
  const A highest = max_row(count, logits);
  const double at_target = double(logits[target]) - double(highest);
  const Lanes<A> shift = splat(highest);
  map_row<A>(
      count, [&](Lanes<A> a) { return pexp(psub(a, shift)); }, logits, logits);
  const A sum = sum_row<A>(count, Same<A>{}, logits);
  if (factor != A(0)) {
    const Lanes<A> scale = splat(factor / sum);
    map_row<A>(
        count, [&](Lanes<A> a) { return pmul(a, scale); }, logits, logits);
    logits[target] -= factor;
  }
  return std::log(double(sum)) - at_target;
}

}  // namespace chela::cpu::rowwise
