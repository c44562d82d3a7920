#pragma once
// What the passes of the long convolution share: how rows and kernels enter the transform, which sequences share a
// kernel's form, how the work is cut into tasks, and where a task finds its kernel.
#include <algorithm>
#include <vector>

#include "chela/cpu/conv/kernel_spectrum.hpp"

namespace chela::cpu::detail {

/// Walks ahead in one group's spectrum. A walk over the tree reads spectra in bursts, at its innermost blocks, and more
/// lines than a core may wait for; fetched two lines at a time throughout, they come by the time they are needed.
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

/// Multiplies by the kernel's spectrum plus the skip, or by the conjugate of that, at the kept points.
template <class A, bool Conjugate, int Eighths = 8>
struct TimesKernel {
  static constexpr unsigned kept = kept_points(Eighths);
  const A* kernel = nullptr;
  LanePacket<A> skip = {};
  SpectrumAhead<A> ahead{kernel};

  CHELA_ALWAYS_INLINE void begin(Index row) { ahead.begin(row / 8 * Eighths); }
  CHELA_ALWAYS_INLINE void fetch_ahead() { ahead.fetch(); }
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>& x, Index row, int e) const {
    if (!(kept >> e & 1)) return;
    ComplexLanes<A> k = load_point<A>(kernel + (row / 8 * Eighths + kept_place(kept, e)) * point_size<A>);
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

/// Hands `use` a source of the transform over the rows of one sequence. Rows that are not packets in memory are copied
/// to `work` first.
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

/// From this size on the rows of a result leave the caches before the last group is done: inputs and spectra of four
/// times that size come through meanwhile.
inline constexpr Index least_streamed_rows = Index(1) << 23;

/// Hands `use` a sink of the transform for the rows of one sequence, which are packets in memory, of `all` that the call
/// writes.
template <class A, class Use>
void with_sink(TensorView<A, 2> rows, TensorView<A, 3> all, ChannelGroup group, const Use& use) {
  A* const first = rows.data + group.first;
  if constexpr (sizeof(LanePacket<A>) == line_bytes) {
    if (worth_streaming(all, least_streamed_rows)) {
      use(RealRowsOut<A, true>{first, rows.strides[0], rows.extents[0]});
      return finish_streams();
    }
  }
  use(RealRowsOut<A>{first, rows.strides[0], rows.extents[0]});
}

/// The rows before a sequence's first token that its kernel meets: none when there is no state.
template <class T>
TensorView<const T, 2> history_rows(TensorView<const T, 3> state, Index sequence, const KernelLags& lags) {
  if (!state.present()) return {};
  const auto rows = slice(state, sequence);
  const Index met = std::min(lags.taps - 1, rows.extents[0]);
  return run(rows, 0, rows.extents[0] - met, met);
}

/// The rows before the block of a sequence that begins at `begin`, which are in the block before, as blocks are as long
/// as the kernel at least.
template <class T>
TensorView<const T, 2> block_history(TensorView<const T, 2> rows, TensorView<const T, 2> history, Index begin,
                                     const KernelLags& lags) {
  return begin == 0 ? history : run(rows, 0, begin - (lags.taps - 1), lags.taps - 1);
}

template <class T>
TensorView<T, 2> sequence_rows(TensorView<T, 3> x, const Sequence& q) {
  return run(slice(x, q.batch), 0, q.begin, q.count);
}

/// How many runs so many sequences are cut into, when `groups` alone are fewer than the tasks that are wanted.
constexpr Index batch_runs(Index wanted_tasks, Index groups, Index sequences) {
  return std::clamp<Index>(ceil_div(wanted_tasks, std::max<Index>(groups, 1)), 1, std::max<Index>(sequences, 1));
}

/// The group and the run of a class's members that one task computes.
template <class A>
struct LongConvTask {
  Index group_index;
  ChannelGroup group;
  Index begin, end;

  LongConvTask(Index task, Index runs, Index members, Index channels)
      : group_index(task / runs), group(channel_group<A>(group_index, channels)) {
    const Index run_len = ceil_div(members, runs);
    begin = std::min(task % runs * run_len, members), end = std::min(begin + run_len, members);
  }
};

/// Sequences, by their places in the batch, that one kernel form serves.
template <class A, int Eighths>
struct SequenceClass {
  KernelForm<A, Eighths> form;
  std::vector<Index> members;
};

/// Sequences without tokens belong to no class. In the order in which the choices first come up.
template <class A, LongConvPolicy P>
std::vector<SequenceClass<A, P.eighths>> sequence_classes(const LongConvShape& s, bool with_state) {
  constexpr LongConvPolicy policy = LongConvPolicyConstant<P>::value;
  struct Found {
    LongConvChoice choice;
    Index longest;
    std::vector<Index> members;
  };
  std::vector<Found> found;
  for (Index i = 0; i < s.sequences.size(); ++i) {
    const Index tokens = s.sequences[i].count;
    if (tokens == 0) continue;
    const KernelLags lags = lags_in_use(s.taps, s.back_taps, tokens, with_state, policy);
    const LongConvChoice choice = choose_long_conv(policy, tokens, lags.taps, lags.back, with_state);
    auto at = std::find_if(found.begin(), found.end(), [&](const Found& f) { return f.choice == choice; });
    if (at == found.end()) at = found.insert(at, {choice, 0, {}});
    at->longest = std::max(at->longest, tokens);
    at->members.push_back(i);
  }
  std::vector<SequenceClass<A, P.eighths>> classes;
  for (Found& f : found)
    classes.push_back(
        {KernelForm<A, P.eighths>(f.choice, lags_in_use(s.taps, s.back_taps, f.longest, with_state, policy)),
         std::move(f.members)});
  return classes;
}

inline std::vector<Index> sequences_with_tokens(const LongConvShape& s) {
  std::vector<Index> members;
  for (Index i = 0; i < s.sequences.size(); ++i)
    if (s.sequences[i].count > 0) members.push_back(i);
  return members;
}

/// Whether a spectrum made earlier serves this call.
template <class A, int Eighths>
Status check_spectrum(const KernelSpectrum<A, Eighths>& k, const LongConvShape& s, bool needs_state) {
  return first_failure(
      k.status(),
      require(k.channels() == s.channels, Code::bad_shape, "the kernel's spectrum must have as many channels as x"),
      require(s.tokens <= k.tokens() || s.sequences.cu_seqlens.present(), Code::bad_shape,
              "x has more tokens than the kernel's spectrum was made for; make it for the longest call"),
      require(k.with_state() || !needs_state, Code::bad_value,
              "an initial state needs a spectrum that was made with_state"));
}

/// Refuses offsets that lead outside of the tensors, and sequences longer than what a spectrum serves. Reads the
/// offsets.
inline Status check_sequences(const SequenceBatch& sequences, Index most_tokens) {
  if (Status s = check_offsets(sequences); !s.ok()) return s;
  if (!sequences.cu_seqlens.present()) return {};
  for (Index i = 0; i < sequences.size(); ++i)
    if (sequences[i].count > most_tokens)
      return {Code::bad_shape, "a sequence has more tokens than the kernel's spectrum was made for"};
  return {};
}

template <class Args, class A, int Eighths>
LongConvShape shape_with(const Args& a, const KernelSpectrum<A, Eighths>& k) {
  return {a.x.extents[0], a.x.extents[1], a.x.extents[2],
          k.taps(),       k.back_taps(),  {a.x.extents[0], a.x.extents[1], a.cu_seqlens}};
}

/// Calls `use(kernel_of)` for a kernel that this call alone needs; `kernel_of(group, worker)` is that group's, good
/// until the worker asks for another. With one run a group is met once, and its kernel is made on the way and stays in
/// the caches; with several there are few groups, and all are made before.
template <class A, int Eighths, Executor E, class Use>
void with_kernel(const KernelForm<A, Eighths>& form, TensorView<const A, 2> taps, TensorView<const A, 2> back_taps,
                 Index runs, const E& executor, const Use& use) {
  const Index channels = taps.extents[0], size = form.size(), groups = channel_groups<A>(channels);
  const Scratch<A> kernels((runs > 1 ? groups : Index(executor.workers())) * size);
  const auto make = [&](Index g, Index place) {
    form.make(taps, back_taps, channel_group<A>(g, channels), kernels.data() + place * size);
  };
  if (runs > 1) executor.for_each(groups, [&](Index g, int) { make(g, g); });
  use([&](Index g, int worker) -> const A* {
    if (runs == 1) make(g, worker);
    return kernels.data() + (runs > 1 ? g : Index(worker)) * size;
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
template <class Args, class A, int Eighths>
Status check_with(const Args& a, const KernelSpectrum<A, Eighths>& spectrum) {
  const LongConvShape shape = shape_with(a, spectrum);
  if (Status s =
          first_failure(check_spectrum(spectrum, shape, needs_state(a)), chela::detail::check_long_conv(a, shape));
      !s.ok())
    return s;
  return check_sequences(shape.sequences, spectrum.tokens());
}

}  // namespace chela::cpu::detail
