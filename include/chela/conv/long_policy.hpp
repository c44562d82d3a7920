#pragma once
// How a long convolution is evaluated: a policy value, and the rule that chooses from sizes alone.
#include <algorithm>

#include "chela/conv/fft_plan.hpp"

namespace chela {

/// All give the same answer to rounding.
enum class LongConvMethod {
  automatic,  ///< by `choose_long_conv`
  direct,     ///< the sums themselves: a product per tap and token, the lowest cost for short kernels and few tokens
  blocks,     ///< one transform per block of tokens at least as long as the kernel, with the inputs before as its state
  transform,  ///< one transform over the whole sequence
};

/// The arithmetic of transforms of 16-bit data on a GPU. A CPU, and float data, always have the accumulator's.
enum class TransformArithmetic {
  automatic,    ///< elements' where it serves, which is several times as fast
  element,      ///< half precision on tensor cores, with about as much error as the output's own rounding
  accumulator,  ///< float
};

struct LongConvPolicy {
  static constexpr int as_measured = -1;

  LongConvMethod method = LongConvMethod::automatic;
  /// Automatic: the most products per output, averaged over a sequence, for which the sums are taken directly;
  /// `as_measured` for the backend.
  int direct_products = as_measured;
  /// The fewest tokens of a block.
  int least_block = 256;
  /// Partial kernels: only this many taps, the latest inputs', take part; 0 means all. States keep their length.
  int taps = 0;
  /// Frequency-sparse kernels: only the lowest eighths of the frequencies take part, 2, 4, 6, or 8 for all. Of the
  /// product at the 2N frequencies of one transform over the sequence the others are dropped, which is a smoother
  /// kernel that looks ahead a little. An approximation for kernels that are smooth themselves.
  int eighths = 8;
  TransformArithmetic arithmetic = TransformArithmetic::automatic;

  friend bool operator==(const LongConvPolicy&, const LongConvPolicy&) = default;
};

/// Carries a policy as a type, and is the one place where a policy is judged.
template <LongConvPolicy P>
struct LongConvPolicyConstant {
  static constexpr LongConvPolicy value = P;
  static_assert(P.direct_products >= 0 || P.direct_products == LongConvPolicy::as_measured,
                "LongConvPolicy::direct_products must be 0 or more, or as_measured; 0 leaves the choice between the "
                "transforms");
  static_assert(P.least_block >= 32, "LongConvPolicy::least_block must be at least 32, the shortest transform");
  static_assert(P.taps >= 0, "LongConvPolicy::taps must be 0 or more; 0 takes the whole kernel");
  static_assert(P.eighths == 2 || P.eighths == 4 || P.eighths == 6 || P.eighths == 8,
                "LongConvPolicy::eighths must be 2, 4, 6 or 8; 8 takes every frequency");
  static_assert(P.eighths == 8 || P.method == LongConvMethod::automatic || P.method == LongConvMethod::transform,
                "LongConvPolicy::eighths below 8 needs one transform over the sequence: method automatic or transform");
};

/// One sequence's way: `direct`, `blocks` or `transform`, and the transform's points. Sequences with equal choices
/// share a kernel's spectrum.
struct LongConvChoice {
  LongConvMethod method = LongConvMethod::transform;
  Index points = 0;  ///< also the tokens of a block

  friend constexpr bool operator==(const LongConvChoice&, const LongConvChoice&) = default;
};

/// The products of one channel of a sequence over its tokens.
constexpr double long_conv_products(Index tokens, Index taps, Index back_taps, bool with_state) {
  const auto met = [&](Index lags) {  // by outputs whose inputs begin with the sequence
    const Index n = std::min(lags, tokens);
    return double(tokens) * double(n) - 0.5 * double(n) * double(n - 1);
  };
  const double causal = with_state ? double(tokens) * double(taps) : met(taps);
  return back_taps > 0 ? causal + met(back_taps) : causal;
}

/// The most products per output that a CPU takes directly: kernels as long as the sequence cross at 50 tokens, kernels
/// much shorter at 40 taps (EPYC 9004, float, `bench_long_conv_cpu`).
inline constexpr int direct_products_on_cpu = 28;

/// Chooses from sizes alone, so that equal calls are computed alike everywhere. Blocks serve causal kernels; they are
/// taken when they need no more points than the whole, as smaller transforms stay in nearer caches.
constexpr LongConvChoice choose_long_conv(const LongConvPolicy& policy, Index tokens, Index taps, Index back_taps,
                                          bool with_state) {
  const LongConvChoice direct{LongConvMethod::direct, 0};
  const bool sparse = policy.eighths < 8;
  const int most_products =
      policy.direct_products == LongConvPolicy::as_measured ? direct_products_on_cpu : policy.direct_products;
  if (policy.method == LongConvMethod::direct) return direct;
  if (!sparse && policy.method == LongConvMethod::automatic &&
      long_conv_products(tokens, taps, back_taps, with_state) <= double(most_products) * double(tokens))
    return direct;
  const LongConvChoice whole{LongConvMethod::transform,
                             right_angle_size(right_angle_least_points(tokens, taps, back_taps, with_state)).points};
  if (sparse || policy.method == LongConvMethod::transform || back_taps > 0) return whole;
  const LongConvChoice blocks{LongConvMethod::blocks,
                              right_angle_size(std::max<Index>(taps, policy.least_block)).points};
  if (policy.method == LongConvMethod::blocks) return blocks;
  const bool fewer = tokens > blocks.points && ceil_div(tokens, blocks.points) * blocks.points <= whole.points;
  return fewer ? blocks : whole;
}

}  // namespace chela
