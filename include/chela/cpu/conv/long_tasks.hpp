#pragma once
// What the passes of the long convolution share: how rows and kernels enter the transform, how the work is cut into tasks, and
// where a task finds its kernel's spectrum.
#include <algorithm>

#include "chela/cpu/conv/kernel_spectrum.hpp"

namespace chela::cpu::detail {

/// Walks ahead in one group's spectrum. A walk over the tree reads spectra in bursts, at its innermost blocks, and more lines
/// than a core may wait for; fetched two lines at a time throughout, they come by the time they are needed.
template <class A>
class SpectrumAhead {
 public:
  explicit SpectrumAhead(const A* spectrum = nullptr) : spectrum_(spectrum), next_(spectrum), limit_(spectrum) {}

  /// The walk has come to this point.
  CHELA_ALWAYS_INLINE void begin(Index row) {
    const A* here = spectrum_ + row * point_size<A>;
    next_ = std::max(next_, here + least_bytes / sizeof(A)), limit_ = here + most_bytes / sizeof(A);
  }
  CHELA_ALWAYS_INLINE void fetch() {
    if (next_ >= limit_) return;
    fetch_to_read(next_), fetch_to_read(next_ + line);
    next_ += 2 * line;
  }

 private:
  static constexpr std::size_t least_bytes = 2048, most_bytes = 131072, line = 64 / sizeof(A);
  const A *spectrum_, *next_, *limit_;
};

/// Multiplies by the kernel's spectrum plus the skip, or by the conjugate of that.
template <class A, bool Conjugate>
struct TimesKernel {
  const A* kernel = nullptr;
  LanePacket<A> skip = {};
  SpectrumAhead<A> ahead{kernel};

  CHELA_ALWAYS_INLINE void begin(Index row) { ahead.begin(row); }
  CHELA_ALWAYS_INLINE void fetch_ahead() { ahead.fetch(); }
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& x, Index row) const {
    ComplexLanes<A> k = load_point<A>(kernel + row * point_size<A>);
    k.re = Eigen::internal::padd(k.re, skip);
    x = Conjugate ? times_conjugate(x, k) : times(x, k);
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

/// How many runs the batch is cut into, when `groups` alone are fewer than the tasks that are wanted.
constexpr Index batch_runs(Index wanted_tasks, Index groups, Index batch) {
  return std::clamp<Index>(ceil_div(wanted_tasks, std::max<Index>(groups, 1)), 1, std::max<Index>(batch, 1));
}

/// The group and the sequences of one task.
template <class A>
struct LongConvTask {
  Index group_index;
  ChannelGroup group;
  Index begin, end;

  LongConvTask(Index task, Index runs, const LongConvShape& s)
      : group_index(task / runs), group(channel_group<A>(group_index, s.channels)) {
    const Index run_len = ceil_div(s.batch, runs);
    begin = std::min(task % runs * run_len, s.batch), end = std::min(begin + run_len, s.batch);
  }
};

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

/// Calls `use(plan, kernel_of)` for a kernel that this call alone needs. With one run a group is met once, and its spectrum is
/// made on the way and stays in the caches; with several there are few groups, and all spectra are made before.
template <class Args, Executor E, class Use>
void with_kernel(const Args& a, bool with_state, Index runs, const E& executor, const Use& use) {
  using A = std::remove_const_t<typename decltype(a.taps)::Value>;
  if (runs > 1) {
    const auto spectrum = kernel_spectrum(a.taps, a.back_taps, a.x.extents[1], executor, {.with_state = with_state});
    return use(spectrum.plan(), [&](Index g, int) { return spectrum.group(g); });
  }
  const LongConvShape s = long_conv_shape(a);
  const RightAnglePlan<A> plan = make_plan<A>(right_angle_least_points(s.tokens, s.taps, s.back_taps, with_state));
  const Index size = plan.points() * point_size<A>;
  const Scratch<A> spectra(executor.workers() * size);
  use(plan, [&](Index g, int worker) -> const A* {
    A* points = spectra.data() + worker * size;
    transform_kernel<A>(plan, a.taps, a.back_taps, s.tokens, with_state, channel_group<A>(g, s.channels), points);
    return points;
  });
}

template <class T>
constexpr bool needs_state(const LongConvArgs<T>& a) {
  return a.initial_state.present();
}
template <class T>
constexpr bool needs_state(const LongConvBackwardArgs<T>& a) {
  return a.initial_state.present() || a.grad_initial_state.present();
}

/// Every refusal of a call with a spectrum made earlier.
template <class Args, class A>
Status check_with(const Args& a, const KernelSpectrum<A>& spectrum) {
  const LongConvShape shape = shape_with(a, spectrum);
  return first_failure(check_spectrum(spectrum, shape, needs_state(a)), chela::detail::check_long_conv(a, shape));
}

}  // namespace chela::cpu::detail
