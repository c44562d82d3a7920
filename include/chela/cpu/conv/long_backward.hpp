#pragma once
// Gradients of the long convolution: the input's and the kernel's from one transform of the output's gradient. See
// cpu/conv/long.hpp for the algebra.
#include "chela/cpu/conv/long_tasks.hpp"

namespace chela::cpu {

namespace detail {

/// sum += g conj(x), and then what `next` does to g. `First`: there is no sum yet, and it may take the input's place.
template <class A, bool First, class Next>
struct SumCorrelation {
  const A* input = nullptr;
  A* sum = nullptr;
  Next next;

  CHELA_ALWAYS_INLINE void begin(Index row) { next.begin(row); }
  CHELA_ALWAYS_INLINE void fetch_ahead() { next.fetch_ahead(); }
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& g, Index row) const {
    using namespace Eigen::internal;
    const ComplexLanes<A> x = load_point<A>(input + row * point_size<A>);
    ComplexLanes<A> s = times_conjugate(g, x);
    if constexpr (!First) {
      const ComplexLanes<A> before = load_point<A>(sum + row * point_size<A>);
      s = {padd(s.re, before.re), padd(s.im, before.im)};
    }
    store_point(sum + row * point_size<A>, s);
    next(g, row);
  }
};

/// In the backward pass the cut orders a sum, so it depends on the shape only: enough tasks for a few workers, at the price of
/// one summed spectrum each.
template <class A>
constexpr Index backward_runs(const LongConvShape& s) {
  constexpr Index enough_tasks = 16;
  return batch_runs(enough_tasks, channel_groups<A>(s.channels), s.batch);
}

/// Backward over a run of the batch. `input` and `sum` are spectra; without `sum` there is no correlation.
template <class T, class A>
struct LongConvBackward {
  const LongConvBackwardArgs<T>& a;
  const LongConvShape& s;
  const RightAnglePlan<A>& plan;

  bool wants_kernel() const { return a.grad_taps.present() || a.grad_back_taps.present() || a.grad_skip.present(); }
  bool wants_input() const { return a.grad_x.present() || a.grad_initial_state.present(); }

  void run_group(const A* kernel, ChannelGroup group, Index batch_begin, Index batch_end, A* work, A* input,
                 A* sum) const {
    const TimesKernel<A, true> times_kernel{kernel, skip_lanes(a.skip, group, plan.points())};
    if (wants_kernel() && batch_begin == batch_end) std::fill_n(sum, plan.points() * point_size<A>, A(0));
    if (batch_end - batch_begin == 1) input = sum;
    for (Index b = batch_begin; b < batch_end; ++b) {
      if (wants_kernel())
        with_source<A>(slice(a.x, b), history_rows(a.initial_state, b), group, plan.points(), input,
                       [&](const auto& source) { transform(plan, source, input); });
      with_source<A>(slice(a.grad_y, b), group, work, [&](const auto& source) {
        if (!wants_kernel())
          input_gradient(source, times_kernel, group, b, work);
        else if (b == batch_begin)
          both_gradients<true>(source, times_kernel, group, b, work, input, sum);
        else
          both_gradients<false>(source, times_kernel, group, b, work, input, sum);
      });
    }
  }

  template <bool First, class Source, class Times>
  void both_gradients(const Source& source, const Times& times_kernel, ChannelGroup group, Index b, A* work,
                      const A* input, A* sum) const {
    if (wants_input())
      input_gradient(source, SumCorrelation<A, First, Times>{input, sum, times_kernel}, group, b, work);
    else
      transform(plan, source, work, SumCorrelation<A, First, KeepSpectrum>{input, sum, {}});
  }

  template <class Source, class Middle>
  void input_gradient(const Source& source, const Middle& middle, ChannelGroup group, Index b, A* work) const {
    const auto grad_x = a.grad_x.present() ? slice(a.grad_x, b) : TensorView<T, 2>{};
    if constexpr (std::is_same_v<T, A>) {
      if (!a.grad_initial_state.present() && rows_are_packets<A>(grad_x, group))
        return convolve(plan, source, middle, RealRowsOut<A>{grad_x.data + group.first, grad_x.strides[0], s.tokens},
                        work);
    }
    convolve(plan, source, middle, Points<A>{work}, work);
    if (a.grad_x.present()) scatter_group<A>(work, point_size<A>, grad_x, group);
    if (a.grad_initial_state.present()) scatter_behind(work, A(-1), slice(a.grad_initial_state, b), group);
  }

  /// `rows` get `factor` times the imaginary parts of the last points.
  template <class U>
  void scatter_behind(A* points, A factor, TensorView<U, 2> rows, ChannelGroup group) const {
    A* first = points + (plan.points() - rows.extents[0]) * point_size<A> + lanes_of<A>;
    scale_packets(first, rows.extents[0], factor);
    scatter_group<A>(first, point_size<A>, rows, group);
  }

  /// From the summed spectrum, which is overwritten. Taps that met no input get zero.
  void kernel_gradient(ChannelGroup group, A* sum) const {
    transform_back(plan, sum, Points<A>{sum});
    const A factor = A(1) / A(plan.points());
    const Index causal = causal_taps_in_use(s.taps, s.tokens, a.initial_state.present());
    const Index back = back_taps_in_use(s.back_taps, s.tokens);
    const auto zero = [&](TensorView<A, 2> rows, Index begin) {
      for (Index r = begin; r < rows.extents[0]; ++r)
        for (Index d = group.first; d < group.first + group.lanes; ++d) rows(r, d) = A(0);
    };
    scale_packets(sum, std::max<Index>(causal, 1), factor);
    for (int i = 0; i < group.lanes && a.grad_skip.present(); ++i) a.grad_skip(group.first + i) = sum[i];
    if (a.grad_taps.present()) {
      const auto rows = transposed(a.grad_taps, 0, 1);
      scatter_group<A>(sum, point_size<A>, run(rows, 0, 0, causal), group);
      zero(rows, causal);
    }
    if (a.grad_back_taps.present()) {
      const auto rows = transposed(a.grad_back_taps, 0, 1);
      scatter_behind(sum, -factor, reversed(run(rows, 0, 0, back), 0), group);
      zero(rows, back);
    }
  }
};

template <class T, class A, class KernelOf, Executor E>
void run_long_conv_backward(const LongConvBackwardArgs<T>& a, const LongConvShape& s, Index runs,
                            const RightAnglePlan<A>& plan, const KernelOf& kernel_of, const E& executor) {
  const LongConvBackward<T, A> backward{a, s, plan};
  const Index groups = channel_groups<A>(s.channels), size = plan.points() * point_size<A>;
  const Scratch<A> scratch(executor.workers() * 2 * size);
  const bool kernel = backward.wants_kernel();
  const Scratch<A> sums(kernel ? (runs > 1 ? groups * runs : Index(executor.workers())) * size : 0);
  executor.for_each(groups * runs, [&](Index index, int worker) {
    const LongConvTask<A> task(index, runs, s);
    A* work = scratch.data() + worker * 2 * size;
    A* sum = kernel ? sums.data() + (runs > 1 ? index : worker) * size : nullptr;
    const A* spectrum = backward.wants_input() ? kernel_of(task.group_index, worker) : nullptr;
    backward.run_group(spectrum, task.group, task.begin, task.end, work, work + size, sum);
    if (kernel && runs == 1) backward.kernel_gradient(task.group, sum);
  });
  if (!kernel || runs == 1) return;
  executor.for_each(groups, [&](Index g, int) {
    A* sum = sums.data() + g * runs * size;
    for (Index r = 1; r < runs; ++r)
      for (Index i = 0; i < size; ++i) sum[i] += sum[r * size + i];
    backward.kernel_gradient(channel_group<A>(g, s.channels), sum);
  });
}

}  // namespace detail

/// Those gradients of `long_conv` that are present.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(a);
  const Index runs = detail::backward_runs<Accumulator<T>>(shape);
  detail::with_kernel(a, detail::needs_state(a), runs, executor, [&](const auto& plan, const auto& kernel_of) {
    detail::run_long_conv_backward(a, shape, runs, plan, kernel_of, executor);
  });
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const KernelSpectrum<Accumulator<T>>& spectrum,
                          const E& executor = {}) {
  if (Status s = detail::check_with(a, spectrum); !s.ok()) return s;
  const LongConvShape shape = detail::shape_with(a, spectrum);
  detail::run_long_conv_backward(
      a, shape, detail::backward_runs<Accumulator<T>>(shape), spectrum.plan(),
      [&](Index g, int) { return spectrum.group(g); }, executor);
  return {};
}

}  // namespace chela::cpu
