#include "chela/cpu/attention/gates.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <utility>

#include "chela/cpu/element.hpp"
#include "chela/reference/gates.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct Shape {
  Index batch = 1, tokens = 1, heads = 1, keys = 1;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.batch << " T" << s.tokens << " H" << s.heads << " K" << s.keys;
}

/// A gate as the reference knows it.
template <class G>
constexpr std::pair<reference::Gate, double> named = {reference::Gate::given, 1.0};
template <int N>
constexpr std::pair<reference::Gate, double> named<LogSigmoidGate<N>> = {reference::Gate::log_sigmoid, double(N)};
template <>
constexpr std::pair<reference::Gate, double> named<SoftplusGate> = {reference::Gate::softplus, 1.0};
template <class L>
constexpr std::pair<reference::Gate, double> named<BoundedGate<L>> = {reference::Gate::bounded,
                                                                      BoundedGate<L>::lower_bound};

/// Element type, gate and rank of a pass.
template <class T_, class G_, int R>
struct Pass {
  using T = T_;
  using A = Accumulator<T>;
  using G = G_;
  static constexpr int rank = R;

  /// [batch, token, head, key] for a decay per key, else the keys, one, are dropped.
  template <class X>
  static TensorView<X, R> ranked(TensorView<X, 4> view) {
    if constexpr (R == 4)
      return view;
    else
      return slice_axis<3>(view, 0);
  }
  template <class X>
  static TensorView<X, R - 2> ranked(TensorView<X, 2> view) {
    if constexpr (R == 4)
      return view;
    else
      return slice_axis<1>(view, 0);
  }
};

/// Random inputs, and outputs of NaN, for both directions of one problem.
template <class P>
struct Problem {
  using T = typename P::T;
  using A = typename P::A;
  Tensor<T, 4> logits, grad_logits;
  Tensor<A, 4> grad_log_decay, log_decay;
  Tensor<A, 1> log_rate, grad_log_rate;
  Tensor<A, 2> bias, grad_bias;

  explicit Problem(const Shape& s, double size = 3)
      : logits(random_tensor<T>(1, s.batch, s.tokens, s.heads, s.keys)),
        grad_logits(nan_tensor<T>(s.batch, s.tokens, s.heads, s.keys)),
        grad_log_decay(random_tensor<A>(2, s.batch, s.tokens, s.heads, s.keys)),
        log_decay(nan_tensor<A>(s.batch, s.tokens, s.heads, s.keys)),
        log_rate(random_tensor<A>(3, s.heads)),
        grad_log_rate(nan_tensor<A>(s.heads)),
        bias(random_tensor<A>(4, s.heads, s.keys)),
        grad_bias(nan_tensor<A>(s.heads, s.keys)) {
    fill_random(logits.view(), 1, -size, size);
  }

  DecayGateArgs<T, typename P::G, P::rank> args() {
    DecayGateArgs<T, typename P::G, P::rank> a{.logits = P::ranked(std::as_const(logits).view()),
                                               .log_decay = P::ranked(log_decay.view())};
    if (P::G::takes_parameters) a.log_rate = log_rate, a.bias = P::ranked(std::as_const(bias).view());
    return a;
  }

  DecayGateBackwardArgs<T, typename P::G, P::rank> backward_args() {
    DecayGateBackwardArgs<T, typename P::G, P::rank> a{
        .logits = P::ranked(std::as_const(logits).view()),
        .grad_log_decay = P::ranked(std::as_const(grad_log_decay).view()),
        .grad_logits = P::ranked(grad_logits.view())};
    if (P::G::takes_parameters) {
      a.log_rate = log_rate, a.bias = P::ranked(std::as_const(bias).view());
      a.grad_log_rate = grad_log_rate, a.grad_bias = P::ranked(grad_bias.view());
    }
    return a;
  }
};

/// The same problem in double for the reference.
struct DoubleProblem {
  Tensor<double, 4> logits, grad_log_decay;
  Tensor<double, 1> log_rate;
  Tensor<double, 2> bias;
  reference::DecayGateProblem problem;

  template <class P>
  explicit DoubleProblem(const Problem<P>& p)
      : logits(converted<double>(p.logits.view())),
        grad_log_decay(converted<double>(p.grad_log_decay.view())),
        log_rate(converted<double>(p.log_rate.view())),
        bias(converted<double>(p.bias.view())),
        problem{.gate = named<typename P::G>.first, .constant = named<typename P::G>.second, .logits = logits} {
    if (P::G::takes_parameters) problem.log_rate = log_rate, problem.bias = bias;
  }
};

const Shape shapes[] = {
    {.tokens = 0, .heads = 2, .keys = 3},
    {.tokens = 1},
    {.batch = 2, .tokens = 3, .heads = 15},
    {.tokens = 3, .heads = 16, .keys = 1},
    {.tokens = 5, .heads = 17, .keys = 1},
    {.batch = 2, .tokens = 63, .heads = 3, .keys = 5},
    {.tokens = 64, .heads = 4, .keys = 4},
    {.tokens = 65, .heads = 2, .keys = 7},
    {.batch = 3, .tokens = 100, .heads = 4, .keys = 64},
};

template <class P>
void check_pass(const Shape& s) {
  CAPTURE(s);
  Problem<P> p(s);
  const DoubleProblem d(p);
  using T = typename P::T;
  using A = typename P::A;
  REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
  auto want = converted<double>(p.log_decay.view());
  reference::decay_gate(d.problem, want);
  CHECK(relative_error(p.log_decay, want) < tolerance<A>(4));

  REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());
  auto want_logits = want;
  Tensor<double, 1> want_rate(s.heads);
  Tensor<double, 2> want_bias(s.heads, s.keys);
  reference::decay_gate_backward(d.problem, d.grad_log_decay, {want_logits, want_rate, want_bias});
  CHECK(relative_error(p.grad_logits, want_logits) < tolerance<T>(4));
  if (!P::G::takes_parameters) return;
  CHECK(relative_error(p.grad_log_rate, want_rate) < tolerance<A>(s.batch * s.tokens * s.keys));
  CHECK(relative_error(p.grad_bias, want_bias) < tolerance<A>(s.batch * s.tokens));
}

template <class P>
void check_all() {
  for (const Shape& s : shapes)
    if (P::rank == 4 || s.keys == 1) check_pass<P>(s);
}

/// A gate of a user's own that knows numbers only: log(1 - x^2 / (1 + x^2)).
struct ScalarGate {
  static constexpr bool takes_parameters = false;
  template <std::floating_point A>
  static A log_decay(A x, A) {
    return -std::log1p(x * x);
  }
  template <std::floating_point A>
  static GateDerivatives<A> derivatives(A x, A) {
    return {-2 * x / (1 + x * x), A(0)};
  }
};

template <class X>
bool same_bits(const X& a, const X& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double largest = std::numeric_limits<float>::max();
const double extremes[] = {-infinity, -largest, -1e30, -1e4, -745, -104, -88, -30, -1,   -1e-4,   -1e-30,  0,
                           1e-30,     1e-4,     1,     30,   88,   104,  745, 1e4, 1e30, largest, infinity};
constexpr Index extreme_count = std::size(extremes);

/// The gate at every extreme logit, one head and one rate for all: log-decays and gradients for gradients of 1.
template <class A, class G>
std::pair<Tensor<A, 3>, Tensor<A, 3>> at_extremes(double log_rate_value) {
  Tensor<A, 3> logits(1, extreme_count, 1), log_decay(logits.extents()), ones(logits.extents(), A(1)),
      grad(logits.extents());
  for (Index i = 0; i < extreme_count; ++i) logits(0, i, 0) = A(extremes[i]);
  const Tensor<A, 1> log_rate({1}, A(log_rate_value));
  TensorView<const A, 1> rate;
  if (G::takes_parameters) rate = log_rate;
  REQUIRE(
      cpu::decay_gate(DecayGateArgs<A, G>{.logits = logits, .log_rate = rate, .log_decay = log_decay}, SerialExecutor{})
          .ok());
  REQUIRE(
      cpu::decay_gate_backward(
          DecayGateBackwardArgs<A, G>{.logits = logits, .log_rate = rate, .grad_log_decay = ones, .grad_logits = grad},
          SerialExecutor{})
          .ok());
  return {std::move(log_decay), std::move(grad)};
}

}  // namespace

static_assert(DecayGate<GivenLogDecay> && DecayGate<LogSigmoidGate<>> && DecayGate<SoftplusGate>);
static_assert(DecayGate<BoundedGate<>> && DecayGate<ScalarGate> && !DecayGate<GivenBeta>);

TEST_CASE_TEMPLATE("decay gates match the reference, forward and backward", P, Pass<float, GivenLogDecay, 3>,
                   Pass<float, LogSigmoidGate<>, 4>, Pass<float, SoftplusGate, 3>, Pass<float, SoftplusGate, 4>,
                   Pass<float, BoundedGate<>, 4>, Pass<float, ScalarGate, 3>, Pass<double, LogSigmoidGate<1>, 3>,
                   Pass<double, SoftplusGate, 4>, Pass<double, BoundedGate<std::ratio<-5, 2>>, 3>,
                   Pass<Eigen::bfloat16, SoftplusGate, 4>, Pass<Eigen::bfloat16, LogSigmoidGate<>, 3>,
                   Pass<Eigen::half, BoundedGate<>, 3>, Pass<Eigen::half, GivenLogDecay, 4>) {
  if constexpr (!std::is_same_v<typename P::G, ScalarGate>) {
    check_all<P>();
  } else {  // the reference does not know it: against the gate itself
    Problem<P> p({.tokens = 70, .heads = 3});
    REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
    REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());
    for_each_index(p.logits.view(), [&](auto... i) {
      const float x = p.logits(i...);
      CHECK(p.log_decay(i...) == doctest::Approx(ScalarGate::log_decay(x, 1.f)).epsilon(1e-6));
      const float want = p.grad_log_decay(i...) * ScalarGate::derivatives(x, 1.f).by_logit;
      CHECK(p.grad_logits(i...) == doctest::Approx(want).epsilon(1e-6));
    });
  }
}

TEST_CASE_TEMPLATE("gradients agree with central differences", P, Pass<double, LogSigmoidGate<>, 3>,
                   Pass<double, SoftplusGate, 3>, Pass<double, SoftplusGate, 4>, Pass<double, BoundedGate<>, 3>,
                   Pass<double, BoundedGate<>, 4>) {
  Problem<P> p({.batch = 2, .tokens = 3, .heads = 3, .keys = P::rank == 4 ? 4 : 1});
  DoubleProblem d(p);
  REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());
  const auto loss = [&] {
    REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
    return weighted_sum<4>(p.log_decay, p.grad_log_decay);
  };
  CHECK(gradient_error<4>(loss, p.logits, p.grad_logits) < gradient_tolerance);
  const auto reference_loss = [&] {
    reference::decay_gate(d.problem, p.log_decay);
    return weighted_sum<4>(p.log_decay, p.grad_log_decay);
  };
  Tensor<double, 4> logits(p.logits.extents());
  Tensor<double, 1> log_rate(p.log_rate.extents());
  Tensor<double, 2> bias(p.bias.extents());
  reference::decay_gate_backward(d.problem, d.grad_log_decay, {logits, log_rate, bias});
  CHECK(gradient_error<4>(reference_loss, d.logits, logits) < gradient_tolerance);
  if (!P::G::takes_parameters) return;
  CHECK(gradient_error<1>(loss, p.log_rate, p.grad_log_rate) < gradient_tolerance);
  CHECK(gradient_error<2>(loss, p.bias, p.grad_bias) < gradient_tolerance);
  CHECK(gradient_error<1>(reference_loss, d.log_rate, log_rate) < gradient_tolerance);
  CHECK(gradient_error<2>(reference_loss, d.bias, bias) < gradient_tolerance);
}

TEST_CASE_TEMPLATE("no logit and no rate gives NaN or growth", G, LogSigmoidGate<>, SoftplusGate, BoundedGate<>,
                   BoundedGate<std::ratio<-1, 3>>) {
  for (double log_rate : {0.0, 1e4, -1e4, 88.0, -104.0, infinity, -infinity}) {
    CAPTURE(log_rate);
    const auto check = [&](auto number) {
      using A = decltype(number);
      const auto [log_decay, grad] = at_extremes<A, G>(log_rate);
      const A rate = std::exp(A(log_rate));
      for (Index i = 0; i < extreme_count; ++i) {
        CAPTURE(extremes[i]);
        CHECK(log_decay(0, i, 0) <= 0);
        CHECK(!std::isnan(grad(0, i, 0)));
        const A one = G::log_decay(A(extremes[i]), rate);  // on one number, as a device does
        CHECK(one <= 0);
        CHECK(!std::isnan(G::derivatives(A(extremes[i]), rate).by_logit));
        CHECK(!std::isnan(G::derivatives(A(extremes[i]), rate).by_log_rate));
        if (std::fpclassify(std::exp(-std::abs(A(extremes[i])))) == FP_SUBNORMAL) continue;  // zero to a register
        if (std::isinf(one))
          CHECK(log_decay(0, i, 0) == one);
        else
          CHECK(log_decay(0, i, 0) == doctest::Approx(one).epsilon(1e-5));
      }
    };
    check(float()), check(double());
  }
}

TEST_CASE("gates reach their limits") {
  const auto [log_sigmoid, log_sigmoid_grad] = at_extremes<float, LogSigmoidGate<>>(0);
  const auto [softplus, softplus_grad] = at_extremes<float, SoftplusGate>(0);
  const auto [bounded, bounded_grad] = at_extremes<float, BoundedGate<>>(0);
  const Index last = extreme_count - 1;
  CHECK(log_sigmoid(0, 0, 0) == -infinity);
  CHECK(log_sigmoid(0, last, 0) == 0);
  CHECK(log_sigmoid_grad(0, 0, 0) == 1 / 16.f);
  CHECK(softplus(0, 0, 0) == 0);
  CHECK(softplus(0, last, 0) == -infinity);
  CHECK(softplus_grad(0, last, 0) == -1);
  CHECK(bounded(0, 0, 0) == 0);
  CHECK(bounded(0, last, 0) == -5);
  CHECK(bounded_grad(0, last, 0) == 0);
}

TEST_CASE_TEMPLATE("a decay close to 1 keeps its digits", A, float, double) {
  const double close = 32 * double(std::numeric_limits<A>::epsilon());
  for (double x : {5.0, 15.0, 30.0, 60.0, 85.0}) {
    CAPTURE(x);
    // On one number and on registers: the head count decides nothing, so one head in a row of sixteen slots.
    const Tensor<A, 3> up({1, 1, 1}, A(x)), down({1, 1, 1}, A(-x));
    Tensor<A, 3> g(1, 1, 1);
    const auto run = [&]<class G>(const Tensor<A, 3>& logits, G) {
      REQUIRE(cpu::decay_gate(DecayGateArgs<A, G>{.logits = logits, .log_decay = g}, SerialExecutor{}).ok());
      return double(g(0, 0, 0));
    };
    const double tail = std::log1p(std::exp(-x));
    CHECK(run(up, LogSigmoidGate<>{}) == doctest::Approx(-tail / 16).epsilon(close));
    CHECK(run(down, SoftplusGate{}) == doctest::Approx(-tail).epsilon(close));
    CHECK(run(down, BoundedGate<>{}) == doctest::Approx(-5 * std::exp(-x) / (1 + std::exp(-x))).epsilon(close));
    CHECK(double(LogSigmoidGate<>::log_decay(A(x), A(1))) == doctest::Approx(-tail / 16).epsilon(close));
  }
}

TEST_CASE("NaN stays where it is") {
  Problem<Pass<float, SoftplusGate, 4>> p({.tokens = 3, .heads = 2, .keys = 20});
  p.logits(0, 1, 1, 7) = std::numeric_limits<float>::quiet_NaN();
  REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
  REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());
  for_each_index(p.log_decay.view(), [&](Index b, Index t, Index h, Index i) {
    const bool here = t == 1 && h == 1 && i == 7;
    CHECK(std::isnan(p.log_decay(b, t, h, i)) == here);
    CHECK(std::isnan(p.grad_logits(b, t, h, i)) == here);
    CHECK(std::isnan(p.grad_bias(h, i)) == (h == 1 && i == 7));
  });
  CHECK(!std::isnan(p.grad_log_rate(0)));
}

TEST_CASE("a reset that no gradient reaches leaves the gradients finite") {
  Problem<Pass<float, SoftplusGate, 3>> p({.tokens = 4, .heads = 2});
  p.logits(0, 2, 1, 0) = float(infinity);
  p.grad_log_decay(0, 2, 1, 0) = 0;
  REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
  CHECK(p.log_decay(0, 2, 1, 0) == -infinity);
  REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());
  for (float g : p.grad_log_rate) CHECK(std::isfinite(g));
  for (float g : p.grad_bias) CHECK(std::isfinite(g));
}

TEST_CASE("absent parameters are a rate of 1 and no bias, and absent gradients are not needed by the others") {
  using P = Pass<float, BoundedGate<>, 4>;
  Problem<P> p({.tokens = 70, .heads = 3, .keys = 5});
  p.log_rate.fill(0), p.bias.fill(0);
  auto args = p.args();
  REQUIRE(cpu::decay_gate(args, SerialExecutor{}).ok());
  const auto with = p.log_decay;
  args.log_rate = {}, args.bias = {};
  REQUIRE(cpu::decay_gate(args, SerialExecutor{}).ok());
  CHECK(same_bits(p.log_decay, with));

  auto back = p.backward_args();
  REQUIRE(cpu::decay_gate_backward(back, SerialExecutor{}).ok());
  const auto logits = p.grad_logits;
  const auto log_rate = p.grad_log_rate;
  const auto bias = p.grad_bias;
  p.grad_logits.fill(7), p.grad_log_rate.fill(7), p.grad_bias.fill(7);
  back.grad_logits = {}, back.grad_bias = {};
  REQUIRE(cpu::decay_gate_backward(back, SerialExecutor{}).ok());
  CHECK(same_bits(p.grad_log_rate, log_rate));
  back = p.backward_args(), back.grad_log_rate = {};
  REQUIRE(cpu::decay_gate_backward(back, SerialExecutor{}).ok());
  CHECK(same_bits(p.grad_logits, logits));
  CHECK(same_bits(p.grad_bias, bias));
}

TEST_CASE("the answer does not depend on the number of workers") {
  struct ManyWorkers : SerialExecutor {
    int workers() const { return 16; }
  };
  const auto check = [](auto pass, const Shape& s) {
    using P = decltype(pass);
    Problem<P> one(s), many(s), threads(s);
    REQUIRE(cpu::decay_gate(one.args(), SerialExecutor{}).ok());
    REQUIRE(cpu::decay_gate_backward(one.backward_args(), SerialExecutor{}).ok());
    REQUIRE(cpu::decay_gate(many.args(), ManyWorkers{}).ok());
    REQUIRE(cpu::decay_gate_backward(many.backward_args(), ManyWorkers{}).ok());
    REQUIRE(cpu::decay_gate(threads.args(), DefaultExecutor{}).ok());
    REQUIRE(cpu::decay_gate_backward(threads.backward_args(), DefaultExecutor{}).ok());
    for (const auto* other : {&many, &threads}) {
      CHECK(same_bits(other->log_decay, one.log_decay));
      CHECK(same_bits(other->grad_logits, one.grad_logits));
      CHECK(same_bits(other->grad_log_rate, one.grad_log_rate));
      CHECK(same_bits(other->grad_bias, one.grad_bias));
    }
  };
  check(Pass<float, SoftplusGate, 4>{}, {.batch = 2, .tokens = 200, .heads = 4, .keys = 72});
  check(Pass<float, BoundedGate<>, 3>{}, {.batch = 2, .tokens = 9000, .heads = 3});
}

TEST_CASE("strides are respected, memory between rows is left alone, and working in place changes nothing") {
  using P = Pass<float, SoftplusGate, 4>;
  Problem<P> p({.batch = 2, .tokens = 19, .heads = 3, .keys = 10});
  REQUIRE(cpu::decay_gate(p.args(), SerialExecutor{}).ok());
  REQUIRE(cpu::decay_gate_backward(p.backward_args(), SerialExecutor{}).ok());

  // Inputs and parameters stored in another order, backwards in time; outputs inside a wider buffer.
  const auto scattered = [](const Tensor<float, 4>& x) {
    const auto [b, t, h, d] = x.extents();
    return Tensor<float, 4>(b, h, d, t);
  };
  const auto as_tokens = [](auto view) { return reversed(transposed(transposed(view, 1, 3), 2, 3), 1); };
  auto logits = scattered(p.logits), grad = scattered(p.logits);
  const auto from = as_tokens(logits.view()), grad_from = as_tokens(grad.view());
  for_each_index(from, [&](auto... i) { from(i...) = p.logits(i...), grad_from(i...) = p.grad_log_decay(i...); });
  Tensor<float, 2> turned_bias(10, 3), turned_grad(10, 3), spaced_rate(3, 4), spaced_grad({3, 4}, 7.f);
  for (Index h = 0; h < 3; ++h) {
    spaced_rate(h, 1) = p.log_rate(h);
    for (Index i = 0; i < 10; ++i) turned_bias(i, h) = p.bias(h, i);
  }
  const auto bias = transposed(turned_bias.view(), 0, 1);
  const auto rate = slice_axis<1>(spaced_rate.view(), 1);
  Tensor<float, 4> wide({2, 19, 5, 30}, -7.f);
  const auto inside = run(run(wide.view(), 2, 1, 3), 3, 4, 10);

  using G = SoftplusGate;
  REQUIRE(
      cpu::decay_gate(DecayGateArgs<float, G, 4>{.logits = from, .log_rate = rate, .bias = bias, .log_decay = inside},
                      SerialExecutor{})
          .ok());
  CHECK(relative_error(inside, p.log_decay.view()) == 0);
  REQUIRE(
      cpu::decay_gate_backward(DecayGateBackwardArgs<float, G, 4>{.logits = from,
                                                                  .log_rate = rate,
                                                                  .bias = bias,
                                                                  .grad_log_decay = grad_from,
                                                                  .grad_logits = inside,
                                                                  .grad_log_rate = slice_axis<1>(spaced_grad.view(), 1),
                                                                  .grad_bias = transposed(turned_grad.view(), 0, 1)},
                               SerialExecutor{})
          .ok());
  CHECK(relative_error(inside, p.grad_logits.view()) == 0);
  CHECK(relative_error(slice_axis<1>(spaced_grad.view(), 1), p.grad_log_rate.view()) == 0);
  CHECK(relative_error(transposed(turned_grad.view(), 0, 1), p.grad_bias.view()) == 0);
  CHECK(spaced_grad(0, 0) == 7);
  Index untouched = 0;
  for (float entry : wide) untouched += entry == -7.f;
  CHECK(untouched == wide.size() - inside.size());

  auto back = p.backward_args();
  auto grad_in_place = p.grad_log_decay;
  back.grad_log_decay = back.grad_logits = grad_in_place;
  const auto grad_logits = p.grad_logits;
  REQUIRE(cpu::decay_gate_backward(back, SerialExecutor{}).ok());
  CHECK(same_bits(grad_in_place, grad_logits));
  auto args = p.args();
  auto in_place = p.logits;
  args.logits = args.log_decay = in_place;
  REQUIRE(cpu::decay_gate(args, SerialExecutor{}).ok());
  CHECK(same_bits(in_place, p.log_decay));
}

TEST_CASE("a broadcast logit serves every head, per token or per key") {
  Problem<Pass<float, BoundedGate<>, 4>> p({.tokens = 4, .heads = 3, .keys = 6});
  auto args = p.args();
  args.logits.strides[2] = 0;
  REQUIRE(cpu::decay_gate(args, SerialExecutor{}).ok());
  for_each_index(p.log_decay.view(), [&](Index b, Index t, Index h, Index i) {
    const float want = BoundedGate<>::log_decay(p.logits(b, t, 0, i) + p.bias(h, i), std::exp(p.log_rate(h)));
    CHECK(p.log_decay(b, t, h, i) == doctest::Approx(want).epsilon(1e-5));
  });
}

TEST_CASE_TEMPLATE("arguments that do not fit are refused by name", P, Pass<float, SoftplusGate, 3>,
                   Pass<float, SoftplusGate, 4>) {
  Problem<P> p({.tokens = 4, .heads = 2, .keys = P::rank == 4 ? 3 : 1});
  const auto says = [](const Status& s, const std::string& word) {
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  const auto refused = [&](auto change, const std::string& word) {
    auto args = p.args();
    change(args);
    return says(cpu::decay_gate(args, SerialExecutor{}), word);
  };
  CHECK(refused([](auto& a) { a.logits.data = nullptr; }, "logits need data"));
  CHECK(refused([](auto& a) { a.logits.extents[1] = -1; }, "zero or more"));
  CHECK(refused([](auto& a) { a.log_rate.extents[0] = 3; }, "log_rate must be [head]"));
  CHECK(refused([](auto& a) { a.bias.extents[0] = 3; }, "bias must be"));
  CHECK(refused([](auto& a) { a.bias.extents[P::rank - 3] += 1; }, "bias must be"));
  CHECK(refused([](auto& a) { a.log_decay.extents[1] = 3; }, "log_decay must have"));
  CHECK(refused([](auto& a) { a.log_decay.strides[1] = 0; }, "broadcast"));

  const auto backward_refused = [&](auto change, const std::string& word) {
    auto args = p.backward_args();
    change(args);
    return says(cpu::decay_gate_backward(args, SerialExecutor{}), word);
  };
  CHECK(backward_refused([](auto& a) { a.logits.data = nullptr; }, "logits need data"));
  CHECK(backward_refused([](auto& a) { a.log_rate.extents[0] = 3; }, "log_rate must be"));
  CHECK(backward_refused([](auto& a) { a.grad_log_decay.extents[0] = 2; }, "grad_log_decay must have"));
  CHECK(backward_refused([](auto& a) { a.grad_log_decay.data = nullptr; }, "grad_log_decay must have"));
  CHECK(backward_refused([](auto& a) { a.grad_logits.strides[2] = 0; }, "grad_logits must have"));
  CHECK(backward_refused([](auto& a) { a.grad_log_rate.extents[0] = 1; }, "grad_log_rate needs"));
  CHECK(backward_refused([](auto& a) { a.log_rate = {}; }, "grad_log_rate needs"));
  CHECK(backward_refused([](auto& a) { a.grad_bias.strides[0] = 0; }, "grad_bias needs"));
  CHECK(backward_refused([](auto& a) { a.bias = {}; }, "grad_bias needs"));
}

TEST_CASE("parameters are refused by gates that have none") {
  Problem<Pass<float, LogSigmoidGate<>, 3>> p({.tokens = 4, .heads = 2});
  const auto says = [](const Status& s, const std::string& word) {
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  auto args = p.args();
  args.log_rate = p.log_rate;
  CHECK(says(cpu::decay_gate(args, SerialExecutor{}), "log_rate is given"));
  args = p.args(), args.bias = slice_axis<1>(std::as_const(p.bias).view(), 0);
  CHECK(says(cpu::decay_gate(args, SerialExecutor{}), "bias is given"));
  auto back = p.backward_args();
  back.grad_log_rate = p.grad_log_rate;
  CHECK(says(cpu::decay_gate_backward(back, SerialExecutor{}), "grad_log_rate needs"));
}
