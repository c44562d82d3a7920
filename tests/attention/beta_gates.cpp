#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "chela/cpu/attention/gates.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "chela/cpu/element.hpp"
#include "chela/reference/gates.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct Shape {
  Index batch = 1, tokens = 1, heads = 1;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.batch << " T" << s.tokens << " H" << s.heads;
}

const Shape shapes[] = {{.tokens = 0, .heads = 2},
                        {.tokens = 1},
                        {.batch = 2, .tokens = 3, .heads = 15},
                        {.tokens = 3, .heads = 16},
                        {.tokens = 5, .heads = 17},
                        {.batch = 2, .tokens = 5000, .heads = 3}};

constexpr double infinity = std::numeric_limits<double>::infinity();

}  // namespace

static_assert(BetaGate<GivenBeta> && BetaGate<SigmoidBeta<>> && BetaGate<SigmoidBeta<2>> && !BetaGate<GivenLogDecay>);

TEST_CASE_TEMPLATE("beta gates match the reference, forward and backward", T, float, double, Eigen::bfloat16,
                   Eigen::half) {
  using A = Accumulator<T>;
  const auto check = [](auto gate, double factor, const Shape& s) {
    CAPTURE(s);
    using G = decltype(gate);
    auto logits = random_tensor<T>(1, s.batch, s.tokens, s.heads);
    fill_random(logits.view(), 1, -6, 6);
    const auto grad_beta = random_tensor<A>(2, s.batch, s.tokens, s.heads);
    auto beta = nan_tensor<A>(s.batch, s.tokens, s.heads);
    auto grad = nan_tensor<T>(s.batch, s.tokens, s.heads);
    REQUIRE(cpu::beta_gate(BetaGateArgs<T, G>{.logits = logits, .beta = beta}, DefaultExecutor{}).ok());
    REQUIRE(cpu::beta_gate_backward(
                BetaGateBackwardArgs<T, G>{.logits = logits, .grad_beta = grad_beta, .grad_logits = grad},
                DefaultExecutor{})
                .ok());
    const auto x = converted<double>(logits.view()), g = converted<double>(grad_beta.view());
    auto want = x, want_grad = g;
    if constexpr (!std::is_same_v<G, GivenBeta>) {
      reference::sigmoid_beta(factor, x, want);
      reference::sigmoid_beta_backward(factor, x, g, want_grad);
    }
    CHECK(relative_error(beta, want) < tolerance<A>(4));
    CHECK(relative_error(grad, want_grad) < tolerance<T>(4));
  };
  for (const Shape& s : shapes) check(GivenBeta{}, 1, s), check(SigmoidBeta<>{}, 1, s), check(SigmoidBeta<2>{}, 2, s);
}

TEST_CASE("beta gates: central differences, extremes, strides") {
  Tensor<double, 3> logits = random_tensor<double>(1, 2, 3, 5), beta(2, 3, 5), grad(2, 3, 5);
  const auto grad_beta = random_tensor<double>(2, 2, 3, 5);
  const auto forward = [&] {
    return cpu::beta_gate(BetaGateArgs<double, SigmoidBeta<2>>{.logits = logits, .beta = beta}, SerialExecutor{});
  };
  const auto loss = [&] {
    REQUIRE(forward().ok());
    return weighted_sum<3>(beta, grad_beta);
  };
  REQUIRE(
      cpu::beta_gate_backward(
          BetaGateBackwardArgs<double, SigmoidBeta<2>>{.logits = logits, .grad_beta = grad_beta, .grad_logits = grad},
          SerialExecutor{})
          .ok());
  CHECK(gradient_error<3>(loss, logits, grad) < gradient_tolerance);

  for (double x : {-infinity, -1e30, -1e4, -104.0, -30.0, 0.0, 1e-30, 30.0, 88.0, 1e4, infinity}) {
    CHECK((SigmoidBeta<2>::beta(float(x)) >= 0 && SigmoidBeta<2>::beta(float(x)) <= 2));
    CHECK((SigmoidBeta<2>::derivative(float(x)) >= 0 && SigmoidBeta<2>::derivative(float(x)) <= 0.5f));
    logits(1, 2, 3) = x;
    REQUIRE(forward().ok());
    CHECK(beta(1, 2, 3) == doctest::Approx(SigmoidBeta<2>::beta(x)).epsilon(1e-14));
  }

  Tensor<double, 3> turned(5, 3, 2);
  REQUIRE(
      cpu::beta_gate(BetaGateArgs<double, SigmoidBeta<2>>{.logits = logits, .beta = transposed(turned.view(), 0, 2)},
                     SerialExecutor{})
          .ok());
  CHECK(relative_error(transposed(turned.view(), 0, 2), beta.view()) == 0);
}
TEST_CASE("gates feed linear attention, and take the gradients that come out of it") {
  using G = SoftplusGate;
  const auto q = random_tensor<double>(1, 1, 6, 2, 3), k = random_tensor<double>(2, 1, 6, 2, 3),
             v = random_tensor<double>(3, 1, 6, 2, 4), grad_o = random_tensor<double>(4, 1, 6, 2, 4);
  auto logits = random_tensor<double>(5, 1, 6, 2, 3);
  auto log_rate = random_tensor<double>(6, 2);
  Tensor<double, 4> log_decay(1, 6, 2, 3), grad_log_decay(1, 6, 2, 3), grad_logits(1, 6, 2, 3), o(1, 6, 2, 4);
  Tensor<double, 1> grad_log_rate(2);
  const auto loss = [&] {
    REQUIRE(cpu::decay_gate(DecayGateArgs<double, G, 4>{.logits = logits, .log_rate = log_rate, .log_decay = log_decay},
                            SerialExecutor{})
                .ok());
    REQUIRE(cpu::linear_attention(
                LinearAttentionArgs<double, DecayKind::per_key>{.q = q, .k = k, .v = v, .o = o, .log_decay = log_decay},
                SerialExecutor{})
                .ok());
    return weighted_sum<4>(o, grad_o);
  };
  loss();
  REQUIRE(cpu::linear_attention_backward(
              LinearAttentionBackwardArgs<double, DecayKind::per_key>{
                  .q = q, .k = k, .v = v, .grad_o = grad_o, .log_decay = log_decay, .grad_log_decay = grad_log_decay},
              SerialExecutor{})
              .ok());
  REQUIRE(cpu::decay_gate_backward(DecayGateBackwardArgs<double, G, 4>{.logits = logits,
                                                                       .log_rate = log_rate,
                                                                       .grad_log_decay = grad_log_decay,
                                                                       .grad_logits = grad_logits,
                                                                       .grad_log_rate = grad_log_rate},
                                   SerialExecutor{})
              .ok());
  CHECK(gradient_error<4>(loss, logits, grad_logits) < gradient_tolerance);
  CHECK(gradient_error<1>(loss, log_rate, grad_log_rate) < gradient_tolerance);
}
TEST_CASE("beta gates refuse arguments that do not fit, by name") {
  const auto says = [](const Status& s, const std::string& word) {
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  const auto x = random_tensor<float>(1, 1, 4, 2);
  auto y = nan_tensor<float>(1, 4, 2);
  using G = SigmoidBeta<>;
  BetaGateArgs<float, G> beta{.logits = x, .beta = y};
  beta.logits.data = nullptr;
  CHECK(says(cpu::beta_gate(beta, SerialExecutor{}), "logits need data"));
  beta.logits = x, beta.beta.extents[2] = 1;
  CHECK(says(cpu::beta_gate(beta, SerialExecutor{}), "beta must have"));
  const BetaGateBackwardArgs<float, G> good{.logits = x, .grad_beta = x, .grad_logits = y};
  CHECK(check(good).ok());
  auto bad = good;
  bad.grad_beta.extents[1] = 3;
  CHECK(says(cpu::beta_gate_backward(bad, SerialExecutor{}), "grad_beta must have"));
  bad = good, bad.grad_logits.strides[1] = 0;
  CHECK(says(cpu::beta_gate_backward(bad, SerialExecutor{}), "grad_logits must have"));
  bad = good, bad.logits.data = nullptr;
  CHECK(says(cpu::beta_gate_backward(bad, SerialExecutor{}), "logits need data"));
}
