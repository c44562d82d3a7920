// Taps of long kernels from their parameters on a GPU, and gradients back to them.
#include "chela/cuda/conv/kernels.cuh"

#include <doctest/doctest.h>

#include "chela/reference/kernels.hpp"
#include "support/device.cuh"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

namespace chela::test {

TEST_CASE_TEMPLATE("squash shrinks towards zero, and passes gradients where it does not clip", A, float, double) {
  const Tensor<A, 2> weights = random_tensor<A>(1, 5, 333), grad_taps = random_tensor<A>(2, 5, 333);
  const DeviceTensor<A, 2> w(weights), g(grad_taps), taps(nan_tensor<A>(5, 333)), grad(nan_tensor<A>(5, 333));
  const Stream stream;
  REQUIRE(cuda::squash_taps(SquashTapsArgs<A>{w.view(), taps.view(), A(0.25)}, stream).ok());
  REQUIRE(cuda::squash_taps_backward(SquashTapsBackwardArgs<A>{w.view(), g.view(), grad.view(), A(0.25)}, stream).ok());
  stream.wait();
  Tensor<double, 2> want(Index(5), Index(333));
  reference::squash_taps(converted<double>(weights.view()), 0.25, want);
  const Tensor<A, 2> got = taps.host(), got_grad = grad.host();
  CHECK(relative_error(got, want) <= tolerance<A>(1));
  bool passed = true;
  for_each_index(got.view(), [&](auto... i) { passed &= got_grad(i...) == (got(i...) != 0 ? grad_taps(i...) : A(0)); });
  CHECK(passed);
  CHECK(cuda::squash_taps(SquashTapsArgs<A>{w.view(), taps.view(), A(-1)}, stream).code == Code::bad_value);
}

struct SgShape {
  Index scales, channels, width, length;
};
constexpr SgShape sg_shapes[] = {{1, 3, 1, 1},  {1, 3, 4, 4},   {2, 2, 1, 3},     {3, 5, 4, 0},  {3, 5, 4, 28},
                                 {4, 5, 3, 20}, {4, 2, 16, 17}, {6, 3, 16, 1000}, {5, 1, 7, 200}};

TEST_CASE_TEMPLATE("SGConv matches its definition tap by tap, and its gradient value by value", A, float, double) {
  for (const auto& [scales, channels, width, length] : sg_shapes) {
    CAPTURE(scales);
    CAPTURE(length);
    const Tensor<A, 3> weights = random_tensor<A>(1, scales, channels, width);
    const Tensor<A, 2> grad_taps = random_tensor<A>(3, channels, length);
    Tensor<A, 1> norm = random_tensor<A>(2, channels);
    for (A& value : norm) value += A(2);
    const DeviceTensor<A, 3> w(weights), grad(nan_tensor<A>(scales, channels, width));
    const DeviceTensor<A, 2> taps(nan_tensor<A>(channels, length)), g(grad_taps);
    const DeviceTensor<A, 1> n(norm), norms(nan_tensor<A>(channels));
    const Stream stream;
    REQUIRE(cuda::sgconv_taps(SgConvTapsArgs<A>{w.view(), n.view(), taps.view(), A(0.7)}, stream).ok());
    REQUIRE(
        cuda::sgconv_taps_backward(SgConvTapsBackwardArgs<A>{n.view(), g.view(), grad.view(), A(0.7)}, stream).ok());
    stream.wait();
    const Tensor<double, 3> wide = converted<double>(weights.view());
    const Tensor<double, 1> wide_norm = converted<double>(norm.view());
    Tensor<double, 2> want(channels, length), unit_taps(channels, length);
    reference::sgconv_taps(wide, wide_norm, double(A(0.7)), want);
    CHECK(relative_error(taps.host(), want) <= tolerance<A>(4));
    Tensor<double, 3> want_grad(scales, channels, width);
    for_each_index(want_grad.view(), [&](Index i, Index d, Index r) {
      Tensor<double, 3> unit(scales, channels, width);
      unit(i, d, r) = 1;
      reference::sgconv_taps(unit, wide_norm, double(A(0.7)), unit_taps);
      for (Index j = 0; j < length; ++j) want_grad(i, d, r) += unit_taps(d, j) * double(grad_taps(d, j));
    });
    CHECK(relative_error(grad.host(), want_grad) <= tolerance<A>(length + 4));

    REQUIRE(cuda::sgconv_norm(SgConvTapsArgs<A>{w.view(), {}, taps.view(), A(0.7)}, norms.view(), stream).ok());
    stream.wait();
    reference::sgconv_taps(wide, {}, double(A(0.7)), want);
    Tensor<double, 1> want_norm(channels);
    for (Index d = 0; d < channels; ++d) {
      for (Index j = 0; j < length; ++j) want_norm(d) += want(d, j) * want(d, j);
      want_norm(d) = std::sqrt(want_norm(d));
    }
    CHECK(relative_error(norms.host(), want_norm) <= tolerance<A>(length + 4));
  }
}

TEST_CASE_TEMPLATE("EMA's taps are sums of powers, and gradients follow them", A, float, double) {
  for (Index length : {0, 1, 2, 31, 33, 100, 511, 513, 1500}) {
    CAPTURE(length);
    constexpr Index channels = 3, averages = 5;
    Tensor<A, 2> p[4];
    for (unsigned i = 0; i < 4; ++i) p[i] = random_tensor<A>(i + 1, channels, averages);
    for (A& alpha : p[0]) alpha *= 4;
    const Tensor<A, 2> grad_taps = random_tensor<A>(7, channels, length);
    const DeviceTensor<A, 2> alpha(p[0]), delta(p[1]), beta(p[2]), eta(p[3]), g(grad_taps),
        taps(nan_tensor<A>(channels, length)), none(nan_tensor<A>(channels, averages)), ga(none.host()),
        gd(none.host()), gb(none.host()), ge(none.host());
    const EmaParameters<const A> parameters{alpha.view(), delta.view(), beta.view(), eta.view()};
    const EmaParameters<A> grad{ga.view(), gd.view(), gb.view(), ge.view()};
    const Stream stream;
    REQUIRE(cuda::ema_taps(EmaTapsArgs<A>{parameters, taps.view()}, stream).ok());
    REQUIRE(cuda::ema_taps_backward(EmaTapsBackwardArgs<A>{parameters, g.view(), grad}, stream).ok());
    stream.wait();
    Tensor<double, 2> wide[4], want(channels, length);
    for (int i = 0; i < 4; ++i) wide[i] = converted<double>(p[i].view());
    const auto loss = [&] {
      reference::ema_taps(wide[0], wide[1], wide[2], wide[3], want);
      double sum = 0;
      for_each_index(want.view(), [&](auto... i) { sum += want(i...) * double(grad_taps(i...)); });
      return sum;
    };
    loss();
    CHECK(relative_error(taps.host(), want) <= tolerance<A>(averages));
    const double bound = gradient_tolerance + tolerance<A>(1);
    const Tensor<A, 2> got[4] = {ga.host(), gd.host(), gb.host(), ge.host()};
    for (int i = 0; i < 4; ++i) CHECK(gradient_error<2>(loss, wide[i], converted<double>(got[i].view())) < bound);
  }
}

}  // namespace chela::test
