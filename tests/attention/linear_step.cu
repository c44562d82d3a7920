// One token of linear attention on a GPU, against the double reference.
#include <cuda_bf16.h>
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "chela/cuda/attention/linear_step.cuh"
#include "support/attention.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {

using bf16 = __nv_bfloat16;

struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};
template <StateLayout L>
struct HalfStates : LinearAttentionForm {
  template <Element T>
  using StateElement = bf16;
  static constexpr StateLayout state_layout = L;
};

template <class S, AttentionForm F>
Tensor<S, 4> in_layout(const Tensor<float, 4>& key_major_states) {
  const auto from = key_major<F>(key_major_states.view());
  const auto& [b, h, rows, columns] = from.extents;
  Tensor<S, 4> to(b, h, rows, columns);
  for_each_index(to.view(), [&](auto... i) { to(i...) = S(float(from(i...))); });
  return to;
}

/// A problem's tokens on the device, and its states in the form's layout and element.
template <class T, DecayKind D, RuleKind R, AttentionForm F>
struct DeviceSteps {
  using S = StateOf<T, F>;
  const Problem<T, D, R>& on_host;
  DeviceTensor<T, 4> q, k, v, o;
  DeviceTensor<S, 4> states;
  DeviceTensor<float, log_decay_rank(D)> log_decay;
  DeviceTensor<float, 3> beta;
  Stream stream;

  explicit DeviceSteps(const Problem<T, D, R>& p)
      : on_host(p),
        q(p.q),
        k(p.k),
        v(p.v),
        o(p.output()),
        states(in_layout<S, F>(p.initial_state)),
        log_decay(p.log_decay),
        beta(p.beta) {}

  LinearAttentionStepArgs<T, D, R, F> args(Index token) const {
    const auto at = [&](auto x) { return slice_axis<1>(x, token); };
    LinearAttentionStepArgs<T, D, R, F> step{
        .q = at(q.view()), .k = at(k.view()), .v = at(v.view()), .o = at(o.view()), .state = states};
    if constexpr (D == DecayKind::per_head) step.log_decay = log_decay;
    if constexpr (D == DecayKind::per_token || D == DecayKind::per_key) step.log_decay = at(log_decay.view());
    if constexpr (R == RuleKind::delta) step.beta = at(beta.view());
    return step;
  }
  void run() const {
    for (Index t = 0; t < on_host.s.tokens; ++t) {
      const Status status = cuda::linear_attention_step(args(t), stream);
      CAPTURE(std::string(status.why));
      REQUIRE(status.ok());
    }
    stream.wait();
  }
};

/// Largest relative error of outputs and states, or 1e9 where a guard zone was written to.
template <AttentionForm F, class T, DecayKind D, RuleKind R>
double error_of(const Problem<T, D, R>& p) {
  const DeviceSteps<T, D, R, F> device(p);
  device.run();
  const DoubleProblem wide(p);
  Tensor<double, 4> want(p.output().extents()), want_state(p.state().extents());
  reference::linear_attention(wide.problem, want, want_state);
  if (!device.o.guards_intact() || !device.states.guards_intact()) return 1e9;
  const auto states = device.states.host();
  const double output = relative_error(device.o.host(), want),
               state = relative_error(key_major<F>(states.view()), want_state.view());
  return output > state || output != output ? output : state;
}

template <class T, int Rank>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return a.extents() == b.extents() && std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T)) == 0;
}

Shape shape_of(Index key_dim, Index value_dim, Index tokens = 4) {
  return {.batch = 3,
          .tokens = tokens,
          .query_heads = 2,
          .key_heads = 2,
          .value_heads = 2,
          .key_dim = key_dim,
          .value_dim = value_dim};
}

#define CHELA_MEMBERS                                                                                   \
  Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>,         \
      Member<DecayKind::per_token, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::additive>, \
      Member<DecayKind::none, RuleKind::delta>, Member<DecayKind::per_head, RuleKind::delta>,           \
      Member<DecayKind::per_token, RuleKind::delta>, Member<DecayKind::per_key, RuleKind::delta>

TEST_CASE_TEMPLATE("steps over any dims are the recurrence", M, CHELA_MEMBERS) {
  const Index dims[][2] = {{1, 1},     {16, 16},  {17, 33},   {64, 64}, {64, 128}, {128, 64},
                           {128, 128}, {100, 70}, {256, 200}, {3, 260}, {240, 17}};
  for (const auto& [key_dim, value_dim] : dims) {
    CAPTURE(key_dim);
    CAPTURE(value_dim);
    const Problem<bf16, M::decay, M::rule> p(shape_of(key_dim, value_dim));
    CHECK(error_of<LinearAttentionForm>(p) < tensor_core_tolerance<bf16>());
    CHECK(error_of<ValueMajor>(p) < tensor_core_tolerance<bf16>());
  }
}

TEST_CASE("in float, errors are float's") {
  const Problem<float, DecayKind::per_key, RuleKind::delta> p(shape_of(128, 100));
  CHECK(error_of<LinearAttentionForm>(p) < tolerance<float>(p.s.tokens * p.s.key_dim));
  CHECK(error_of<ValueMajor>(p) < tolerance<float>(p.s.tokens * p.s.key_dim));
}

TEST_CASE("states of 16 bits") {
  const Problem<bf16, DecayKind::per_token, RuleKind::additive> p(shape_of(128, 128, 1)), odd(shape_of(65, 37, 1));
  CHECK(error_of<HalfStates<StateLayout::key_major>>(p) < tensor_core_tolerance<bf16>());
  CHECK(error_of<HalfStates<StateLayout::value_major>>(p) < tensor_core_tolerance<bf16>());
  CHECK(error_of<HalfStates<StateLayout::key_major>>(odd) < tensor_core_tolerance<bf16>());
}

TEST_CASE_TEMPLATE("heads that share", M, Member<DecayKind::per_token, RuleKind::additive>,
                   Member<DecayKind::per_key, RuleKind::delta>) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}};
  for (const auto& [query, key, value] : heads) {
    const Shape shape{.batch = 2,
                      .tokens = 3,
                      .query_heads = query,
                      .key_heads = key,
                      .value_heads = value,
                      .key_dim = 64,
                      .value_dim = 40};
    CAPTURE(shape);
    const Problem<bf16, M::decay, M::rule> p(shape);
    CHECK(error_of<LinearAttentionForm>(p) < tensor_core_tolerance<bf16>());
    CHECK(error_of<ValueMajor>(p) < tensor_core_tolerance<bf16>());
  }
}

TEST_CASE("decays of any strength") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, minus_infinity}) {
    CAPTURE(g);
    Problem<bf16, DecayKind::per_key, RuleKind::additive> p(shape_of(64, 64));
    for (Index i = 0; i < p.log_decay.size(); ++i) p.log_decay.data()[i] = i % 3 == 0 ? 0.f : g;
    CHECK(error_of<LinearAttentionForm>(p) < tensor_core_tolerance<bf16>());
    CHECK(error_of<ValueMajor>(p) < tensor_core_tolerance<bf16>());
  }
}

TEST_CASE("slots of a pool, rows with room to spare, and a second run") {
  const Problem<bf16, DecayKind::per_token, RuleKind::delta> p(shape_of(64, 96));
  const DeviceSteps<bf16, DecayKind::per_token, RuleKind::delta, LinearAttentionForm> plain(p), again(p);
  plain.run(), again.run();
  CHECK(same_bits(plain.o.host(), again.o.host()));
  CHECK(same_bits(plain.states.host(), again.states.host()));

  constexpr Index spare = 3;  // odd, so that rows are no whole aligned units
  constexpr float untouched = 7;
  Tensor<float, 4> pool(std::array<Index, 4>{5, 2, 64, 96 + spare}, untouched);
  Tensor<std::int32_t, 1> slots(3);
  slots(0) = 4, slots(1) = 0, slots(2) = 2;
  for_each_index(p.initial_state.view(),
                 [&](auto b, auto h, auto k, auto v) { pool(slots(b), h, k, v) = p.initial_state(b, h, k, v); });
  const DeviceTensor<float, 4> states(pool);
  const DeviceTensor<std::int32_t, 1> device_slots(slots);
  const DeviceTensor<bf16, 4> o(p.output());
  for (Index t = 0; t < p.s.tokens; ++t) {
    auto args = plain.args(t);
    args.o = slice_axis<1>(o.view(), t);
    args.state = chela::run(states.view(), 3, 0, 96), args.state_slots = device_slots.view();
    REQUIRE(cuda::linear_attention_step(args, plain.stream).ok());
  }
  plain.stream.wait();
  CHECK(same_bits(o.host(), plain.o.host()));
  const auto want = plain.states.host(), got = states.host();
  for_each_index(want.view(), [&](auto b, auto h, auto k, auto v) { pool(slots(b), h, k, v) = want(b, h, k, v); });
  CHECK(same_bits(got, pool));
}

TEST_CASE("NaN stays in its sequence and head") {
  Problem<bf16, DecayKind::none, RuleKind::delta> p(shape_of(64, 64));
  const DeviceSteps<bf16, DecayKind::none, RuleKind::delta, LinearAttentionForm> clean(p);
  p.k(1, 0, 0, 5) = bf16(std::numeric_limits<float>::quiet_NaN());
  const DeviceSteps<bf16, DecayKind::none, RuleKind::delta, LinearAttentionForm> dirty(p);
  clean.run(), dirty.run();
  const auto want = clean.o.host(), got = dirty.o.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
    if (b != 1 || h != 0) same = same && float(got(b, t, h, i)) == float(want(b, t, h, i));
  });
  CHECK(same);
}

TEST_CASE("a graph replays the step") {
  const Problem<bf16, DecayKind::per_token, RuleKind::additive> p(shape_of(128, 128, 1));
  const DeviceSteps<bf16, DecayKind::per_token, RuleKind::additive, LinearAttentionForm> plain(p), replayed(p);
  plain.run();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require_cuda(cudaStreamBeginCapture(replayed.stream, cudaStreamCaptureModeGlobal));
  REQUIRE(cuda::linear_attention_step(replayed.args(0), replayed.stream).ok());
  require_cuda(cudaStreamEndCapture(replayed.stream, &graph));
  require_cuda(cudaGraphInstantiate(&executable, graph, 0));
  require_cuda(cudaGraphLaunch(executable, replayed.stream));
  replayed.stream.wait();
  CHECK(same_bits(plain.o.host(), replayed.o.host()));
  CHECK(same_bits(plain.states.host(), replayed.states.host()));
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
}

TEST_CASE("refusals name the argument, and no sequence is no work") {
  const Problem<bf16, DecayKind::none, RuleKind::additive> p(shape_of(64, 64)), wide(shape_of(257, 16));
  const DeviceSteps<bf16, DecayKind::none, RuleKind::additive, LinearAttentionForm> device(p), wide_device(wide);
  const auto refused = [](const auto& args, const char* word) {
    const Status s = cuda::linear_attention_step(args, nullptr);
    CAPTURE(std::string(s.why));
    CHECK(!s.ok());
    CHECK(std::string(s.why).find(word) != std::string::npos);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  };
  refused(wide_device.args(0), "key_dim");
  auto args = device.args(0);
  args.state = {};
  refused(args, "state");
  args = device.args(0), args.q.extents[2] -= 1;
  refused(args, "key_dim");
  args = device.args(0);
  args.q.extents[0] = args.k.extents[0] = args.v.extents[0] = args.o.extents[0] = args.state.extents[0] = 0;
  CHECK(cuda::linear_attention_step(args, nullptr).ok());
}

}  // namespace chela::test
