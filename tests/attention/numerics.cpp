// The numerical promises of linear attention: whatever the decays, every output, state and gradient is finite where the
// double recurrence is, and as close to it as rounding allows; a reset is exact; a NaN stays where it came from.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "attention/numerics.hpp"
#include "chela/cpu/attention/linear.hpp"

using namespace chela;
using namespace chela::test;

namespace {

constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked};
const Shape shape{
    .batch = 2, .tokens = 80, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20};

void check(const Errors& errors) {
  for (const Error& e : errors) {
    CAPTURE(std::string(e.of));
    CHECK(e.error < e.allowed);
  }
}

template <class T, DecayKind D, RuleKind R>
void check_member() {
  for (Decays decays : all_decays)
    for (double size : {1.0, 1e4}) {
      if (size > 1 && (R == RuleKind::delta || std::is_same_v<T, Eigen::half>)) continue;  // half: out of its range
      CAPTURE(std::string(name_of(decays)));
      CAPTURE(size);
      auto p = extreme_problem<T, D, R>(shape, decays, size);
      check(forward_errors<ChunkPolicy{}>(p));
      check(forward_errors<chunked>(p));
      check(step_errors(p));
      check(backward_errors(p));
      if (R == RuleKind::delta) continue;
      INFO("bidirectional");
      p.span = Span::bidirectional;
      check(forward_errors<ChunkPolicy{}>(p));
      check(backward_errors(p));
    }
}

template <class T, int Rank>
bool all_zero(TensorView<T, Rank> x) {
  bool zero = true;
  for_each_index(x, [&](auto... i) { zero = zero && x(i...) == T(0); });
  return zero;
}

/// The state head of a head of a tensor that has `heads`.
Index state_head_of(Index head, Index heads) { return head * shape.value_heads / heads; }

/// Whether two tensors, of batch entries along axis 0, have the same bits outside of one batch entry (-1: outside of
/// all) and the heads of one state.
template <int HeadAxis, class T, int Rank>
bool same_bits_elsewhere(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b, Index batch, Index state_head) {
  bool same = true;
  for_each_index(a.view(), [&](auto... index) {
    const std::array<Index, Rank> i{index...};
    const bool tainted = (batch < 0 || HeadAxis == 0 || i[0] == batch) &&
                         state_head_of(i[HeadAxis], a.extents()[HeadAxis]) == state_head;
    same = same && (tainted || std::memcmp(&a(index...), &b(index...), sizeof(T)) == 0);
  });
  return same;
}

}  // namespace

TEST_CASE("additive, decay per head") { check_member<float, DecayKind::per_head, RuleKind::additive>(); }
TEST_CASE("additive, decay per token") { check_member<float, DecayKind::per_token, RuleKind::additive>(); }
TEST_CASE("additive, decay per key") { check_member<float, DecayKind::per_key, RuleKind::additive>(); }
TEST_CASE("delta, decay per head") { check_member<float, DecayKind::per_head, RuleKind::delta>(); }
TEST_CASE("delta, decay per token") { check_member<float, DecayKind::per_token, RuleKind::delta>(); }
TEST_CASE("delta, decay per key") { check_member<float, DecayKind::per_key, RuleKind::delta>(); }
TEST_CASE("double") { check_member<double, DecayKind::per_key, RuleKind::delta>(); }
TEST_CASE("bfloat16") { check_member<Eigen::bfloat16, DecayKind::per_key, RuleKind::additive>(); }
TEST_CASE("half") { check_member<Eigen::half, DecayKind::per_token, RuleKind::delta>(); }

TEST_CASE_TEMPLATE("nothing is left of what came before a reset, neither forward nor backward", M,
                   Member<DecayKind::per_token, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::additive>,
                   Member<DecayKind::per_token, RuleKind::delta>, Member<DecayKind::per_key, RuleKind::delta>) {
  for (Index reset : {0, 5, 16, 31, 32, 33, 64, 79}) {
    CAPTURE(reset);
    Problem<float, M::decay, M::rule> p(shape);
    for (float& x : p.initial_state) x *= 1e30f;
    const auto from_reset = [&](auto x) { return run(x, 1, reset, shape.tokens - reset); };
    const auto before_reset = [&](auto x) { return run(x, 1, 0, reset); };
    const auto set = [](auto view, float value) { for_each_index(view, [&](auto... i) { view(i...) = value; }); };
    set(run(p.log_decay.view(), 1, reset, 1), -std::numeric_limits<float>::infinity());
    set(from_reset(p.v.view()), 0);
    auto o = p.output();
    auto state = p.state();
    REQUIRE(cpu::linear_attention(p.args(o, state), SerialExecutor{}).ok());
    CHECK(all_zero(from_reset(o.view())));
    CHECK(all_zero(state.view()));

    Problem<float, M::decay, M::rule> back(shape);
    for (float& x : back.grad_final_state) x *= 1e30f;
    set(run(back.log_decay.view(), 1, reset, 1), -std::numeric_limits<float>::infinity());
    set(before_reset(back.grad_o.view()), 0);
    Gradients<float, M::decay, M::rule> grad(back);
    REQUIRE(cpu::linear_attention_backward(grad.args(back), SerialExecutor{}).ok());
    CHECK(all_zero(before_reset(grad.q.view())));
    CHECK(all_zero(before_reset(grad.k.view())));
    CHECK(all_zero(before_reset(grad.v.view())));
    CHECK(all_zero(before_reset(grad.beta.view())));
    CHECK(all_zero(run(grad.log_decay.view(), 1, 0, reset + 1)));
    CHECK(all_zero(grad.state.view()));
  }
}

TEST_CASE_TEMPLATE("a NaN stays in the batch entry and head that it came into, and is seen there", M,
                   Member<DecayKind::per_head, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::additive>,
                   Member<DecayKind::per_token, RuleKind::delta>, Member<DecayKind::per_key, RuleKind::delta>) {
  constexpr Index batch = 1, head = 1, query_head = 3, token = 37, key = 7, value = 18;
  using Run = Problem<float, M::decay, M::rule>;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  struct Results {
    Tensor<float, 4> o, state;
    Gradients<float, M::decay, M::rule> grad;
    Tensor<float, 4> step_o, step_state;
  };
  const auto compute = [](const Run& p) {
    Results r{p.output(), p.state(), Gradients<float, M::decay, M::rule>(p), p.output(), p.initial_state};
    REQUIRE(cpu::linear_attention(p.args(r.o, r.state), SerialExecutor{}).ok());
    REQUIRE(cpu::linear_attention_backward(r.grad.args(p), SerialExecutor{}).ok());
    REQUIRE(cpu::linear_attention_step(step_args(p, token, r.step_o, r.step_state), SerialExecutor{}).ok());
    return r;
  };
  for (Decays decays : {Decays::none, Decays::mixture}) {
    const Run clean = extreme_problem<float, M::decay, M::rule>(shape, decays, 1);
    const Results want = compute(clean);
    for (const char* input : {"q", "k", "v", "log_decay", "beta"}) {
      CAPTURE(std::string(name_of(decays)));
      CAPTURE(std::string(input));
      Run p = clean;
      if (*input == 'q') p.q(batch, token, query_head, key) = nan;
      if (*input == 'k') p.k(batch, token, head, key) = nan;
      if (*input == 'v') p.v(batch, token, head, value) = nan;
      if (*input == 'b' && p.delta) p.beta(batch, token, head) = nan;
      if (*input == 'l') {
        if constexpr (M::decay == DecayKind::per_head) p.log_decay(head) = nan;
        if constexpr (M::decay == DecayKind::per_token) p.log_decay(batch, token, head) = nan;
        if constexpr (M::decay == DecayKind::per_key) p.log_decay(batch, token, head, key) = nan;
      }
      const bool all_batches = M::decay == DecayKind::per_head && *input == 'l';
      const Results got = compute(p);
      if (*input != 'b' || p.delta) {
        CHECK(std::isnan(got.o(batch, token, query_head, value)));
        CHECK(std::isnan(got.step_o(batch, token, query_head, value)));
      }
      const Index reached = all_batches ? -1 : batch;
      CHECK(same_bits_elsewhere<2>(got.o, want.o, reached, head));
      CHECK(same_bits_elsewhere<1>(got.state, want.state, reached, head));
      CHECK(same_bits_elsewhere<2>(got.step_o, want.step_o, reached, head));
      CHECK(same_bits_elsewhere<1>(got.step_state, want.step_state, reached, head));
      CHECK(same_bits_elsewhere<2>(got.grad.q, want.grad.q, reached, head));
      CHECK(same_bits_elsewhere<2>(got.grad.k, want.grad.k, reached, head));
      CHECK(same_bits_elsewhere<2>(got.grad.v, want.grad.v, reached, head));
      CHECK(same_bits_elsewhere<1>(got.grad.state, want.grad.state, reached, head));
      CHECK(same_bits_elsewhere<2>(got.grad.beta, want.grad.beta, reached, head));
      constexpr int decay_head = M::decay == DecayKind::per_head ? 0 : 2;
      CHECK(same_bits_elsewhere<decay_head>(got.grad.log_decay, want.grad.log_decay, reached, head));
    }
  }
}
