#pragma once
// The spectrum of a long kernel, made once and used by any number of calls.
//
// A causal tap j is the real coefficient j of a complex polynomial. Modulo x^N - i a lag of -m is coefficient N - m times -i,
// so an anticausal tap is an imaginary coefficient, and so is an input that lies m tokens before the first: kernels that look
// both ways and calls that continue a history cost no more than one transform each.
#include <memory>

#include "chela/conv/fft_plan.hpp"
#include "chela/conv/long.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/channel_group.hpp"
#include "chela/cpu/conv/right_angle_fft.hpp"

namespace chela::cpu {

namespace detail {

/// Radix 8 holds 16 packets of data; with 16 registers it spills, which radix 4 avoids where memory is slow as well.
template <class A>
RightAnglePlan<A> make_plan(Index least_points) {
  constexpr Index far = 16384;
  constexpr bool few_registers = Eigen::internal::packet_traits<A>::size * sizeof(A) < 64;
  return RightAnglePlan<A>(least_points, few_registers && least_points >= far ? 4 : 8);
}

/// Taps that a call over this many tokens can meet.
constexpr Index causal_taps_in_use(Index taps, Index tokens, bool with_state) {
  return with_state ? taps : std::min(taps, tokens);
}
constexpr Index back_taps_in_use(Index back_taps, Index tokens) {
  return std::min(back_taps, std::max<Index>(tokens - 1, 0));
}

/// `points` gets real parts from `ahead` (rows 0 on) and imaginary parts from `behind`: its last row m = 1 becomes row N - 1,
/// negated. Both are [row, channel].
template <class A, class T, class U>
void stage_points(TensorView<T, 2> ahead, TensorView<U, 2> behind, ChannelGroup group, A factor, Index n, A* points) {
  const Index real_rows = ahead.extents[0], imaginary_rows = behind.extents[0];
  gather_group<A>(ahead, group, points, point_size<A>);
  scale_packets(points, real_rows, factor);
  zero_packets(points + real_rows * point_size<A>, n - real_rows);
  A* imaginary = points + lanes_of<A>;
  A* first_behind = imaginary + (n - imaginary_rows) * point_size<A>;
  zero_packets(imaginary, n - imaginary_rows);
  gather_group<A>(behind, group, first_behind, point_size<A>);
  scale_packets(first_behind, imaginary_rows, -factor);
}

/// The spectrum of one group's kernel over N, made in place in `points`.
template <class A>
void transform_kernel(const RightAnglePlan<A>& plan, TensorView<const A, 2> taps, TensorView<const A, 2> back_taps,
                      Index tokens, bool with_state, ChannelGroup group, A* points) {
  const Index causal = causal_taps_in_use(taps.extents[1], tokens, with_state);
  const Index back = back_taps.present() ? back_taps_in_use(back_taps.extents[1], tokens) : 0;
  const auto ahead = run(transposed(taps, 0, 1), 0, 0, causal);
  const A factor = A(1) / A(plan.points());
  if (back == 0) {
    gather_group<A>(ahead, group, points, point_size<A>);
    scale_packets(points, causal, factor);
    return transform(plan, RealRows<A>{points, point_size<A>, causal}, points);
  }
  const auto behind = reversed(run(transposed(back_taps, 0, 1), 0, 0, back), 0);
  stage_points(ahead, behind, group, factor, plan.points(), points);
  transform(plan, Points<A>{points}, points);
}

}  // namespace detail

/// What a spectrum must be able to do beyond calls that start from nothing.
struct KernelSpectrumOptions {
  bool with_state = false;  ///< serve calls with an initial state; may take twice the points when L > tokens
};

/// A kernel ready for use, in a layout of its own. Movable; any number of threads may read it at once.
template <class A>
class KernelSpectrum {
 public:
  KernelSpectrum() = default;

  /// Ok, or why there is no spectrum; operators that are given it refuse with the same words.
  Status status() const { return status_; }
  Index tokens() const { return tokens_; }        ///< the most tokens a call may have
  Index channels() const { return channels_; }    ///< as in taps
  Index taps() const { return taps_; }            ///< L, whatever the number of tokens
  Index back_taps() const { return back_taps_; }  ///< M
  bool with_state() const { return with_state_; }
  const RightAnglePlan<A>& plan() const { return plan_; }

  /// The points of one packet of channels.
  const A* group(Index g) const { return points_.data() + g * plan_.points() * detail::point_size<A>; }

 private:
  template <class W, Executor E>
  friend KernelSpectrum<std::remove_const_t<W>> kernel_spectrum(TensorView<W, 2>,
                                                                TensorView<const std::remove_const_t<W>, 2>, Index,
                                                                const E&, KernelSpectrumOptions);

  Status status_{Code::bad_value, "the kernel's spectrum is empty; make it with kernel_spectrum"};
  Index tokens_ = 0, channels_ = 0, taps_ = 0, back_taps_ = 0;
  bool with_state_ = false;
  RightAnglePlan<A> plan_;
  detail::Scratch<A> points_;
};

/// The spectrum of `taps` [channel, L] and `back_taps` [channel, M] (or absent) for calls over up to `tokens` tokens.
template <class W, Executor E>
KernelSpectrum<std::remove_const_t<W>> kernel_spectrum(TensorView<W, 2> taps,
                                                       TensorView<const std::remove_const_t<W>, 2> back_taps,
                                                       Index tokens, const E& executor,
                                                       KernelSpectrumOptions options = {}) {
  using A = std::remove_const_t<W>;
  KernelSpectrum<A> out;
  const Index channels = taps.extents[0];
  out.status_ = first_failure(chela::detail::check_long_conv_taps<const A>(taps, back_taps, channels),
                              require(tokens >= 0, Code::bad_value, "tokens must be zero or more"));
  if (!out.status_.ok()) return out;
  out.tokens_ = tokens, out.channels_ = channels, out.with_state_ = options.with_state;
  out.taps_ = taps.extents[1], out.back_taps_ = back_taps.present() ? back_taps.extents[1] : 0;
  out.plan_ = detail::make_plan<A>(right_angle_least_points(tokens, out.taps_, out.back_taps_, options.with_state));
  const Index groups = detail::channel_groups<A>(channels), size = out.plan_.points() * detail::point_size<A>;
  out.points_ = detail::Scratch<A>(groups * size);
  executor.for_each(groups, [&](Index g, int) {
    detail::transform_kernel<A>(out.plan_, taps, back_taps, tokens, options.with_state,
                                detail::channel_group<A>(g, channels), out.points_.data() + g * size);
  });
  return out;
}

}  // namespace chela::cpu
