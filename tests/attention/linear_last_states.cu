// The states after each of the last tokens of linear attention on a GPU.
#include <algorithm>

#include "attention/device_problem.cuh"

namespace chela::test {

using Element = __nv_bfloat16;

template <LinearPolicy P, class Args>
Status call(const Args& args) {
  return run_on_device<P>(args, Stream());
}

/// The first tokens of a problem.
template <class P>
P beginning_of(const P& p, Index tokens) {
  P head = p;
  const auto cut = [&](auto& x) {
    auto extents = x.extents();
    extents[1] = tokens;
    auto shorter = std::decay_t<decltype(x)>(extents);
    for_each_index(shorter.view(), [&](auto... i) { shorter(i...) = x(i...); });
    x = shorter;
  };
  head.shape.tokens = head.s.tokens = tokens;
  cut(head.q), cut(head.k), cut(head.v), cut(head.grad_o);
  if constexpr (!std::same_as<decltype(P::log_decay), Tensor<float, 1>>) cut(head.log_decay);
  return head;
}

/// The state after so many tokens, in double.
template <class P>
Tensor<double, 4> state_after(const P& p, Index tokens) {
  const P head = beginning_of(p, tokens);
  const DoubleProblem wide(head);
  Tensor<double, 4> o(head.output().extents()), state(head.state().extents());
  reference::linear_attention(wide.problem, o, state);
  return state;
}

template <LinearPolicy P, DecayKind D>
void check_last_states(const Problem<Element, D, RuleKind::additive>& p, Index count) {
  CAPTURE(p.shape);
  CAPTURE(count);
  const DeviceTensor<Element, 4> q(p.q), k(p.k), v(p.v), o(p.output()), plain(p.output());
  const DeviceTensor<float, 4> initial(p.initial_state), final(p.state()), plain_final(p.state());
  const DeviceTensor<float, log_decay_rank(D)> log_decay(p.log_decay);
  const DeviceTensor<float, 5> last(nan_tensor<float>(p.s.batch, count, p.s.state_heads(), p.s.key_dim, p.s.value_dim));
  LinearAttentionArgs<Element, D> args{
      .q = q, .k = k, .v = v, .o = plain, .initial_state = initial, .final_state = plain_final};
  if constexpr (D != DecayKind::none) args.log_decay = log_decay;
  REQUIRE(call<P>(args).ok());
  args.o = o, args.final_state = final, args.last_states = last;
  REQUIRE(call<P>(args).ok());
  CHECK(same_bits(o.host(), plain.host()));
  CHECK(same_bits(final.host(), plain_final.host()));
  CHECK(last.guards_intact());
  const Tensor<float, 5> got = last.host();
  const auto entry = [&](Index i) { return slice_axis<1>(got.view(), i); };
  const Tensor<float, 4> end = final.host();
  CHECK(relative_error(entry(count - 1), end.view()) == 0);
  for (Index i = 0; i < count; ++i) {
    CAPTURE(i);
    const Tensor<double, 4> want = state_after(p, std::max<Index>(p.s.tokens - (count - 1 - i), 0));
    CHECK(relative_error(entry(i), want.view()) < tensor_core_tolerance<Element>());
  }
}

TEST_CASE_TEMPLATE("any number of last states, of any number of tokens", M, Member<DecayKind::none, RuleKind::additive>,
                   Member<DecayKind::per_head, RuleKind::additive>, Member<DecayKind::per_token, RuleKind::additive>,
                   Member<DecayKind::per_key, RuleKind::additive>) {
  using P = Problem<Element, M::decay, M::rule>;
  for (Index tokens : {0, 1, 2, 63, 64, 65, 66, 128, 200})
    for (Index count : {1, 2, 5}) {
      const P p(shape_of(tokens, 64, 64), Gates::mixed_with_resets);
      check_last_states<LinearPolicy{}>(p, count);
      check_last_states<in_segments>(p, count);
      check_last_states<on_warps>(p, count);
    }
  check_last_states<LinearPolicy{}>(P(shape_of(130, 128, 128, 1)), 70);
  check_last_states<in_segments>(P(shape_of(260, 128, 64, 1)), 3);
  check_last_states<on_warps>(P(shape_of(130, 48, 80, 1)), 4);
  check_last_states<LinearPolicy{}>(P(shape_of(20, 64, 64)), 30);
  for (const auto& [key_heads, value_heads] : {std::pair<Index, Index>{2, 2}, {1, 2}, {2, 1}})
    check_last_states<LinearPolicy{}>(P({.batch = 2,
                                         .tokens = 70,
                                         .query_heads = 4,
                                         .key_heads = key_heads,
                                         .value_heads = value_heads,
                                         .key_dim = 64,
                                         .value_dim = 64}),
                                      3);
}

TEST_CASE_TEMPLATE("last states of packed sequences, value-major, with states in slots and in place", M,
                   Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_token, RuleKind::additive>,
                   Member<DecayKind::per_key, RuleKind::additive>) {
  const std::int64_t offsets[] = {0, 0, 1, 65, 66, 130, 200};
  constexpr Index sequences = 6, count = 3, pool = 8;
  const Problem<Element, M::decay, M::rule> p(shape_of(200, 64, 64));
  const DeviceTensor<Element, 4> q(p.q), k(p.k), v(p.v), o(p.output()), alone_o(p.output());
  const DeviceTensor<float, log_decay_rank(M::decay)> log_decay(p.log_decay);
  Tensor<std::int64_t, 1> cu_seqlens(sequences + 1);
  Tensor<std::int32_t, 1> slots(sequences);
  std::copy(std::begin(offsets), std::end(offsets), cu_seqlens.begin());
  for (Index i = 0; i < sequences; ++i) slots(i) = std::int32_t((3 * i + 2) % pool);
  const DeviceTensor<std::int64_t, 1> device_offsets(cu_seqlens);
  const DeviceTensor<std::int32_t, 1> device_slots(slots);
  const Tensor<float, 4> before = random_tensor<float>(9, pool, Index(2), Index(64), Index(64));
  const DeviceTensor<float, 4> states(before), starts(before);
  const DeviceTensor<float, 5> last(nan_tensor<float>(sequences, count, Index(2), Index(64), Index(64))),
      alone_last(nan_tensor<float>(sequences, count, Index(2), Index(64), Index(64)));
  LinearAttentionArgs<Element, M::decay, M::rule, ValueMajor> args{.q = q,
                                                                   .k = k,
                                                                   .v = v,
                                                                   .o = o,
                                                                   .initial_state = states,
                                                                   .final_state = states,
                                                                   .cu_seqlens = device_offsets.view(),
                                                                   .state_slots = device_slots.view(),
                                                                   .last_states = last};
  if constexpr (M::decay != DecayKind::none) args.log_decay = log_decay;
  REQUIRE(call<in_order>(args).ok());
  for (Index i = 0; i < sequences; ++i) {
    auto one = args;
    const auto cut = [&](auto& x) { x = run(x, 1, offsets[i], offsets[i + 1] - offsets[i]); };
    cut(one.q), cut(one.k), cut(one.v);
    if constexpr (M::decay != DecayKind::none) cut(one.log_decay);
    one.o = run(alone_o.view(), 1, offsets[i], offsets[i + 1] - offsets[i]);
    one.cu_seqlens = {}, one.state_slots = {};
    one.initial_state = run(starts.view(), 0, Index(slots(i)), 1), one.final_state = {};
    one.last_states = run(alone_last.view(), 0, i, 1);
    REQUIRE(call<in_order>(one).ok());
  }
  CHECK(same_bits(o.host(), alone_o.host()));
  CHECK(same_bits(last.host(), alone_last.host()));
}

TEST_CASE("last states that do not fit are refused") {
  const Problem<Element, DecayKind::none, RuleKind::additive> p(shape_of(64, 64, 64));
  const DeviceTensor<Element, 4> q(p.q), k(p.k), v(p.v), o(p.output());
  const DeviceTensor<float, 5> last(nan_tensor<float>(Index(1), Index(2), Index(2), Index(64), Index(80)));
  const LinearAttentionArgs<Element> args{.q = q, .k = k, .v = v, .o = o, .last_states = last};
  const Status s = cuda::linear_attention(args, {}, nullptr);
  CHECK(s.code == Code::bad_shape);
  CHECK(std::string(s.why).find("last_states") != std::string::npos);
}

}  // namespace chela::test
