#pragma once
// Long depthwise convolution on the CPU: see chela/conv/long.hpp for what is computed and cpu/conv/kernel_spectrum.hpp
// for how taps and earlier inputs enter the transform. With X, K, G the spectra of inputs, kernel and output gradient
// (all N points have |w| = 1, so a conjugate spectrum is that of lags negated),
//
//   y       = real part of inverse(X K)             skip[d] is added to K: it is a tap at lag 0
//   grad_x  = real part of inverse(G conj K)        of earlier inputs: minus the imaginary part at N - m
//   grad_k  = inverse(sum_b G conj X)               tap j: real part at j; lag -m: minus the imaginary part at N - m
//
// Blocks are sequences in a row, each with the inputs before it as its earlier ones. A task is one packet of channels
// and a run of the sequences; the kernel's spectrum is read once per run. Gradients are in cpu/conv/long_backward.hpp,
// one token at a time in cpu/conv/long_step.hpp and cpu/conv/long_stream.hpp; this header brings all.
#include "chela/cpu/conv/long_backward.hpp"
#include "chela/cpu/conv/long_step.hpp"
#include "chela/cpu/conv/long_stream.hpp"
#include "chela/cpu/conv/long_tasks.hpp"

namespace chela::cpu {

namespace detail {

/// Outputs of one group of channels, with a kernel at hand.
template <class T, class A, int Eighths>
struct LongConvForward {
  const LongConvArgs<T>& a;
  const LongConvShape& s;
  const KernelForm<A, Eighths>& form;

  Index scratch_size() const {
    return form.direct() ? (form.lags.chunk_rows() + direct_chunk) * lanes_of<A> : form.work_size();
  }

  void sequence(const A* kernel, ChannelGroup group, Index i, A* work) const {
    const auto x = sequence_rows(a.x, s.sequences[i]);
    const auto y = sequence_rows(a.y, s.sequences[i]);
    const auto history = history_rows(a.initial_state, i, form.lags);
    if (form.direct()) return direct(kernel, group, x, history, y, work);
    const Index block = form.choice.method == LongConvMethod::blocks ? form.plan.points() : x.extents[0];
    const TimesKernel<A, false, Eighths> middle{kernel, skip_lanes(a.skip, group, form.plan.points())};
    for (Index begin = 0; begin < x.extents[0]; begin += block) {
      const Index count = std::min(block, x.extents[0] - begin);
      transform_rows(middle, group, run(x, 0, begin, count), block_history(x, history, begin, form.lags),
                     run(y, 0, begin, count), work);
    }
  }

  void transform_rows(const TimesKernel<A, false, Eighths>& middle, ChannelGroup group, TensorView<const T, 2> x,
                      TensorView<const T, 2> history, TensorView<T, 2> y, A* work) const {
    with_source<A>(x, history, group, form.plan.points(), work, [&](const auto& source) {
      if constexpr (std::is_same_v<T, A>) {
        if (rows_are_packets<A>(y, group))
          return with_sink(y, a.y, group, [&](const auto& sink) { convolve(form.plan, source, middle, sink, work); });
      }
      convolve(form.plan, source, middle, RealRowsOut<A>{work, point_size<A>, y.extents[0]}, work);
      scatter_group<A>(work, point_size<A>, y, group);
    });
  }

  void direct(const A* kernel, ChannelGroup group, TensorView<const T, 2> x, TensorView<const T, 2> history,
              TensorView<T, 2> y, A* work) const {
    direct_convolve<A>(
        form.lags, kernel, skip_lanes(a.skip, group, 1), {-history.extents[0], x.extents[0]}, 0, y.extents[0],
        [&](Index begin, Index count, A* to) { stage_rows<A>(x, history, group, begin, count, to); },
        [&](Index begin, const A* packets, Index count) {
          scatter_group<A>(packets, lanes_of<A>, run(y, 0, begin, count), group);
        },
        work);
  }

  /// The last inputs, of the tokens and of what came before. In this order the final state may be the initial state's
  /// memory.
  void final_state(ChannelGroup group, Index i) const {
    if (!a.final_state.present()) return;
    const auto x = sequence_rows(a.x, s.sequences[i]);
    const Index tokens = x.extents[0];
    for (Index r = 0; r < s.history(); ++r) {
      const Index t = tokens - s.history() + r;
      for (Index d = group.first; d < group.first + group.lanes; ++d)
        a.final_state(i, r, d) = t >= 0                      ? x(t, d)
                                 : a.initial_state.present() ? a.initial_state(i, r + tokens, d)
                                                             : T(0);
    }
  }
};

/// Sequences are independent in the forward pass, so the cut may follow the number of workers; four tasks each even out
/// their speeds.
template <class A, Executor E>
Index forward_runs(const LongConvShape& s, Index members, const E& executor) {
  return batch_runs(4 * executor.workers(), channel_groups<A>(s.channels), members);
}

template <class T, class A, int Eighths, class KernelOf, Executor E>
void run_long_conv(const LongConvForward<T, A, Eighths>& pass, const std::vector<Index>& members, Index runs,
                   const KernelOf& kernel_of, const E& executor) {
  const Index size = pass.scratch_size();
  const Scratch<A> scratch(executor.workers() * size);
  executor.for_each(channel_groups<A>(pass.s.channels) * runs, [&](Index index, int worker) {
    const LongConvTask<A> task(index, runs, Index(members.size()), pass.s.channels);
    const A* kernel = kernel_of(task.group_index, worker);
    for (Index m = task.begin; m < task.end; ++m) {
      pass.sequence(kernel, task.group, members[std::size_t(m)], scratch.data() + worker * size);
      pass.final_state(task.group, members[std::size_t(m)]);
    }
  });
}

/// Those sequences whose final state is their initial one.
template <class A, class T>
void final_states_without_tokens(const LongConvArgs<T>& a, const LongConvShape& s) {
  const KernelForm<A> none;
  for (Index i = 0; i < s.sequences.size(); ++i)
    if (s.sequences[i].count == 0) LongConvForward<T, A, 8>{a, s, none}.final_state({0, int(s.channels)}, i);
}

}  // namespace detail

/// y and, if wanted, the final state.
template <LongConvPolicy P = LongConvPolicy{}, Element T, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const E& executor = {}) {
  using A = Accumulator<T>;
  if (Status s = check(a); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(a);
  if (Status s = check_offsets(shape.sequences); !s.ok()) return s;
  for (const auto& same : detail::sequence_classes<A, P>(shape, detail::needs_state(a))) {
    const detail::LongConvForward<T, A, P.eighths> pass{a, shape, same.form};
    const Index runs = detail::forward_runs<A>(shape, Index(same.members.size()), executor);
    detail::with_kernel<A>(same.form, a.taps, a.back_taps, runs, executor, [&](const auto& kernel_of) {
      detail::run_long_conv(pass, same.members, runs, kernel_of, executor);
    });
  }
  detail::final_states_without_tokens<A>(a, shape);
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read. Every
/// sequence costs what the spectrum was made for.
template <Element T, int Eighths, Executor E = DefaultExecutor>
Status long_conv(const LongConvArgs<T>& a, const KernelSpectrum<Accumulator<T>, Eighths>& spectrum,
                 const E& executor = {}) {
  using A = Accumulator<T>;
  if (Status s = detail::check_with(a, spectrum); !s.ok()) return s;
  const LongConvShape shape = detail::shape_with(a, spectrum);
  const std::vector<Index> members = detail::sequences_with_tokens(shape);
  detail::run_long_conv(
      detail::LongConvForward<T, A, Eighths>{a, shape, spectrum.form()}, members,
      detail::forward_runs<A>(shape, Index(members.size()), executor), [&](Index g, int) { return spectrum.group(g); },
      executor);
  detail::final_states_without_tokens<A>(a, shape);
  return {};
}

}  // namespace chela::cpu
