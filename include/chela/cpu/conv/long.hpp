#pragma once
// Long depthwise convolution on the CPU: see chela/conv/long.hpp for what is computed and cpu/conv/kernel_spectrum.hpp for how
// taps and earlier inputs enter the transform. With X, K, G the spectra of inputs, kernel and output gradient (all N points
// have |w| = 1, so a conjugate spectrum is that of lags negated),
//
//   y       = real part of inverse(X K)             skip[d] is added to K: it is a tap at lag 0
//   grad_x  = real part of inverse(G conj K)        of earlier inputs: minus the imaginary part at N - m
//   grad_k  = inverse(sum_b G conj X)               tap j: real part at j; lag -m: minus the imaginary part at N - m
//
// One token at a time: cpu/conv/long_step.hpp. A task is one packet of channels and a run of the batch; the kernel's spectrum is read once per run.
#include <algorithm>
#include <vector>

#include "chela/cpu/conv/kernel_spectrum.hpp"
#include "chela/cpu/conv/long_step.hpp"

namespace chela::cpu {

namespace detail {

/// Spectra are fetched this many elements ahead of the block at work: the hardware does not follow a depth-first walk.
inline constexpr Index spectrum_ahead = 1024;

/// Multiplies by the kernel's spectrum plus the skip, or by the conjugate of that.
template <class A, bool Conjugate>
struct TimesKernel {
  const A* kernel = nullptr;
  LanePacket<A> skip = {};

  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& x, Index row) const {
    using namespace Eigen::internal;
    const A* at = kernel + row * point_size<A>;
    prefetch(at + spectrum_ahead);
    prefetch(at + spectrum_ahead + lanes_of<A>);
    ComplexLanes<A> k = load_point<A>(at);
    k.re = padd(k.re, skip);
    if constexpr (Conjugate)
      x = {pmadd(x.im, k.im, pmul(x.re, k.re)), negated_madd(x.re, k.im, pmul(x.im, k.re))};
    else
      x = {negated_madd(x.im, k.im, pmul(x.re, k.re)), pmadd(x.im, k.re, pmul(x.re, k.im))};
  }
};

/// sum += g conj(x), and then what `next` does to g.
template <class A, class Next>
struct SumCorrelation {
  const A* input = nullptr;
  A* sum = nullptr;
  Next next;

  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& g, Index row) const {
    using namespace Eigen::internal;
    const ComplexLanes<A> x = load_point<A>(input + row * point_size<A>);
    ComplexLanes<A> s = load_point<A>(sum + row * point_size<A>);
    s.re = pmadd(g.im, x.im, pmadd(g.re, x.re, s.re));
    s.im = negated_madd(g.re, x.im, LanePacket<A>(pmadd(g.im, x.re, s.im)));
    store_point(sum + row * point_size<A>, s);
    next(g, row);
  }
};

/// The skips of a group over N, as the spectrum has it.
template <class A>
LanePacket<A> skip_lanes(TensorView<const A, 1> skip, ChannelGroup group, Index points) {
  A lanes[lanes_of<A>] = {};
  for (int i = 0; i < group.lanes && skip.present(); ++i) lanes[i] = skip(group.first + i) / A(points);
  return Eigen::internal::ploadu<LanePacket<A>>(lanes);
}

/// Hands `use` a source of the transform over the rows of one sequence. Rows that are not packets in memory are copied to
/// `work` first.
template <class A, class T, class Use>
void with_source(TensorView<const T, 2> rows, ChannelGroup group, A* work, const Use& use) {
  if constexpr (std::is_same_v<T, A>) {
    if (rows_are_packets<A>(rows, group))
      return use(RealRows<A>{rows.data + group.first, rows.strides[0], rows.extents[0]});
  }
  gather_group<A>(rows, group, work, point_size<A>);
  use(RealRows<A>{work, point_size<A>, rows.extents[0]});
}

/// The same with what came before, if `history` has rows.
template <class A, class T, class Use>
void with_source(TensorView<const T, 2> rows, TensorView<const T, 2> history, ChannelGroup group, Index points, A* work,
                 const Use& use) {
  if (history.extents[0] == 0) return with_source(rows, group, work, use);
  stage_points(rows, history, group, A(1), points, work);
  use(Points<A>{work});
}

/// The rows before the first token: none when there is no state.
template <class T>
TensorView<const T, 2> history_rows(TensorView<const T, 3> state, Index b) {
  return state.present() ? slice(state, b) : TensorView<const T, 2>{};
}

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

template <class T, class A, Executor E>
void run_long_conv(const LongConvArgs<T>& a, const LongConvShape& s, const KernelSpectrum<A>& spectrum,
                   const E& executor) {
  const auto& plan = spectrum.plan();
  const Index groups = channel_groups<A>(s.channels);
  if (groups == 0) return;
  // Sequences are independent here, so the cut may follow the number of workers; four tasks each even out their speeds.
  const Index runs = std::clamp<Index>(ceil_div(4 * executor.workers(), groups), 1, std::max<Index>(s.batch, 1));
  const Index run_len = ceil_div(s.batch, runs), size = plan.points() * point_size<A>;
  const Scratch<A> scratch(executor.workers() * size);
  executor.for_each(groups * runs, [&](Index task, int worker) {
    const ChannelGroup group = channel_group<A>(task / runs, s.channels);
    const Index begin = std::min(task % runs * run_len, s.batch), end = std::min(begin + run_len, s.batch);
    if (s.tokens > 0)
      long_conv_group(a, plan, spectrum.group(task / runs), group, begin, end, scratch.data() + worker * size);
    for (Index b = begin; b < end && a.final_state.present(); ++b) copy_final_state(a, s, group, b);
  });
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
    if (wants_kernel()) std::fill_n(sum, plan.points() * point_size<A>, A(0));
    for (Index b = batch_begin; b < batch_end; ++b) {
      if (wants_kernel())
        with_source<A>(slice(a.x, b), history_rows(a.initial_state, b), group, plan.points(), input,
                       [&](const auto& source) { transform(plan, source, input); });
      with_source<A>(slice(a.grad_y, b), group, work, [&](const auto& source) {
        if (!wants_input())
          transform(plan, source, work, SumCorrelation<A, KeepSpectrum>{input, sum, {}});
        else if (wants_kernel())
          input_gradient(source, SumCorrelation<A, TimesKernel<A, true>>{input, sum, times_kernel}, group, b, work);
        else
          input_gradient(source, times_kernel, group, b, work);
      });
    }
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

template <class T, class A, Executor E>
void run_long_conv_backward(const LongConvBackwardArgs<T>& a, const LongConvShape& s, const KernelSpectrum<A>& spectrum,
                            const E& executor) {
  const LongConvBackward<T, A> backward{a, s, spectrum.plan()};
  const Index groups = channel_groups<A>(s.channels), size = spectrum.plan().points() * point_size<A>;
  if (groups == 0) return;
  // The cut of the batch orders a sum, so it may depend on the shape only: enough tasks for a few workers when the groups
  // are not, at the price of one summed spectrum each.
  constexpr Index enough_tasks = 16;
  const Index runs = std::clamp<Index>(ceil_div(enough_tasks, groups), 1, std::max<Index>(s.batch, 1));
  const Index run_len = ceil_div(s.batch, runs);
  const Scratch<A> scratch(executor.workers() * 2 * size);
  const bool kernel = backward.wants_kernel();
  const Scratch<A> sums(kernel ? (runs > 1 ? groups * runs : Index(executor.workers())) * size : 0);
  executor.for_each(groups * runs, [&](Index task, int worker) {
    const ChannelGroup group = channel_group<A>(task / runs, s.channels);
    const Index begin = std::min(task % runs * run_len, s.batch), end = std::min(begin + run_len, s.batch);
    A* work = scratch.data() + worker * 2 * size;
    A* sum = kernel ? sums.data() + (runs > 1 ? task : worker) * size : nullptr;
    backward.run_group(spectrum.group(task / runs), group, begin, end, work, work + size, sum);
    if (kernel && runs == 1) backward.kernel_gradient(group, sum);
  });
  if (!kernel || runs == 1) return;
  executor.for_each(groups, [&](Index g, int) {
    A* sum = sums.data() + g * runs * size;
    for (Index r = 1; r < runs; ++r)
      for (Index i = 0; i < size; ++i) sum[i] += sum[r * size + i];
    backward.kernel_gradient(channel_group<A>(g, s.channels), sum);
  });
}

/// Whether a spectrum made earlier serves this call.
template <class A>
Status check_spectrum(const KernelSpectrum<A>& k, const LongConvShape& s, bool needs_state) {
  return first_failure(
      k.status(),
      require(k.channels() == s.channels, Code::bad_shape, "the kernel's spectrum must have as many channels as x"),
      require(s.tokens <= k.tokens(), Code::bad_shape,
              "x has more tokens than the kernel's spectrum was made for; make it for the longest call"),
      require(k.with_state() || !needs_state, Code::bad_value,
              "an initial state needs a spectrum that was made with_state"));
}

template <class Args, class A>
LongConvShape shape_with(const Args& a, const KernelSpectrum<A>& k) {
  return {a.x.extents[0], a.x.extents[1], a.x.extents[2], k.taps(), k.back_taps()};
}

template <class Args, Executor E>
auto spectrum_of(const Args& a, bool with_state, const E& executor) {
  return kernel_spectrum(a.taps, a.back_taps, a.x.extents[1], executor, {.with_state = with_state});
}

}  // namespace detail

/// y and, if wanted, the final state.
template <Element T, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  detail::run_long_conv(a, long_conv_shape(a), detail::spectrum_of(a, a.initial_state.present(), executor), executor);
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read.
template <Element T, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const KernelSpectrum<Accumulator<T>>& spectrum, const E& executor = {}) {
  const LongConvShape shape = detail::shape_with(a, spectrum);
  if (Status s = detail::check_spectrum(spectrum, shape, a.initial_state.present()); !s.ok()) return s;
  if (Status s = chela::detail::check_long_conv(a, shape); !s.ok()) return s;
  detail::run_long_conv(a, shape, spectrum, executor);
  return {};
}

/// Those gradients of `long_conv` that are present.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const bool state = a.initial_state.present() || a.grad_initial_state.present();
  detail::run_long_conv_backward(a, long_conv_shape(a), detail::spectrum_of(a, state, executor), executor);
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const KernelSpectrum<Accumulator<T>>& spectrum,
                          const E& executor = {}) {
  const LongConvShape shape = detail::shape_with(a, spectrum);
  const bool state = a.initial_state.present() || a.grad_initial_state.present();
  if (Status s = detail::check_spectrum(spectrum, shape, state); !s.ok()) return s;
  if (Status s = chela::detail::check_long_conv(a, shape); !s.ok()) return s;
  detail::run_long_conv_backward(a, shape, spectrum, executor);
  return {};
}

}  // namespace chela::cpu
