#include "chela/cpu/attention/linear.hpp"

#include <doctest/doctest.h>

#include <string>
#include <utility>

#include "attention/results.hpp"
#include "chela/reference/linear.hpp"
#include "support/attention.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

/// The member of this file: no decay, additive.
template <class T>
struct Plain : Problem<T, DecayKind::none, RuleKind::additive> {
  explicit Plain(Shape shape, Span direction = Span::causal) : Plain::Problem(shape) { this->span = direction; }
};

constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked, .chunk_len = 16};
constexpr ChunkPolicy chunked_odd{.evaluation = Evaluation::chunked, .chunk_len = 7};
constexpr ChunkPolicy short_tiles{.chunk_len = 5, .value_tile = 16};

const Shape shapes[] = {
    {.tokens = 0},
    {.tokens = 1},
    {.tokens = 15, .key_dim = 16, .value_dim = 32},
    {.tokens = 16, .key_dim = 16, .value_dim = 16},
    {.tokens = 17, .key_dim = 5, .value_dim = 3},
    {.batch = 2, .tokens = 31, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 9, .value_dim = 33},
    {.tokens = 32, .key_dim = 1, .value_dim = 1},
    {.tokens = 33, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 8, .value_dim = 40},
    {.tokens = 20, .query_heads = 2, .key_heads = 2, .value_heads = 6, .key_dim = 7, .value_dim = 10},
    {.tokens = 12, .query_heads = 8, .key_heads = 1, .value_heads = 4, .key_dim = 4, .value_dim = 6},
    {.batch = 3, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 48},
};

template <ChunkPolicy P, class T>
void check_forward(const Shape& shape, Span span) {
  CAPTURE(shape);
  const Plain<T> p(shape, span);
  const DoubleProblem d(p);
  Tensor<T, 4> o = p.output();
  auto final_state = p.state();
  REQUIRE(cpu::linear_attention<P>(p.args(o, final_state), SerialExecutor{}).ok());
  auto want = converted<double>(o.view()), want_state = converted<double>(final_state.view());
  reference::linear_attention(d.problem, want, want_state);
  CHECK(relative_error(o, want) < tolerance<T>(terms(shape)));
  CHECK(relative_error(final_state, want_state) < tolerance<Accumulator<T>>(shape.tokens + 1));
}

template <ChunkPolicy P, class T>
void check_backward(const Shape& shape, Span span) {
  CAPTURE(shape);
  const Plain<T> p(shape, span);
  const DoubleProblem d(p);
  Gradients<T, DecayKind::none, RuleKind::additive> got(p);
  REQUIRE(cpu::linear_attention_backward<P>(got.args(p), SerialExecutor{}).ok());
  auto want_q = converted<double>(got.q.view()), want_k = converted<double>(got.k.view()),
       want_v = converted<double>(got.v.view()), want_state = converted<double>(got.state.view());
  reference::linear_attention_backward(d.problem, d.grad_o, d.grad_final_state, {want_q, want_k, want_v, want_state});
  const double allowed = tolerance<T>(terms(shape));
  CHECK(relative_error(got.q, want_q) < allowed);
  CHECK(relative_error(got.k, want_k) < allowed);
  CHECK(relative_error(got.v, want_v) < allowed);
  CHECK(relative_error(got.state, want_state) < tolerance<Accumulator<T>>(terms(shape)));
}

template <ChunkPolicy P, class T>
void check_all() {
  for (const Shape& shape : shapes)
    for (Span span : {Span::causal, Span::bidirectional})
      check_forward<P, T>(shape, span), check_backward<P, T>(shape, span);
}

}  // namespace

TEST_CASE("forward and backward match the reference, by token recurrence") { check_all<ChunkPolicy{}, float>(); }
TEST_CASE("forward and backward match the reference, by short tiles") { check_all<short_tiles, float>(); }
TEST_CASE("forward and backward match the reference, by chunks") { check_all<chunked, float>(); }
TEST_CASE("forward and backward match the reference, by chunks of an odd length") { check_all<chunked_odd, float>(); }
TEST_CASE("forward and backward match the reference in double") { check_all<ChunkPolicy{}, double>(); }
TEST_CASE("forward and backward match the reference in bfloat16") { check_all<ChunkPolicy{}, Eigen::bfloat16>(); }
TEST_CASE("forward and backward match the reference in half") { check_all<ChunkPolicy{}, Eigen::half>(); }

TEST_CASE("the reference's gradients agree with central differences") {
  for (Span span : {Span::causal, Span::bidirectional}) {
    const Shape shape{
        .batch = 2, .tokens = 5, .query_heads = 4, .key_heads = 1, .value_heads = 2, .key_dim = 3, .value_dim = 2};
    Plain<double> p(shape, span);
    DoubleProblem d(p);
    auto o = p.output(), final_state = p.state();
    const auto loss = [&] {
      reference::linear_attention(d.problem, o, final_state);
      return weighted_sum<4>(o, d.grad_o) + weighted_sum<4>(final_state, d.grad_final_state);
    };
    Tensor<double, 4> q(d.q.extents()), k(d.k.extents()), v(d.v.extents()), state(d.initial_state.extents());
    reference::linear_attention_backward(d.problem, d.grad_o, d.grad_final_state, {q, k, v, state});
    CHECK(gradient_error<4>(loss, d.q, q) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.k, k) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.v, v) < gradient_tolerance);
    CHECK(gradient_error<4>(loss, d.initial_state, state) < gradient_tolerance);
  }
}

TEST_CASE("an absent state is zero, and absent gradients are not needed by the others") {
  const Plain<float> p({.tokens = 9, .query_heads = 4, .key_heads = 2, .value_heads = 2});
  auto with_zero = p.output(), without = p.output();
  Tensor<float, 4> zero(p.initial_state.extents());
  LinearAttentionArgs<float> args{.q = p.q, .k = p.k, .v = p.v, .o = with_zero, .initial_state = zero};
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  args.o = without, args.initial_state = {};
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  CHECK(same_bits(with_zero, without));

  auto all = p.state(), alone = p.state();
  Tensor<float, 4> q(p.q.extents()), k(p.k.extents()), v(p.v.extents());
  LinearAttentionBackwardArgs<float> back{.q = p.q,
                                          .k = p.k,
                                          .v = p.v,
                                          .grad_o = p.grad_o,
                                          .grad_q = q,
                                          .grad_k = k,
                                          .grad_v = v,
                                          .grad_initial_state = all};
  REQUIRE(cpu::linear_attention_backward(back, SerialExecutor{}).ok());
  back.grad_q = back.grad_k = back.grad_v = {};
  back.grad_initial_state = alone;
  REQUIRE(cpu::linear_attention_backward(back, SerialExecutor{}).ok());
  CHECK(same_bits(all, alone));
}

TEST_CASE_TEMPLATE("pieces that pass the state on equal one call, bit for bit", P, PolicyConstant<ChunkPolicy{}>,
                   PolicyConstant<chunked>) {
  const Plain<float> p(
      {.batch = 2, .tokens = 64, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20});
  auto whole = p.output(), pieces = p.output();
  auto whole_state = p.state(), state = p.initial_state;
  REQUIRE(cpu::linear_attention<P::value>(p.args(whole, whole_state), SerialExecutor{}).ok());
  for (Index begin : {0, 16, 48}) {
    const Index count = begin == 0 ? 16 : begin == 16 ? 32 : 16;
    LinearAttentionArgs<float> part{.q = run(p.q.view(), 1, begin, count),
                                    .k = run(p.k.view(), 1, begin, count),
                                    .v = run(p.v.view(), 1, begin, count),
                                    .o = run(pieces.view(), 1, begin, count),
                                    .initial_state = state,
                                    .final_state = state};
    REQUIRE(cpu::linear_attention<P::value>(part, SerialExecutor{}).ok());
  }
  CHECK(same_bits(whole, pieces));
  CHECK(same_bits(whole_state, state));
}

TEST_CASE("decoding token by token equals the pass, bit for bit") {
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
    const Plain<float> p(shape);
    auto pass = p.output(), steps = p.output();
    auto pass_state = p.state(), state = p.initial_state;
    REQUIRE(cpu::linear_attention(p.args(pass, pass_state), SerialExecutor{}).ok());
    for (Index t = 0; t < shape.tokens; ++t)
      REQUIRE(cpu::linear_attention_step(step_args(p, t, steps, state), SerialExecutor{}).ok());
    CHECK(same_bits(pass, steps));
    CHECK(same_bits(pass_state, state));
  }
}

TEST_CASE("the answer does not depend on the number of workers") {
  struct ManyWorkers : SerialExecutor {  // runs serially, but makes the operator cut its work as for many threads
    int workers() const { return 16; }
  };
  for (Index heads : {1, 8}) {
    const Plain<float> p({.tokens = 40,
                          .query_heads = heads,
                          .key_heads = heads,
                          .value_heads = heads,
                          .key_dim = 24,
                          .value_dim = 200});
    auto one = p.output(), many = p.output();
    auto one_state = p.state(), many_state = p.state();
    REQUIRE(cpu::linear_attention(p.args(one, one_state), SerialExecutor{}).ok());
    REQUIRE(cpu::linear_attention(p.args(many, many_state), ManyWorkers{}).ok());
    CHECK(same_bits(one, many));
    CHECK(same_bits(one_state, many_state));
    many.fill(0), many_state.fill(0);
    REQUIRE(cpu::linear_attention(p.args(many, many_state), DefaultExecutor{}).ok());
    CHECK(same_bits(one, many));
    CHECK(same_bits(one_state, many_state));
  }
}

TEST_CASE("strides are respected, and memory between rows is left alone") {
  const Shape shape{
      .batch = 2, .tokens = 19, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 10, .value_dim = 18};
  const Plain<float> p(shape);
  auto want = p.output();
  auto want_state = p.state();
  REQUIRE(cpu::linear_attention(p.args(want, want_state), SerialExecutor{}).ok());

  // [batch, head, dim, token] storage, read as [batch, token, head, dim]; outputs inside a wider buffer.
  const auto scattered = [&](const Tensor<float, 4>& x) {
    const auto [b, t, h, d] = x.extents();
    Tensor<float, 4> out(b, h, d, t);
    for_each_index(x.view(), [&](Index i, Index j, Index k, Index l) { out(i, k, l, j) = x(i, j, k, l); });
    return out;
  };
  const auto as_tokens = [](TensorView<const float, 4> x) { return transposed(transposed(x, 1, 3), 2, 3); };
  const auto q = scattered(p.q), k = scattered(p.k), v = scattered(p.v);
  Tensor<float, 4> wide({2, 19, 5, 30}, -7.f);
  auto o = run(run(wide.view(), 2, 1, 3), 3, 4, 18);
  auto state = p.state();
  REQUIRE(cpu::linear_attention(LinearAttentionArgs<float>{.q = as_tokens(q),
                                                           .k = as_tokens(k),
                                                           .v = as_tokens(v),
                                                           .o = o,
                                                           .initial_state = p.initial_state,
                                                           .final_state = state},
                                SerialExecutor{})
              .ok());
  CHECK(relative_error(TensorView<const float, 4>(o), std::as_const(want).view()) == 0);
  CHECK(same_bits(state, want_state));
  Index outside = 0, untouched = 0;
  for_each_index(wide.view(), [&](Index b, Index t, Index h, Index d) {
    const bool inside = h >= 1 && h < 4 && d >= 4 && d < 22;
    outside += !inside;
    untouched += !inside && wide(b, t, h, d) == -7.f;
  });
  CHECK(outside == untouched);
}

TEST_CASE_TEMPLATE("a later token never changes an earlier output, and NaN stays in its own head", P,
                   PolicyConstant<ChunkPolicy{}>, PolicyConstant<chunked>) {
  Plain<float> p({.tokens = 40, .query_heads = 2, .key_heads = 2, .value_heads = 2});
  auto before = p.output(), after = p.output();
  auto state = p.state();
  REQUIRE(cpu::linear_attention<P::value>(p.args(before, state), SerialExecutor{}).ok());
  for (Index i = 0; i < 8; ++i) p.k(0, 37, 1, i) = p.v(0, 37, 1, i) = 100;
  REQUIRE(cpu::linear_attention<P::value>(p.args(after, state), SerialExecutor{}).ok());
  CHECK(relative_error(run(after.view(), 1, 0, 37), run(before.view(), 1, 0, 37)) == 0);
  p.v(0, 38, 1, 3) = std::numeric_limits<float>::quiet_NaN();
  REQUIRE(cpu::linear_attention<P::value>(p.args(after, state), SerialExecutor{}).ok());
  CHECK(relative_error(run(after.view(), 2, 0, 1), run(before.view(), 2, 0, 1)) == 0);
  CHECK(std::isnan(after(0, 39, 1, 3)));
}

TEST_CASE("inputs of 1e4 stay within tolerance of the reference") {
  Plain<float> p({.tokens = 50, .key_dim = 32, .value_dim = 32});
  for (auto* x : {&p.q, &p.k, &p.v}) fill_random(x->view(), 9, -1e4, 1e4);
  const DoubleProblem d(p);
  auto o = p.output();
  auto state = p.state();
  REQUIRE(cpu::linear_attention(p.args(o, state), SerialExecutor{}).ok());
  auto want = converted<double>(o.view());
  reference::linear_attention(d.problem, want);
  CHECK(relative_error(o, want) < tolerance<float>(terms(p.shape)));
}

TEST_CASE("arguments that do not fit are refused by name") {
  const Plain<float> p({.tokens = 4, .query_heads = 2, .key_heads = 2, .value_heads = 2});
  auto o = p.output();
  auto state = p.state();
  const auto refused = [](const LinearAttentionArgs<float>& args, const std::string& word) {
    const Status s = cpu::linear_attention(args, SerialExecutor{});
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  const auto changed = [&](auto change) {
    LinearAttentionArgs<float> args = p.args(o, state);
    change(args);
    return args;
  };
  CHECK(refused(changed([](auto& a) { a.q.data = nullptr; }), "need data"));
  CHECK(refused(changed([](auto& a) { a.k.extents[0] = 2; }), "batch"));
  CHECK(refused(changed([](auto& a) { a.v.extents[1] = 3; }), "token"));
  CHECK(refused(changed([](auto& a) { a.k.extents[3] = 7; }), "key_dim"));
  CHECK(refused(changed([](auto& a) { a.q.extents[3] = a.k.extents[3] = 0; }), "at least 1"));
  CHECK(refused(changed([](auto& a) { a.k.extents[2] = 3; }), "multiple"));
  CHECK(refused(changed([](auto& a) { a.q.extents[2] = 3; }), "multiple"));
  CHECK(refused(changed([](auto& a) { a.o.extents[3] = 5; }), "o must be"));
  CHECK(refused(changed([](auto& a) { a.o.strides[1] = 0; }), "broadcast"));
  CHECK(refused(changed([](auto& a) { a.initial_state.extents[2] = 4; }), "initial_state"));
  CHECK(refused(changed([](auto& a) { a.final_state.extents[1] = 1; }), "final_state"));
  CHECK(refused(changed([](auto& a) { a.final_state.strides[0] = a.final_state.strides[1] = 0; }), "broadcast"));

  LinearAttentionBackwardArgs<float> back{.q = p.q, .k = p.k, .v = p.v, .grad_o = o};
  CHECK(check(back).ok());
  back.grad_q = o;
  back.grad_q.extents[1] = 3;
  CHECK(!cpu::linear_attention_backward(back, SerialExecutor{}).ok());
  CHECK(!cpu::linear_attention_step(LinearAttentionStepArgs<float>{}, SerialExecutor{}).ok());
}
