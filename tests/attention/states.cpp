// States of linear attention as values of their own: forms, slots, stops on the way, ragged batches.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "attention/results.hpp"
#include "chela/cpu/attention/convert_states.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "support/attention.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

/// The tokens [begin, begin + count) of batch entry `entry` of a call's arguments, as a call of its own.
template <class Args>
Args part(Args args, Index entry, Index begin, Index count) {
  const auto cut = [&](auto& x) {
    if (x.present()) x = run(run(x, 0, entry, 1), 1, begin, count);
  };
  cut(args.q), cut(args.k), cut(args.v), cut(args.beta);
  if constexpr (args.log_decay.rank > 1) cut(args.log_decay);
  args.cu_seqlens = {};
  return args;
}
template <class T, DecayKind D, RuleKind R, class F>
LinearAttentionArgs<T, D, R, F> forward_part(LinearAttentionArgs<T, D, R, F> args, Index begin, Index count) {
  args = part(args, 0, begin, count);
  args.o = run(args.o, 1, begin, count);
  return args;
}

template <DecayKind D, RuleKind R, ChunkPolicy P = ChunkPolicy{}>
struct Walk : Member<D, R> {
  static constexpr ChunkPolicy policy = P;
};
constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked};
using Additive = Walk<DecayKind::none, RuleKind::additive>;
using PerKey = Walk<DecayKind::per_key, RuleKind::additive>;
using Delta = Walk<DecayKind::per_token, RuleKind::delta>;
using AdditiveChunks = Walk<DecayKind::none, RuleKind::additive, chunked>;
using DeltaChunks = Walk<DecayKind::per_key, RuleKind::delta, chunked>;

const Shape shape{
    .batch = 1, .tokens = 142, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20};
const std::vector<std::int32_t> offsets{0, 0, 5, 37, 70, 70, 71, 142};
constexpr Index sequences = 7;

Tensor<float, 4> states_of(Index entries, unsigned seed) {
  return random_tensor<float>(seed, entries, Index(2), shape.key_dim, shape.value_dim);
}
Tensor<float, 4> no_states(Index entries) {
  return nan_tensor<float>(entries, Index(2), shape.key_dim, shape.value_dim);
}
Tensor<float, 5> no_saved_states(Index entries, Index count) {
  return nan_tensor<float>(entries, count, Index(2), shape.key_dim, shape.value_dim);
}

}  // namespace

TEST_CASE_TEMPLATE("packed sequences give the bits that each gives alone", M, Additive, PerKey, Delta, AdditiveChunks,
                   DeltaChunks) {
  for (Span span : {Span::causal, Span::bidirectional}) {
    if (M::rule == RuleKind::delta && span == Span::bidirectional) continue;
    Problem<float, M::decay, M::rule> p(shape, Gates::mixed_with_resets);
    p.span = span;
    auto packed = p.output(), alone = p.output();
    const auto initial = states_of(sequences, 11);
    auto packed_states = no_states(sequences), alone_states = no_states(sequences);

    auto args = p.args(packed, packed_states);
    args.initial_state = initial;
    args.cu_seqlens = IndexView(offsets.data(), sequences + 1);
    REQUIRE(cpu::linear_attention<M::policy>(args, SerialExecutor{}).ok());
    const std::vector<std::int64_t> wide(offsets.begin(), offsets.end());
    for (Index i = 0; i < sequences; ++i) {
      auto one = forward_part(p.args(alone, alone_states), wide[std::size_t(i)],
                              wide[std::size_t(i + 1)] - wide[std::size_t(i)]);
      one.initial_state = run(initial.view(), 0, i, 1);
      one.final_state = run(alone_states.view(), 0, i, 1);
      REQUIRE(cpu::linear_attention<M::policy>(one, SerialExecutor{}).ok());
    }
    CHECK(same_bits(packed, alone));
    CHECK(same_bits(packed_states, alone_states));

    packed.fill(0), packed_states.fill(0);
    args.cu_seqlens = IndexView(wide.data(), sequences + 1);
    REQUIRE(cpu::linear_attention<M::policy>(args, DefaultExecutor{}).ok());
    CHECK(same_bits(packed, alone));
    CHECK(same_bits(packed_states, alone_states));
  }
}

TEST_CASE_TEMPLATE("gradients of packed sequences are those that each has alone", M, Additive, PerKey, Delta) {
  for (Span span : {Span::causal, Span::bidirectional}) {
    if (M::rule == RuleKind::delta && span == Span::bidirectional) continue;
    const Problem<float, M::decay, M::rule> p(shape);
    using Args = LinearAttentionBackwardArgs<float, M::decay, M::rule>;
    const auto initial = states_of(sequences, 11), grad_final = states_of(sequences, 12);
    struct Gradients {
      Tensor<float, 4> q, k, v, state;
      Tensor<float, log_decay_rank(M::decay)> log_decay;
      Tensor<float, 3> beta;
    };
    Gradients packed{p.q, p.k, p.v, initial, p.log_decay, p.beta}, alone = packed;
    const auto args_into = [&](Gradients& grad) {
      Args args{.q = p.q,
                .k = p.k,
                .v = p.v,
                .grad_o = p.grad_o,
                .grad_q = grad.q,
                .grad_k = grad.k,
                .grad_v = grad.v,
                .initial_state = initial,
                .grad_final_state = grad_final,
                .grad_initial_state = grad.state,
                .span = span};
      if (p.decays) args.log_decay = p.log_decay, args.grad_log_decay = grad.log_decay;
      if (p.delta) args.beta = p.beta, args.grad_beta = grad.beta;
      return args;
    };
    Args args = args_into(packed);
    args.cu_seqlens = IndexView(offsets.data(), sequences + 1);
    REQUIRE(cpu::linear_attention_backward(args, SerialExecutor{}).ok());
    for (Index i = 0; i < sequences; ++i) {
      const Index begin = offsets[std::size_t(i)], count = offsets[std::size_t(i + 1)] - begin;
      Args one = part(args_into(alone), 0, begin, count);
      for (auto* x : {&one.grad_q, &one.grad_k, &one.grad_v}) *x = run(*x, 1, begin, count);
      one.grad_o = run(one.grad_o, 1, begin, count);
      if (p.delta) one.grad_beta = run(one.grad_beta, 1, begin, count);
      if constexpr (M::decay != DecayKind::none) one.grad_log_decay = run(one.grad_log_decay, 1, begin, count);
      one.initial_state = run(initial.view(), 0, i, 1), one.grad_final_state = run(grad_final.view(), 0, i, 1);
      one.grad_initial_state = run(alone.state.view(), 0, i, 1);
      REQUIRE(cpu::linear_attention_backward(one, SerialExecutor{}).ok());
    }
    CHECK(same_bits(packed.q, alone.q));
    CHECK(same_bits(packed.k, alone.k));
    CHECK(same_bits(packed.v, alone.v));
    CHECK(same_bits(packed.state, alone.state));
    if (p.decays) CHECK(same_bits(packed.log_decay, alone.log_decay));
    if (p.delta) CHECK(same_bits(packed.beta, alone.beta));
  }
}

TEST_CASE_TEMPLATE("boundary states are those of the cut pass, and lead to the same bits", M, Additive, PerKey, Delta,
                   AdditiveChunks, DeltaChunks) {
  const Problem<float, M::decay, M::rule> p(shape, Gates::mixed_with_resets);
  auto whole = p.output(), pieces = p.output();
  auto final_state = p.state(), end = p.state();
  auto boundaries = no_saved_states(1, 2);
  auto args = p.args(whole, final_state);
  args.boundary_states = boundaries, args.boundary_every = 64;
  REQUIRE(cpu::linear_attention<M::policy>(args, SerialExecutor{}).ok());
  auto plain = p.output();
  REQUIRE(cpu::linear_attention<M::policy>(p.args(plain, end), SerialExecutor{}).ok());
  CHECK(same_bits(whole, plain));
  CHECK(same_bits(final_state, end));

  for (Index i = 0; i < 2; ++i) {
    auto prefix = forward_part(p.args(pieces, end), 0, 64 * (i + 1));
    REQUIRE(cpu::linear_attention<M::policy>(prefix, SerialExecutor{}).ok());
    CHECK(same_bits(slice_axis<1>(boundaries.view(), i), end.view()));
    auto rest = forward_part(p.args(pieces, end), 64 * (i + 1), shape.tokens - 64 * (i + 1));
    rest.initial_state = slice_axis<1>(boundaries.view(), i);
    REQUIRE(cpu::linear_attention<M::policy>(rest, SerialExecutor{}).ok());
    CHECK(same_bits(whole, pieces));
    CHECK(same_bits(final_state, end));
  }
}

TEST_CASE("boundaries of shorter sequences than the longest are left alone") {
  const Problem<float, DecayKind::none, RuleKind::additive> p(shape);
  auto o = p.output();
  auto final_state = no_states(sequences);
  auto boundaries = no_saved_states(sequences, 2);
  auto args = p.args(o, final_state);
  args.initial_state = {};
  args.cu_seqlens = IndexView(offsets.data(), sequences + 1);
  args.boundary_states = boundaries, args.boundary_every = 32;
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  for (Index i = 0; i < sequences; ++i)
    for (Index n = 0; n < 2; ++n) {
      const bool reached = offsets[std::size_t(i + 1)] - offsets[std::size_t(i)] >= 32 * (n + 1);
      CHECK(std::isnan(boundaries(i, n, 0, 0, 0)) == !reached);
    }
}

TEST_CASE_TEMPLATE("the last states are those after each of the last tokens", M, Additive, PerKey, Delta) {
  const Problem<float, M::decay, M::rule> p(shape, Gates::mixed_with_resets);
  for (Index tokens : {0, 2, 3, 64, 66, 142}) {
    CAPTURE(tokens);
    constexpr Index count = 4;
    auto o = p.output(), plain = p.output();
    auto final_state = p.state(), end = p.state();
    auto last = no_saved_states(1, count);
    auto args = forward_part(p.args(o, final_state), 0, tokens);
    args.last_states = last;
    REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
    for (Index i = 0; i < count; ++i) {
      const Index until = std::max<Index>(tokens - (count - 1 - i), 0);
      REQUIRE(cpu::linear_attention(forward_part(p.args(plain, end), 0, until), SerialExecutor{}).ok());
      CHECK(relative_error(slice_axis<1>(last.view(), i), end.view()) < tolerance<float>(terms(shape)));
    }
    CHECK(same_bits(slice_axis<1>(last.view(), count - 1), final_state.view()));
    if (tokens == 0) continue;
    REQUIRE(cpu::linear_attention(forward_part(p.args(plain, end), 0, tokens), SerialExecutor{}).ok());
    CHECK(relative_error(run(o.view(), 1, 0, tokens), run(plain.view(), 1, 0, tokens)) <
          tolerance<float>(terms(shape)));
  }
}

TEST_CASE_TEMPLATE("slots say where in a pool each state lies; the others are left alone", M, Additive, PerKey, Delta) {
  const Shape batched{.batch = 3,
                      .tokens = 40,
                      .query_heads = 2,
                      .key_heads = 2,
                      .value_heads = 2,
                      .key_dim = shape.key_dim,
                      .value_dim = shape.value_dim};
  const Problem<float, M::decay, M::rule> p(batched);
  const std::vector<std::int32_t> slots{4, 0, 3};
  auto pool = states_of(6, 21);
  const auto before = pool;
  Tensor<float, 4> own(3, 2, shape.key_dim, shape.value_dim);
  for (Index i = 0; i < 3; ++i)
    for_each_index(slice(own.view(), i),
                   [&](auto... at) { own(i, at...) = pool(Index(slots[std::size_t(i)]), at...); });
  const auto check_pool = [&](const Tensor<float, 4>& want) {
    for (Index i = 0; i < 3; ++i)
      CHECK(same_bits(slice(std::as_const(pool).view(), slots[std::size_t(i)]), slice(want.view(), i)));
    for (Index other : {1, 2, 5})
      CHECK(same_bits(slice(std::as_const(pool).view(), other), slice(before.view(), other)));
  };

  auto direct = p.output(), pooled = p.output();
  auto args = p.args(direct, own);
  args.initial_state = own;
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  args.o = pooled, args.initial_state = pool, args.final_state = pool;
  args.state_slots = IndexView(slots.data(), 3);
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  CHECK(same_bits(direct, pooled));
  check_pool(own);

  const auto token = [](auto x) { return slice_axis<1>(x, 0); };
  LinearAttentionStepArgs<float, M::decay, M::rule> step{
      .q = token(p.q.view()), .k = token(p.k.view()), .v = token(p.v.view()), .o = token(direct.view()), .state = own};
  if constexpr (M::decay != DecayKind::none) step.log_decay = token(p.log_decay.view());
  if constexpr (M::rule == RuleKind::delta) step.beta = token(p.beta.view());
  REQUIRE(cpu::linear_attention_step(step, SerialExecutor{}).ok());
  step.o = token(pooled.view()), step.state = pool, step.state_slots = IndexView(slots.data(), 3);
  REQUIRE(cpu::linear_attention_step(step, SerialExecutor{}).ok());
  CHECK(same_bits(direct, pooled));
  check_pool(own);
}

namespace {

struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};
struct Bfloat16States : LinearAttentionForm {
  template <Element T>
  using StateElement = Eigen::bfloat16;
};

template <AttentionForm F, class Args>
auto with_form(const Args& a) {
  LinearAttentionArgs<float, DecayKind::per_key, RuleKind::additive, F> args{
      .q = a.q, .k = a.k, .v = a.v, .o = a.o, .log_decay = a.log_decay};
  return args;
}

}  // namespace

TEST_CASE("states with values first give the bits of states with keys first") {
  const Problem<float, DecayKind::per_key, RuleKind::additive> p(shape);
  auto keys_first = p.output(), values_first = p.output();
  auto state = p.initial_state;
  Tensor<float, 4> turned(1, 2, shape.value_dim, shape.key_dim);
  Tensor<float, 5> last(1, 2, 2, shape.key_dim, shape.value_dim), turned_last(1, 2, 2, shape.value_dim, shape.key_dim);
  ConvertStatesArgs<float, float> turn{.from = state, .to = turned, .to_layout = StateLayout::value_major};
  REQUIRE(cpu::convert_states(turn, SerialExecutor{}).ok());

  auto args = p.args(keys_first, state);
  args.last_states = last;
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  auto other = with_form<ValueMajor>(p.args(values_first, state));
  other.initial_state = turned, other.final_state = turned, other.last_states = turned_last;
  REQUIRE(cpu::linear_attention(other, SerialExecutor{}).ok());
  CHECK(same_bits(keys_first, values_first));
  CHECK(same_bits(state.view(), transposed(turned.view(), 2, 3)));
  CHECK(same_bits(last.view(), transposed(turned_last.view(), 3, 4)));

  const auto token = [](auto x) { return slice_axis<1>(x, 0); };
  REQUIRE(cpu::linear_attention_step(
              LinearAttentionStepArgs<float, DecayKind::per_key, RuleKind::additive>{
                  .q = token(p.q.view()),
                  .k = token(p.k.view()),
                  .v = token(p.v.view()),
                  .o = token(keys_first.view()),
                  .state = state,
                  .log_decay = token(p.log_decay.view())},
              SerialExecutor{})
              .ok());
  REQUIRE(cpu::linear_attention_step(
              LinearAttentionStepArgs<float, DecayKind::per_key, RuleKind::additive, ValueMajor>{
                  .q = token(p.q.view()),
                  .k = token(p.k.view()),
                  .v = token(p.v.view()),
                  .o = token(values_first.view()),
                  .state = turned,
                  .log_decay = token(p.log_decay.view())},
              SerialExecutor{})
              .ok());
  CHECK(same_bits(keys_first, values_first));
  CHECK(same_bits(state.view(), transposed(turned.view(), 2, 3)));

  Tensor<float, 4> grad(1, 2, shape.key_dim, shape.value_dim), turned_grad(turned.extents()), q(p.q.extents()),
      turned_q(p.q.extents());
  LinearAttentionBackwardArgs<float, DecayKind::per_key, RuleKind::additive> back{.q = p.q,
                                                                                  .k = p.k,
                                                                                  .v = p.v,
                                                                                  .grad_o = p.grad_o,
                                                                                  .grad_q = q,
                                                                                  .initial_state = state,
                                                                                  .grad_final_state = state,
                                                                                  .grad_initial_state = grad,
                                                                                  .log_decay = p.log_decay};
  REQUIRE(cpu::linear_attention_backward(back, SerialExecutor{}).ok());
  LinearAttentionBackwardArgs<float, DecayKind::per_key, RuleKind::additive, ValueMajor> turned_back{
      .q = p.q,
      .k = p.k,
      .v = p.v,
      .grad_o = p.grad_o,
      .grad_q = turned_q,
      .initial_state = turned,
      .grad_final_state = turned,
      .grad_initial_state = turned_grad,
      .log_decay = p.log_decay};
  REQUIRE(cpu::linear_attention_backward(turned_back, SerialExecutor{}).ok());
  CHECK(same_bits(q, turned_q));
  CHECK(same_bits(grad.view(), transposed(turned_grad.view(), 2, 3)));
}

TEST_CASE("bfloat16 states are rounded where they are kept, and nowhere else") {
  const Problem<float, DecayKind::per_key, RuleKind::additive> p(shape);
  auto o = p.output(), want = p.output();
  Tensor<Eigen::bfloat16, 4> kept(p.initial_state.extents());
  Tensor<float, 4> state(p.initial_state.extents()), rounded(state.extents());
  REQUIRE(cpu::convert_states(ConvertStatesArgs<float, Eigen::bfloat16>{.from = p.initial_state, .to = kept},
                              SerialExecutor{})
              .ok());
  REQUIRE(
      cpu::convert_states(ConvertStatesArgs<Eigen::bfloat16, float>{.from = kept, .to = state}, SerialExecutor{}).ok());
  auto args = p.args(want, state);
  args.initial_state = state;
  REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
  auto stored = with_form<Bfloat16States>(p.args(o, state));
  stored.initial_state = kept, stored.final_state = kept;
  REQUIRE(cpu::linear_attention(stored, SerialExecutor{}).ok());
  CHECK(same_bits(o, want));
  for_each_index(state.view(), [&](auto... i) { CHECK(float(kept(i...)) == float(Eigen::bfloat16(state(i...)))); });
}

TEST_CASE("what does not fit is refused, and nothing is written") {
  const Problem<float, DecayKind::none, RuleKind::additive> p(shape);
  auto o = p.output();
  auto states = no_states(sequences);
  LinearAttentionArgs<float> good{.q = p.q,
                                  .k = p.k,
                                  .v = p.v,
                                  .o = o,
                                  .final_state = states,
                                  .cu_seqlens = IndexView(offsets.data(), sequences + 1)};
  const auto refuses = [&](const LinearAttentionArgs<float>& args, Code code, const char* names) {
    const Status s = cpu::linear_attention(args, SerialExecutor{});
    CHECK(s.code == code);
    CHECK_MESSAGE(std::string(s.why).find(names) != std::string::npos, s.why);
    for (float x : o) REQUIRE(std::isnan(x));
  };
  const auto with_offsets = [&](const std::vector<std::int32_t>& x) {
    auto args = good;
    args.final_state = {};
    args.cu_seqlens = IndexView(x.data(), Index(x.size()));
    return args;
  };
  refuses(with_offsets({1, 142}), Code::bad_value, "begin with 0");
  refuses(with_offsets({0, 80, 60, 142}), Code::bad_value, "not decrease");
  refuses(with_offsets({0, 80}), Code::bad_value, "end with the token extent");
  refuses(with_offsets({0, 143}), Code::bad_value, "end with the token extent");
  refuses(with_offsets({0, std::numeric_limits<std::int32_t>::min(), 142}), Code::bad_value, "not decrease");

  auto args = good;
  args.cu_seqlens = IndexView(offsets.data(), 0);
  refuses(args, Code::bad_shape, "cu_seqlens must be [sequences + 1]");
  args = good, args.cu_seqlens = IndexView(offsets.data(), sequences);
  refuses(args, Code::bad_shape, "final_state");
  const Problem<float, DecayKind::none, RuleKind::additive> two(
      {.batch = 2, .tokens = 71, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20});
  auto two_o = two.output();
  args = {.q = two.q, .k = two.k, .v = two.v, .o = two_o, .cu_seqlens = IndexView(offsets.data(), sequences + 1)};
  refuses(args, Code::bad_shape, "batch extent must be 1");

  const std::vector<std::int64_t> outside{0, 1, 2, 3, 4, 5, 7}, negative{0, 1, 2, -1, 4, 5, 6},
      twice{6, 1, 2, 3, 4, 1, 0};
  args = good, args.state_slots = IndexView(outside.data(), sequences);
  refuses(args, Code::bad_value, "state_slots must lie in");
  args.state_slots = IndexView(negative.data(), sequences);
  refuses(args, Code::bad_value, "state_slots must lie in");
  args.state_slots = IndexView(twice.data(), sequences);
  refuses(args, Code::bad_value, "state_slots must differ");
  args.state_slots = IndexView(twice.data(), sequences - 1);
  refuses(args, Code::bad_shape, "state_slots must be [sequence]");

  auto boundaries = no_saved_states(sequences, 2);
  args = good, args.boundary_states = boundaries;
  refuses(args, Code::bad_value, "boundary_every");
  args.boundary_every = 48;
  refuses(args, Code::bad_value, "multiple of the policy's chunk_len");
  args.boundary_states = run(boundaries.view(), 1, 0, 1), args.boundary_every = 32;
  refuses(args, Code::bad_shape, "room for every boundary");
  args = good, args.boundary_states = run(boundaries.view(), 0, 0, 2), args.boundary_every = 32;
  refuses(args, Code::bad_shape, "boundary_states must be [sequence, boundary");
  args = good, args.last_states = run(boundaries.view(), 0, 0, 2);
  refuses(args, Code::bad_shape, "last_states");
  args = good, args.last_states = boundaries, args.span = Span::bidirectional;
  refuses(args, Code::unsupported, "causal span");

  Tensor<float, 4> wrong(1, 2, 3, 4), turned(1, 2, 4, 3);
  CHECK(cpu::convert_states(ConvertStatesArgs<float, float>{.from = wrong, .to = turned}, SerialExecutor{}).code ==
        Code::bad_shape);
}
