#pragma once
// Long depthwise convolution on the CPU: see chela/conv/long.hpp for what is computed and cpu/conv/kernel_spectrum.hpp for how
// taps and earlier inputs enter the transform. With X, K, G the spectra of inputs, kernel and output gradient (all N points
// have |w| = 1, so a conjugate spectrum is that of lags negated),
//
//   y       = real part of inverse(X K)             skip[d] is added to K: it is a tap at lag 0
//   grad_x  = real part of inverse(G conj K)        of earlier inputs: minus the imaginary part at N - m
//   grad_k  = inverse(sum_b G conj X)               tap j: real part at j; lag -m: minus the imaginary part at N - m
//
// A task is one packet of channels and a run of the batch; the kernel's spectrum is read once per run. Gradients are in
// cpu/conv/long_backward.hpp, one token at a time in cpu/conv/long_step.hpp; this header brings both.
#include "chela/cpu/conv/long_backward.hpp"
#include "chela/cpu/conv/long_step.hpp"
#include "chela/cpu/conv/long_tasks.hpp"

namespace chela::cpu {

namespace detail {

/// Forward over a run of the batch with a spectrum at hand.
template <class T, class A>
void long_conv_group(const LongConvArgs<T>& a, const RightAnglePlan<A>& plan, const A* kernel, ChannelGroup group,
                     Index batch_begin, Index batch_end, A* work) {
  const TimesKernel<A, false> middle{kernel, skip_lanes(a.skip, group, plan.points())};
  for (Index b = batch_begin; b < batch_end; ++b) {
    const TensorView<T, 2> y = slice(a.y, b);
    with_source<
        A>(slice(a.x, b), history_rows(a.initial_state, b), group, plan.points(), work, [&](const auto& source) {
      if constexpr (std::is_same_v<T, A>) {
        if (rows_are_packets<A>(y, group))
          return convolve(plan, source, middle, RealRowsOut<A>{y.data + group.first, y.strides[0], y.extents[0]}, work);
      }
      convolve(plan, source, middle, RealRowsOut<A>{work, point_size<A>, y.extents[0]}, work);
      scatter_group<A>(work, point_size<A>, y, group);
    });
  }
}

/// The last inputs, of the tokens and of what came before. In this order the final state may be the initial state's memory.
template <class T>
void copy_final_state(const LongConvArgs<T>& a, const LongConvShape& s, ChannelGroup group, Index b) {
  for (Index r = 0; r < s.history(); ++r) {
    const Index t = s.tokens - s.history() + r;
    for (Index d = group.first; d < group.first + group.lanes; ++d)
      a.final_state(b, r, d) = t >= 0                      ? a.x(b, t, d)
                               : a.initial_state.present() ? a.initial_state(b, r + s.tokens, d)
                                                           : T(0);
  }
}

/// Sequences are independent in the forward pass, so the cut may follow the number of workers; four tasks each even out their
/// speeds.
template <class A, Executor E>
Index forward_runs(const LongConvShape& s, const E& executor) {
  return batch_runs(4 * executor.workers(), channel_groups<A>(s.channels), s.batch);
}

/// `kernel_of(group, worker)` is the kernel's spectrum of that group, good until the worker asks for another.
template <class T, class A, class KernelOf, Executor E>
void run_long_conv(const LongConvArgs<T>& a, const LongConvShape& s, Index runs, const RightAnglePlan<A>& plan,
                   const KernelOf& kernel_of, const E& executor) {
  const Index size = plan.points() * point_size<A>;
  const Scratch<A> scratch(executor.workers() * size);
  executor.for_each(channel_groups<A>(s.channels) * runs, [&](Index index, int worker) {
    const LongConvTask<A> task(index, runs, s);
    if (s.tokens > 0)
      long_conv_group(a, plan, kernel_of(task.group_index, worker), task.group, task.begin, task.end,
                      scratch.data() + worker * size);
    for (Index b = task.begin; b < task.end && a.final_state.present(); ++b) copy_final_state(a, s, task.group, b);
  });
}

}  // namespace detail

/// y and, if wanted, the final state.
template <Element T, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(a);
  const Index runs = detail::forward_runs<Accumulator<T>>(shape, executor);
  detail::with_kernel(a, detail::needs_state(a), runs, executor, [&](const auto& plan, const auto& kernel_of) {
    detail::run_long_conv(a, shape, runs, plan, kernel_of, executor);
  });
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read.
template <Element T, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const KernelSpectrum<Accumulator<T>>& spectrum, const E& executor = {}) {
  if (Status s = detail::check_with(a, spectrum); !s.ok()) return s;
  const LongConvShape shape = detail::shape_with(a, spectrum);
  detail::run_long_conv(
      a, shape, detail::forward_runs<Accumulator<T>>(shape, executor), spectrum.plan(),
      [&](Index g, int) { return spectrum.group(g); }, executor);
  return {};
}

}  // namespace chela::cpu
