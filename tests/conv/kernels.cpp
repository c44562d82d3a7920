#include "chela/cpu/conv/kernels.hpp"

#include <doctest/doctest.h>

#include "chela/cpu/conv/long.hpp"
#include "chela/reference/kernels.hpp"
#include "support/gradients.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

namespace chela {
namespace {

using test::converted;
using test::nan_tensor;
using test::random_tensor;
using test::relative_error;
using test::tolerance;

TEST_CASE_TEMPLATE("squash shrinks towards zero, and passes gradients where it does not clip", A, float, double) {
  const auto weights = random_tensor<A>(1, 5, 33);
  const A threshold = A(0.25);
  Tensor<A, 2> taps = nan_tensor<A>(5, 33);
  Tensor<double, 2> want(Index(5), Index(33));
  REQUIRE(cpu::squash_taps(SquashTapsArgs<A>{.weights = weights, .taps = taps, .threshold = threshold}).ok());
  reference::squash_taps(converted<double>(weights.view()), double(threshold), want);
  CHECK(relative_error(taps, want) <= tolerance<A>(1));

  const auto grad_taps = random_tensor<A>(2, 5, 33);
  Tensor<A, 2> grad = nan_tensor<A>(5, 33);
  REQUIRE(cpu::squash_taps_backward(
              SquashTapsBackwardArgs<A>{
                  .weights = weights, .grad_taps = grad_taps, .grad_weights = grad, .threshold = threshold})
              .ok());
  test::for_each_index(grad.view(),
                       [&](auto... i) { CHECK(grad(i...) == (taps(i...) != 0 ? grad_taps(i...) : A(0))); });
  Tensor<A, 2> in_place = weights;
  REQUIRE(cpu::squash_taps(SquashTapsArgs<A>{.weights = in_place, .taps = in_place, .threshold = threshold}).ok());
  CHECK(relative_error(in_place, taps) == 0);
}

struct SgShape {
  Index scales, channels, width, length;
};

std::ostream& operator<<(std::ostream& out, const SgShape& s) {
  return out << s.scales << " scales D" << s.channels << " width " << s.width << " L" << s.length;
}

constexpr SgShape sg_shapes[] = {{1, 3, 1, 1},  {1, 3, 4, 4},   {2, 2, 1, 3},     {3, 5, 4, 0},  {3, 5, 4, 28},
                                 {4, 5, 3, 20}, {4, 2, 16, 17}, {6, 3, 16, 1000}, {5, 1, 7, 200}};

TEST_CASE_TEMPLATE("SGConv matches its definition tap by tap", A, float, double) {
  for (const SgShape& s : sg_shapes) {
    CAPTURE(s);
    const auto weights = random_tensor<A>(1, s.scales, s.channels, s.width);
    auto norm = random_tensor<A>(2, s.channels);
    for (A& value : norm) value += A(2);
    Tensor<A, 2> taps = nan_tensor<A>(s.channels, s.length);
    Tensor<double, 2> want(s.channels, s.length);
    REQUIRE(cpu::sgconv_taps(SgConvTapsArgs<A>{.weights = weights, .norm = norm, .taps = taps, .decay = A(0.75)}).ok());
    reference::sgconv_taps(converted<double>(weights.view()), converted<double>(norm.view()), 0.75, want);
    CHECK(relative_error(taps, want) <= tolerance<A>(4));
  }
}

TEST_CASE("SGConv gradients match finite differences") {
  for (const SgShape& s : sg_shapes) {
    CAPTURE(s);
    auto weights = random_tensor<double>(1, s.scales, s.channels, s.width);
    auto norm = random_tensor<double>(2, s.channels);
    for (double& value : norm) value += 2;
    const auto grad_taps = random_tensor<double>(3, s.channels, s.length);
    Tensor<double, 3> grad = nan_tensor<double>(s.scales, s.channels, s.width);
    REQUIRE(cpu::sgconv_taps_backward(SgConvTapsBackwardArgs<double>{
                                          .norm = norm, .grad_taps = grad_taps, .grad_weights = grad, .decay = 0.75})
                .ok());
    const auto loss = [&] {
      Tensor<double, 2> taps(s.channels, s.length);
      REQUIRE(
          cpu::sgconv_taps(SgConvTapsArgs<double>{.weights = weights, .norm = norm, .taps = taps, .decay = 0.75}).ok());
      return test::weighted_sum<2>(taps, grad_taps);
    };
    CHECK(test::gradient_error<3>(loss, weights, grad) < test::gradient_tolerance);
  }
}

TEST_CASE("the initial norm makes kernels of norm one") {
  const auto weights = random_tensor<float>(1, 4, 5, 8);
  Tensor<float, 2> taps(Index(5), Index(100));
  Tensor<float, 1> norm(Index(5));
  const SgConvTapsArgs<float> a{.weights = weights, .norm = norm, .taps = taps};
  REQUIRE(cpu::sgconv_norm<float>(a, norm).ok());
  REQUIRE(cpu::sgconv_taps(a).ok());
  for (Index d = 0; d < 5; ++d) {
    double sum = 0;
    for (Index j = 0; j < 100; ++j) sum += double(taps(d, j)) * taps(d, j);
    CHECK(sum == doctest::Approx(1).epsilon(1e-5));
  }
}

TEST_CASE("the scales that reach a length") {
  static_assert(sgconv_reach(3, 16) == 112);
  static_assert(sgconv_scales(112, 16) == 3 && sgconv_scales(113, 16) == 4 && sgconv_scales(0, 16) == 1);
}

template <class A>
struct Ema {
  Tensor<A, 2> alpha, delta, beta, eta;
  Ema(Index channels, Index n)
      : alpha(random_tensor<A>(11, channels, n)),
        delta(random_tensor<A>(12, channels, n)),
        beta(random_tensor<A>(13, channels, n)),
        eta(random_tensor<A>(14, channels, n)) {
    for (A& a : alpha) a = 3 * a - 2;  // some averages forget slowly
  }
  EmaParameters<const A> parameters() const { return {alpha, delta, beta, eta}; }
  EmaParameters<A> gradients() { return {alpha, delta, beta, eta}; }
  Ema<double> in_double() const {
    Ema<double> e(0, 1);
    e.alpha = converted<double>(alpha.view()), e.delta = converted<double>(delta.view());
    e.beta = converted<double>(beta.view()), e.eta = converted<double>(eta.view());
    return e;
  }
};

TEST_CASE_TEMPLATE("the moving average's taps match its definition", A, float, double) {
  for (Index n : {1, 2, 16})
    for (Index length : {0, 1, 2, 63, 64, 65, 200, 3000}) {
      CAPTURE(n);
      CAPTURE(length);
      const Ema<A> e(5, n);
      const Ema<double> exact = e.in_double();
      Tensor<A, 2> taps = nan_tensor<A>(5, length);
      Tensor<double, 2> want(Index(5), length);
      REQUIRE(cpu::ema_taps(EmaTapsArgs<A>{.parameters = e.parameters(), .taps = taps}).ok());
      reference::ema_taps(exact.alpha, exact.delta, exact.beta, exact.eta, want);
      CHECK(relative_error(taps, want) <= tolerance<A>(n));
    }
}

TEST_CASE("averages that keep everything and averages that keep nothing stay finite") {
  Ema<float> e(2, 2);
  e.alpha.fill(-200), e.delta.fill(0);
  e.alpha(1, 0) = e.delta(1, 0) = 200;
  Tensor<float, 2> taps = nan_tensor<float>(2, 300), grad_taps(Index(2), Index(300));
  grad_taps.fill(1);
  Ema<float> grad(2, 2);
  REQUIRE(cpu::ema_taps(EmaTapsArgs<float>{.parameters = e.parameters(), .taps = taps}).ok());
  REQUIRE(cpu::ema_taps_backward(EmaTapsBackwardArgs<float>{
                                     .parameters = e.parameters(), .grad_taps = grad_taps, .grad = grad.gradients()})
              .ok());
  for (float value : taps) CHECK(std::isfinite(value));
  for (const auto* g : {&grad.alpha, &grad.delta, &grad.beta, &grad.eta})
    for (float value : *g) CHECK(std::isfinite(value));
  CHECK(taps(1, 0) == doctest::Approx(e.eta(1, 0) * e.beta(1, 0)));
  CHECK(taps(1, 1) == 0);
}

TEST_CASE("the moving average's gradients match finite differences") {
  for (Index length : {1, 20, 150}) {
    Ema<double> e(3, 4), grad(3, 4);
    const auto grad_taps = random_tensor<double>(3, 3, length);
    REQUIRE(cpu::ema_taps_backward(EmaTapsBackwardArgs<double>{
                                       .parameters = e.parameters(), .grad_taps = grad_taps, .grad = grad.gradients()})
                .ok());
    const auto loss = [&] {
      Tensor<double, 2> taps(Index(3), length);
      REQUIRE(cpu::ema_taps(EmaTapsArgs<double>{.parameters = e.parameters(), .taps = taps}).ok());
      return test::weighted_sum<2>(taps, grad_taps);
    };
    CHECK(test::gradient_error<2>(loss, e.beta, grad.beta) < test::gradient_tolerance);
    CHECK(test::gradient_error<2>(loss, e.eta, grad.eta) < test::gradient_tolerance);
    CHECK(test::gradient_error<2>(loss, e.alpha, grad.alpha) < test::gradient_tolerance);
    if (length > 1) CHECK(test::gradient_error<2>(loss, e.delta, grad.delta) < test::gradient_tolerance);
  }
}

TEST_CASE_TEMPLATE("recurrence, steps and convolution are one filter", T, float, double, Eigen::bfloat16) {
  using A = Accumulator<T>;
  const Index batch = 2, tokens = 90, channels = 21, n = 3;
  const Ema<A> e(channels, n);
  const Ema<double> exact = e.in_double();
  const auto x = random_tensor<T>(1, batch, tokens, channels);
  const auto start = random_tensor<A>(2, batch, channels, n);
  Tensor<double, 3> want(batch, tokens, channels), want_state = converted<double>(start.view());
  reference::ema(converted<double>(x.view()), exact.alpha, exact.delta, exact.beta, exact.eta, want, want_state);

  Tensor<T, 3> y = nan_tensor<T>(batch, tokens, channels), stepped = nan_tensor<T>(batch, tokens, channels);
  Tensor<A, 3> state = nan_tensor<A>(batch, channels, n), step_state = start;
  REQUIRE(
      cpu::ema(EmaArgs<T>{.x = x, .parameters = e.parameters(), .y = y, .initial_state = start, .final_state = state})
          .ok());
  CHECK(relative_error(y, want) <= tolerance<T>(tokens));
  CHECK(relative_error(state, want_state) <= tolerance<A>(tokens));
  for (Index t = 0; t < tokens; ++t)
    REQUIRE(cpu::ema_step(EmaStepArgs<T>{.x = slice_axis<1>(x.view(), t),
                                         .parameters = e.parameters(),
                                         .y = slice_axis<1>(stepped.view(), t),
                                         .state = step_state})
                .ok());
  CHECK(relative_error(stepped, y) == 0);
  CHECK(relative_error(step_state, state) == 0);

  Tensor<A, 2> taps = nan_tensor<A>(channels, tokens);
  Tensor<T, 3> convolved = nan_tensor<T>(batch, tokens, channels), recurrent = nan_tensor<T>(batch, tokens, channels);
  REQUIRE(cpu::ema_taps(EmaTapsArgs<A>{.parameters = e.parameters(), .taps = taps}).ok());
  REQUIRE(cpu::long_conv(LongConvArgs<T>{.x = x, .taps = taps, .y = convolved}).ok());
  REQUIRE(cpu::ema(EmaArgs<T>{.x = x, .parameters = e.parameters(), .y = recurrent}).ok());
  CHECK(relative_error(convolved, recurrent) <= 2 * tolerance<T>(tokens));
}

TEST_CASE("the bits do not depend on the workers, and any strides will do") {
  const Ema<float> e(20, 4);
  Tensor<float, 2> want = nan_tensor<float>(20, 100), got = nan_tensor<float>(100, 20);
  REQUIRE(cpu::ema_taps(EmaTapsArgs<float>{.parameters = e.parameters(), .taps = want}, SerialExecutor{}).ok());
  REQUIRE(cpu::ema_taps(EmaTapsArgs<float>{.parameters = e.parameters(), .taps = transposed(got.view(), 0, 1)}).ok());
  CHECK(relative_error(transposed(got.view(), 0, 1), want.view()) == 0);
  const auto weights = random_tensor<float>(1, 4, 20, 8);
  REQUIRE(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .taps = want}, SerialExecutor{}).ok());
  REQUIRE(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .taps = transposed(got.view(), 0, 1)}).ok());
  CHECK(relative_error(transposed(got.view(), 0, 1), want.view()) == 0);
}

TEST_CASE("what does not fit together is refused") {
  const auto weights = random_tensor<float>(1, 2, 3, 4);
  Tensor<float, 2> taps(Index(3), Index(12)), longer(Index(3), Index(13));
  Tensor<float, 3> grad(Index(2), Index(3), Index(4));
  const Tensor<float, 1> norm(Index(2));
  CHECK(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .taps = taps}).ok());
  CHECK(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .taps = longer}).code == Code::bad_shape);
  CHECK(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .norm = norm, .taps = taps}).code ==
        Code::bad_shape);
  CHECK(cpu::sgconv_taps(SgConvTapsArgs<float>{.weights = weights, .taps = taps, .decay = 0}).code == Code::bad_value);
  CHECK(cpu::sgconv_taps_backward(SgConvTapsBackwardArgs<float>{.grad_taps = longer, .grad_weights = grad}).code ==
        Code::bad_shape);
  CHECK(cpu::squash_taps(SquashTapsArgs<float>{.weights = taps, .taps = longer}).code == Code::bad_shape);
  CHECK(cpu::squash_taps(SquashTapsArgs<float>{.weights = taps, .taps = taps, .threshold = -1}).code ==
        Code::bad_value);
  Ema<float> e(3, 2), other(3, 4);
  CHECK(cpu::ema_taps(EmaTapsArgs<float>{.parameters = other.parameters(), .taps = taps}).ok());
  EmaParameters<const float> mixed = e.parameters();
  mixed.eta = other.eta;
  CHECK(cpu::ema_taps(EmaTapsArgs<float>{.parameters = mixed, .taps = taps}).code == Code::bad_shape);
  CHECK(cpu::ema_taps_backward(
            EmaTapsBackwardArgs<float>{.parameters = e.parameters(), .grad_taps = taps, .grad = other.gradients()})
            .code == Code::bad_shape);
  const auto x = random_tensor<float>(1, 2, 5, 3);
  Tensor<float, 3> y(x.extents()), state(Index(2), Index(3), Index(4));
  CHECK(cpu::ema(EmaArgs<float>{.x = x, .parameters = e.parameters(), .y = y, .initial_state = state}).code ==
        Code::bad_shape);
  CHECK(
      cpu::ema_step(EmaStepArgs<float>{
                        .x = slice_axis<1>(x.view(), 0), .parameters = e.parameters(), .y = slice_axis<1>(y.view(), 0)})
          .code == Code::bad_shape);
}

}  // namespace
}  // namespace chela
