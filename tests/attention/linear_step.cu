// Decoding steps of linear attention on a GPU, all members, forms and element types: against the recurrence in double,
// and against each other.
#include <doctest/doctest.h>

#include <string>

#include "chela/cuda/attention/linear_step.cuh"
#include "chela/reference/gates.hpp"
#include "chela/reference/l2_norm.hpp"
#include "support/attention.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {
namespace {

using Bf16 = __nv_bfloat16;

struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};

template <class Form>
struct SixteenBitStates : Form {
  template <Element>
  using StateElement = Bf16;
};

template <class T_, DecayKind D, RuleKind R, class F = LinearAttentionForm>
struct Instance : Member<D, R> {
  using T = T_;
  using Form = F;
};

/// The inputs of a few tokens on the device, and views of one.
template <class I>
struct DeviceProblem {
  using T = typename I::T;
  using P = Problem<T, I::decay, I::rule>;
  using Args = LinearAttentionStepArgs<T, I::decay, I::rule, typename I::Form>;
  using State = StateOf<T, typename I::Form>;
  P p;
  DeviceTensor<T, 4> q, k, v, o;
  DeviceTensor<State, 4> state;
  DeviceTensor<float, log_decay_rank(I::decay)> log_decay;
  DeviceTensor<float, 3> beta;
  Stream stream;

  explicit DeviceProblem(const P& problem)
      : p(rounded(problem)),
        q(p.q),
        k(p.k),
        v(p.v),
        o(p.output()),
        state(in_layout(p.initial_state.view())),
        log_decay(p.log_decay),
        beta(p.beta) {}

  Args token(Index t) const {
    const auto one = [&](const auto& x) { return slice_axis<1>(x.view(), t); };
    Args args{.q = one(q), .k = one(k), .v = one(v), .o = one(o), .state = state};
    if constexpr (I::decay == DecayKind::per_head) args.log_decay = log_decay;
    if constexpr (I::decay == DecayKind::per_token || I::decay == DecayKind::per_key) args.log_decay = one(log_decay);
    if constexpr (I::rule == RuleKind::delta) args.beta = one(beta);
    return args;
  }
  void run() const {
    for (Index t = 0; t < p.s.tokens; ++t) {
      const Status status = cuda::linear_attention_step(token(t), stream);
      CAPTURE(std::string(status.why));
      REQUIRE(status.ok());
    }
    stream.wait();
  }
  /// States key-major, whatever the form.
  Tensor<State, 4> states() const {
    Tensor<State, 4> out(p.initial_state.extents());
    const auto got = state.host();
    const auto view = key_major<typename I::Form>(got.view());
    for_each_index(view, [&](auto... i) { out(i...) = view(i...); });
    return out;
  }
  bool guards_intact() const { return o.guards_intact() && state.guards_intact(); }

 private:
  /// What the state's type holds of the initial state is what the problem begins from.
  static P rounded(P problem) {
    for (float& x : problem.initial_state) x = static_cast<float>(State(x));
    return problem;
  }
  static Tensor<State, 4> in_layout(TensorView<const float, 4> states) {
    return converted<State>(key_major<typename I::Form>(states));
  }
};

template <class I>
void check_against_reference(const Problem<typename I::T, I::decay, I::rule>& problem) {
  const DeviceProblem<I> device(problem);
  device.run();
  const DoubleProblem wide(device.p);
  Tensor<double, 4> want(device.p.output().extents()), want_state(device.p.initial_state.extents());
  reference::linear_attention(wide.problem, want, want_state);
  CHECK(device.guards_intact());
  using State = typename DeviceProblem<I>::State;
  CHECK(relative_error(device.o.host(), want) < tolerance<typename I::T>(terms(problem.shape)));
  CHECK(relative_error(device.states(), want_state) < tolerance<State>(terms(problem.shape)));
}

constexpr auto additive = RuleKind::additive, delta = RuleKind::delta;
constexpr auto none = DecayKind::none, per_head = DecayKind::per_head, per_token = DecayKind::per_token,
               per_key = DecayKind::per_key;

#define CHELA_MEMBERS                                                                                          \
  Instance<Bf16, none, additive>, Instance<Bf16, per_head, additive>, Instance<Bf16, per_token, additive>,     \
      Instance<Bf16, per_key, additive>, Instance<Bf16, none, delta>, Instance<Bf16, per_head, delta>,         \
      Instance<Bf16, per_token, delta>, Instance<Bf16, per_key, delta>, Instance<__half, per_token, additive>, \
      Instance<__half, per_key, delta>, Instance<float, per_key, additive>, Instance<float, none, delta>,      \
      Instance<Bf16, per_key, additive, ValueMajor>, Instance<Bf16, per_key, delta, ValueMajor>,               \
      Instance<float, none, delta, ValueMajor>

TEST_CASE_TEMPLATE("any key and value dimension", I, CHELA_MEMBERS) {
  const Index dims[][2] = {{1, 1},    {3, 5},     {16, 16},  {31, 33},  {32, 32},   {33, 31},   {64, 128}, {100, 36},
                           {36, 100}, {128, 128}, {130, 65}, {256, 64}, {100, 257}, {257, 100}, {512, 12}};
  for (const auto& [key_dim, value_dim] : dims) {
    const Shape shape{.batch = 3,
                      .tokens = 3,
                      .query_heads = 2,
                      .key_heads = 2,
                      .value_heads = 2,
                      .key_dim = key_dim,
                      .value_dim = value_dim};
    CAPTURE(shape);
    check_against_reference<I>(Problem<typename I::T, I::decay, I::rule>(shape));
  }
}

TEST_CASE_TEMPLATE("heads that share", I, Instance<Bf16, per_key, additive>, Instance<Bf16, per_key, delta>,
                   Instance<Bf16, per_key, delta, ValueMajor>) {
  const Index heads[][3] = {{4, 2, 2}, {2, 4, 2}, {2, 1, 4}, {6, 1, 3}, {1, 3, 3}, {12, 2, 2}};
  for (const auto& [query, key, value] : heads) {
    const Shape shape{.batch = 2,
                      .tokens = 4,
                      .query_heads = query,
                      .key_heads = key,
                      .value_heads = value,
                      .key_dim = 64,
                      .value_dim = 48};
    CAPTURE(shape);
    check_against_reference<I>(Problem<Bf16, I::decay, I::rule>(shape));
  }
}

TEST_CASE_TEMPLATE("states of 16 bits are rounded once a step", I,
                   Instance<Bf16, per_key, additive, SixteenBitStates<LinearAttentionForm>>,
                   Instance<Bf16, per_token, delta, SixteenBitStates<ValueMajor>>,
                   Instance<float, none, additive, SixteenBitStates<LinearAttentionForm>>) {
  for (Index dim : {64, 37, 128})
    check_against_reference<I>(Problem<typename I::T, I::decay, I::rule>(
        {.batch = 2, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = dim, .value_dim = dim}));
}

TEST_CASE_TEMPLATE("decays of any strength", I, Instance<Bf16, per_key, additive>, Instance<float, per_key, delta>) {
  using P = Problem<typename I::T, I::decay, I::rule>;
  const Shape shape{.tokens = 12, .query_heads = 2, .key_heads = 2, .value_heads = 2, .key_dim = 40, .value_dim = 32};
  for (float g : {0.f, -1e-12f, -1.f, -20.f, -88.f, -1000.f, -std::numeric_limits<float>::infinity()})
    for (bool alternating : {false, true}) {
      CAPTURE(g);
      CAPTURE(alternating);
      P p(shape);
      for (Index i = 0; i < p.log_decay.size(); ++i)
        p.log_decay.data()[i] = alternating && i % 7 < 4 ? -0.01f * float(i % 3) : g;
      check_against_reference<I>(p);
    }
  for (Gates gates : {Gates::strong, Gates::mixed_with_resets}) check_against_reference<I>(P(shape, gates));
}

const Shape usual{
    .batch = 3, .tokens = 2, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 64, .value_dim = 96};

TEST_CASE_TEMPLATE("two runs give the same bits", I, CHELA_MEMBERS) {
  const Problem<typename I::T, I::decay, I::rule> p(usual);
  const DeviceProblem<I> first(p), second(p);
  first.run(), second.run();
  CHECK(same_bits(first.o.host(), second.o.host()));
  CHECK(same_bits(first.state.host(), second.state.host()));
}

TEST_CASE_TEMPLATE("states in slots of a pool, by 32- and 64-bit indices", I, Instance<Bf16, per_key, delta>,
                   Instance<Bf16, per_key, delta, ValueMajor>) {
  const Problem<Bf16, I::decay, I::rule> p(usual);
  const DeviceProblem<I> own(p), pooled(p);
  own.run();
  const auto initial = DeviceProblem<I>(p).state.host();
  const auto [batch, heads, rows, columns] = initial.extents();
  const std::int64_t slots[] = {5, 0, 3};
  Tensor<float, 4> pool(7, heads, rows, columns);
  fill_random(pool.view(), 17);
  Tensor<std::int32_t, 1> narrow(3);
  Tensor<std::int64_t, 1> wide(3);
  Tensor<float, 4> want_pool = pool;
  const auto own_states = own.state.host();
  for (Index b = 0; b < batch; ++b) narrow(b) = std::int32_t(slots[b]), wide(b) = slots[b];
  for_each_index(initial.view(), [&](auto b, auto... i) {
    pool(slots[b], i...) = initial(b, i...), want_pool(slots[b], i...) = own_states(b, i...);
  });
  const DeviceTensor<std::int32_t, 1> narrow_slots(narrow);
  const DeviceTensor<std::int64_t, 1> wide_slots(wide);
  for (const IndexView& view : {IndexView(narrow_slots.view()), IndexView(wide_slots.view())}) {
    const DeviceTensor<float, 4> states(pool);
    for (Index t = 0; t < usual.tokens; ++t) {
      auto args = pooled.token(t);
      args.state = states, args.state_slots = view;
      REQUIRE(cuda::linear_attention_step(args, pooled.stream).ok());
    }
    pooled.stream.wait();
    CHECK(same_bits(pooled.o.host(), own.o.host()));
    CHECK(same_bits(states.host(), want_pool));
  }
}

/// The same numbers with other strides: heads before sequences, dims apart, and states with room between their rows.
template <class I>
void check_strides(Index state_padding, Index state_step) {
  const Problem<Bf16, I::decay, I::rule> p(usual);
  const DeviceProblem<I> packed(p);
  packed.run();
  const auto spread = [](const auto& x, Index step, Index padding) {
    const auto [a, b, c, d] = x.extents();
    auto wide = x;
    wide = std::remove_reference_t<decltype(wide)>(std::array<Index, 4>{c, b, a, step * d + padding});
    for (auto& e : wide) e = 7.f;
    for_each_index(x.view(), [&](auto i, auto j, auto l, auto m) { wide(l, j, i, step * m) = x(i, j, l, m); });
    return wide;
  };
  const auto narrow = [](auto view, Index step, Index padding) {
    view = transposed(view, 0, 2);
    view.extents[3] = (view.extents[3] - padding) / step, view.strides[3] *= step;
    return view;
  };
  const DeviceTensor<Bf16, 4> q(spread(p.q, 2, 1)), k(spread(p.k, 3, 0)), v(spread(p.v, 1, 5)),
      o(spread(p.output(), 2, 3));
  const auto initial = DeviceProblem<I>(p).state.host();
  const DeviceTensor<float, 4> state(spread(initial, state_step, state_padding));
  for (Index t = 0; t < usual.tokens; ++t) {
    const auto token = [&](auto view) { return slice_axis<1>(view, t); };
    auto args = packed.token(t);
    args.q = token(narrow(q.view(), 2, 1)), args.k = token(narrow(k.view(), 3, 0));
    args.v = token(narrow(v.view(), 1, 5)), args.o = token(narrow(o.view(), 2, 3));
    args.state = narrow(state.view(), state_step, state_padding);
    const Status status = cuda::linear_attention_step(args, packed.stream);
    CAPTURE(std::string(status.why));
    REQUIRE(status.ok());
  }
  packed.stream.wait();
  // Rows of four give the packed states' very bits. Elsewhere lanes have other columns, and sums another order.
  const bool same = state_step == 1 && state_padding % 4 == 0;
  const double bound = same ? 1e-12 : tolerance<float>(terms(usual));
  CHECK(relative_error(state.host(), spread(packed.state.host(), state_step, state_padding)) < bound);
  CHECK(relative_error(o.host(), spread(packed.o.host(), 2, 3)) < tolerance<Bf16>(terms(usual)));
  CHECK(o.guards_intact());
  CHECK(state.guards_intact());
}

TEST_CASE_TEMPLATE("strides", I, Instance<Bf16, per_key, delta>, Instance<Bf16, per_key, delta, ValueMajor>) {
  check_strides<I>(0, 1), check_strides<I>(8, 1), check_strides<I>(3, 1), check_strides<I>(1, 2);
}

TEST_CASE("broadcast keys, and states read backwards") {
  using I = Instance<float, none, additive>;
  const Problem<float, none, additive> p(usual);
  Problem<float, none, additive> same = p;
  for_each_index(p.k.view(), [&](auto b, auto t, auto h, auto i) { same.k(b, t, h, i) = p.k(b, t, 0, i); });
  const DeviceProblem<I> broadcast(p), plain(same);
  plain.run();
  for (Index t = 0; t < usual.tokens; ++t) {
    auto args = broadcast.token(t);
    args.k.strides[1] = 0;
    REQUIRE(cuda::linear_attention_step(args, broadcast.stream).ok());
  }
  broadcast.stream.wait();
  CHECK(same_bits(broadcast.o.host(), plain.o.host()));
  CHECK(same_bits(broadcast.state.host(), plain.state.host()));

  const DeviceProblem<I> turned(p);
  const auto initial = p.initial_state;
  Tensor<float, 4> reversed_state(initial.extents());
  const auto backwards = reversed(reversed(reversed_state.view(), 2), 3);
  for_each_index(initial.view(), [&](auto... i) { backwards(i...) = initial(i...); });
  const DeviceTensor<float, 4> state(reversed_state);
  const DeviceProblem<I> forwards(p);
  forwards.run();
  for (Index t = 0; t < usual.tokens; ++t) {
    auto args = turned.token(t);
    args.state = reversed(reversed(state.view(), 2), 3);
    REQUIRE(cuda::linear_attention_step(args, turned.stream).ok());
  }
  turned.stream.wait();
  CHECK(relative_error(turned.o.host(), forwards.o.host()) < tolerance<float>(terms(usual)));
}

TEST_CASE_TEMPLATE("NaN stays in its sequence and head", I, Instance<Bf16, per_key, additive>,
                   Instance<Bf16, per_key, delta, ValueMajor>) {
  Problem<Bf16, I::decay, I::rule> p(usual);
  const DeviceProblem<I> clean(p);
  clean.run();
  const Bf16 nan(std::numeric_limits<float>::quiet_NaN());
  p.q(1, 0, 0, 5) = nan, p.k(1, 0, 0, 63) = nan, p.v(1, 1, 0, 7) = nan;
  const DeviceProblem<I> dirty(p);
  dirty.run();
  const auto got = dirty.o.host(), want = clean.o.host();
  const auto got_state = dirty.state.host(), want_state = clean.state.host();
  bool same = true;
  for_each_index(want.view(), [&](auto b, auto t, auto h, auto i) {
    if (b != 1 || h > 1) same = same && float(got(b, t, h, i)) == float(want(b, t, h, i));
  });
  for_each_index(want_state.view(), [&](auto b, auto h, auto... i) {
    if (b != 1 || h > 0) same = same && got_state(b, h, i...) == want_state(b, h, i...);
  });
  CHECK(same);
}

struct GatedLinearAttention : LinearAttentionForm {
  using LogDecayGate = LogSigmoidGate<16>;
};
struct GatedDeltaNet : LinearAttentionForm {
  using LogDecayGate = SoftplusGate;
  using BetaRate = SigmoidBeta<1>;
  static constexpr bool unit_queries_and_keys = true;
};
struct KimiDeltaAttention : GatedDeltaNet {
  using LogDecayGate = BoundedGate<std::ratio<-5>>;
};

template <DecayKind D, RuleKind R, class F, reference::Gate G>
struct Raw : Member<D, R> {
  using Form = F;
  static constexpr reference::Gate gate = G;
};

TEST_CASE_TEMPLATE("gates and unit lengths inside the step", I,
                   Raw<per_key, additive, GatedLinearAttention, reference::Gate::log_sigmoid>,
                   Raw<per_token, delta, GatedDeltaNet, reference::Gate::softplus>,
                   Raw<per_key, delta, KimiDeltaAttention, reference::Gate::bounded>) {
  using F = typename I::Form;
  constexpr bool parameters = F::LogDecayGate::takes_parameters;
  for (float size : {1.f, 1e30f, 1e-25f}) {  // of queries and keys: their squares leave float's range
    const Shape shape{.batch = 2, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 72, .value_dim = 40};
    CAPTURE(size);
    if (size != 1.f && !F::unit_queries_and_keys) continue;
    Problem<Bf16, I::decay, I::rule> p(shape);
    for (Bf16& x : p.q) x = Bf16(size * float(x));
    for (Bf16& x : p.k) x = Bf16(size * float(x));
    Tensor<Bf16, log_decay_rank(I::decay)> logits(p.log_decay.extents());
    Tensor<Bf16, 3> beta(2, 1, 2);
    Tensor<float, 1> log_rate(2);
    Tensor<float, 2> bias(2, I::decay == DecayKind::per_key ? 72 : 1);
    fill_random(logits.view(), 31, -3, 3), fill_random(beta.view(), 32, -3, 3);
    fill_random(log_rate.view(), 33, -1, 1), fill_random(bias.view(), 34);

    DoubleProblem wide(p);
    const auto wide_logits = converted<double>(spread_log_decay(logits.view(), p.s));
    const auto wide_rate = converted<double>(log_rate.view());
    TensorView<const float, 2> keys_bias = bias.view();
    keys_bias.extents[1] = 72;
    if (I::decay != DecayKind::per_key) keys_bias.strides[1] = 0;
    const auto wide_bias = converted<double>(keys_bias);
    reference::DecayGateProblem gate{
        .gate = I::gate, .constant = I::gate == reference::Gate::log_sigmoid ? 16. : -5., .logits = wide_logits};
    if (parameters) gate.log_rate = wide_rate, gate.bias = wide_bias;
    reference::decay_gate(gate, wide.log_decay);
    const Tensor<double, 4> q = wide.q, k = wide.k;
    if (F::unit_queries_and_keys) reference::l2_norm(q, 1e-6, wide.q), reference::l2_norm(k, 1e-6, wide.k);
    if (I::rule == delta)
      for_each_index(beta.view(), [&](auto... i) { wide.beta(i...) = 1 / (1 + std::exp(-double(float(beta(i...))))); });
    Tensor<double, 4> want(p.output().extents()), want_state(p.initial_state.extents());
    reference::linear_attention(wide.problem, want, want_state);

    const DeviceTensor<Bf16, 4> device_q(p.q), device_k(p.k), device_v(p.v), o(p.output());
    const DeviceTensor<float, 4> state(p.initial_state);
    const DeviceTensor<Bf16, log_decay_rank(I::decay)> device_logits(logits);
    const DeviceTensor<Bf16, 3> device_beta(beta);
    const DeviceTensor<float, 1> device_rate(log_rate);
    const DeviceTensor<float, 2> device_bias(bias);
    const Stream stream;
    const auto token = [](const auto& x) { return slice_axis<1>(x.view(), 0); };
    LinearAttentionStepArgs<Bf16, I::decay, I::rule, F> args{.q = token(device_q),
                                                             .k = token(device_k),
                                                             .v = token(device_v),
                                                             .o = token(o),
                                                             .state = state,
                                                             .log_decay = token(device_logits)};
    if constexpr (I::rule == delta) args.beta = token(device_beta);
    if constexpr (parameters) {
      args.gate_log_rate = device_rate;
      if constexpr (I::decay == DecayKind::per_key)
        args.gate_bias = device_bias;
      else
        args.gate_bias = slice_axis<1>(device_bias.view(), 0);
    }
    const Status status = cuda::linear_attention_step(args, stream);
    CAPTURE(std::string(status.why));
    REQUIRE(status.ok());
    stream.wait();
    CHECK(relative_error(o.host(), want) < tolerance<Bf16>(terms(shape)));
    CHECK(relative_error(state.host(), want_state) < tolerance<float>(terms(shape)));
  }
}

TEST_CASE("a graph replays the step, each time from the state it left") {
  using I = Instance<Bf16, per_token, additive>;
  const Problem<Bf16, per_token, additive> p(usual);
  const DeviceProblem<I> plain(p), replayed(p);
  for (int i = 0; i < 3; ++i) REQUIRE(cuda::linear_attention_step(plain.token(0), plain.stream).ok());
  plain.stream.wait();
  const Graph graph(replayed.stream,
                    [&] { REQUIRE(cuda::linear_attention_step(replayed.token(0), replayed.stream).ok()); });
  for (int i = 0; i < 3; ++i) graph.launch();
  replayed.stream.wait();
  CHECK(same_bits(plain.o.host(), replayed.o.host()));
  CHECK(same_bits(plain.state.host(), replayed.state.host()));
}

TEST_CASE("refusals name the argument; nothing to do is no error") {
  using I = Instance<Bf16, per_token, delta>;
  const DeviceProblem<I> device{Problem<Bf16, per_token, delta>(usual)};
  const auto refused = [](const auto& args, const char* word) {
    const Status s = cuda::linear_attention_step(args, nullptr);
    CAPTURE(std::string(s.why));
    CHECK(!s.ok());
    CHECK(std::string(s.why).find(word) != std::string::npos);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  };
  const std::int32_t slots[2] = {};
  auto args = device.token(0);
  args.state = {};
  refused(args, "state");
  args = device.token(0), args.state.extents[2] -= 1;
  refused(args, "state");
  args = device.token(0), args.beta = {};
  refused(args, "beta");
  args = device.token(0), args.log_decay.extents[1] += 1;
  refused(args, "log_decay");
  args = device.token(0), args.o.strides[1] = 0;
  refused(args, "o must");
  args = device.token(0), args.state_slots = IndexView(slots, 2);
  refused(args, "state_slots");
  args = device.token(0), args.q.extents[2] = args.k.extents[2] = args.state.extents[2] = 513;
  refused(args, "key_dim");
  args = device.token(0);
  args.q.extents[0] = args.k.extents[0] = args.v.extents[0] = args.o.extents[0] = args.state.extents[0] = 0;
  args.log_decay.extents[0] = args.beta.extents[0] = 0;
  CHECK(cuda::linear_attention_step(args, nullptr).ok());
}

#undef CHELA_MEMBERS

}  // namespace
}  // namespace chela::test
