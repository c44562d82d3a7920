#pragma once
// The moving average of chela/conv/kernels.hpp as a recurrence, with one packet of channels in its lanes: two multiply-adds per
// average and token, whatever the reach of the filter.
#include <cmath>

#include "chela/conv/kernels.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/channel_group.hpp"

namespace chela::cpu {

namespace detail {

/// One sequence of one group. `decay`, `read` and `z` are n packets: phi, eta alpha beta, and the state.
template <class T, class A>
void ema_group(TensorView<const T, 2> x, TensorView<T, 2> y, ChannelGroup group, const A* decay, const A* read, A* z,
               Index n) {
  using namespace Eigen::internal;
  A row[lanes_of<A>];
  for (Index t = 0; t < x.extents[0]; ++t) {
    gather_group<A>(run(x, 0, t, 1), group, row, lanes_of<A>);
    const LanePacket<A> input = ploadu<LanePacket<A>>(row);
    LanePacket<A> sum = pset1<LanePacket<A>>(A(0));
    for (Index i = 0; i < n * lanes_of<A>; i += lanes_of<A>) {
      const LanePacket<A> next = pmadd(ploadu<LanePacket<A>>(decay + i), ploadu<LanePacket<A>>(z + i), input);
      pstoreu(z + i, next);
      sum = pmadd(ploadu<LanePacket<A>>(read + i), next, sum);
    }
    pstoreu(row, sum);
    scatter_group<A>(row, lanes_of<A>, run(y, 0, t, 1), group);
  }
}

/// phi and eta alpha beta of a group, as n packets each.
template <class A>
void ema_coefficients(const EmaParameters<const A>& p, ChannelGroup group, A* decay, A* read) {
  const Index n = p.alpha.extents[1];
  const auto sigmoid = [](A a) { return A(1) / (A(1) + std::exp(-a)); };
  for (Index i = 0; i < n; ++i)
    for (int lane = 0; lane < lanes_of<A>; ++lane) {
      const Index d = group.first + lane, at = i * lanes_of<A> + lane;
      const bool used = lane < group.lanes;
      const A alpha = used ? sigmoid(p.alpha(d, i)) : A(0);
      decay[at] = used ? A(1) - alpha * sigmoid(p.delta(d, i)) : A(0);
      read[at] = used ? p.eta(d, i) * alpha * p.beta(d, i) : A(0);
    }
}

}  // namespace detail

/// y and, if wanted, the final state.
template <Element T, Executor E = DefaultExecutor>
Status ema(const EmaArgs<T>& a, const E& executor = {}) {
  using A = Accumulator<T>;
  if (Status s = check(a); !s.ok()) return s;
  const Index batch = a.x.extents[0], channels = a.x.extents[2], n = a.parameters.alpha.extents[1];
  const Index size = n * detail::lanes_of<A>;
  const detail::Scratch<A> scratch(executor.workers() * 3 * size);
  executor.for_each(detail::channel_groups<A>(channels), [&](Index g, int worker) {
    const detail::ChannelGroup group = detail::channel_group<A>(g, channels);
    A* const decay = scratch.data() + worker * 3 * size;
    A *const read = decay + size, *const z = read + size;
    detail::ema_coefficients(a.parameters, group, decay, read);
    for (Index b = 0; b < batch; ++b) {
      const auto averages_first = [&](auto state) { return transposed(slice(state, b), 0, 1); };
      if (a.initial_state.present())
        detail::gather_group<A>(averages_first(a.initial_state), group, z, detail::lanes_of<A>);
      else
        std::fill_n(z, size, A(0));
      detail::ema_group(slice(a.x, b), slice(a.y, b), group, decay, read, z, n);
      if (a.final_state.present())
        detail::scatter_group<A>(z, detail::lanes_of<A>, averages_first(a.final_state), group);
    }
  });
  return {};
}

/// One token per sequence.
template <Element T, Executor E = DefaultExecutor>
Status ema_step(const EmaStepArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  return ema(as_pass(a), executor);
}

}  // namespace chela::cpu
