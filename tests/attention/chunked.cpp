// Chunked evaluation of every member of linear attention, against the double recurrence and the token recurrence.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <type_traits>

#include "attention/results.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "chela/reference/linear.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

constexpr ChunkPolicy by_chunks_of(int chunk_len) {
  return {.evaluation = Evaluation::chunked, .chunk_len = chunk_len};
}

// On both sides of chunks of 16, 7 and 64 tokens, and of the blocks of 16 inside them.
const Shape shapes[] = {
    {.tokens = 0},
    {.tokens = 1},
    {.tokens = 6, .key_dim = 3, .value_dim = 5},
    {.tokens = 15, .key_dim = 16, .value_dim = 32},
    {.tokens = 16, .key_dim = 16, .value_dim = 16},
    {.tokens = 17, .key_dim = 5, .value_dim = 3},
    {.batch = 2, .tokens = 31, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 9, .value_dim = 33},
    {.tokens = 33, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 8, .value_dim = 40},
    {.tokens = 20, .query_heads = 2, .key_heads = 2, .value_heads = 6, .key_dim = 7, .value_dim = 10},
    {.tokens = 63, .key_dim = 20, .value_dim = 8},
    {.tokens = 21, .key_dim = 270, .value_dim = 70},
    {.tokens = 65, .query_heads = 2, .key_dim = 64, .value_dim = 4},
    {.batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 32, .value_dim = 24},
};

template <int Rank>
bool finite(const Tensor<float, Rank>& x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); });
}

/// Sets every log-decay to g(token, key); 0 where the member has no such axis.
template <class T, DecayKind D, RuleKind R, class F>
void set_log_decay(Problem<T, D, R>& p, const F& g) {
  for_each_index(p.log_decay.view(), [&](auto... i) {
    const std::array<Index, sizeof...(i)> at{i...};
    Index token = 0, key = 0;
    if constexpr (sizeof...(i) >= 3) token = at[1];
    if constexpr (sizeof...(i) == 4) key = at[3];
    p.log_decay(i...) = Accumulator<T>(g(token, key));
  });
}

template <ChunkPolicy P, class T, DecayKind D, RuleKind R>
void check_forward(const Problem<T, D, R>& p) {
  CAPTURE(p.shape);
  CAPTURE(P.chunk_len);
  using A = Accumulator<T>;
  const DoubleProblem d(p);
  auto o = p.output(), recurrent = p.output();
  auto state = p.state(), recurrent_state = p.state();
  REQUIRE(cpu::linear_attention<P>(p.args(o, state), SerialExecutor{}).ok());
  auto want = converted<double>(o.view()), want_state = converted<double>(state.view());
  reference::linear_attention(d.problem, want, want_state);
  CHECK(relative_error(o, want) < tolerance<T>(terms(p.shape)));
  CHECK(relative_error(state, want_state) < tolerance<A>(terms(p.shape)));
  REQUIRE(cpu::linear_attention(p.args(recurrent, recurrent_state), SerialExecutor{}).ok());
  CHECK(relative_error(o, recurrent) < 2 * tolerance<T>(terms(p.shape)));
  CHECK(relative_error(state, recurrent_state) < 2 * tolerance<A>(terms(p.shape)));
}

template <class T, DecayKind D, RuleKind R, int... ChunkLens>
void check_member() {
  for (const Shape& shape : shapes)
    for (Gates gates : {Gates::mild, Gates::strong, Gates::mixed_with_resets}) {
      CAPTURE(int(gates));
      const Problem<T, D, R> p(shape, gates);
      (check_forward<by_chunks_of(ChunkLens)>(p), ...);
      if (D == DecayKind::none) break;
    }
}

constexpr double reset = -std::numeric_limits<double>::infinity();

/// Log-decays at the edges of what is legal, by token and key.
constexpr double (*edge_cases[])(Index, Index) = {
    [](Index, Index) { return 0.0; },
    [](Index, Index) { return -1e-12; },
    [](Index, Index) { return -1.0; },
    [](Index, Index) { return -20.0; },
    [](Index, Index) { return -88.0; },
    [](Index, Index) { return -1000.0; },
    [](Index, Index) { return reset; },
    [](Index t, Index) { return t % 2 ? reset : 0.0; },
    [](Index t, Index) { return t % 16 == 0 ? reset : -0.1; },
    [](Index t, Index) { return t % 16 == 15 ? reset : 0.0; },
    [](Index t, Index) { return t % 16 == 5 || t % 16 == 6 ? reset : -0.5; },
    [](Index t, Index) { return t == 21 ? -1000.0 : -1e-3; },
    [](Index t, Index i) {
      return (t + i) % 5 == 0 ? reset : (t + i) % 5 == 1 ? 0.0 : (t + i) % 5 == 2 ? -88.0 : -0.2;
    },
};

template <DecayKind D, RuleKind R, int... ChunkLens>
void check_edge_cases() {
  Problem<float, D, R> p({.tokens = 70, .key_dim = 19, .value_dim = 6});
  for (const auto& g : edge_cases) {
    CAPTURE(&g - edge_cases);
    set_log_decay(p, g);
    (check_forward<by_chunks_of(ChunkLens)>(p), ...);
    auto o = p.output();
    auto state = p.state();
    REQUIRE(cpu::linear_attention<by_chunks_of(16)>(p.args(o, state), SerialExecutor{}).ok());
    CHECK(finite(o));
    CHECK(finite(state));
  }
}

using ScalarAdditive = Member<DecayKind::per_token, RuleKind::additive>;
using KeyAdditive = Member<DecayKind::per_key, RuleKind::additive>;
using ScalarDelta = Member<DecayKind::per_token, RuleKind::delta>;
using KeyDelta = Member<DecayKind::per_key, RuleKind::delta>;

constexpr ChunkPolicy chunked = by_chunks_of(16);

}  // namespace

TEST_CASE("additive, no decay") { check_member<float, DecayKind::none, RuleKind::additive, 16, 7>(); }
TEST_CASE("additive, decay per head") { check_member<float, DecayKind::per_head, RuleKind::additive, 16, 7>(); }
TEST_CASE("additive, decay per token") { check_member<float, DecayKind::per_token, RuleKind::additive, 16, 64>(); }
TEST_CASE("additive, decay per key") { check_member<float, DecayKind::per_key, RuleKind::additive, 16, 7, 64>(); }
TEST_CASE("delta, no decay") { check_member<float, DecayKind::none, RuleKind::delta, 16, 7>(); }
TEST_CASE("delta, decay per head") { check_member<float, DecayKind::per_head, RuleKind::delta, 16, 64>(); }
TEST_CASE("delta, decay per token") { check_member<float, DecayKind::per_token, RuleKind::delta, 16, 7>(); }
TEST_CASE("delta, decay per key") { check_member<float, DecayKind::per_key, RuleKind::delta, 16, 7, 64>(); }
TEST_CASE("the shortest and the longest chunk") {
  check_forward<by_chunks_of(1)>(Problem<float, DecayKind::per_key, RuleKind::delta>({.tokens = 9}));
  check_forward<by_chunks_of(1024)>(Problem<float, DecayKind::per_key, RuleKind::delta>({.tokens = 1030}));
}
TEST_CASE("double") { check_member<double, DecayKind::per_key, RuleKind::delta, 16>(); }
TEST_CASE("bfloat16") { check_member<Eigen::bfloat16, DecayKind::per_key, RuleKind::delta, 16>(); }

TEST_CASE("log-decays from 0 to -infinity, anywhere in a chunk") {
  check_edge_cases<DecayKind::per_head, RuleKind::additive, 16>();
  check_edge_cases<DecayKind::per_token, RuleKind::additive, 16, 64>();
  check_edge_cases<DecayKind::per_key, RuleKind::additive, 16, 7, 64>();
  check_edge_cases<DecayKind::per_token, RuleKind::delta, 16, 7>();
  check_edge_cases<DecayKind::per_key, RuleKind::delta, 16, 7, 64>();
}

TEST_CASE_TEMPLATE("nothing of what lies before a reset is left, not a bit", M, ScalarAdditive, KeyAdditive,
                   ScalarDelta, KeyDelta) {
  for (Index at : {0, 5, 16, 21, 32}) {
    CAPTURE(at);
    Problem<float, M::decay, M::rule> p(
        {.tokens = 40, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 35});
    set_log_decay(p, [&](Index t, Index) { return t == at ? reset : -0.1; });
    auto before = p.output(), after = p.output();
    auto state_before = p.state(), state_after = p.state();
    REQUIRE(cpu::linear_attention<chunked>(p.args(before, state_before), SerialExecutor{}).ok());
    for (float& x : p.initial_state) x *= 1e36f;
    for_each_index(p.v.view(), [&](Index b, Index t, Index h, Index i) { p.v(b, t, h, i) *= t < at ? 1e34f : 1.f; });
    REQUIRE(cpu::linear_attention<chunked>(p.args(after, state_after), SerialExecutor{}).ok());
    const Index left = 40 - at;
    CHECK(same_bits(run(before.view(), 1, at, left), run(after.view(), 1, at, left)));
    CHECK(same_bits(state_before, state_after));
  }
}

TEST_CASE_TEMPLATE("pieces that pass the state on at chunk boundaries equal one call, bit for bit", M, ScalarAdditive,
                   KeyAdditive, ScalarDelta, KeyDelta) {
  const Problem<float, M::decay, M::rule> p(
      {.batch = 2, .tokens = 70, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20},
      Gates::mixed_with_resets);
  auto whole = p.output(), pieces = p.output();
  auto whole_state = p.state(), state = p.initial_state;
  REQUIRE(cpu::linear_attention<chunked>(p.args(whole, whole_state), SerialExecutor{}).ok());
  for (Index begin : {0, 16, 48}) {
    const Index count = begin == 0 ? 16 : begin == 16 ? 32 : 22;
    const auto piece = [&](auto x) { return run(x, 1, begin, count); };
    LinearAttentionArgs<float, M::decay, M::rule> part{.q = piece(p.q.view()),
                                                       .k = piece(p.k.view()),
                                                       .v = piece(p.v.view()),
                                                       .o = piece(pieces.view()),
                                                       .initial_state = state,
                                                       .final_state = state,
                                                       .log_decay = piece(p.log_decay.view())};
    if (p.delta) part.beta = piece(p.beta.view());
    REQUIRE(cpu::linear_attention<chunked>(part, SerialExecutor{}).ok());
  }
  CHECK(same_bits(whole, pieces));
  CHECK(same_bits(whole_state, state));
}

TEST_CASE_TEMPLATE("a later token never changes an earlier output, and NaN stays in its own head", M, ScalarAdditive,
                   KeyAdditive, ScalarDelta, KeyDelta) {
  const Shape shape{.batch = 2, .tokens = 40, .query_heads = 2, .key_heads = 2, .value_heads = 2};
  const Problem<float, M::decay, M::rule> clean(shape, Gates::mixed_with_resets);
  auto before = clean.output(), after = clean.output();
  auto state_before = clean.state(), state_after = clean.state();
  REQUIRE(cpu::linear_attention<chunked>(clean.args(before, state_before), SerialExecutor{}).ok());

  auto later = clean;
  for (Index i = 0; i < 8; ++i) later.q(1, 37, 0, i) = later.v(1, 37, 0, i) = 100, later.k(1, 37, 0, i) = 0.1f;
  REQUIRE(cpu::linear_attention<chunked>(later.args(after, state_after), SerialExecutor{}).ok());
  CHECK(same_bits(run(before.view(), 1, 0, 37), run(after.view(), 1, 0, 37)));

  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const auto check_nan = [&](auto&& put) {
    auto p = clean;
    put(p);
    REQUIRE(cpu::linear_attention<chunked>(p.args(after, state_after), SerialExecutor{}).ok());
    CHECK(std::isnan(after(1, 20, 0, 3)));
    CHECK(same_bits(slice(before.view(), 0), slice(after.view(), 0)));
    CHECK(same_bits(run(before.view(), 2, 1, 1), run(after.view(), 2, 1, 1)));
    CHECK(same_bits(run(state_before.view(), 1, 1, 1), run(state_after.view(), 1, 1, 1)));
  };
  check_nan([](auto& p) { p.q(1, 20, 0, 2) = nan; });
  check_nan([](auto& p) { p.k(1, 20, 0, 2) = nan; });
  check_nan([](auto& p) { p.v(1, 20, 0, 3) = nan; });
  check_nan([](auto& p) { p.initial_state(1, 0, 2, 3) = nan; });
  check_nan([](auto& p) {
    for_each_index(p.log_decay.view(), [&](Index b, Index t, Index h, auto... i) {
      if (b == 1 && t == 20 && h == 0) p.log_decay(b, t, h, i...) = nan;
    });
  });
}

TEST_CASE_TEMPLATE("strides and the number of workers change nothing, bit for bit", M, ScalarAdditive, KeyDelta) {
  const Problem<float, M::decay, M::rule> p(
      {.batch = 2, .tokens = 37, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 10, .value_dim = 6},
      Gates::mixed_with_resets);
  auto plain = p.output();
  auto plain_state = p.state();
  REQUIRE(cpu::linear_attention<chunked>(p.args(plain, plain_state), SerialExecutor{}).ok());

  // Every tensor with its axes the other way round in memory.
  const auto turned = [](auto view) {
    using X = std::remove_const_t<typename decltype(view)::Value>;
    std::array<Index, decltype(view)::rank> extents;
    std::reverse_copy(std::begin(view.extents), std::end(view.extents), extents.begin());
    return Tensor<X, decltype(view)::rank>(extents);
  };
  const auto as_seen = [](auto& tensor) {
    auto view = tensor.view();
    std::reverse(std::begin(view.extents), std::end(view.extents));
    std::reverse(std::begin(view.strides), std::end(view.strides));
    return view;
  };
  const auto copied = [&](auto view) {
    auto tensor = turned(view);
    const auto seen = as_seen(tensor);
    for_each_index(view, [&](auto... i) { seen(i...) = view(i...); });
    return tensor;
  };
  auto q = copied(p.q.view()), k = copied(p.k.view()), v = copied(p.v.view()), o = turned(plain.view());
  auto initial = copied(p.initial_state.view()), final_state = turned(plain_state.view());
  auto log_decay = copied(p.log_decay.view());
  auto beta = copied(p.beta.view());
  LinearAttentionArgs<float, M::decay, M::rule> args{.q = as_seen(q),
                                                     .k = as_seen(k),
                                                     .v = as_seen(v),
                                                     .o = as_seen(o),
                                                     .initial_state = as_seen(initial),
                                                     .final_state = as_seen(final_state),
                                                     .log_decay = as_seen(log_decay)};
  if (p.delta) args.beta = as_seen(beta);
  REQUIRE(cpu::linear_attention<chunked>(args, DefaultExecutor{}).ok());
  CHECK(same_bits(plain.view(), as_seen(o)));
  CHECK(same_bits(plain_state.view(), as_seen(final_state)));
}

TEST_CASE("with decay or the delta rule, gradients are those of the recurrence, bit for bit") {
  const Problem<float, DecayKind::per_key, RuleKind::delta> p(
      {.tokens = 37, .query_heads = 2, .key_heads = 1, .value_heads = 2});
  Gradients<float, DecayKind::per_key, RuleKind::delta> got(p), want(p);
  REQUIRE(cpu::linear_attention_backward<chunked>(got.args(p), SerialExecutor{}).ok());
  REQUIRE(cpu::linear_attention_backward<ChunkPolicy{.chunk_len = 16}>(want.args(p), SerialExecutor{}).ok());
  CHECK(same_bits(got, want));
}

TEST_CASE("the delta rule is evaluated in chunks where a strip of the state outgrows the first-level cache") {
  constexpr Index strip_keys = 32 * 1024 / Index(sizeof(float)) / cpu::RegisterBlock<float>::columns;
  for (const Index keys : {strip_keys, strip_keys + 1}) {
    const Problem<float, DecayKind::per_token, RuleKind::delta> p({.tokens = 40, .key_dim = keys, .value_dim = 5});
    const auto output = [&]<ChunkPolicy policy>() {
      auto o = p.output();
      auto state = p.state();
      REQUIRE(cpu::linear_attention<policy>(p.args(o, state), SerialExecutor{}).ok());
      return o;
    };
    const auto by_rule = output.template operator()<ChunkPolicy{}>();
    const auto in_chunks = output.template operator()<ChunkPolicy{.evaluation = Evaluation::chunked}>();
    const auto by_token = output.template operator()<ChunkPolicy{.evaluation = Evaluation::token_recurrence}>();
    CHECK(same_bits(by_rule, in_chunks) == (keys > strip_keys));
    CHECK(same_bits(by_rule, by_token) == (keys <= strip_keys));
  }
}
