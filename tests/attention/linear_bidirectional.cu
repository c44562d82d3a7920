// Linear attention over a bidirectional span on a GPU, bfloat16.
#include "attention/device_problem.cuh"

#define CHELA_MEMBERS                                                                           \
  Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>, \
      Member<DecayKind::per_token, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::additive>

namespace chela::test {

using Element = __nv_bfloat16;

template <DecayKind D>
Problem<Element, D, RuleKind::additive> both_ways(const Shape& shape, Gates gates = Gates::mild) {
  Problem<Element, D, RuleKind::additive> p(shape, gates);
  p.span = Span::bidirectional;
  return p;
}

template <LinearPolicy... P, DecayKind D>
void check_errors(const Problem<Element, D, RuleKind::additive>& p) {
  CAPTURE(p.shape);
  const double bound =
      D == DecayKind::none ? tensor_core_tolerance<Element>() : tensor_core_two_way_tolerance<Element>();
  for (double error : {error_of<P>(p)...}) CHECK(error < bound);
}

TEST_CASE_TEMPLATE("both ways over any number of tokens", M, CHELA_MEMBERS) {
  for (Index tokens : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000}) {
    check_errors<LinearPolicy{}, in_segments, on_warps>(both_ways<M::decay>(shape_of(tokens, 64, 64, 4)));
    check_errors<LinearPolicy{}, in_segments, in_order, narrow, on_warps>(
        both_ways<M::decay>(shape_of(tokens, 128, 128, tokens < 100 ? 4 : 1)));
  }
}

TEST_CASE_TEMPLATE("both ways with any key and value dimension", M, CHELA_MEMBERS) {
  const Index dims[][2] = {{64, 128}, {128, 64}, {16, 16},   {48, 80},  {112, 32},
                           {192, 16}, {16, 256}, {256, 256}, {160, 144}};
  for (const auto& [key_dim, value_dim] : dims)
    check_errors<LinearPolicy{}, on_warps>(both_ways<M::decay>(shape_of(150, key_dim, value_dim)));
}

TEST_CASE_TEMPLATE("both ways with heads that share", M, CHELA_MEMBERS) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads)
    check_errors<LinearPolicy{}, in_segments, on_warps>(both_ways<M::decay>({.batch = 2,
                                                                             .tokens = 100,
                                                                             .query_heads = query,
                                                                             .key_heads = key,
                                                                             .value_heads = value,
                                                                             .key_dim = 64,
                                                                             .value_dim = 64}));
}

TEST_CASE_TEMPLATE("both ways under decays of any strength", M, Member<DecayKind::per_token, RuleKind::additive>,
                   Member<DecayKind::per_key, RuleKind::additive>) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, minus_infinity})
    for (bool alternating : {false, true}) {
      CAPTURE(g);
      CAPTURE(alternating);
      auto p = both_ways<M::decay>(shape_of(200, 64, 64)), large = both_ways<M::decay>(shape_of(200, 128, 128, 1));
      for (auto* problem : {&p, &large})
        for (Index i = 0; i < problem->log_decay.size(); ++i)
          problem->log_decay.data()[i] = alternating && i % 7 < 4 ? -0.01f * float(i % 3) : g;
      check_errors<LinearPolicy{}, in_segments, on_warps>(p);
      check_errors<LinearPolicy{}, on_warps>(large);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets})
    check_errors<LinearPolicy{}, in_segments, on_warps>(both_ways<M::decay>(shape_of(500, 64, 64), gates));
}

TEST_CASE_TEMPLATE("both ways, two runs give the same bits", M, CHELA_MEMBERS) {
  const auto p = both_ways<M::decay>(shape_of(1000, 128, 128, 4));
  const DeviceProblem<Element, M::decay> first(p), second(p);
  REQUIRE(run_on_device(first.args(), first.stream).ok());
  REQUIRE(run_on_device(second.args(), second.stream).ok());
  CHECK(same_bits(first.o.host(), second.o.host()));
  CHECK(same_bits(first.final_state.host(), second.final_state.host()));
}

TEST_CASE_TEMPLATE("both ways on strided tensors", M, CHELA_MEMBERS) {
  const Shape shape{
      .batch = 2, .tokens = 130, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 64, .value_dim = 64};
  check_strides<LinearPolicy{}>(both_ways<M::decay>(shape));
  check_strides<on_warps>(both_ways<M::decay>(shape));
  check_strides<LinearPolicy{}>(both_ways<M::decay>(shape_of(130, 48, 80)));
}

/// Packed sequences, their states value-major in slots and in place, against each sequence alone.
template <LinearPolicy P, DecayKind D>
void check_ragged(Index key_dim) {
  const std::int64_t offsets[] = {0, 0, 5, 69, 70, 70, 198, 300, 512};
  constexpr Index sequences = 8, pool = 11;
  const auto p = both_ways<D>(shape_of(512, key_dim, 64), Gates::mixed_with_resets);
  const DeviceProblem<Element, D> packed(p), alone(p);
  const Tensor<float, 4> before = random_tensor<float>(11, pool, Index(2), Index(64), key_dim);
  const DeviceTensor<float, 4> packed_states(before), alone_states(before);
  Tensor<std::int64_t, 1> cu_seqlens(sequences + 1);
  Tensor<std::int32_t, 1> slots(sequences);
  std::copy(std::begin(offsets), std::end(offsets), cu_seqlens.begin());
  for (Index i = 0; i < sequences; ++i) slots(i) = std::int32_t((4 * i + 3) % pool);
  const DeviceTensor<std::int64_t, 1> device_offsets(cu_seqlens);
  const DeviceTensor<std::int32_t, 1> device_slots(slots);
  const auto with_states = [&](const auto& a, const auto& states) {
    LinearAttentionArgs<Element, D, RuleKind::additive, ValueMajor> args{.q = a.q,
                                                                         .k = a.k,
                                                                         .v = a.v,
                                                                         .o = a.o,
                                                                         .initial_state = states,
                                                                         .final_state = states,
                                                                         .span = Span::bidirectional};
    if constexpr (D != DecayKind::none) args.log_decay = a.log_decay;
    return args;
  };
  auto args = with_states(packed.args(), packed_states.view());
  args.cu_seqlens = device_offsets.view(), args.state_slots = device_slots.view();
  REQUIRE(run_on_device<P>(args, packed.stream).ok());
  for (Index i = 0; i < sequences; ++i) {
    const auto one = tokens_of(alone.args(), offsets[i], offsets[i + 1] - offsets[i]);
    const auto state = chela::run(alone_states.view(), 0, Index(slots(i)), 1);
    REQUIRE(run_on_device<P>(with_states(one, state), alone.stream).ok());
  }
  CHECK(same_bits(packed.o.host(), alone.o.host()));
  CHECK(same_bits(packed_states.host(), alone_states.host()));
}

TEST_CASE_TEMPLATE("both ways, packed sequences give the bits that each gives alone", M, CHELA_MEMBERS) {
  check_ragged<in_order, M::decay>(64);
  check_ragged<in_segments, M::decay>(128);
  if constexpr (M::decay != DecayKind::none) check_ragged<on_warps, M::decay>(64);
}

TEST_CASE_TEMPLATE("both ways, NaN stays in its batch entry and head", M, CHELA_MEMBERS) {
  auto p = both_ways<M::decay>(
      {.batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64});
  const DeviceProblem<Element, M::decay> clean(p);
  REQUIRE(run_on_device(clean.args(), clean.stream).ok());
  const Element nan(std::numeric_limits<float>::quiet_NaN());
  p.q(1, 3, 0, 5) = nan, p.k(1, 70, 0, 5) = nan, p.v(1, 99, 0, 5) = nan, p.v(1, 0, 0, 0) = nan;
  const DeviceProblem<Element, M::decay> dirty(p);
  REQUIRE(run_on_device(dirty.args(), dirty.stream).ok());
  const auto got = dirty.o.host(), want = clean.o.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
    if (b != 1 || h != 0) same = same && float(got(b, t, h, i)) == float(want(b, t, h, i));
  });
  CHECK(same);
}

TEST_CASE_TEMPLATE("both ways, a graph replays the call", M, CHELA_MEMBERS) {
  const auto p = both_ways<M::decay>(shape_of(500, 128, 128));
  const DeviceProblem<Element, M::decay> plain(p), replayed(p);
  REQUIRE(run_on_device<in_segments>(plain.args(), plain.stream).ok());
  const DeviceMemory scratch(cuda::workspace_bytes<in_segments>(replayed.args()));
  const Graph graph(replayed.stream, [&] {
    REQUIRE(
        cuda::linear_attention<in_segments>(replayed.args(), {scratch.data(), scratch.bytes()}, replayed.stream).ok());
  });
  graph.launch();
  replayed.stream.wait();
  CHECK(same_bits(plain.o.host(), replayed.o.host()));
}

TEST_CASE("both ways, what is refused") {
  const auto p = both_ways<DecayKind::none>(shape_of(100, 64, 64));
  const DeviceProblem<Element, DecayKind::none> device(p);
  Status s = cuda::linear_attention<LinearPolicy{.instructions = Instructions::warpgroup}>(device.args(), {}, nullptr);
  CHECK(s.code == Code::unsupported);
  s = cuda::linear_attention(device.args(), {}, nullptr);
  CHECK(std::string(s.why).find("workspace") != std::string::npos);
  const DeviceTensor<float, 5> last(nan_tensor<float>(1, 2, 2, 64, 64));
  auto args = device.args();
  args.last_states = last;
  s = cuda::linear_attention(args, {}, nullptr);
  CHECK(std::string(s.why).find("last_states") != std::string::npos);
}

}  // namespace chela::test
