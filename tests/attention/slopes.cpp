#include "chela/attention/slopes.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "chela/cpu/attention/linear.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

template <class A>
std::vector<A> listed(const Tensor<A, 1>& slopes) {
  return {slopes.begin(), slopes.end()};
}

}  // namespace

TEST_CASE("RetNet's decays are 1 - 1/32, 1 - 1/64, ...") {
  const auto slopes = retnet_slopes<double>(8);
  double kept = 32;
  for (Index h = 0; h < 8; ++h, kept *= 2) CHECK(std::exp(slopes(h)) == doctest::Approx(1 - 1 / kept).epsilon(1e-15));
  CHECK(slopes(0) == std::log(31.0 / 32));
}

TEST_CASE("a RetNet decay close to 1 keeps its digits") {
  const auto slopes = retnet_slopes<float>(60);
  CHECK(slopes(40) == -std::exp2(-45.f));
  CHECK(slopes(59) == -std::exp2(-64.f));
}

TEST_CASE("ALiBi's slopes for head counts that are powers of two") {
  CHECK(listed(alibi_slopes<double>(1)) == std::vector{-1.0 / 256});
  CHECK(listed(alibi_slopes<double>(2)) == std::vector{-1.0 / 16, -1.0 / 256});
  CHECK(listed(alibi_slopes<double>(8)) ==
        std::vector{-1.0 / 2, -1.0 / 4, -1.0 / 8, -1.0 / 16, -1.0 / 32, -1.0 / 64, -1.0 / 128, -1.0 / 256});
  const auto sixteen = alibi_slopes<double>(16);
  for (Index h = 0; h < 16; ++h) CHECK(sixteen(h) == -std::exp2(-double(h + 1) / 2));
}

TEST_CASE("ALiBi's slopes for other head counts: those of the power below, then every second one of the power above") {
  CHECK(listed(alibi_slopes<double>(3)) == std::vector{-1.0 / 16, -1.0 / 256, -1.0 / 4});
  CHECK(listed(alibi_slopes<double>(6)) == std::vector{-1.0 / 4, -1.0 / 16, -1.0 / 64, -1.0 / 256, -1.0 / 2, -1.0 / 8});
  const auto twelve = alibi_slopes<double>(12), eight = alibi_slopes<double>(8), sixteen = alibi_slopes<double>(16);
  for (Index h = 0; h < 8; ++h) CHECK(twelve(h) == eight(h));
  for (Index h = 8; h < 12; ++h) CHECK(twelve(h) == sixteen(2 * (h - 8)));
}

TEST_CASE("Lightning's slopes are ALiBi's, less in later layers") {
  const auto alibi = alibi_slopes<double>(6);
  for (Index layer : {0, 1, 11}) {
    const auto slopes = lightning_slopes<double>(6, layer, 12);
    for (Index h = 0; h < 6; ++h) CHECK(slopes(h) == alibi(h) * (1 - double(layer) / 11 + 1e-5));
  }
  const auto last = lightning_slopes<float>(4, 11, 12);
  CHECK(last(0) == doctest::Approx(-0.25e-5).epsilon(1e-6));
  CHECK(listed(lightning_slopes<double>(6, 0, 1)) == listed(lightning_slopes<double>(6, 0, 12)));
}

TEST_CASE("every slope is a log-decay: finite and at most 0") {
  for (Index heads : {0, 1, 5, 16, 200})
    for (const auto& slopes : {retnet_slopes(heads), alibi_slopes(heads), lightning_slopes(heads, 3, 4)}) {
      CHECK(slopes.size() == heads);
      for (float g : slopes) CHECK((g <= 0 && g > -1));
    }
}

TEST_CASE("slopes go into a pass with a decay per head as they are") {
  const auto q = random_tensor<float>(1, 1, 5, 2, 4), k = random_tensor<float>(2, 1, 5, 2, 4),
             v = random_tensor<float>(3, 1, 5, 2, 3);
  auto o = nan_tensor<float>(1, 5, 2, 3);
  const auto slopes = retnet_slopes(2);
  REQUIRE(cpu::linear_attention(
              LinearAttentionArgs<float, DecayKind::per_head>{
                  .q = q, .k = k, .v = v, .o = o, .scale = 1, .log_decay = slopes},
              SerialExecutor{})
              .ok());
  double want = 0;  // the last token's first value of the second head
  for (Index s = 0; s < 5; ++s) {
    double score = 0;
    for (Index i = 0; i < 4; ++i) score += double(q(0, 4, 1, i)) * k(0, s, 1, i);
    want += std::pow(1 - 1.0 / 64, double(4 - s)) * score * v(0, s, 1, 0);
  }
  CHECK(std::abs(o(0, 4, 1, 0) - want) < tolerance<float>(20));
}
