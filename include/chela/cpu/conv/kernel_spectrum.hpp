#pragma once
// A long kernel made ready: its spectrum, or its packets where the sums are taken directly; made once and used by any
// number of calls.
//
// A causal tap j is the real coefficient j of a complex polynomial. Modulo x^N - i a lag of -m is coefficient N - m
// times -i, so an anticausal tap is an imaginary coefficient, and so is an input that lies m tokens before the first:
// kernels that look both ways and calls that continue a history cost no more than one transform each.
#include <memory>

#include "chela/conv/long.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/long_direct.hpp"
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

/// The lags that a call over this many tokens can meet, of the taps that take part.
constexpr KernelLags lags_in_use(Index taps, Index back_taps, Index tokens, bool with_state, const LongConvPolicy& p) {
  const Index part = p.taps > 0 ? std::min<Index>(taps, p.taps) : taps;
  return {std::max<Index>(with_state ? part : std::min(part, tokens), 1),
          std::min(back_taps, std::max<Index>(tokens - 1, 0))};
}

/// `points` gets real parts from `ahead` (rows 0 on) and imaginary parts from `behind`: its last row m = 1 becomes row
/// N - 1, negated. Both are [row, channel].
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

/// The points of an innermost block whose frequencies are among the lowest `eighths` of eight: its points lie an eighth
/// of the circle apart, in bit-reversed order, and half of those kept are at its end, the negative frequencies.
constexpr unsigned kept_points(int eighths) {
  unsigned kept = 0;
  for (int e = 0; e < 8; ++e) {
    const int octant = ((e & 1) << 2) | (e & 2) | (e >> 2);
    if (octant < eighths / 2 || octant >= 8 - eighths / 2) kept |= 1u << e;
  }
  return kept;
}

/// The place of point e among those kept.
constexpr int kept_place(unsigned kept, int e) {
  int place = 0;
  for (int i = 0; i < e; ++i) place += int(kept >> i) & 1;
  return place;
}

/// How kernels of one size are made ready for one choice. Spectra hold `Eighths` points of each eight.
template <class A, int Eighths = 8>
struct KernelForm {
  LongConvChoice choice;
  KernelLags lags;
  RightAnglePlan<A> plan;

  KernelForm() = default;
  KernelForm(LongConvChoice c, KernelLags l) : choice(c), lags(l) {
    if (!direct()) plan = make_plan<A>(c.points);
  }

  bool direct() const { return choice.method == LongConvMethod::direct; }
  /// Elements that one group's kernel takes.
  Index size() const { return direct() ? lags.rows() * lanes_of<A> : work_size() / 8 * Eighths; }
  /// Elements of all points.
  Index work_size() const { return plan.points() * point_size<A>; }

  void make(TensorView<const A, 2> taps, TensorView<const A, 2> back_taps, ChannelGroup group, A* to) const {
    if (direct()) return stage_direct_kernel<A>(lags, taps, back_taps, group, to);
    if constexpr (Eighths == 8) {
      make_spectrum(taps, back_taps, group, to);
    } else {
      const Scratch<A> all(work_size());
      make_spectrum(taps, back_taps, group, all.data());
      for (Index row = 0; row < plan.points(); ++row)
        if (kept_points(Eighths) >> (row % 8) & 1)
          std::copy_n(all.data() + row * point_size<A>, point_size<A>,
                      to + (row / 8 * Eighths + kept_place(kept_points(Eighths), int(row % 8))) * point_size<A>);
    }
  }

  void make_spectrum(TensorView<const A, 2> taps, TensorView<const A, 2> back_taps, ChannelGroup group, A* to) const {
    const auto ahead = run(transposed(taps, 0, 1), 0, 0, lags.taps);
    const A factor = A(1) / A(plan.points());
    if (lags.back == 0) {
      gather_group<A>(ahead, group, to, point_size<A>);
      scale_packets(to, lags.taps, factor);
      return transform(plan, RealRows<A>{to, point_size<A>, lags.taps}, to);
    }
    const auto behind = reversed(run(transposed(back_taps, 0, 1), 0, 0, lags.back), 0);
    stage_points(ahead, behind, group, factor, plan.points(), to);
    transform(plan, Points<A>{to}, to);
  }
};

}  // namespace detail

/// What a spectrum must be able to do beyond calls that start from nothing.
struct KernelSpectrumOptions {
  bool with_state = false;  ///< serve calls with an initial state; may take twice the points when L > tokens
};

/// A kernel ready for use, in a layout of its own. Movable; any number of threads may read it at once. `Eighths`: as in
/// the policy it was made with.
template <class A, int Eighths = 8>
class KernelSpectrum {
 public:
  KernelSpectrum() = default;

  /// Ok, or why there is no spectrum; operators that are given it refuse with the same words.
  Status status() const { return status_; }
  Index tokens() const { return tokens_; }        ///< the most tokens a sequence may have
  Index channels() const { return channels_; }    ///< as in taps
  Index taps() const { return taps_; }            ///< L, whatever the number of tokens
  Index back_taps() const { return back_taps_; }  ///< M
  bool with_state() const { return with_state_; }
  LongConvMethod method() const { return form_.choice.method; }  ///< how calls are computed
  const detail::KernelForm<A, Eighths>& form() const { return form_; }

  /// What belongs to one packet of channels.
  const A* group(Index g) const { return memory_.data() + g * form_.size(); }

 private:
  template <LongConvPolicy P, class W, Executor E>
  friend KernelSpectrum<std::remove_const_t<W>, P.eighths> kernel_spectrum(TensorView<W, 2>,
                                                                           TensorView<const std::remove_const_t<W>, 2>,
                                                                           Index, const E&, KernelSpectrumOptions);

  Status status_{Code::bad_value, "the kernel's spectrum is empty; make it with kernel_spectrum"};
  Index tokens_ = 0, channels_ = 0, taps_ = 0, back_taps_ = 0;
  bool with_state_ = false;
  detail::KernelForm<A, Eighths> form_;
  detail::Scratch<A> memory_;
};

/// The spectrum of `taps` [channel, L] and `back_taps` [channel, M] (or absent) for calls over up to `tokens` tokens,
/// which the policy's choice for that many serves.
template <LongConvPolicy P = LongConvPolicy{}, class W, Executor E>
KernelSpectrum<std::remove_const_t<W>, P.eighths> kernel_spectrum(TensorView<W, 2> taps,
                                                                  TensorView<const std::remove_const_t<W>, 2> back_taps,
                                                                  Index tokens, const E& executor,
                                                                  KernelSpectrumOptions options = {}) {
  using A = std::remove_const_t<W>;
  constexpr LongConvPolicy policy = LongConvPolicyConstant<P>::value;
  KernelSpectrum<A, P.eighths> out;
  const Index channels = taps.extents[0];
  out.status_ = first_failure(chela::detail::check_long_conv_taps<const A>(taps, back_taps, channels),
                              require(tokens >= 0, Code::bad_value, "tokens must be zero or more"));
  if (!out.status_.ok()) return out;
  out.tokens_ = tokens, out.channels_ = channels, out.with_state_ = options.with_state;
  out.taps_ = taps.extents[1], out.back_taps_ = back_taps.present() ? back_taps.extents[1] : 0;
  const detail::KernelLags lags = detail::lags_in_use(out.taps_, out.back_taps_, tokens, options.with_state, policy);
  out.form_ = {choose_long_conv(policy, tokens, lags.taps, lags.back, options.with_state), lags};
  const Index groups = detail::channel_groups<A>(channels), size = out.form_.size();
  out.memory_ = detail::Scratch<A>(groups * size);
  executor.for_each(groups, [&](Index g, int) {
    out.form_.make(taps, back_taps, detail::channel_group<A>(g, channels), out.memory_.data() + g * size);
  });
  return out;
}

}  // namespace chela::cpu
