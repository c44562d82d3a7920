#pragma once
// Gradients of the long convolution: the input's and the kernel's from one transform of the output's gradient. See
// cpu/conv/long.hpp for the algebra. In blocks, what flows to the inputs before a block is carried to the block before,
// so they are walked from the last to the first.
#include "chela/cpu/conv/long_tasks.hpp"

namespace chela::cpu {

namespace detail {

/// sum += g conj(x), and then what `next` does to g. `First`: there is no sum yet, and it may take the input's place.
template <class A, bool First, class Next>
struct SumCorrelation {
  static constexpr unsigned kept = Next::kept;
  const A* input = nullptr;
  A* sum = nullptr;
  Next next;

  CHELA_ALWAYS_INLINE void begin(Index row) { next.begin(row); }
  CHELA_ALWAYS_INLINE void fetch_ahead() { next.fetch_ahead(); }
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& g, Index row, int e) const {
    using namespace Eigen::internal;
    const ComplexLanes<A> x = load_point<A>(input + (row + e) * point_size<A>);
    ComplexLanes<A> s = times_conjugate(g, x);
    if constexpr (!First) {
      const ComplexLanes<A> before = load_point<A>(sum + (row + e) * point_size<A>);
      s = {padd(s.re, before.re), padd(s.im, before.im)};
    }
    store_point(sum + (row + e) * point_size<A>, s);
    next(g, row, e);
  }
};

/// In the backward pass the cut orders a sum, so it depends on the shape only: enough tasks for a few workers, at the
/// price of one summed kernel each.
template <class A>
constexpr Index backward_runs(const LongConvShape& s, Index members) {
  constexpr Index enough_tasks = 16;
  return batch_runs(enough_tasks, channel_groups<A>(s.channels), members);
}

/// to += from, row by row.
template <class T, class U>
void add_rows(TensorView<const T, 2> from, TensorView<U, 2> to, ChannelGroup group) {
  using A = Accumulator<T>;
  for (Index r = 0; r < to.extents[0]; ++r)
    for (Index d = group.first; d < group.first + group.lanes; ++d)
      to(r, d) = static_cast<U>(static_cast<A>(to(r, d)) + static_cast<A>(from(r, d)));
}

template <class A, class U>
void zero_rows(TensorView<U, 2> rows, ChannelGroup group) {
  for (Index r = 0; r < rows.extents[0]; ++r)
    for (Index d = group.first; d < group.first + group.lanes; ++d) rows(r, d) = U(A(0));
}

/// Where a task's transforms and sums are. A kernel's sum is a spectrum, or packets of lags.
template <class A>
struct BackwardScratch {
  A *work, *input, *carry;
};

/// Gradients of one group of channels, with a kernel at hand.
template <class T, class A, int Eighths>
struct LongConvBackward {
  const LongConvBackwardArgs<T>& a;
  const LongConvShape& s;
  const KernelForm<A, Eighths>& form;

  bool wants_kernel() const { return a.grad_taps.present() || a.grad_back_taps.present() || a.grad_skip.present(); }
  bool wants_input() const { return a.grad_x.present() || a.grad_initial_state.present(); }
  bool in_blocks() const { return form.choice.method == LongConvMethod::blocks; }

  Index part_size() const {
    return form.direct() ? (form.lags.chunk_rows() + direct_chunk) * lanes_of<A> : form.work_size();
  }
  Index sum_size() const { return form.direct() ? form.size() : form.work_size(); }
  BackwardScratch<A> part(A* memory) const { return {memory, memory + part_size(), memory + 2 * part_size()}; }

  TensorView<T, 2> grad_rows(Index i) const {
    return a.grad_x.present() ? sequence_rows(a.grad_x, s.sequences[i]) : TensorView<T, 2>{};
  }

  void sequences(const std::vector<Index>& members, Index begin, Index end, const A* kernel, ChannelGroup group,
                 BackwardScratch<A> scratch, A* sum) const {
    if (wants_kernel() && (form.direct() || begin == end)) std::fill_n(sum, sum_size(), A(0));
    bool first = true;  // nothing is in the sum yet
    for (Index m = begin; m < end; ++m) {
      const Index i = members[std::size_t(m)];
      if (form.direct())
        direct(kernel, group, i, scratch, sum);
      else
        blocks(kernel, group, i, scratch, sum, first, end - begin == 1);
      states(group, i);
    }
  }

  void blocks(const A* kernel, ChannelGroup group, Index i, BackwardScratch<A> scratch, A* sum, bool& first,
              bool alone) const {
    const auto x = sequence_rows(a.x, s.sequences[i]), grad_y = sequence_rows(a.grad_y, s.sequences[i]);
    const auto history = history_rows(a.initial_state, i, form.lags);
    const Index tokens = x.extents[0], block = in_blocks() ? form.plan.points() : tokens,
                count = ceil_div(tokens, block);
    const TimesKernel<A, true, Eighths> times_kernel{kernel, skip_lanes(a.skip, group, form.plan.points())};
    if (alone && count == 1) scratch.input = sum;
    if (in_blocks()) std::fill_n(scratch.carry, block * lanes_of<A>, A(0));
    for (Index k = count - 1; k >= 0; --k) {
      const Index begin = k * block, rows = std::min(block, tokens - begin);
      if (wants_kernel())
        with_source<A>(run(x, 0, begin, rows), block_history(x, history, begin, form.lags), group, form.plan.points(),
                       scratch.input, [&](const auto& source) { transform(form.plan, source, scratch.input); });
      with_source<A>(run(grad_y, 0, begin, rows), group, scratch.work, [&](const auto& source) {
        if (!wants_kernel())
          input_gradient(source, times_kernel, group, i, begin, rows, scratch);
        else if (first)
          both_gradients<true>(source, times_kernel, group, i, begin, rows, scratch, sum);
        else
          both_gradients<false>(source, times_kernel, group, i, begin, rows, scratch, sum);
      });
      first = false;
    }
    const Index known = form.lags.taps - 1;
    if (in_blocks() && a.grad_initial_state.present())
      scatter_group<A>(scratch.carry + (block - known) * lanes_of<A>, lanes_of<A>, met_rows(i), group);
  }

  template <bool First, class Source, class Times>
  void both_gradients(const Source& source, const Times& times_kernel, ChannelGroup group, Index i, Index begin,
                      Index rows, const BackwardScratch<A>& scratch, A* sum) const {
    if (wants_input())
      input_gradient(source, SumCorrelation<A, First, Times>{scratch.input, sum, times_kernel}, group, i, begin, rows,
                     scratch);
    else
      transform(form.plan, source, scratch.work, SumCorrelation<A, First, KeepSpectrum>{scratch.input, sum, {}});
  }

  template <class Source, class Middle>
  void input_gradient(const Source& source, const Middle& middle, ChannelGroup group, Index i, Index begin, Index rows,
                      const BackwardScratch<A>& scratch) const {
    A* work = scratch.work;
    const auto grad_x = a.grad_x.present() ? run(grad_rows(i), 0, begin, rows) : TensorView<T, 2>{};
    if constexpr (std::is_same_v<T, A>) {
      if (!in_blocks() && !a.grad_initial_state.present() && rows_are_packets<A>(grad_x, group))
        return with_sink(grad_x, a.grad_x, group,
                         [&](const auto& sink) { convolve(form.plan, source, middle, sink, work); });
    }
    convolve(form.plan, source, middle, Points<A>{work}, work);
    if (in_blocks()) exchange_carry(work, scratch.carry);
    if (a.grad_x.present()) scatter_group<A>(work, point_size<A>, grad_x, group);
    if (!in_blocks() && a.grad_initial_state.present()) scatter_behind(work, A(-1), met_rows(i), group);
  }

  /// Real parts take what the block behind sent; minus the imaginary parts go to the block before.
  void exchange_carry(A* points, A* carry) const {
    using namespace Eigen::internal;
    for (Index r = 0; r < form.plan.points(); ++r, points += point_size<A>, carry += lanes_of<A>) {
      const ComplexLanes<A> x = load_point<A>(points);
      pstoreu(points, padd(x.re, ploadu<LanePacket<A>>(carry)));
      pstoreu(carry, pnegate(x.im));
    }
  }

  /// `rows` get `factor` times the imaginary parts of the last points.
  template <class U>
  void scatter_behind(A* points, A factor, TensorView<U, 2> rows, ChannelGroup group) const {
    A* first = points + (form.plan.points() - rows.extents[0]) * point_size<A> + lanes_of<A>;
    scale_packets(first, rows.extents[0], factor);
    scatter_group<A>(first, point_size<A>, rows, group);
  }

  /// Of the initial state's gradient, the rows that the kernel meets.
  TensorView<T, 2> met_rows(Index i) const {
    const auto rows = slice(a.grad_initial_state, i);
    return run(rows, 0, rows.extents[0] - (form.lags.taps - 1), form.lags.taps - 1);
  }

  void direct(const A* kernel, ChannelGroup group, Index i, const BackwardScratch<A>& scratch, A* sum) const {
    constexpr int lanes = lanes_of<A>;
    const auto x = sequence_rows(a.x, s.sequences[i]), grad_y = sequence_rows(a.grad_y, s.sequences[i]);
    const auto history = history_rows(a.initial_state, i, form.lags);
    const Index tokens = x.extents[0], before = form.lags.taps - 1;
    for (Index begin = 0; wants_kernel() && begin < tokens; begin += direct_chunk) {
      const Index count = std::min(direct_chunk, tokens - begin);
      stage_rows<A>(x, history, group, begin - before - direct_margin, direct_margin + form.lags.lags() - 1 + count,
                    scratch.input);
      stage_rows<A>(grad_y, {}, group, begin, count, scratch.work);
      direct_correlate<A>(form.lags, scratch.input, scratch.work, count, sum + direct_margin * lanes);
    }
    if (!wants_input()) return;
    for (Index q = 0; q < form.lags.rows(); ++q)
      std::copy_n(kernel + q * lanes, lanes, scratch.carry + (form.lags.rows() - 1 - q) * lanes);
    direct_convolve<A>(
        form.lags.reversed(), scratch.carry, skip_lanes(a.skip, group, 1), {0, tokens},
        a.grad_initial_state.present() ? -before : 0, tokens,
        [&](Index begin, Index count, A* to) { stage_rows<A>(grad_y, {}, group, begin, count, to); },
        [&](Index begin, const A* packets, Index count) {
          const Index old = std::clamp<Index>(-begin, 0, count);
          if (old > 0) scatter_group<A>(packets, lanes, run(met_rows(i), 0, begin + before, old), group);
          if (a.grad_x.present() && old < count)
            scatter_group<A>(packets + old * lanes, lanes, run(grad_rows(i), 0, begin + old, count - old), group);
        },
        scratch.input);
  }

  /// What else flows to the inputs: the final state is made of the last of them.
  void states(ChannelGroup group, Index i) const {
    const Index tokens = s.sequences[i].count, kept = std::max<Index>(s.history() - tokens, 0);
    if (a.grad_initial_state.present()) {
      const auto rows = slice(a.grad_initial_state, i);
      const Index unmet = tokens > 0 ? s.history() - (form.lags.taps - 1) : s.history();
      zero_rows<A>(run(rows, 0, 0, unmet), group);
      if (a.grad_final_state.present())
        add_rows(run(slice(a.grad_final_state, i), 0, 0, kept), run(rows, 0, s.history() - kept, kept), group);
    }
    const Index last = s.history() - kept;
    if (a.grad_x.present() && a.grad_final_state.present())
      add_rows(run(slice(a.grad_final_state, i), 0, kept, last), run(grad_rows(i), 0, tokens - last, last), group);
  }

  /// From the sum, which is overwritten. Taps that met no input get zero, or with `add` what they have.
  void kernel_gradient(ChannelGroup group, A* sum, bool add) const {
    constexpr int lanes = lanes_of<A>;
    const Index stride = form.direct() ? lanes : point_size<A>, causal = form.lags.taps, back = form.lags.back;
    A *ahead = sum, *behind = nullptr;  // packets of lags 0 on, and of lags -back on
    if (form.direct()) {
      behind = sum + direct_margin * lanes, ahead = behind + back * lanes;
    } else {
      transform_back(form.plan, sum, Points<A>{sum}, KeepPoints<kept_points(Eighths)>{});
      const A factor = A(1) / A(form.plan.points());
      behind = sum + (form.plan.points() - back) * point_size<A> + lanes;
      scale_packets(behind, back, -factor);
      scale_packets(sum, causal, factor);
    }
    for (int i = 0; i < group.lanes && a.grad_skip.present(); ++i) {
      A& skip = a.grad_skip(group.first + i);
      skip = add ? skip + ahead[i] : ahead[i];
    }
    const auto write = [&](TensorView<A, 2> rows, Index met, A* packets, bool backwards) {
      const auto head = run(rows, 0, 0, met), ordered = backwards ? reversed(head, 0) : head;
      if (add) add_group<A>(ordered, group, A(1), packets, stride);
      scatter_group<A>(packets, stride, ordered, group);
      if (!add) zero_rows<A>(run(rows, 0, met, rows.extents[0] - met), group);
    };
    if (a.grad_taps.present()) write(transposed(a.grad_taps, 0, 1), causal, ahead, false);
    if (a.grad_back_taps.present()) write(transposed(a.grad_back_taps, 0, 1), back, behind, true);
  }
};

/// `add`: the gradients of the kernel are added to what is there.
template <class T, class A, int Eighths, class KernelOf, Executor E>
void run_long_conv_backward(const LongConvBackward<T, A, Eighths>& pass, const std::vector<Index>& members, Index runs,
                            const KernelOf& kernel_of, bool add, const E& executor) {
  if (!pass.wants_kernel() && !pass.wants_input()) return;
  const Index groups = channel_groups<A>(pass.s.channels), part = 3 * pass.part_size(), size = pass.sum_size();
  const Scratch<A> scratch(executor.workers() * part);
  const bool kernel = pass.wants_kernel();
  const Scratch<A> sums(kernel ? (runs > 1 ? groups * runs : Index(executor.workers())) * size : 0);
  executor.for_each(groups * runs, [&](Index index, int worker) {
    const LongConvTask<A> task(index, runs, Index(members.size()), pass.s.channels);
    A* sum = kernel ? sums.data() + (runs > 1 ? index : worker) * size : nullptr;
    const A* made = pass.wants_input() ? kernel_of(task.group_index, worker) : nullptr;
    pass.sequences(members, task.begin, task.end, made, task.group, pass.part(scratch.data() + worker * part), sum);
    if (kernel && runs == 1) pass.kernel_gradient(task.group, sum, add);
  });
  if (!kernel || runs == 1) return;
  executor.for_each(groups, [&](Index g, int) {
    A* sum = sums.data() + g * runs * size;
    for (Index r = 1; r < runs; ++r)
      for (Index i = 0; i < size; ++i) sum[i] += sum[r * size + i];
    pass.kernel_gradient(channel_group<A>(g, pass.s.channels), sum, add);
  });
}

/// What no class of sequences computes: states that pass through a sequence without tokens, and the kernel's gradients
/// where no sequence has any.
template <class A, class T>
void gradients_without_tokens(const LongConvBackwardArgs<T>& a, const LongConvShape& s, bool no_tokens) {
  const KernelForm<A> none;
  const ChannelGroup all{0, int(s.channels)};
  for (Index i = 0; i < s.sequences.size(); ++i)
    if (s.sequences[i].count == 0) LongConvBackward<T, A, 8>{a, s, none}.states(all, i);
  if (!no_tokens) return;
  if (a.grad_taps.present()) zero_rows<A>(transposed(a.grad_taps, 0, 1), all);
  if (a.grad_back_taps.present()) zero_rows<A>(transposed(a.grad_back_taps, 0, 1), all);
  for (Index d = 0; d < s.channels && a.grad_skip.present(); ++d) a.grad_skip(d) = A(0);
}

}  // namespace detail

/// Those gradients of `long_conv` that are present.
template <LongConvPolicy P = LongConvPolicy{}, Element T, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const E& executor = {}) {
  using A = Accumulator<T>;
  if (Status s = check(a); !s.ok()) return s;
  const LongConvShape shape = long_conv_shape(a);
  if (Status s = check_offsets(shape.sequences); !s.ok()) return s;
  const auto classes = detail::sequence_classes<A, P>(shape, detail::needs_state(a));
  for (const auto& same : classes) {
    const detail::LongConvBackward<T, A, P.eighths> pass{a, shape, same.form};
    const Index runs = detail::backward_runs<A>(shape, Index(same.members.size()));
    detail::with_kernel<A>(same.form, a.taps, a.back_taps, runs, executor, [&](const auto& kernel_of) {
      detail::run_long_conv_backward(pass, same.members, runs, kernel_of, &same != &classes.front(), executor);
    });
  }
  detail::gradients_without_tokens<A>(a, shape, classes.empty());
  return {};
}

/// The same with a kernel that was transformed before; `taps` and `back_taps` of the arguments are not read.
template <Element T, int Eighths, Executor E = DefaultExecutor>
Status long_conv_backward(const LongConvBackwardArgs<T>& a, const KernelSpectrum<Accumulator<T>, Eighths>& spectrum,
                          const E& executor = {}) {
  using A = Accumulator<T>;
  if (Status s = detail::check_with(a, spectrum); !s.ok()) return s;
  const LongConvShape shape = detail::shape_with(a, spectrum);
  const std::vector<Index> members = detail::sequences_with_tokens(shape);
  if (!members.empty())
    detail::run_long_conv_backward(
        detail::LongConvBackward<T, A, Eighths>{a, shape, spectrum.form()}, members,
        detail::backward_runs<A>(shape, Index(members.size())), [&](Index g, int) { return spectrum.group(g); }, false,
        executor);
  detail::gradients_without_tokens<A>(a, shape, members.empty());
  return {};
}

}  // namespace chela::cpu
