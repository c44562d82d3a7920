#pragma once
// Linear attention on a GPU, for the element type and decays that the including file names: TestElement, CHELA_MEMBERS
// for the test cases that try all members, test_decay for those that try one, plain_decay where its kind matters
// little.
#include <doctest/doctest.h>

#include <string>

#include "attention/device_problem.cuh"

namespace chela::test {

TEST_CASE_TEMPLATE("any number of tokens", M, CHELA_MEMBERS) {
  for (Index tokens : {0, 1, 15, 16, 17, 63, 64, 65, 200, 1000}) {
    CAPTURE(tokens);
    const Index heads = tokens < 100 ? 4 : 1;  // numbers enough for a mean error
    const Problem<TestElement, M::decay, M::rule> p(shape_of(tokens, 64, 64)), large(shape_of(tokens, 128, 128, heads));
    const double bound = tensor_core_tolerance<TestElement>();
    CHECK(error_of<LinearPolicy{}>(p) < bound);
    CHECK(error_of<LinearPolicy{}>(large) < bound);
    CHECK(error_of<in_order>(large) < bound);
    CHECK(error_of<on_warps>(p) < bound);
    CHECK(error_of<on_warps>(large) < bound);
    CHECK(error_of<in_segments>(p) < bound);
    CHECK(error_of<in_segments>(large) < bound);
    CHECK(error_of<narrow>(large) < bound);
  }
}

TEST_CASE_TEMPLATE("any key and value dimension", M, CHELA_MEMBERS) {
  const Index dims[][2] = {{64, 128}, {128, 64}, {16, 16},   {48, 80},  {112, 32},
                           {192, 16}, {16, 256}, {256, 256}, {160, 144}};
  for (const auto& [key_dim, value_dim] : dims) {
    CAPTURE(key_dim);
    CAPTURE(value_dim);
    const Problem<TestElement, M::decay, M::rule> p(shape_of(150, key_dim, value_dim));
    CHECK(error_of<LinearPolicy{}>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<on_warps>(p) < tensor_core_tolerance<TestElement>());
  }
}

TEST_CASE_TEMPLATE("heads that share", M, CHELA_MEMBERS) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads) {
    const Shape shape{.batch = 2,
                      .tokens = 100,
                      .query_heads = query,
                      .key_heads = key,
                      .value_heads = value,
                      .key_dim = 64,
                      .value_dim = 64};
    CAPTURE(shape);
    const Problem<TestElement, M::decay, M::rule> p(shape);
    CHECK(error_of<LinearPolicy{}>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<in_segments>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<on_warps>(p) < tensor_core_tolerance<TestElement>());
  }
}

TEST_CASE("decays of any strength") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  using P = Problem<TestElement, test_decay, RuleKind::additive>;
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, minus_infinity})
    for (bool alternating : {false, true}) {
      CAPTURE(g);
      CAPTURE(alternating);
      P p(shape_of(200, 64, 64)), large(shape_of(200, 128, 128, 1));
      for (P* problem : {&p, &large})
        for (Index i = 0; i < problem->log_decay.size(); ++i)
          problem->log_decay.data()[i] = alternating && i % 7 < 4 ? -0.01f * float(i % 3) : g;
      const double bound = tensor_core_tolerance<TestElement>();
      CHECK(error_of<LinearPolicy{}>(p) < bound);
      CHECK(error_of<LinearPolicy{}>(large) < bound);
      CHECK(error_of<in_segments>(p) < bound);
      CHECK(error_of<on_warps>(p) < bound);
      CHECK(error_of<on_warps>(large) < bound);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets}) {
    const P p(shape_of(500, 64, 64), gates);
    CHECK(error_of<LinearPolicy{}>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<in_segments>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<on_warps>(p) < tensor_core_tolerance<TestElement>());
  }
}

template <LinearPolicy P, class T, DecayKind D>
void check_pieces(const Problem<T, D, RuleKind::additive>& p) {
  DeviceProblem<T, D> whole(p), pieces(p);
  REQUIRE(run_on_device<P>(whole.args(), whole.stream).ok());
  auto args = pieces.args();
  for (Index begin = 0; begin < p.s.tokens;) {
    const Index count = std::min<Index>(begin == 0 ? 64 : 128, p.s.tokens - begin);
    REQUIRE(run_on_device<P>(tokens_of(args, begin, count), pieces.stream).ok());
    args.initial_state = args.final_state;
    begin += count;
  }
  CHECK(same_bits(whole.o.host(), pieces.o.host()));
  CHECK(same_bits(whole.final_state.host(), pieces.final_state.host()));
}

TEST_CASE_TEMPLATE("pieces of whole chunks give the bits of one call, states in place", M, CHELA_MEMBERS) {
  const Problem<TestElement, M::decay, M::rule> p(shape_of(300, 64, 64)), large(shape_of(300, 128, 128)),
      shared({.batch = 2,
              .tokens = 300,
              .query_heads = 4,
              .key_heads = 2,
              .value_heads = 2,
              .key_dim = 64,
              .value_dim = 64});
  check_pieces<in_order>(p), check_pieces<in_order>(large), check_pieces<in_order>(shared);
  check_pieces<on_warps>(p), check_pieces<on_warps>(large), check_pieces<on_warps>(shared);
}

TEST_CASE_TEMPLATE("two runs give the same bits", M, CHELA_MEMBERS) {
  const Problem<TestElement, M::decay, M::rule> p(shape_of(1000, 128, 128, 4));
  const DeviceProblem<TestElement, M::decay> first(p), second(p);
  REQUIRE(run_on_device(first.args(), first.stream).ok());
  REQUIRE(run_on_device(second.args(), second.stream).ok());
  CHECK(same_bits(first.o.host(), second.o.host()));
  CHECK(same_bits(first.final_state.host(), second.final_state.host()));
}

TEST_CASE_TEMPLATE("strides", M, CHELA_MEMBERS) {
  const Shape shape{
      .batch = 2, .tokens = 130, .query_heads = 3, .key_heads = 3, .value_heads = 3, .key_dim = 64, .value_dim = 64};
  check_strides<LinearPolicy{}>(Problem<TestElement, M::decay, M::rule>(shape));
  check_strides<on_warps>(Problem<TestElement, M::decay, M::rule>(shape));
  check_strides<LinearPolicy{}>(Problem<TestElement, M::decay, M::rule>(shape_of(130, 48, 80)));
}

/// Runs with batch entries more than 2^31 elements apart, and compares with the packed layout.
template <LinearPolicy P, class T, DecayKind D>
void check_far_apart(const Problem<T, D, RuleKind::additive>& p) {
  REQUIRE(p.s.batch == 2);
  const DeviceProblem<T, D> packed(p);
  REQUIRE(run_on_device<P>(packed.args(), packed.stream).ok());
  auto args = packed.args();
  constexpr Index apart = (Index(1) << 31) + 64;
  const Index of_entry = args.q.size() / 2, begins[] = {0, of_entry, 2 * of_entry, 3 * of_entry};
  const DeviceMemory memory(std::size_t(apart + 4 * of_entry) * sizeof(T));
  const auto entry_bytes = std::size_t(of_entry) * sizeof(T);
  const auto move = [&](auto& view, Index begin) {
    T* const to = static_cast<T*>(memory.data()) + begin;
    for (Index entry = 0; entry < 2; ++entry)
      require_cuda(cudaMemcpy(to + entry * apart, view.data + entry * of_entry, entry_bytes, cudaMemcpyDeviceToDevice));
    view.data = to, view.strides[0] = apart;
  };
  move(args.q, begins[0]), move(args.k, begins[1]), move(args.v, begins[2]), move(args.o, begins[3]);
  require_cuda(cudaMemset2D(args.o.data, apart * sizeof(T), 0xff, entry_bytes, 2));
  REQUIRE(run_on_device<P>(args, packed.stream).ok());
  Tensor<T, 4> got(p.output().extents());
  require_cuda(
      cudaMemcpy2D(got.data(), entry_bytes, args.o.data, apart * sizeof(T), entry_bytes, 2, cudaMemcpyDeviceToHost));
  CHECK(same_bits(got, packed.o.host()));
}

TEST_CASE("tensors of more than 2^31 elements") {
  const Shape shape{
      .batch = 2, .tokens = 130, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64};
  check_far_apart<LinearPolicy{}>(Problem<TestElement, DecayKind::per_token, RuleKind::additive>(shape));
  check_far_apart<in_segments>(Problem<TestElement, DecayKind::none, RuleKind::additive>(shape));
  check_far_apart<on_warps>(Problem<TestElement, DecayKind::per_token, RuleKind::additive>(shape));
}

TEST_CASE("calls on several streams do not disturb each other") {
  using P = Problem<TestElement, DecayKind::per_token, RuleKind::additive>;
  const P p(shape_of(2000, 64, 64)), other(shape_of(1500, 128, 128, 3));
  const DeviceProblem<TestElement, DecayKind::per_token> alone(p), first(p), second(p), third(other);
  REQUIRE(run_on_device<in_segments>(alone.args(), alone.stream).ok());
  const DeviceMemory scratch[] = {DeviceMemory(cuda::workspace_bytes<in_segments>(first.args())),
                                  DeviceMemory(cuda::workspace_bytes<in_segments>(second.args())),
                                  DeviceMemory(cuda::workspace_bytes<in_segments>(third.args()))};
  const auto queue = [&](const auto& device, const DeviceMemory& memory) {
    return cuda::linear_attention<in_segments>(device.args(), {memory.data(), memory.bytes()}, device.stream).ok();
  };
  for (int round = 0; round < 5; ++round) {
    REQUIRE(queue(first, scratch[0]));
    REQUIRE(queue(third, scratch[2]));
    REQUIRE(queue(second, scratch[1]));
  }
  first.stream.wait(), second.stream.wait(), third.stream.wait();
  CHECK(same_bits(first.o.host(), alone.o.host()));
  CHECK(same_bits(second.o.host(), alone.o.host()));
}

TEST_CASE("broadcast keys") {
  const Problem<TestElement, plain_decay, RuleKind::additive> p(shape_of(130, 64, 64));
  const DeviceProblem<TestElement, plain_decay> device(p);
  auto args = device.args();
  args.k.strides[2] = 0;
  REQUIRE(run_on_device(args, device.stream).ok());
  Problem<TestElement, plain_decay, RuleKind::additive> same = p;
  for_each_index(p.k.view(), [&](auto b, auto t, auto h, auto i) { same.k(b, t, h, i) = p.k(b, t, 0, i); });
  const DoubleProblem wide(same);
  Tensor<double, 4> want(p.output().extents());
  reference::linear_attention(wide.problem, want);
  CHECK(relative_error(device.o.host(), want) < tensor_core_tolerance<TestElement>());
}

template <LinearPolicy P, DecayKind D>
void check_isolation() {
  const Shape shape{
      .batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64};
  Problem<TestElement, D, RuleKind::additive> p(shape);
  const DeviceProblem<TestElement, D> clean(p);
  REQUIRE(run_on_device<P>(clean.args(), clean.stream).ok());
  const TestElement nan(std::numeric_limits<float>::quiet_NaN());
  p.q(1, 3, 0, 5) = nan, p.k(1, 70, 0, 5) = nan, p.v(1, 99, 0, 5) = nan, p.v(1, 0, 0, 0) = nan;
  const DeviceProblem<TestElement, D> dirty(p);
  REQUIRE(run_on_device<P>(dirty.args(), dirty.stream).ok());
  auto got = dirty.o.host();
  const auto want = clean.o.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
    if (b != 1 || h != 0) same = same && std::memcmp(&got(b, t, h, i), &want(b, t, h, i), sizeof(TestElement)) == 0;
  });
  CHECK(same);
}

TEST_CASE("NaN stays in its batch entry and head") {
  check_isolation<LinearPolicy{}, plain_decay>();
  check_isolation<LinearPolicy{}, test_decay>();
  check_isolation<in_segments, test_decay>();
  check_isolation<on_warps, plain_decay>();
  check_isolation<on_warps, test_decay>();
}

TEST_CASE("states value-major, in slots, and at boundaries") {
  const Problem<TestElement, test_decay, RuleKind::additive> p(
      {.batch = 2, .tokens = 200, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 128});
  const DeviceProblem<TestElement, test_decay> plain(p);
  auto args = plain.args();
  const DeviceTensor<float, 5> boundaries(nan_tensor<float>(2, 3, 2, 64, 128));
  args.boundary_states = boundaries, args.boundary_every = 64;
  REQUIRE(run_on_device(args, plain.stream).ok());

  Tensor<float, 4> pool(5, 2, 128, 64);
  for_each_index(p.initial_state.view(),
                 [&](auto b, auto h, auto k, auto v) { pool(b == 0 ? 3 : 1, h, v, k) = p.initial_state(b, h, k, v); });
  const DeviceTensor<float, 4> states(pool);
  Tensor<std::int32_t, 1> slots(2);
  slots(0) = 3, slots(1) = 1;
  const DeviceTensor<std::int32_t, 1> device_slots(slots);
  const DeviceTensor<TestElement, 4> o(p.output());
  const LinearAttentionArgs<TestElement, test_decay, RuleKind::additive, ValueMajor> pooled{
      .q = args.q,
      .k = args.k,
      .v = args.v,
      .o = o,
      .initial_state = states,
      .final_state = states,
      .log_decay = args.log_decay,
      .state_slots = device_slots.view()};
  REQUIRE(run_on_device(pooled, plain.stream).ok());
  CHECK(same_bits(o.host(), plain.o.host()));
  const auto got = states.host(), want = plain.final_state.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto h, auto k, auto v) {
    same = same && got(b == 0 ? 3 : 1, h, v, k) == want(b, h, k, v);
  });
  CHECK(same);

  const auto saved = boundaries.host();
  for (Index boundary : {1, 2, 3}) {
    const DeviceTensor<float, 4> at(p.state());
    auto head = tokens_of(plain.args(), 0, 64 * boundary);
    head.final_state = at;
    REQUIRE(run_on_device(head, plain.stream).ok());
    const auto state = at.host();
    for_each_index(state.view(), [&](auto b, auto h, auto k, auto v) {
      same = same && state(b, h, k, v) == saved(b, boundary - 1, h, k, v);
    });
  }
  CHECK(same);

  REQUIRE(run_on_device<in_segments>(args, plain.stream).ok());
  const auto summed_apart = boundaries.host();
  CHECK(relative_error(summed_apart, saved) < tensor_core_tolerance<TestElement>());
}

template <LinearPolicy P, DecayKind D>
void check_ragged(Index key_dim) {
  const std::int64_t offsets[] = {0, 0, 5, 69, 70, 70, 198, 300, 512};
  constexpr Index sequences = 8;
  const Problem<TestElement, D, RuleKind::additive> p(shape_of(512, key_dim, 64));
  const DeviceProblem<TestElement, D> packed(p), alone(p);
  const auto initial = random_tensor<float>(11, sequences, Index(2), key_dim, Index(64));
  const DeviceTensor<float, 4> starts(initial);
  const auto none = nan_tensor<float>(sequences, Index(2), key_dim, Index(64));
  const DeviceTensor<float, 4> packed_states(none), alone_states(none);
  Tensor<std::int64_t, 1> cu_seqlens(sequences + 1);
  std::copy(std::begin(offsets), std::end(offsets), cu_seqlens.begin());
  const DeviceTensor<std::int64_t, 1> device_offsets(cu_seqlens);

  auto args = packed.args();
  args.initial_state = starts, args.final_state = packed_states, args.cu_seqlens = device_offsets.view();
  REQUIRE(run_on_device<P>(args, packed.stream).ok());
  for (Index i = 0; i < sequences; ++i) {
    auto one = tokens_of(alone.args(), offsets[i], offsets[i + 1] - offsets[i]);
    one.initial_state = chela::run(starts.view(), 0, i, 1), one.final_state = chela::run(alone_states.view(), 0, i, 1);
    REQUIRE(run_on_device<P>(one, alone.stream).ok());
  }
  CHECK(same_bits(packed.o.host(), alone.o.host()));
  CHECK(same_bits(packed_states.host(), alone_states.host()));
}

TEST_CASE("packed sequences give the bits that each gives alone") {
  check_ragged<in_order, plain_decay>(64);
  check_ragged<in_order, test_decay>(128);
  check_ragged<in_segments, plain_decay>(128);
  check_ragged<in_segments, test_decay>(64);
  check_ragged<on_warps, plain_decay>(64);
  check_ragged<on_warps, test_decay>(128);
}

TEST_CASE("a graph replays the call") {
  const Problem<TestElement, test_decay, RuleKind::additive> p(shape_of(500, 128, 128));
  const DeviceProblem<TestElement, test_decay> plain(p), replayed(p);
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

TEST_CASE("refusals name the argument") {
  const auto refused = [](const auto& args, const char* word) {
    const Status s = cuda::linear_attention(args, {}, nullptr);
    CAPTURE(std::string(s.why));
    CHECK(!s.ok());
    CHECK(std::string(s.why).find(word) != std::string::npos);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  };
  const Problem<TestElement, plain_decay, RuleKind::additive> p(shape_of(64, 64, 64)), odd(shape_of(64, 40, 64)),
      wide(shape_of(64, 64, 272));
  const DeviceProblem<TestElement, plain_decay> device(p), odd_device(odd), wide_device(wide);
  refused(odd_device.args(), "key_dim");
  refused(wide_device.args(), "value_dim");
  auto args = device.args();
  args.q.strides[1] += 1;
  refused(args, "q must");
  args = device.args(), args.k.data += 1;
  refused(args, "k must");
  args = device.args(), args.v.strides[3] = 2;
  refused(args, "v must");
  args = device.args(), args.o.data += 4;
  refused(args, "o must");
  args = device.args(), args.q.extents[1] -= 1;
  refused(args, "token extent");
  args = device.args(), args.boundary_every = 32;
  const DeviceTensor<float, 5> boundaries(nan_tensor<float>(1, 2, 2, 64, 64));
  args.boundary_states = boundaries;
  refused(args, "boundary_every");
  const Status s = cuda::linear_attention<in_segments>(device.args(), {}, nullptr);
  CHECK(std::string(s.why).find("workspace") != std::string::npos);
  const Status dims = cuda::linear_attention<LinearPolicy{.instructions = Instructions::warpgroup}>(
      DeviceProblem<TestElement, plain_decay>(
          Problem<TestElement, plain_decay, RuleKind::additive>(shape_of(64, 32, 64)))
          .args(),
      {}, nullptr);
  CHECK(dims.code == Code::unsupported);
}

}  // namespace chela::test
