// The members with decay and with the delta rule, against the double recurrence.
#include <doctest/doctest.h>

#include <numeric>
#include <string>
#include <utility>

#include "attention/results.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "chela/reference/linear.hpp"
#include "support/attention.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

const Shape shapes[] = {
    {.tokens = 0},
    {.tokens = 1},
    {.tokens = 15, .key_dim = 16, .value_dim = 32},
    {.tokens = 17, .key_dim = 5, .value_dim = 3},
    {.batch = 2, .tokens = 31, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 9, .value_dim = 33},
    {.tokens = 32, .key_dim = 1, .value_dim = 1},
    {.tokens = 33, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 8, .value_dim = 40},
    {.tokens = 20, .query_heads = 2, .key_heads = 2, .value_heads = 6, .key_dim = 7, .value_dim = 10},
    {.batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 32, .value_dim = 24},
};

template <int Rank>
double squared_norm(const Tensor<double, Rank>& x) {
  return std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
}

/// Terms of a log-decay's gradient, which sums over the whole state.
Index decay_terms(const Shape& s) { return s.key_dim * s.value_dim * (s.tokens + 1); }

template <class T, DecayKind D, RuleKind R, ChunkPolicy P = ChunkPolicy{}>
void check_forward(const Shape& shape, Gates gates, Span span) {
  CAPTURE(shape);
  CAPTURE(int(gates));
  Problem<T, D, R> p(shape, gates);
  p.span = span;
  const DoubleProblem d(p);
  Tensor<T, 4> o = p.output();
  auto final_state = p.state();
  REQUIRE(cpu::linear_attention<P>(p.args(o, final_state), SerialExecutor{}).ok());
  auto want = converted<double>(o.view()), want_state = converted<double>(final_state.view());
  reference::linear_attention(d.problem, want, want_state);
  CHECK(relative_error(o, want) < tolerance<T>(terms(shape)));
  CHECK(relative_error(final_state, want_state) < tolerance<typename Problem<T, D, R>::A>(terms(shape)));
}

template <class T, DecayKind D, RuleKind R>
void check_backward(const Shape& shape, Gates gates, Span span) {
  using A = Accumulator<T>;
  CAPTURE(shape);
  CAPTURE(int(gates));
  Problem<T, D, R> p(shape, gates);
  p.span = span;
  const DoubleProblem d(p);
  Gradients<T, D, R> got(p);
  REQUIRE(cpu::linear_attention_backward(got.args(p), SerialExecutor{}).ok());

  Tensor<double, 4> want_q(d.q.extents()), want_k(d.k.extents()), want_v(d.v.extents()),
      want_state(d.initial_state.extents());
  Tensor<double, 4> want_decay(d.log_decay.extents());
  Tensor<double, 3> want_beta(d.beta.extents());
  reference::LinearAttentionGradients want{want_q, want_k, want_v, want_state};
  if (p.decays) want.log_decay = want_decay;
  if (p.delta) want.beta = want_beta;
  reference::linear_attention_backward(d.problem, d.grad_o, d.grad_final_state, want);
  const double allowed = tolerance<T>(terms(shape));
  CHECK(relative_error(got.q, want_q) < allowed);
  CHECK(relative_error(got.k, want_k) < allowed);
  CHECK(relative_error(got.v, want_v) < allowed);
  CHECK(relative_error(got.state, want_state) < tolerance<A>(terms(shape)));
  if (p.delta) CHECK(relative_error(got.beta, want_beta) < tolerance<A>(terms(shape)));
  if constexpr (D == DecayKind::per_key) {
    CHECK(relative_error(got.log_decay, want_decay) < tolerance<A>(decay_terms(shape)));
  } else if constexpr (D != DecayKind::none) {
    Tensor<double, log_decay_rank(D)> sum(got.log_decay.extents());
    double summed = 0;  // a sum is as exact as its terms, not as what is left of them
    for_each_index(want_decay.view(), [&](Index b, Index t, Index h, Index i) {
      summed += std::abs(want_decay(b, t, h, i));
      if constexpr (D == DecayKind::per_head)
        sum(h) += want_decay(b, t, h, i);
      else
        sum(b, t, h) += want_decay(b, t, h, i);
    });
    for (std::size_t i = 0; i < std::size_t(sum.size()); ++i) sum.data()[i] -= double(got.log_decay.data()[i]);
    CHECK(std::sqrt(squared_norm(sum)) <= tolerance<A>(decay_terms(shape)) * summed);
  }
}

template <class T, DecayKind D, RuleKind R>
void check_member(Span span = Span::causal) {
  for (Shape shape : shapes) {
    // A single key of unit length is the whole key space: the delta rule then forgets by 1 - beta at each token, and what is
    // left of early tokens is too ill-conditioned to compare.
    if (R == RuleKind::delta && shape.key_dim == 1) shape.key_dim = 2;
    for (Gates gates : {Gates::mild, Gates::strong, Gates::mixed_with_resets}) {
      check_forward<T, D, R>(shape, gates, span);
      check_backward<T, D, R>(shape, gates, span);
      if (D == DecayKind::none) break;
    }
  }
}

}  // namespace

TEST_CASE("additive, decay per head") {
  for (Span span : {Span::causal, Span::bidirectional})
    check_member<float, DecayKind::per_head, RuleKind::additive>(span);
}
TEST_CASE("additive, decay per token") {
  for (Span span : {Span::causal, Span::bidirectional})
    check_member<float, DecayKind::per_token, RuleKind::additive>(span);
}
TEST_CASE("additive, decay per key") {
  for (Span span : {Span::causal, Span::bidirectional})
    check_member<float, DecayKind::per_key, RuleKind::additive>(span);
}
TEST_CASE("delta, no decay") { check_member<float, DecayKind::none, RuleKind::delta>(); }
TEST_CASE("delta, decay per head") { check_member<float, DecayKind::per_head, RuleKind::delta>(); }
TEST_CASE("delta, decay per token") { check_member<float, DecayKind::per_token, RuleKind::delta>(); }
TEST_CASE("delta, decay per key") { check_member<float, DecayKind::per_key, RuleKind::delta>(); }

TEST_CASE("double") { check_member<double, DecayKind::per_key, RuleKind::delta>(); }
TEST_CASE("bfloat16") {
  for (Span span : {Span::causal, Span::bidirectional})
    check_member<Eigen::bfloat16, DecayKind::per_key, RuleKind::additive>(span);
}
TEST_CASE("half") { check_member<Eigen::half, DecayKind::per_token, RuleKind::delta>(); }

TEST_CASE_TEMPLATE("decoding token by token equals the pass, to rounding", M,
                   Member<DecayKind::per_head, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::additive>,
                   Member<DecayKind::none, RuleKind::delta>, Member<DecayKind::per_token, RuleKind::delta>,
                   Member<DecayKind::per_key, RuleKind::delta>) {
  for (const Shape& shape :
       {Shape{.batch = 2,
       .tokens = 7,
       .query_heads = 2,
       .key_heads = 2,
       .value_heads = 2,
       .key_dim = 16,
       .value_dim = 64},
        Shape{.tokens = 7, .query_heads = 6, .key_heads = 1, .value_heads = 3, .key_dim = 5, .value_dim = 9}}) {
    CAPTURE(shape);
    const Problem<float, M::decay, M::rule> p(shape, Gates::mixed_with_resets);
    auto pass = p.output(), steps = p.output();
    auto pass_state = p.state(), state = p.initial_state;
    REQUIRE(cpu::linear_attention(p.args(pass, pass_state), SerialExecutor{}).ok());
    for (Index t = 0; t < shape.tokens; ++t)
      REQUIRE(cpu::linear_attention_step(step_args(p, t, steps, state), SerialExecutor{}).ok());
    CHECK(relative_error(steps, pass) < tolerance<float>(terms(shape)));
    CHECK(relative_error(state, pass_state) < tolerance<float>(terms(shape)));
  }
}

TEST_CASE("the reference's gradients agree with central differences") {
  const auto check_reference = [](auto member, Span span) {
    using M = decltype(member);
    const Shape shape{
        .batch = 2, .tokens = 5, .query_heads = 4, .key_heads = 1, .value_heads = 2, .key_dim = 3, .value_dim = 2};
    Problem<double, M::decay, M::rule> p(shape);
    p.span = span;
    DoubleProblem d(p);
    auto o = p.output(), final_state = p.state();
    const auto loss = [&] {
      reference::linear_attention(d.problem, o, final_state);
      return weighted_sum<4>(o, d.grad_o) + weighted_sum<4>(final_state, d.grad_final_state);
    };
    Tensor<double, 4> q(d.q.extents()), k(d.k.extents()), v(d.v.extents()), state(d.initial_state.extents()),
        log_decay(d.log_decay.extents());
    Tensor<double, 3> beta(d.beta.extents());
    reference::linear_attention_backward(d.problem, d.grad_o, d.grad_final_state, {q, k, v, state, log_decay, beta});
    CHECK(gradient_error<4>(loss, d.q, q) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.k, k) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.v, v) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.initial_state, state) < gradient_tolerance);
    if (p.decays) CHECK(gradient_error<4>(loss, d.log_decay, log_decay) < gradient_tolerance);
    if (p.delta) CHECK(gradient_error<3>(loss, d.beta, beta) < gradient_tolerance);
  };
  check_reference(Member<DecayKind::per_key, RuleKind::additive>{}, Span::causal);
  check_reference(Member<DecayKind::per_key, RuleKind::additive>{}, Span::bidirectional);
  check_reference(Member<DecayKind::none, RuleKind::delta>{}, Span::causal);
  check_reference(Member<DecayKind::per_key, RuleKind::delta>{}, Span::causal);
}
