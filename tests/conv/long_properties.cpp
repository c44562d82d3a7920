// What must hold of the long convolution whatever the numbers, over random shapes. The seed is fixed and printed with
// every failure.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>

#include "chela/cpu/conv/long.hpp"
#include "conv/long_problem.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

namespace chela {
namespace {

using namespace test;

constexpr unsigned seed = 20240611;
constexpr double tight = 1e-12;

/// Lengths of all magnitudes up to some hundreds, as often just beside a power of two as anywhere.
LongShape random_shape(std::mt19937& random, bool two_sided) {
  const auto length = [&] {
    const Index power = Index(1) << std::uniform_int_distribution<int>(0, 9)(random);
    const int how = std::uniform_int_distribution<int>(0, 3)(random);
    return how == 0 ? power : how == 1 ? power + 1 : std::uniform_int_distribution<Index>(power, 2 * power)(random);
  };
  const auto coin = [&] { return std::uniform_int_distribution<int>(0, 1)(random) == 1; };
  LongShape s{std::uniform_int_distribution<Index>(1, 3)(random),
              length(),
              std::uniform_int_distribution<Index>(1, 20)(random),
              length(),
              two_sided && coin() ? length() : 0,
              coin(),
              coin()};
  return s;
}

/// Calls `check(shape)` for many shapes.
template <class Check>
void for_random_shapes(int count, bool two_sided, const Check& check) {
  std::mt19937 random(seed);
  for (int i = 0; i < count; ++i) {
    const LongShape shape = random_shape(random, two_sided);
    CAPTURE(seed);
    CAPTURE(shape);
    check(shape);
  }
}

template <LongConvPolicy P = LongConvPolicy{}>
Tensor<double, 3> output(const LongProblem<double>& p) {
  LongForward<double> out(p.shape);
  REQUIRE(cpu::long_conv<P>(out.into(p.args())).ok());
  return out.y;
}

/// Of the largest element, since sums that cancel are rounded like the others.
double distance(const Tensor<double, 3>& got, const Tensor<double, 3>& want) {
  double difference = 0, largest = 1;
  for (Index i = 0; i < want.size(); ++i) {
    difference = std::max(difference, std::abs(got.data()[i] - want.data()[i]));
    largest = std::max(largest, std::abs(want.data()[i]));
    if (std::isnan(got.data()[i])) return got.data()[i];
  }
  return difference / largest;
}

TEST_CASE("linear in the inputs and their history, and in the kernel") {
  for_random_shapes(30, true, [](const LongShape& s) {
    const LongProblem<double> p(s);
    LongProblem<double> q(s), sum(s);
    q.x = random_tensor<double>(21, s.batch, s.tokens, s.channels);
    q.state = random_tensor<double>(22, s.batch, s.taps - 1, s.channels);
    for (Index i = 0; i < p.x.size(); ++i) sum.x.data()[i] = 2 * p.x.data()[i] - 3 * q.x.data()[i];
    for (Index i = 0; i < p.state.size(); ++i) sum.state.data()[i] = 2 * p.state.data()[i] - 3 * q.state.data()[i];
    const auto y = output(p), z = output(q);
    Tensor<double, 3> want = y;
    for (Index i = 0; i < y.size(); ++i) want.data()[i] = 2 * y.data()[i] - 3 * z.data()[i];
    CHECK(distance(output(sum), want) < tight);

    LongProblem<double> other(s), twice(s);
    other.taps = random_tensor<double>(23, s.channels, s.taps);
    other.back_taps = random_tensor<double>(24, s.channels, s.back_taps);
    const auto add = [](auto& to, const auto& a, const auto& b) {
      for (Index i = 0; i < to.size(); ++i) to.data()[i] = a.data()[i] + b.data()[i];
    };
    add(twice.taps, p.taps, other.taps), add(twice.back_taps, p.back_taps, other.back_taps);
    add(twice.skip, p.skip, other.skip);
    add(want, y, output(other));
    CHECK(distance(output(twice), want) < tight);
  });
}

TEST_CASE("inputs that come later give outputs that come later") {
  for_random_shapes(30, false, [](LongShape s) {
    s.state = false;
    const Index delay = s.tokens / 3;
    const LongProblem<double> p(s);
    LongProblem<double> late(s);
    for (Index b = 0; b < s.batch; ++b)
      for (Index t = 0; t < s.tokens; ++t)
        for (Index d = 0; d < s.channels; ++d) late.x(b, t, d) = t < delay ? 0 : p.x(b, t - delay, d);
    const auto y = output(p);
    Tensor<double, 3> want(s.batch, s.tokens, s.channels);
    for (Index b = 0; b < s.batch; ++b)
      for (Index t = delay; t < s.tokens; ++t)
        for (Index d = 0; d < s.channels; ++d) want(b, t, d) = y(b, t - delay, d);
    CHECK(distance(output(late), want) < tight);
  });
}

TEST_CASE("all ways agree, and an impulse gives the kernel back: nothing wraps around") {
  for_random_shapes(60, true, [](LongShape s) {
    const LongProblem<double> p(s);
    const auto want = output<direct>(p);
    CHECK(distance(output<whole>(p), want) < tight);
    CHECK(distance(output<blocks>(p), want) < tight);
    CHECK(distance(output(p), want) < tight);

    s.state = false;
    LongProblem<double> impulse(s);
    const Index at = s.tokens / 3;
    impulse.x.fill(0);
    for (Index b = 0; b < s.batch; ++b)
      for (Index d = 0; d < s.channels; ++d) impulse.x(b, at, d) = 1;
    Tensor<double, 3> kernel(s.batch, s.tokens, s.channels);
    for (Index b = 0; b < s.batch; ++b)
      for (Index t = 0; t < s.tokens; ++t)
        for (Index d = 0; d < s.channels; ++d) {
          const Index lag = t - at;
          kernel(b, t, d) = lag >= 0 && lag < s.taps            ? impulse.taps(d, lag)
                            : lag < 0 && -lag - 1 < s.back_taps ? impulse.back_taps(d, -lag - 1)
                                                                : 0;
          if (lag == 0 && s.skip) kernel(b, t, d) += impulse.skip(d);
        }
    CHECK(distance(output<whole>(impulse), kernel) < tight);
    CHECK(distance(output<blocks>(impulse), kernel) < tight);
    CHECK(distance(output(impulse), kernel) < tight);
  });
}

TEST_CASE("the last input reaches the last output only, at any length") {
  for (Index tokens = 1; tokens < 700; tokens += tokens < 140 ? 1 : 37) {
    CAPTURE(tokens);
    LongProblem<double> p({1, tokens, 2, tokens, 0, false, false});
    p.x.fill(0);
    p.x(0, tokens - 1, 0) = 1e6;
    const auto y = output<whole>(p);
    for (Index t = 0; t + 1 < tokens; ++t) REQUIRE(std::abs(y(0, t, 0)) < 1e-7);
    CHECK(y(0, tokens - 1, 0) == doctest::Approx(1e6 * p.taps(0, 0)).epsilon(tight));
  }
}

/// Whether row t of channel 0 is finite just where `reached(t)` is false.
template <class Reached>
bool not_finite_where(const Tensor<double, 3>& rows, const Reached& reached) {
  for (Index t = 0; t < rows.extents()[1]; ++t)
    if (std::isfinite(rows(0, t, 0)) == reached(t)) return false;
  return true;
}

TEST_CASE("direct sums take a NaN or an infinity to the outputs that meet it and to no other") {
  for (Index taps : {1, 2, 7, 8, 9, 20, 70})
    for (Index back : {0, 1, 6, 30})
      for (double bad : {std::nan(""), std::numeric_limits<double>::infinity()})
        for (Index at = 0; at < 40; ++at) {
          CAPTURE(taps);
          CAPTURE(back);
          CAPTURE(at);
          LongProblem<double> p({1, 40, 3, taps, back, true, true});
          LongGradients<double> gradients(p.shape);
          p.x(0, at, 0) = bad, p.grad_y(0, at, 0) = bad;
          const auto meets = [&](Index to, Index from) { return to - from < taps && from - to <= back; };
          const auto y = output<direct>(p);
          CHECK(not_finite_where(y, [&](Index t) { return meets(t, at); }));
          REQUIRE(cpu::long_conv_backward<direct>(gradients.into(p.backward_args())).ok());
          CHECK(not_finite_where(gradients.x, [&](Index t) { return meets(at, t); }));
          CHECK(not_finite_where(gradients.state, [&](Index r) { return meets(at, r - (taps - 1)); }));
        }
}

TEST_CASE("pieces that pass the state on, and streams, are the whole") {
  std::mt19937 random(seed);
  for_random_shapes(40, false, [&](const LongShape& s) {
    const LongProblem<double> p(s);
    LongForward<double> want(s);
    REQUIRE(cpu::long_conv(want.into(p.args())).ok());
    Tensor<double, 3> y = nan_tensor<double>(s.batch, s.tokens, s.channels), state = p.state;
    if (!s.state) state.fill(0);
    const cpu::LongConvStreamKernel<double> kernel(p.taps.view(), SerialExecutor{});
    cpu::LongConvStream<double> stream(kernel, s.batch);
    REQUIRE(cpu::long_conv_stream_prefill(state.view(), kernel, stream).ok());
    Tensor<double, 3> streamed = nan_tensor<double>(s.batch, s.tokens, s.channels);
    for (Index begin = 0; begin < s.tokens;) {
      const Index count = std::uniform_int_distribution<Index>(1, s.tokens - begin)(random);
      LongConvArgs<double> a = p.args();
      a.x = run(a.x, 1, begin, count), a.y = run(y.view(), 1, begin, count);
      a.initial_state = state, a.final_state = state;
      REQUIRE(cpu::long_conv(a).ok());
      begin += count;
    }
    for (Index t = 0; t < s.tokens; ++t)
      REQUIRE(cpu::long_conv_stream_step(
                  LongConvStreamArgs<double>{
                      .x = slice_axis<1>(p.x.view(), t), .skip = p.args().skip, .y = slice_axis<1>(streamed.view(), t)},
                  kernel, stream)
                  .ok());
    CHECK(distance(y, want.y) < tight);
    CHECK(distance(streamed, want.y) < tight);
    CHECK(relative_error(state, want.final_state) == 0);
  });
}

TEST_CASE("gradients of pieces, each given what flows into its final state, are the whole's") {
  for_random_shapes(30, false, [](LongShape s) {
    s.state = true;
    const LongProblem<double> p(s);
    const auto flowing = random_tensor<double>(31, s.batch, s.taps - 1, s.channels);
    LongGradients<double> want(s), first(s), second(s);
    LongConvBackwardArgs<double> all = want.into(p.backward_args());
    all.grad_final_state = flowing;
    REQUIRE(cpu::long_conv_backward(all).ok());

    const Index cut = s.tokens / 3;
    Tensor<double, 3> between(s.batch, s.taps - 1, s.channels);
    LongConvArgs<double> head = p.args();
    Tensor<double, 3> y(s.batch, cut, s.channels);
    head.x = run(head.x, 1, 0, cut), head.y = y, head.final_state = between;
    REQUIRE(cpu::long_conv(head).ok());
    LongConvBackwardArgs<double> tail = second.into(p.backward_args());
    tail.x = run(tail.x, 1, cut, s.tokens - cut), tail.grad_y = run(tail.grad_y, 1, cut, s.tokens - cut);
    tail.grad_x = run(first.x.view(), 1, cut, s.tokens - cut), tail.initial_state = between;
    tail.grad_final_state = flowing;
    REQUIRE(cpu::long_conv_backward(tail).ok());
    LongConvBackwardArgs<double> front = first.into(p.backward_args());
    front.x = run(front.x, 1, 0, cut), front.grad_y = run(front.grad_y, 1, 0, cut);
    front.grad_x = run(first.x.view(), 1, 0, cut), front.grad_final_state = second.state;
    REQUIRE(cpu::long_conv_backward(front).ok());
    CHECK(distance(first.x, want.x) < tight);
    CHECK(distance(first.state, want.state) < tight);
    for (Index i = 0; i < first.taps.size(); ++i) first.taps.data()[i] += second.taps.data()[i];
    CHECK(relative_error(first.taps, want.taps) < tight);
  });
}

template <LongConvPolicy P>
void check_adjoint(const LongShape& s) {
  const LongProblem<double> p(s);
  LongForward<double> forward(s);
  LongGradients<double> g(s);
  const auto weight = random_tensor<double>(41, s.batch, s.taps - 1, s.channels);
  REQUIRE(cpu::long_conv<P>(forward.into(p.args())).ok());
  LongConvBackwardArgs<double> b = g.into(p.backward_args());
  b.grad_final_state = weight;
  REQUIRE(cpu::long_conv_backward<P>(b).ok());
  const double y = weighted_sum<3>(forward.y, p.grad_y);
  const double through = y + weighted_sum<3>(forward.final_state, weight);
  double back = weighted_sum<3>(g.x, p.x), size = 1;
  if (s.state) back += weighted_sum<3>(g.state, p.state);
  double kernel = weighted_sum<2>(g.taps, p.taps);
  if (s.skip) kernel += weighted_sum<1>(g.skip, p.skip);
  if (s.back_taps > 0) kernel += weighted_sum<2>(g.back_taps, p.back_taps);
  for (Index i = 0; i < forward.y.size(); ++i) size += std::abs(forward.y.data()[i] * p.grad_y.data()[i]);
  CHECK(std::abs(through - back) < tight * size);
  CHECK(std::abs(y - kernel) < tight * size);
}

TEST_CASE("the backward pass is the adjoint of the forward pass, in x and in the kernel") {
  for_random_shapes(40, true, [](const LongShape& s) {
    check_adjoint<direct>(s);
    check_adjoint<whole>(s);
    check_adjoint<blocks>(s);
  });
}

}  // namespace
}  // namespace chela
