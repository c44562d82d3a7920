// Linear attention that makes its own log-decays, betas and unit keys: against the same steps taken one by one, and against
// differences through all of them.
#include <doctest/doctest.h>

#include <string>

#include "chela/cpu/attention/linear.hpp"
#include "support/attention.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct GatedLinearAttention : LinearAttentionForm {
  using LogDecayGate = LogSigmoidGate<16>;
};
struct GatedDeltaNet : LinearAttentionForm {
  using LogDecayGate = SoftplusGate;
  using BetaRate = SigmoidBeta<1>;
  static constexpr bool unit_queries_and_keys = true;
};
struct KimiDeltaAttention : GatedDeltaNet {
  using LogDecayGate = BoundedGate<std::ratio<-5>>;
};

template <DecayKind D, RuleKind R, class F>
struct Instance {
  static constexpr DecayKind decay = D;
  static constexpr RuleKind rule = R;
  using Form = F;
  static constexpr bool takes_parameters = F::LogDecayGate::takes_parameters;
};
using Gla = Instance<DecayKind::per_key, RuleKind::additive, GatedLinearAttention>;
using Gdn = Instance<DecayKind::per_token, RuleKind::delta, GatedDeltaNet>;
using Kda = Instance<DecayKind::per_key, RuleKind::delta, KimiDeltaAttention>;

/// Logits and parameters beside the inputs of a problem.
template <class T, class I>
struct RawProblem {
  using A = Accumulator<T>;
  Problem<T, I::decay, I::rule> p;
  Tensor<T, log_decay_rank(I::decay)> logits;
  Tensor<T, 3> beta;
  Tensor<A, 1> log_rate;
  Tensor<A, gate_bias_rank(I::decay)> bias;

  explicit RawProblem(const Shape& shape)
      : p(shape),
        logits(p.log_decay.extents()),
        beta(shape.batch, shape.tokens, p.s.state_heads()),
        log_rate(p.s.state_heads()) {
    p.k = random_tensor<T>(2, shape.batch, shape.tokens, shape.key_heads, shape.key_dim);
    if constexpr (I::decay == DecayKind::per_key)
      bias = Tensor<A, 2>(p.s.state_heads(), shape.key_dim);
    else
      bias = Tensor<A, 1>(p.s.state_heads());
    fill_random(logits.view(), 31, -3, 3), fill_random(beta.view(), 32, -3, 3);
    fill_random(log_rate.view(), 33, -1, 1), fill_random(bias.view(), 34);
  }

  template <class Args>
  void put_gates_into(Args& args) const {
    args.log_decay = logits;
    if constexpr (I::rule == RuleKind::delta) args.beta = beta;
    if constexpr (I::takes_parameters) args.gate_log_rate = log_rate, args.gate_bias = bias;
  }
  LinearAttentionArgs<T, I::decay, I::rule, typename I::Form> args(Tensor<T, 4>& o, Tensor<A, 4>& final_state) const {
    LinearAttentionArgs<T, I::decay, I::rule, typename I::Form> a{
        .q = p.q, .k = p.k, .v = p.v, .o = o, .initial_state = p.initial_state, .final_state = final_state};
    put_gates_into(a);
    return a;
  }
};

const Shape shape{
    .batch = 2, .tokens = 37, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 9, .value_dim = 12};

}  // namespace

TEST_CASE_TEMPLATE("gates inside the operator do what they do outside", I, Gla, Gdn, Kda) {
  const RawProblem<float, I> raw(shape);
  auto inside = raw.p.output(), outside = raw.p.output();
  auto inside_state = raw.p.state(), outside_state = raw.p.state();
  REQUIRE(cpu::linear_attention(raw.args(inside, inside_state), SerialExecutor{}).ok());

  auto plain = raw.p;
  using Gate = typename I::Form::LogDecayGate;
  DecayGateArgs<float, Gate, log_decay_rank(I::decay)> gate{.logits = raw.logits, .log_decay = plain.log_decay};
  if constexpr (I::takes_parameters) gate.log_rate = raw.log_rate, gate.bias = raw.bias;
  REQUIRE(cpu::decay_gate(gate, SerialExecutor{}).ok());
  if constexpr (I::rule == RuleKind::delta) {
    REQUIRE(cpu::beta_gate(BetaGateArgs<float, SigmoidBeta<1>>{raw.beta, plain.beta}, SerialExecutor{}).ok());
    REQUIRE(cpu::l2_norm(L2NormArgs<float>{raw.p.q, plain.q}, SerialExecutor{}).ok());
    REQUIRE(cpu::l2_norm(L2NormArgs<float>{raw.p.k, plain.k}, SerialExecutor{}).ok());
  }
  REQUIRE(cpu::linear_attention(plain.args(outside, outside_state), SerialExecutor{}).ok());
  CHECK(std::equal(inside.begin(), inside.end(), outside.begin()));
  CHECK(std::equal(inside_state.begin(), inside_state.end(), outside_state.begin()));

  // Token by token from the same logits.
  auto state = raw.p.initial_state;
  for (Index t = 0; t < shape.tokens; ++t) {
    const auto token = [&](const auto& x) { return slice_axis<1>(x.view(), t); };
    LinearAttentionStepArgs<float, I::decay, I::rule, typename I::Form> step{.q = token(raw.p.q),
                                                                             .k = token(raw.p.k),
                                                                             .v = token(raw.p.v),
                                                                             .o = slice_axis<1>(outside.view(), t),
                                                                             .state = state,
                                                                             .log_decay = token(raw.logits)};
    if constexpr (I::rule == RuleKind::delta) step.beta = token(raw.beta);
    if constexpr (I::takes_parameters) step.gate_log_rate = raw.log_rate, step.gate_bias = raw.bias;
    REQUIRE(cpu::linear_attention_step(step, SerialExecutor{}).ok());
  }
  CHECK(relative_error(outside, inside) < tolerance<float>(terms(shape)));
  CHECK(relative_error(state, inside_state) < tolerance<float>(terms(shape)));
}

TEST_CASE_TEMPLATE("gradients reach the logits, the gate's parameters and the raw keys", I, Gla, Gdn, Kda) {
  RawProblem<double, I> raw({.tokens = 6, .query_heads = 2, .key_dim = 4, .value_dim = 3});
  auto& p = raw.p;
  auto o = p.output(), final_state = p.state();
  const auto loss = [&] {
    REQUIRE(cpu::linear_attention(raw.args(o, final_state), SerialExecutor{}).ok());
    return weighted_sum<4>(o, p.grad_o) + weighted_sum<4>(final_state, p.grad_final_state);
  };
  auto q = p.q, k = p.k, v = p.v, state = p.initial_state;
  auto logits = raw.logits;
  auto beta = raw.beta;
  auto log_rate = raw.log_rate;
  auto bias = raw.bias;
  LinearAttentionBackwardArgs<double, I::decay, I::rule, typename I::Form> args{.q = p.q,
                                                                                .k = p.k,
                                                                                .v = p.v,
                                                                                .grad_o = p.grad_o,
                                                                                .grad_q = q,
                                                                                .grad_k = k,
                                                                                .grad_v = v,
                                                                                .initial_state = p.initial_state,
                                                                                .grad_final_state = p.grad_final_state,
                                                                                .grad_initial_state = state};
  raw.put_gates_into(args);
  args.grad_log_decay = logits;
  if constexpr (I::rule == RuleKind::delta) args.grad_beta = beta;
  if constexpr (I::takes_parameters) args.grad_gate_log_rate = log_rate, args.grad_gate_bias = bias;
  REQUIRE(cpu::linear_attention_backward(args, SerialExecutor{}).ok());
  CHECK(gradient_error<4>(loss, p.q, q) < gradient_tolerance);
  CHECK(gradient_error<4>(loss, p.k, k) < gradient_tolerance);
  CHECK(gradient_error<4>(loss, p.v, v) < gradient_tolerance);
  CHECK(gradient_error<4>(loss, p.initial_state, state) < gradient_tolerance);
  CHECK(gradient_error<log_decay_rank(I::decay)>(loss, raw.logits, logits) < gradient_tolerance);
  if constexpr (I::rule == RuleKind::delta) CHECK(gradient_error<3>(loss, raw.beta, beta) < gradient_tolerance);
  if constexpr (I::takes_parameters) {
    CHECK(gradient_error<1>(loss, raw.log_rate, log_rate) < gradient_tolerance);
    CHECK(gradient_error<gate_bias_rank(I::decay)>(loss, raw.bias, bias) < gradient_tolerance);

    // Gradients of the parameters alone need none of the logits.
    auto alone = log_rate;
    alone.fill(0);
    args.grad_log_decay = {}, args.grad_gate_bias = {}, args.grad_gate_log_rate = alone;
    REQUIRE(cpu::linear_attention_backward(args, SerialExecutor{}).ok());
    CHECK(std::equal(alone.begin(), alone.end(), log_rate.begin()));
  }
}

TEST_CASE("16-bit logits, queries and keys") {
  const RawProblem<Eigen::bfloat16, Gdn> raw(shape);
  RawProblem<float, Gdn> rounded(shape);
  const auto copy = [](const auto& from, auto& to) {
    std::transform(from.begin(), from.end(), to.begin(), [](auto x) { return float(x); });
  };
  copy(raw.p.q, rounded.p.q), copy(raw.p.k, rounded.p.k), copy(raw.p.v, rounded.p.v);
  copy(raw.logits, rounded.logits), copy(raw.beta, rounded.beta);
  auto o = raw.p.output();
  auto want = rounded.p.output();
  auto state = raw.p.state(), want_state = state;
  REQUIRE(cpu::linear_attention(raw.args(o, state), SerialExecutor{}).ok());
  REQUIRE(cpu::linear_attention(rounded.args(want, want_state), SerialExecutor{}).ok());
  CHECK(relative_error(o, want) < tolerance<Eigen::bfloat16>(terms(shape)));
  CHECK(relative_error(state, want_state) <
        tolerance<Eigen::bfloat16>(terms(shape)));  // unit keys are rounded to bfloat16
}

TEST_CASE("parameters that the gate does not take are refused") {
  const RawProblem<float, Gla> gla(shape);
  auto o = gla.p.output();
  auto state = gla.p.state();
  auto args = gla.args(o, state);
  args.gate_log_rate = gla.log_rate;
  Status s = cpu::linear_attention(args, SerialExecutor{});
  CHECK(s.code == Code::bad_value);
  CHECK(std::string(s.why).find("takes none") != std::string::npos);

  const RawProblem<float, Kda> kda(shape);
  auto kda_args = kda.args(o, state);
  kda_args.gate_log_rate = run(kda.log_rate.view(), 0, 0, 1);
  CHECK(cpu::linear_attention(kda_args, SerialExecutor{}).code == Code::bad_shape);
  kda_args = kda.args(o, state);
  kda_args.gate_bias = run(kda.bias.view(), 1, 0, 3);
  s = cpu::linear_attention(kda_args, SerialExecutor{});
  CHECK(s.code == Code::bad_shape);
  CHECK(std::string(s.why).find("gate_bias") != std::string::npos);
  for (float x : o) REQUIRE(std::isnan(x));
}
