// Long sequences in float, up to 2^20 tokens, against sums in double at sampled outputs.
#include <doctest/doctest.h>

#include "chela/cpu/conv/long.hpp"
#include "support/tensors.hpp"

namespace chela {
namespace {

using test::nan_tensor;
using test::random_tensor;

/// Root mean square of the differences over that of the sums, at tokens near both ends and between. `got(t, d)`,
/// `want(t, d)`.
template <class Got, class Want>
double sampled_error(Index tokens, Index channels, const Got& got, const Want& want) {
  double difference = 0, norm = 0;
  for (Index i = 0; i < 90; ++i) {
    const Index t = i < 20 ? i : i < 40 ? tokens - 1 - (i - 20) : (i * 104729) % tokens;
    for (Index d : {Index(0), channels / 2, channels - 1}) {
      const double w = want(t, d);
      difference += (got(t, d) - w) * (got(t, d) - w), norm += w * w;
    }
  }
  return std::sqrt(difference / norm);
}

void check_far(Index tokens, Index taps, double most) {
  constexpr Index channels = 5;
  CAPTURE(tokens);
  CAPTURE(taps);
  const auto x = random_tensor<float>(1, 1, tokens, channels), grad_y = random_tensor<float>(2, 1, tokens, channels);
  const auto kernel = random_tensor<float>(3, channels, taps);
  auto y = nan_tensor<float>(1, tokens, channels), grad_x = nan_tensor<float>(1, tokens, channels);
  auto grad_taps = nan_tensor<float>(channels, taps);
  REQUIRE(cpu::long_conv(LongConvArgs<float>{.x = x, .taps = kernel, .y = y}).ok());
  REQUIRE(
      cpu::long_conv_backward(LongConvBackwardArgs<float>{
                                  .x = x, .taps = kernel, .grad_y = grad_y, .grad_x = grad_x, .grad_taps = grad_taps})
          .ok());
  const auto forward = [&](Index t, Index d) {
    double sum = 0;
    for (Index j = 0; j < std::min(taps, t + 1); ++j) sum += double(kernel(d, j)) * double(x(0, t - j, d));
    return sum;
  };
  const auto input = [&](Index t, Index d) {
    double sum = 0;
    for (Index j = 0; j < std::min(taps, tokens - t); ++j) sum += double(kernel(d, j)) * double(grad_y(0, t + j, d));
    return sum;
  };
  const auto tap = [&](Index j, Index d) {
    double sum = 0;
    for (Index t = j; t < tokens; ++t) sum += double(grad_y(0, t, d)) * double(x(0, t - j, d));
    return sum;
  };
  CHECK(sampled_error(
            tokens, channels, [&](Index t, Index d) { return double(y(0, t, d)); }, forward) < most);
  CHECK(sampled_error(
            tokens, channels, [&](Index t, Index d) { return double(grad_x(0, t, d)); }, input) < most);
  CHECK(sampled_error(
            taps, channels, [&](Index j, Index d) { return double(grad_taps(d, j)); }, tap) < most);
}

TEST_CASE("a sum over 65536 tokens keeps six digits, and over others nearly") {
  check_far(65536, 65536, 1e-6);
  check_far(65537, 65537, 1e-6);    // a prime
  check_far(200003, 200003, 1e-6);  // another
  check_far(200003, 1000, 1e-6);    // in blocks
  check_far(1 << 20, 1 << 20, 2e-6);
}

}  // namespace
}  // namespace chela
