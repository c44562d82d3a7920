// Linear attention of float data on a GPU.
#include "attention/device_problem.cuh"

#define CHELA_MEMBERS                                                                           \
  Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>, \
      Member<DecayKind::per_token, RuleKind::additive>

namespace chela::test {

using cuda::FloatProducts;
inline constexpr LinearPolicy exactly{.float_products = FloatProducts::three_tf32};
inline constexpr LinearPolicy roughly{.float_products = FloatProducts::tf32};

template <DecayKind D>
void check_errors(const Problem<float, D, RuleKind::additive>& p) {
  CAPTURE(p.shape);
  CHECK(error_of<exactly>(p) < tolerance<float>(terms(p.shape)));
  CHECK(error_of<roughly>(p) < tf32_tolerance());
}

TEST_CASE_TEMPLATE("float data: any number of tokens", M, CHELA_MEMBERS) {
  for (Index tokens : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 1000}) {
    check_errors(Problem<float, M::decay, M::rule>(shape_of(tokens, 64, 64, tokens < 100 ? 4 : 1)));
    check_errors(Problem<float, M::decay, M::rule>(shape_of(tokens, 128, 128, 1)));
  }
}

TEST_CASE_TEMPLATE("float data: any key and value dimension", M, CHELA_MEMBERS) {
  const Index dims[][2] = {{64, 128}, {128, 64}, {16, 16},   {48, 80},  {112, 32},
                           {192, 16}, {16, 256}, {256, 256}, {160, 144}};
  for (const auto& [key_dim, value_dim] : dims)
    check_errors(Problem<float, M::decay, M::rule>(shape_of(150, key_dim, value_dim)));
}

TEST_CASE_TEMPLATE("float data: heads that share", M, CHELA_MEMBERS) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads)
    check_errors(Problem<float, M::decay, M::rule>({.batch = 2,
                                                    .tokens = 100,
                                                    .query_heads = query,
                                                    .key_heads = key,
                                                    .value_heads = value,
                                                    .key_dim = 64,
                                                    .value_dim = 64}));
}

TEST_CASE("float data: decays of any strength") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, minus_infinity})
    for (bool alternating : {false, true}) {
      CAPTURE(g);
      CAPTURE(alternating);
      Problem<float, DecayKind::per_token, RuleKind::additive> p(shape_of(200, 64, 64));
      for (Index i = 0; i < p.log_decay.size(); ++i)
        p.log_decay.data()[i] = alternating && i % 7 < 4 ? -0.01f * float(i % 3) : g;
      check_errors(p);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets})
    check_errors(Problem<float, DecayKind::per_token, RuleKind::additive>(shape_of(500, 64, 64), gates));
}

TEST_CASE_TEMPLATE("float data: strides", M, CHELA_MEMBERS) {
  const Problem<float, M::decay, M::rule> p(
      {.batch = 2, .tokens = 70, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 64, .value_dim = 64});
  const auto spread = [](const Tensor<float, 4>& packed) {
    const auto [b, t, h, d] = packed.extents();
    Tensor<float, 4> wide(std::array<Index, 4>{b, h, t, d + 12}, 7.f);
    for_each_index(packed.view(), [&](auto i, auto j, auto l, auto m) { wide(i, l, j, m) = packed(i, j, l, m); });
    return wide;
  };
  const auto narrow_view = [](const DeviceTensor<float, 4>& wide) {
    return transposed(chela::run(wide.view(), 3, 0, wide.view().extents[3] - 12), 1, 2);
  };
  const DeviceProblem<float, M::decay> packed(p);
  const DeviceTensor<float, 4> q(spread(p.q)), k(spread(p.k)), v(spread(p.v)), o(spread(p.output()));
  REQUIRE(run_on_device<exactly>(packed.args(), packed.stream).ok());
  auto args = packed.args();
  args.q = narrow_view(q), args.k = narrow_view(k), args.v = narrow_view(v), args.o = narrow_view(o);
  REQUIRE(run_on_device<exactly>(args, packed.stream).ok());
  CHECK(same_bits(o.host(), spread(packed.o.host())));
}

TEST_CASE("float data: packed sequences, pieces and last states") {
  const std::int64_t offsets[] = {0, 0, 5, 69, 70, 70, 198, 300};
  constexpr Index sequences = 7, count = 3;
  const Problem<float, DecayKind::per_token, RuleKind::additive> p(shape_of(300, 64, 64), Gates::mixed_with_resets);
  const DeviceProblem<float, DecayKind::per_token> packed(p), alone(p), pieces(p);
  const DeviceTensor<float, 4> starts(random_tensor<float>(11, sequences, Index(2), Index(64), Index(64)));
  const auto none = nan_tensor<float>(sequences, Index(2), Index(64), Index(64));
  const auto no_last = nan_tensor<float>(sequences, count, Index(2), Index(64), Index(64));
  const DeviceTensor<float, 4> packed_states(none), alone_states(none);
  const DeviceTensor<float, 5> packed_last(no_last), alone_last(no_last);
  Tensor<std::int64_t, 1> cu_seqlens(sequences + 1);
  std::copy(std::begin(offsets), std::end(offsets), cu_seqlens.begin());
  const DeviceTensor<std::int64_t, 1> device_offsets(cu_seqlens);
  auto args = packed.args();
  args.initial_state = starts, args.final_state = packed_states, args.last_states = packed_last;
  args.cu_seqlens = device_offsets.view();
  REQUIRE(run_on_device<exactly>(args, packed.stream).ok());
  for (Index i = 0; i < sequences; ++i) {
    auto one = tokens_of(alone.args(), offsets[i], offsets[i + 1] - offsets[i]);
    one.initial_state = chela::run(starts.view(), 0, i, 1), one.final_state = chela::run(alone_states.view(), 0, i, 1);
    one.last_states = chela::run(alone_last.view(), 0, i, 1);
    REQUIRE(run_on_device<exactly>(one, alone.stream).ok());
  }
  CHECK(same_bits(packed.o.host(), alone.o.host()));
  CHECK(same_bits(packed_states.host(), alone_states.host()));
  CHECK(same_bits(packed_last.host(), alone_last.host()));

  const DeviceProblem<float, DecayKind::per_token> whole(p);
  REQUIRE(run_on_device<exactly>(whole.args(), whole.stream).ok());
  auto part = pieces.args();
  for (Index begin = 0; begin < 300; begin += 128) {
    REQUIRE(run_on_device<exactly>(tokens_of(part, begin, std::min<Index>(128, 300 - begin)), pieces.stream).ok());
    part.initial_state = part.final_state;
  }
  CHECK(same_bits(whole.o.host(), pieces.o.host()));
  CHECK(same_bits(whole.final_state.host(), pieces.final_state.host()));
}

TEST_CASE("float data: NaN stays in its batch entry and head") {
  Problem<float, DecayKind::none, RuleKind::additive> p(
      {.batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64});
  const DeviceProblem<float, DecayKind::none> clean(p);
  REQUIRE(run_on_device<exactly>(clean.args(), clean.stream).ok());
  p.q(1, 3, 0, 5) = p.k(1, 70, 0, 5) = p.v(1, 99, 0, 5) = std::numeric_limits<float>::quiet_NaN();
  const DeviceProblem<float, DecayKind::none> dirty(p);
  REQUIRE(run_on_device<exactly>(dirty.args(), dirty.stream).ok());
  const auto got = dirty.o.host(), want = clean.o.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
    if (b != 1 || h != 0) same = same && got(b, t, h, i) == want(b, t, h, i);
  });
  CHECK(same);
  CHECK(std::isnan(got(1, 99, 0, 0)));
}

TEST_CASE("float data: what is refused") {
  Problem<float, DecayKind::none, RuleKind::additive> p(shape_of(64, 64, 64));
  const DeviceProblem<float, DecayKind::none> device(p);
  const auto names = [](Status s, const char* word) {
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  CHECK(names(cuda::linear_attention(device.args(), {}, nullptr), "LinearPolicy::float_products"));
  auto args = device.args();
  args.span = Span::bidirectional;
  CHECK(names(cuda::linear_attention<exactly>(args, {}, nullptr), "span"));
  args = device.args(), args.q.strides[1] += 2;
  CHECK(names(cuda::linear_attention<exactly>(args, {}, nullptr), "q must"));
  constexpr LinearPolicy on_warpgroups{.instructions = Instructions::warpgroup,
                                       .float_products = FloatProducts::three_tf32};
  CHECK(names(cuda::linear_attention<on_warpgroups>(device.args(), {}, nullptr), "Instructions::warp"));
  const Problem<float, DecayKind::per_key, RuleKind::additive> per_key(shape_of(64, 64, 64));
  const DeviceProblem<float, DecayKind::per_key> other(per_key);
  CHECK(names(cuda::linear_attention<exactly>(other.args(), {}, nullptr), "decay per key"));
}

}  // namespace chela::test
