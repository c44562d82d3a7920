#pragma once
// Streams of the long convolution: see chela/conv/long_stream.hpp for the levels. A kernel is made ready once and
// serves any number of streams; a stream is a value, and a copy of it is a place to come back to.
//
// A level's product is one transform per group of channels and sequence, in stages: the outermost pass, each of its
// parts, the outermost inverse pass. Which stages are due follows from the clock alone; groups take turns, so that
// their stages do not fall on the same tokens.
#include "chela/conv/long_stream.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/conv/long_tasks.hpp"

namespace chela::cpu {

/// A kernel cut for streams. Any number of threads may read it at once.
template <class A>
class LongConvStreamKernel {
 public:
  LongConvStreamKernel() = default;

  template <Executor E>
  LongConvStreamKernel(TensorView<const A, 2> taps, const E& executor) {
    status_ = chela::detail::check_long_conv_taps<const A>(taps, {}, taps.extents[0]);
    if (!status_.ok()) return;
    channels_ = taps.extents[0], levels_ = {taps.extents[1]};
    for (int i = 0; i < levels_.count(); ++i) {
      const Index first = levels_.points(i), count = std::min(levels_.taps - first, levels_.points(i));
      forms_.emplace_back(LongConvChoice{LongConvMethod::transform, levels_.points(i)}, detail::KernelLags{count, 0});
    }
    group_size_ = levels_.direct() * detail::lanes_of<A>;
    for (const auto& form : forms_) group_size_ += form.size();
    const Index groups = detail::channel_groups<A>(channels_);
    memory_ = detail::Scratch<A>(groups * group_size_);
    executor.for_each(groups, [&](Index g, int) {
      const detail::ChannelGroup group = detail::channel_group<A>(g, channels_);
      A* to = memory_.data() + g * group_size_;
      detail::gather_group<A>(run(transposed(taps, 0, 1), 0, 0, levels_.direct()), group, to, detail::lanes_of<A>);
      to += levels_.direct() * detail::lanes_of<A>;
      for (std::size_t i = 0; i < forms_.size(); to += forms_[i++].size())
        forms_[i].make(run(taps, 1, levels_.points(int(i)), forms_[i].lags.taps), {}, group, to);
    });
  }

  Status status() const { return status_; }
  Index channels() const { return channels_; }
  const StreamLevels& levels() const { return levels_; }
  const RightAnglePlan<A>& plan(int level) const { return forms_[std::size_t(level)].plan; }

  /// Packets of the direct lags.
  const A* direct(Index group) const { return memory_.data() + group * group_size_; }
  const A* spectrum(int level, Index group) const {
    const A* at = direct(group) + levels_.direct() * detail::lanes_of<A>;
    for (int i = 0; i < level; ++i) at += forms_[std::size_t(i)].size();
    return at;
  }

 private:
  Status status_{Code::bad_value, "the stream's kernel is empty; make it from taps"};
  Index channels_ = 0, group_size_ = 0;
  StreamLevels levels_;
  std::vector<detail::KernelForm<A>> forms_;
  detail::Scratch<A> memory_;
};

namespace detail {

/// Adds coefficients p to what is due at the tokens `first` + p: real parts at p = row, imaginary ones N later. What
/// was due before `from` is dropped.
template <class A>
struct AddToOutputs {
  A* outputs = nullptr;
  Index mask = 0, first = 0, points = 0, from = 0;

  CHELA_ALWAYS_INLINE void store(Index row, const ComplexLanes<A>& x) const {
    add(first + row, x.re), add(first + points + row, x.im);
  }
  CHELA_ALWAYS_INLINE void add(Index token, const LanePacket<A>& x) const {
    using namespace Eigen::internal;
    if (token < from) return;
    A* at = outputs + (token & mask) * lanes_of<A>;
    pstoreu(at, padd(ploadu<LanePacket<A>>(at), x));
  }
  CHELA_ALWAYS_INLINE void fetch(Index) const {}
};

}  // namespace detail

/// The state of `batch` streams of one kernel's shape: O(L) per channel. It begins with nothing before the first token.
template <class A>
class LongConvStream {
 public:
  LongConvStream() = default;
  LongConvStream(const LongConvStreamKernel<A>& kernel, Index batch)
      : batch_(batch), channels_(kernel.channels()), levels_(kernel.levels()) {
    const Index lanes = detail::lanes_of<A>;
    inputs_ = levels_.input_rows() * lanes, outputs_ = levels_.output_rows() * lanes;
    group_size_ = batch_ * (inputs_ + outputs_);
    for (int i = 0; i < levels_.count(); ++i) group_size_ += levels_.points(i) * detail::point_size<A>;
    memory_ = Tensor<A, 1>(detail::channel_groups<A>(channels_) * group_size_);
  }

  Index batch() const { return batch_; }
  Index channels() const { return channels_; }
  const StreamLevels& levels() const { return levels_; }

 private:
  template <Element T, Executor E>
  friend Status long_conv_stream_step(const LongConvStreamArgs<T>&, const LongConvStreamKernel<Accumulator<T>>&,
                                      LongConvStream<Accumulator<T>>&, const E&);
  template <Element T, Executor E>
  friend Status long_conv_stream_prefill(TensorView<T, 3>, const LongConvStreamKernel<Accumulator<T>>&,
                                         LongConvStream<Accumulator<T>>&, const E&);

  A* inputs(Index group, Index b) { return memory_.data() + group * group_size_ + b * (inputs_ + outputs_); }
  A* outputs(Index group, Index b) { return inputs(group, b) + inputs_; }
  A* work(Index group, int level) {
    A* at = memory_.data() + group * group_size_ + batch_ * (inputs_ + outputs_);
    for (int i = 0; i < level; ++i) at += levels_.points(i) * detail::point_size<A>;
    return at;
  }

  /// y for this token, which enters.
  detail::LanePacket<A> token(const LongConvStreamKernel<A>& kernel, Index group, Index b,
                              const detail::LanePacket<A>& x, const detail::LanePacket<A>& skip) {
    using namespace Eigen::internal;
    constexpr int lanes = detail::lanes_of<A>;
    A* const rows = inputs(group, b);
    const Index mask = levels_.input_rows() - 1, direct = levels_.direct();
    pstoreu(rows + (clock_ & mask) * lanes, x);
    A* const due = outputs(group, b) + (clock_ & (levels_.output_rows() - 1)) * lanes;
    const detail::LanePacket<A> zero = pset1<detail::LanePacket<A>>(A(0));
    detail::LanePacket<A> sums[4] = {pmadd(skip, x, ploadu<detail::LanePacket<A>>(due)), zero, zero, zero};
    pstoreu(due, zero);
    const A* taps = kernel.direct(group);
    const auto add = [&](detail::LanePacket<A>& sum, Index j) {
      sum = pmadd(ploadu<detail::LanePacket<A>>(taps + j * lanes),
                  ploadu<detail::LanePacket<A>>(rows + ((clock_ - j) & mask) * lanes), sum);
    };
    Index j = 0;
    for (; j + 4 <= direct; j += 4) {
      CHELA_UNROLL
      for (int i = 0; i < 4; ++i) add(sums[i], j + i);
    }
    for (; j < direct; ++j) add(sums[0], j);
    return padd(padd(sums[0], sums[1]), padd(sums[2], sums[3]));
  }

  /// The stages that are due when so many tokens have been seen, of the block that a level completed last.
  void stages(const LongConvStreamKernel<A>& kernel, int level, Index seen, Index group, Index groups) {
    const Index block = levels_.block(level), complete = seen / block * block, step = seen - complete;
    if (complete <= begun_) return;
    const RightAnglePlan<A>& plan = kernel.plan(level);
    const Index each = plan.pass(0).radix + 2, slots = batch_ * each * groups;
    const auto before = [&](Index s) {  // this group's stages that are due before step s
      return ceil_div(std::max<Index>(ceil_div(s * slots, block) - group, 0), groups);
    };
    for (Index k = before(step); k < before(step + 1); ++k)
      stage(kernel, level, group, k / each, int(k % each), complete);
  }

  void stage(const LongConvStreamKernel<A>& kernel, int level, Index group, Index b, int stage, Index complete) {
    const RightAnglePlan<A>& plan = kernel.plan(level);
    const Index block = levels_.block(level);
    A* const points = work(group, level);
    if (stage == 0) {
      const A* rows = inputs(group, b) + ((complete - block) & (levels_.input_rows() - 1)) * detail::lanes_of<A>;
      detail::first_pass(plan, detail::RealRows<A>{rows, detail::lanes_of<A>, block}, points);
    } else if (stage <= plan.pass(0).radix) {
      detail::TimesKernel<A, false> middle{kernel.spectrum(level, group),
                                           Eigen::internal::pset1<detail::LanePacket<A>>(A(0))};
      detail::walk_part<detail::Walk::both>(plan, stage - 1, points, middle);
    } else {
      detail::last_pass(plan, points, due_after(level, group, b, complete));
    }
  }

  detail::AddToOutputs<A> due_after(int level, Index group, Index b, Index complete) {
    return {outputs(group, b), levels_.output_rows() - 1, complete + levels_.block(level), levels_.points(level),
            clock_};
  }

  /// The inputs before the clock, [row, channel], and all that is still due of them.
  template <class T>
  void begin(const LongConvStreamKernel<A>& kernel, TensorView<const T, 2> rows, Index group, Index b) {
    constexpr int lanes = detail::lanes_of<A>;
    const detail::ChannelGroup channels = detail::channel_group<A>(group, channels_);
    const Index kept = std::min(clock_, levels_.input_rows());
    std::fill_n(inputs(group, b), inputs_ + outputs_, A(0));
    for (Index t = clock_ - kept; t < clock_; ++t)
      detail::gather_group<A>(run(rows, 0, t, 1), channels, inputs(group, b) + (t & (levels_.input_rows() - 1)) * lanes,
                              lanes);
    for (int level = 0; level < levels_.count(); ++level) {
      const Index block = levels_.block(level);
      A* const points = work(group, level);
      for (Index complete = clock_ / block * block; complete > 0 && complete + 4 * block > clock_; complete -= block) {
        detail::gather_group<A>(run(rows, 0, complete - block, block), channels, points, detail::point_size<A>);
        detail::convolve(kernel.plan(level), detail::RealRows<A>{points, detail::point_size<A>, block},
                         detail::TimesKernel<A, false>{kernel.spectrum(level, group),
                                                       Eigen::internal::pset1<detail::LanePacket<A>>(A(0))},
                         due_after(level, group, b, complete), points);
      }
    }
  }

  Index batch_ = 0, channels_ = 0;
  StreamLevels levels_;
  Index inputs_ = 0, outputs_ = 0, group_size_ = 0;
  Index clock_ = 0, begun_ = 0;  // tokens so far, and of these the ones that prefill brought
  Tensor<A, 1> memory_;
};

namespace detail {

template <class A>
Status check_stream(const LongConvStreamKernel<A>& kernel, const LongConvStream<A>& stream, Index batch,
                    Index channels) {
  return first_failure(kernel.status(),
                       require(stream.channels() == kernel.channels() && stream.levels().taps == kernel.levels().taps,
                               Code::bad_shape, "the stream must have been made for a kernel of this shape"),
                       require(stream.batch() == batch && stream.channels() == channels, Code::bad_shape,
                               "x must be [batch, channel] with the batch and the channels of the stream"));
}

}  // namespace detail

/// y for one token per sequence, whose state the stream is.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_stream_step(const LongConvStreamArgs<T>& a, const LongConvStreamKernel<Accumulator<T>>& kernel,
                             LongConvStream<Accumulator<T>>& stream, const E& executor = {}) {
  using A = Accumulator<T>;
  const Index batch = a.x.extents[0], channels = a.x.extents[1];
  if (Status s = first_failure(check(a), detail::check_stream(kernel, stream, batch, channels)); !s.ok()) return s;
  const Index groups = detail::channel_groups<A>(channels);
  executor.for_each(groups, [&](Index g, int) {
    const detail::ChannelGroup group = detail::channel_group<A>(g, channels);
    const auto skip = detail::skip_lanes(a.skip, group, 1);
    for (Index b = 0; b < batch; ++b) {
      A values[detail::lanes_of<A>];
      detail::gather_group<A>(run(a.x, 0, b, 1), group, values, detail::lanes_of<A>);
      const auto y = stream.token(kernel, g, b, Eigen::internal::ploadu<detail::LanePacket<A>>(values), skip);
      Eigen::internal::pstoreu(values, y);
      detail::scatter_group<A>(values, detail::lanes_of<A>, run(a.y, 0, b, 1), group);
    }
    for (int level = 0; level < stream.levels_.count(); ++level)
      stream.stages(kernel, level, stream.clock_ + 1, g, groups);
  });
  ++stream.clock_;
  return {};
}

/// Makes the stream one that has seen these inputs, [batch, token, channel]; those older than L - 1 tokens, or a final
/// state of `long_conv`, make no difference.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_stream_prefill(TensorView<T, 3> inputs, const LongConvStreamKernel<Accumulator<T>>& kernel,
                                LongConvStream<Accumulator<T>>& stream, const E& executor = {}) {
  using A = Accumulator<T>;
  const Index batch = inputs.extents[0], channels = inputs.extents[2];
  if (Status s = first_failure(detail::check_stream(kernel, stream, batch, channels),
                               require(readable(inputs), Code::bad_shape, "inputs need data"));
      !s.ok())
    return s;
  const Index seen = std::min(inputs.extents[1], stream.levels_.taps - 1);
  const TensorView<const T, 3> last = run(inputs, 1, inputs.extents[1] - seen, seen);
  stream.clock_ = stream.begun_ = seen;
  executor.for_each(detail::channel_groups<A>(channels), [&](Index g, int) {
    for (Index b = 0; b < batch; ++b) stream.begin(kernel, slice(last, b), g, b);
  });
  return {};
}

}  // namespace chela::cpu
