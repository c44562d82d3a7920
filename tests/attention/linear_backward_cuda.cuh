#pragma once
// Gradients of linear attention on a GPU, for one element type and some members: linear_backward.cu, linear_backward_per_key.cu
// and their like for half precision. They name the element type, CHELA_MEMBERS, and of these one for tests that do not look
// at decays (plain_decay) and one for those that do (test_decay).
#include <doctest/doctest.h>

#include <string>

#include "attention/device_gradients.cuh"

namespace chela::test {

TEST_CASE_TEMPLATE("gradients of any number of tokens", M, CHELA_MEMBERS) {
  using P = Problem<TestElement, M::decay, M::rule>;
  for (Index tokens : {0, 1, 15, 16, 17, 63, 64, 65, 200, 500}) {
    check_errors<LinearPolicy{}, in_segments, on_warps>(P(shape_of(tokens, 64, 64, 4)));
    check_errors<LinearPolicy{}, in_segments, narrow, in_order, on_warps>(P(shape_of(tokens, 128, 128, 1)));
  }
}

TEST_CASE_TEMPLATE("gradients of long sequences", M, CHELA_MEMBERS) {
  using P = Problem<TestElement, M::decay, M::rule>;
  check_errors<in_order, in_segments, on_warps>(P(shape_of(2048 + 100, 64, 64, 4)));
}

TEST_CASE_TEMPLATE("gradients of any key and value dimension", M, CHELA_MEMBERS) {
  using P = Problem<TestElement, M::decay, M::rule>;
  for (const auto& [key_dim, value_dim] : {std::pair<Index, Index>{64, 128}, {128, 64}})
    check_errors<LinearPolicy{}, in_segments, on_warps>(P(shape_of(150, key_dim, value_dim)));
  const std::pair<Index, Index> odd[] = {{16, 16}, {48, 80}, {112, 32}, {192, 16}, {16, 256}, {256, 256}, {160, 144}};
  for (const auto& [key_dim, value_dim] : odd) check_errors<LinearPolicy{}>(P(shape_of(150, key_dim, value_dim)));
  check_errors<LinearPolicy{}>(P(shape_of(1100, 48, 144, 1)));
}

TEST_CASE_TEMPLATE("gradients of heads that share", M, CHELA_MEMBERS) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads) {
    const Shape shape{.batch = 2,
                      .tokens = 100,
                      .query_heads = query,
                      .key_heads = key,
                      .value_heads = value,
                      .key_dim = 64,
                      .value_dim = 64};
    check_errors<LinearPolicy{}, in_segments, on_warps>(Problem<TestElement, M::decay, M::rule>(shape));
  }
}

TEST_CASE("gradients under decays of any strength") {
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
      check_errors<LinearPolicy{}, in_segments, on_warps>(p), check_errors<LinearPolicy{}, on_warps>(large);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets})
    check_errors<LinearPolicy{}, in_segments, on_warps>(P(shape_of(1300, 64, 64), gates));
}

TEST_CASE_TEMPLATE("two runs give the same gradients", M, CHELA_MEMBERS) {
  const Problem<TestElement, M::decay, M::rule> p(shape_of(1100, 128, 128, 4));
  const DeviceGradients<TestElement, M::decay> first(p), second(p);
  REQUIRE(run_on_device(first.args(), first.stream).ok());
  REQUIRE(run_on_device(second.args(), second.stream).ok());
  CHECK(same_gradients(first, second));
}

TEST_CASE_TEMPLATE("gradients that are not wanted", M, CHELA_MEMBERS) {
  const Problem<TestElement, M::decay, M::rule> p(
      {.batch = 2, .tokens = 130, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64});
  const WantedGradients<TestElement, M::decay> want(p);
  const DeviceGradients<TestElement, M::decay> all(p);
  REQUIRE(run_on_device(all.args(), all.stream).ok());
  const auto only = [&](auto change) {
    const DeviceGradients<TestElement, M::decay> some(p);
    auto args = some.args();
    const auto wanted = args;
    args.grad_q = {}, args.grad_k = {}, args.grad_v = {}, args.grad_initial_state = {}, args.grad_log_decay = {};
    change(args, wanted);
    REQUIRE(run_on_device(args, some.stream).ok());
    if (args.grad_q.present()) CHECK(same_bits(some.grad_q.host(), all.grad_q.host()));
    if (args.grad_k.present()) CHECK(same_bits(some.grad_k.host(), all.grad_k.host()));
    if (args.grad_v.present())
      CHECK(relative_error(some.grad_v.host(), all.grad_v.host()) < tensor_core_gradient_tolerance<TestElement>());
    if (args.grad_initial_state.present())
      CHECK(relative_error(some.grad_initial_state.host(), all.grad_initial_state.host()) <
            tensor_core_gradient_tolerance<TestElement>());
    if (args.grad_log_decay.present())
      CHECK(relative_error(some.grad_log_decay.host(), want.log_decay) < want.decay_bound());
  };
  if (M::decay == DecayKind::none) {  // else with the log-decays' gradient sums are kept apart that are not without it
    only([](auto& args, const auto& all) { args.grad_q = all.grad_q; });
    only([](auto& args, const auto& all) { args.grad_k = all.grad_k; });
  }
  only([](auto& args, const auto& all) { args.grad_v = all.grad_v; });
  only([](auto& args, const auto& all) { args.grad_initial_state = all.grad_initial_state; });
  only([](auto& args, const auto& all) { args.grad_log_decay = all.grad_log_decay; });
  only([](auto&, const auto&) {});

  auto without = all.args();
  without.grad_log_decay = {};
  REQUIRE(run_on_device(without, all.stream).ok());
  const double bound = tensor_core_gradient_tolerance<TestElement>();
  CHECK(relative_error(all.grad_q.host(), want.q) < bound);
  CHECK(relative_error(all.grad_k.host(), want.k) < bound);
  CHECK(relative_error(all.grad_v.host(), want.v) < bound);
}

TEST_CASE_TEMPLATE("gradients of states that are absent, or in place", M, CHELA_MEMBERS) {
  for (Index key_heads : {2, 1}) {
    Problem<TestElement, M::decay, M::rule> p({.batch = 2,
                                               .tokens = 130,
                                               .query_heads = 2,
                                               .key_heads = key_heads,
                                               .value_heads = key_heads,
                                               .key_dim = 64,
                                               .value_dim = 64});
    const DeviceGradients<TestElement, M::decay> apart(p), in_place(p);
    REQUIRE(run_on_device(apart.args(), apart.stream).ok());
    auto args = in_place.args();
    args.grad_initial_state = in_place.grad_final_state;
    REQUIRE(run_on_device(args, in_place.stream).ok());
    CHECK(same_bits(in_place.grad_final_state.host(), apart.grad_initial_state.host()));
    CHECK(same_bits(in_place.grad_k.host(), apart.grad_k.host()));
    CHECK(same_bits(in_place.grad_v.host(), apart.grad_v.host()));

    std::fill(p.initial_state.begin(), p.initial_state.end(), 0.f);
    std::fill(p.grad_final_state.begin(), p.grad_final_state.end(), 0.f);
    const DeviceGradients<TestElement, M::decay> zero(p), absent(p);
    REQUIRE(run_on_device(zero.args(), zero.stream).ok());
    auto without = absent.args();
    without.initial_state = {}, without.grad_final_state = {};
    REQUIRE(run_on_device(without, absent.stream).ok());
    CHECK(same_bits(zero.grad_q.host(), absent.grad_q.host()));
    CHECK(same_bits(zero.grad_k.host(), absent.grad_k.host()));
    CHECK(same_bits(zero.grad_v.host(), absent.grad_v.host()));
    CHECK(same_bits(zero.grad_initial_state.host(), absent.grad_initial_state.host()));
    const WantedGradients<TestElement, M::decay> want(p);
    if (M::decay != DecayKind::none) {
      CHECK(relative_error(zero.grad_log_decay.host(), want.log_decay) < want.decay_bound());
      CHECK(relative_error(absent.grad_log_decay.host(), want.log_decay) < want.decay_bound());
    }
  }
}

/// Runs on [batch, head, token, dim] tensors whose rows have room to spare, and compares with the packed layout.
template <class T, DecayKind D>
void check_strides(const Problem<T, D, RuleKind::additive>& p) {
  const auto spread = [](const Tensor<T, 4>& packed) {
    const auto [b, t, h, d] = packed.extents();
    Tensor<T, 4> wide(std::array<Index, 4>{b, h, t, d + 24}, T(7.f));
    for_each_index(packed.view(), [&](auto i, auto j, auto l, auto m) { wide(i, l, j, m) = packed(i, j, l, m); });
    return wide;
  };
  const auto narrow_view = [](const DeviceTensor<T, 4>& wide) {
    return transposed(chela::run(wide.view(), 3, 0, wide.view().extents[3] - 24), 1, 2);
  };
  const DeviceGradients<T, D> packed(p);
  const DeviceTensor<T, 4> q(spread(p.q)), k(spread(p.k)), v(spread(p.v)), grad_o(spread(p.grad_o));
  const DeviceTensor<T, 4> grad_q(spread(p.q)), grad_k(spread(p.k)), grad_v(spread(p.v));
  REQUIRE(run_on_device(packed.args(), packed.stream).ok());
  auto args = packed.args();
  args.q = narrow_view(q), args.k = narrow_view(k), args.v = narrow_view(v), args.grad_o = narrow_view(grad_o);
  args.grad_q = narrow_view(grad_q), args.grad_k = narrow_view(grad_k), args.grad_v = narrow_view(grad_v);
  REQUIRE(run_on_device(args, packed.stream).ok());
  CHECK(same_bits(grad_q.host(), spread(packed.grad_q.host())));
  CHECK(same_bits(grad_k.host(), spread(packed.grad_k.host())));
  CHECK(same_bits(grad_v.host(), spread(packed.grad_v.host())));
}

TEST_CASE_TEMPLATE("gradients of strided tensors", M, CHELA_MEMBERS) {
  check_strides(Problem<TestElement, M::decay, M::rule>(
      {.batch = 2, .tokens = 130, .query_heads = 4, .key_heads = 2, .value_heads = 4, .key_dim = 64, .value_dim = 64}));
}

TEST_CASE("packed sequences have the gradients that each has alone") {
  check_ragged<in_order>(Problem<TestElement, plain_decay, RuleKind::additive>(shape_of(1700, 64, 64)));
  check_ragged<in_order>(Problem<TestElement, test_decay, RuleKind::additive>(shape_of(1700, 128, 64)));
  check_ragged<in_segments>(Problem<TestElement, plain_decay, RuleKind::additive>(shape_of(1700, 128, 64)));
  check_ragged<in_segments>(Problem<TestElement, test_decay, RuleKind::additive>(shape_of(1700, 64, 64)));
  check_ragged<on_warps>(Problem<TestElement, plain_decay, RuleKind::additive>(shape_of(1700, 64, 64)));
  check_ragged<on_warps>(Problem<TestElement, test_decay, RuleKind::additive>(shape_of(1700, 128, 64)));
}

template <DecayKind D>
void check_isolation() {
  Problem<TestElement, D, RuleKind::additive> p(
      {.batch = 2, .tokens = 100, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 64});
  const DeviceGradients<TestElement, D> clean(p);
  REQUIRE(run_on_device(clean.args(), clean.stream).ok());
  const TestElement nan(std::numeric_limits<float>::quiet_NaN());
  p.q(1, 3, 0, 5) = nan, p.k(1, 70, 0, 5) = nan, p.v(1, 99, 0, 5) = nan, p.grad_o(1, 0, 0, 0) = nan;
  const DeviceGradients<TestElement, D> dirty(p);
  REQUIRE(run_on_device(dirty.args(), dirty.stream).ok());
  bool same = true;
  const auto compare = [&](const auto& a, const auto& b) {
    const auto got = a.host(), want = b.host();
    for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
      if (b != 1 || h != 0) same = same && std::memcmp(&got(b, t, h, i), &want(b, t, h, i), sizeof(TestElement)) == 0;
    });
  };
  compare(dirty.grad_q, clean.grad_q), compare(dirty.grad_k, clean.grad_k), compare(dirty.grad_v, clean.grad_v);
  CHECK(same);
}

TEST_CASE("NaN stays in its batch entry's and head's gradients") {
  check_isolation<plain_decay>();
  check_isolation<test_decay>();
}

TEST_CASE("refusals of gradients name the argument") {
  const auto refused = [](const auto& args, const char* word) {
    const Status s = cuda::linear_attention_backward(args, {}, nullptr);
    CAPTURE(std::string(s.why));
    CHECK(!s.ok());
    CHECK(std::string(s.why).find(word) != std::string::npos);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  };
  const Problem<TestElement, test_decay, RuleKind::additive> p(shape_of(64, 64, 64)), odd(shape_of(64, 40, 64)),
      wide(shape_of(64, 64, 272));
  const DeviceGradients<TestElement, test_decay> device(p), odd_device(odd), wide_device(wide);
  refused(odd_device.args(), "key_dim");
  refused(wide_device.args(), "value_dim");
  auto args = device.args();
  args.q.strides[1] += 1;
  refused(args, "q must");
  args = device.args(), args.grad_o.strides[3] = 2;
  refused(args, "grad_o must");
  args = device.args(), args.grad_q.data += 4;
  refused(args, "grad_q must");
  args = device.args(), args.grad_k.strides[2] += 4;
  refused(args, "grad_k must");
  args = device.args(), args.grad_v.data += 1;
  refused(args, "grad_v must");
  refused(device.args(), "workspace");
}

}  // namespace chela::test
