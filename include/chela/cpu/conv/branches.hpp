#pragma once
// Folding parallel branches into one kernel, and the gradients of the fold. See chela/conv/branches.hpp.
#include <algorithm>
#include <cmath>

#include "chela/conv/branches.hpp"
#include "chela/core/executor.hpp"

namespace chela::cpu {

namespace detail {

/// What a branch's norm does to channel d: multiply by 1 / deviation and by the gain, after taking the mean away.
template <class A>
struct BranchNorm {
  A inverse_deviation = 1, gain = 1, mean = 0, offset = 0;

  BranchNorm(const ConvBranch<A>& b, Index d) {
    if (!b.mean.present()) return;
    inverse_deviation = A(1) / std::sqrt(b.variance(d) + b.eps);
    mean = b.mean(d);
    if (b.gain.present()) gain = b.gain(d);
    if (b.offset.present()) offset = b.offset(d);
  }
  A scale() const { return gain * inverse_deviation; }
};

/// Calls f(channel) for every channel, some at a time.
void for_each_channel(Index channels, const Executor auto& executor, auto&& f) {
  constexpr Index at_once = 32;
  executor.for_each(ceil_div(channels, at_once), [&](Index task, int) {
    for (Index d = task * at_once; d < std::min(channels, (task + 1) * at_once); ++d) f(d);
  });
}

}  // namespace detail

/// taps and bias of the one convolution that equals the sum of the branches.
template <Element A, Executor E = DefaultExecutor>
Status fold_branches(const FoldBranchesArgs<A>& args, const E& executor = {}) {
  if (Status s = check(args); !s.ok()) return s;
  detail::for_each_channel(args.taps.extents[0], executor, [&](Index d) {
    A bias = 0;
    for (Index j = 0; j < args.taps.extents[1]; ++j) args.taps(d, j) = 0;
    for (const ConvBranch<A>& b : args.branches) {
      const detail::BranchNorm<A> norm(b, d);
      const A scale = norm.scale();
      for (Index j = 0; j < b.taps.extents[1]; ++j) args.taps(d, j) += scale * b.taps(d, j);
      bias += norm.offset - scale * norm.mean;
    }
    if (args.bias.present()) args.bias(d) = bias;
  });
  return {};
}

/// Gradients of each branch's taps, gain and offset from those of the folded taps and bias.
template <Element A, Executor E = DefaultExecutor>
Status fold_branches_backward(const FoldBranchesBackwardArgs<A>& args, const E& executor = {}) {
  if (Status s = check(args); !s.ok()) return s;
  detail::for_each_channel(args.grad_taps.extents[0], executor, [&](Index d) {
    const A grad_bias = args.grad_bias.present() ? args.grad_bias(d) : A(0);
    for (std::size_t i = 0; i < args.branches.size(); ++i) {
      const ConvBranch<A>& b = args.branches[i];
      const ConvBranchGradients<A>& grads = args.grads[i];
      const detail::BranchNorm<A> norm(b, d);
      const Index length = b.taps.extents[1];
      if (grads.gain.present()) {
        A sum = 0;
        for (Index j = 0; j < length; ++j) sum += args.grad_taps(d, j) * b.taps(d, j);
        grads.gain(d) = norm.inverse_deviation * (sum - grad_bias * norm.mean);
      }
      if (grads.offset.present()) grads.offset(d) = grad_bias;
      if (grads.taps.present())
        for (Index j = 0; j < length; ++j) grads.taps(d, j) = norm.scale() * args.grad_taps(d, j);
    }
  });
  return {};
}

}  // namespace chela::cpu
