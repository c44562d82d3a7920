// Gradients of linear attention over a bidirectional span on a GPU, bfloat16.
#include "attention/device_gradients.cuh"

#define CHELA_MEMBERS                                                                           \
  Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>, \
      Member<DecayKind::per_token, RuleKind::additive>

namespace chela::test {

using Element = __nv_bfloat16;

template <DecayKind D>
Problem<Element, D, RuleKind::additive> both_ways(const Shape& shape, Gates gates = Gates::mild) {
  Problem<Element, D, RuleKind::additive> p(shape, gates);
  p.span = Span::bidirectional;
  return p;
}

TEST_CASE_TEMPLATE("gradients both ways of any number of tokens", M, CHELA_MEMBERS) {
  for (Index tokens : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 130, 500}) {
    check_errors<LinearPolicy{}, in_segments, on_warps>(both_ways<M::decay>(shape_of(tokens, 64, 64, 4)));
    check_errors<LinearPolicy{}, in_order>(both_ways<M::decay>(shape_of(tokens, 128, 128, tokens < 100 ? 4 : 1)));
  }
  check_errors<LinearPolicy{}>(both_ways<M::decay>(shape_of(2048 + 100, 64, 64, 2)));
}

TEST_CASE_TEMPLATE("gradients both ways of any key and value dimension", M, CHELA_MEMBERS) {
  const std::pair<Index, Index> dims[] = {{64, 128}, {128, 64}, {16, 16},   {48, 80},  {112, 32},
                                          {192, 16}, {16, 256}, {256, 256}, {160, 144}};
  for (const auto& [key_dim, value_dim] : dims)
    check_errors<LinearPolicy{}>(both_ways<M::decay>(shape_of(150, key_dim, value_dim)));
}

TEST_CASE_TEMPLATE("gradients both ways of heads that share", M, CHELA_MEMBERS) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads)
    check_errors<LinearPolicy{}, in_segments>(both_ways<M::decay>({.batch = 2,
                                                                   .tokens = 100,
                                                                   .query_heads = query,
                                                                   .key_heads = key,
                                                                   .value_heads = value,
                                                                   .key_dim = 64,
                                                                   .value_dim = 64}));
}

TEST_CASE("gradients both ways under decays of any strength") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, minus_infinity})
    for (bool alternating : {false, true}) {
      CAPTURE(g);
      CAPTURE(alternating);
      auto p = both_ways<DecayKind::per_token>(shape_of(200, 64, 64));
      for (Index i = 0; i < p.log_decay.size(); ++i)
        p.log_decay.data()[i] = alternating && i % 7 < 4 ? -0.01f * float(i % 3) : g;
      check_errors<LinearPolicy{}, in_segments, on_warps>(p);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets})
    check_errors<LinearPolicy{}, on_warps>(both_ways<DecayKind::per_token>(shape_of(1300, 64, 64), gates));
}

TEST_CASE_TEMPLATE("gradients both ways, two runs give the same bits", M, CHELA_MEMBERS) {
  const auto p = both_ways<M::decay>(shape_of(1100, 128, 128, 4));
  const DeviceGradients<Element, M::decay> first(p), second(p);
  REQUIRE(run_on_device(first.args(), first.stream).ok());
  REQUIRE(run_on_device(second.args(), second.stream).ok());
  CHECK(same_gradients(first, second));
}

TEST_CASE_TEMPLATE("gradients both ways that are not wanted", M, CHELA_MEMBERS) {
  const auto p = both_ways<M::decay>(
      {.batch = 2, .tokens = 130, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64});
  const WantedGradients<Element, M::decay> want(p);
  const auto only = [&](auto change) {
    const DeviceGradients<Element, M::decay> some(p);
    auto args = some.args();
    const auto wanted = args;
    args.grad_q = {}, args.grad_k = {}, args.grad_v = {}, args.grad_initial_state = {}, args.grad_log_decay = {};
    change(args, wanted);
    REQUIRE(run_on_device(args, some.stream).ok());
    const double bound = tensor_core_gradient_tolerance<Element>();
    if (args.grad_q.present()) CHECK(relative_error(some.grad_q.host(), want.q) < bound);
    if (args.grad_k.present()) CHECK(relative_error(some.grad_k.host(), want.k) < bound);
    if (args.grad_v.present()) CHECK(relative_error(some.grad_v.host(), want.v) < bound);
    if (args.grad_initial_state.present())
      CHECK(relative_error(some.grad_initial_state.host(), want.initial_state) < bound);
    if (args.grad_log_decay.present())
      CHECK(relative_error(some.grad_log_decay.host(), want.log_decay) < want.decay_bound());
  };
  only([](auto& args, const auto& all) { args.grad_q = all.grad_q; });
  only([](auto& args, const auto& all) { args.grad_k = all.grad_k; });
  only([](auto& args, const auto& all) { args.grad_v = all.grad_v; });
  only([](auto& args, const auto& all) { args.grad_initial_state = all.grad_initial_state; });
  only([](auto& args, const auto& all) { args.grad_log_decay = all.grad_log_decay; });
  only([](auto&, const auto&) {});
}

TEST_CASE_TEMPLATE("gradients both ways of a state in place", M, CHELA_MEMBERS) {
  for (Index key_heads : {2, 1}) {
    const auto p = both_ways<M::decay>({.batch = 2,
                                        .tokens = 130,
                                        .query_heads = 2,
                                        .key_heads = key_heads,
                                        .value_heads = key_heads,
                                        .key_dim = 64,
                                        .value_dim = 64});
    const DeviceGradients<Element, M::decay> apart(p), in_place(p);
    REQUIRE(run_on_device(apart.args(), apart.stream).ok());
    auto args = in_place.args();
    args.grad_initial_state = in_place.grad_final_state;
    REQUIRE(run_on_device(args, in_place.stream).ok());
    CHECK(same_bits(in_place.grad_final_state.host(), apart.grad_initial_state.host()));
    CHECK(same_bits(in_place.grad_v.host(), apart.grad_v.host()));
  }
}

TEST_CASE("gradients both ways of packed sequences are those that each has alone") {
  check_ragged<in_order>(both_ways<DecayKind::none>(shape_of(1700, 64, 64)));
  check_ragged<in_order>(both_ways<DecayKind::per_token>(shape_of(1700, 128, 64)));
  check_ragged<in_segments>(both_ways<DecayKind::none>(shape_of(1700, 128, 64)));
  check_ragged<in_segments>(both_ways<DecayKind::per_token>(shape_of(1700, 64, 64)));
  check_ragged<on_warps>(both_ways<DecayKind::per_token>(shape_of(1700, 64, 64)));
}

TEST_CASE("gradients both ways, what is refused") {
  const auto p = both_ways<DecayKind::none>(shape_of(100, 64, 64));
  const DeviceGradients<Element, DecayKind::none> device(p);
  constexpr LinearPolicy on_warpgroups{.instructions = Instructions::warpgroup};
  CHECK(cuda::linear_attention_backward<on_warpgroups>(device.args(), {}, nullptr).code == Code::unsupported);
  const auto decayed = both_ways<DecayKind::per_token>(shape_of(100, 64, 64));
  const DeviceGradients<Element, DecayKind::per_token> other(decayed);
  CHECK(std::string(cuda::linear_attention_backward(other.args(), {}, nullptr).why).find("workspace") !=
        std::string::npos);
}

}  // namespace chela::test
