#include "chela/cpu/attention/l2_norm.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <utility>

#include "chela/cpu/element.hpp"
#include "chela/reference/l2_norm.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct Shape {
  Index batch = 1, tokens = 1, heads = 1, dim = 1;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.batch << " T" << s.tokens << " H" << s.heads << " D" << s.dim;
}

const Shape shapes[] = {
    {.tokens = 0, .dim = 8},
    {.tokens = 3, .dim = 0},
    {.dim = 1},
    {.tokens = 3, .heads = 2, .dim = 15},
    {.tokens = 3, .heads = 2, .dim = 16},
    {.batch = 2, .tokens = 3, .heads = 2, .dim = 17},
    {.batch = 1, .tokens = 255, .dim = 5},
    {.batch = 1, .tokens = 256, .dim = 5},
    {.batch = 1, .tokens = 257, .dim = 5},
    {.batch = 3, .tokens = 70, .heads = 4, .dim = 128},
};

template <class T>
Tensor<T, 4> normed(TensorView<const T, 4> x, double epsilon = 1e-6) {
  Tensor<T, 4> y(std::to_array({x.extents[0], x.extents[1], x.extents[2], x.extents[3]}),
                 T(std::numeric_limits<float>::quiet_NaN()));
  REQUIRE(cpu::l2_norm(L2NormArgs<T>{.x = x, .y = y, .epsilon = epsilon}, SerialExecutor{}).ok());
  return y;
}

template <class T>
Tensor<T, 4> gradient(TensorView<const T, 4> x, TensorView<const T, 4> grad_y, double epsilon = 1e-6) {
  Tensor<T, 4> grad_x(std::to_array({x.extents[0], x.extents[1], x.extents[2], x.extents[3]}),
                      T(std::numeric_limits<float>::quiet_NaN()));
  REQUIRE(cpu::l2_norm_backward(L2NormBackwardArgs<T>{.x = x, .grad_y = grad_y, .grad_x = grad_x, .epsilon = epsilon},
                                SerialExecutor{})
              .ok());
  return grad_x;
}

template <class T>
void check_shape(const Shape& s, double size) {
  CAPTURE(s);
  CAPTURE(size);
  auto x = random_tensor<T>(1, s.batch, s.tokens, s.heads, s.dim);
  fill_random(x.view(), 1, -size, size);
  auto grad_y = random_tensor<T>(2, s.batch, s.tokens, s.heads, s.dim);
  fill_random(grad_y.view(), 2, -size,
              size);  // so that the gradient, grad_y / n, is no subnormal number of a 16-bit type
  const auto wide_x = converted<double>(x.view()), wide_grad = converted<double>(grad_y.view());
  auto want = wide_x, want_grad = wide_x;
  reference::l2_norm(wide_x, 1e-6, want);
  reference::l2_norm_backward(wide_x, 1e-6, wide_grad, want_grad);
  CHECK(relative_error(normed<T>(std::as_const(x)), want) < tolerance<T>(s.dim));
  // One number alone has a gradient that all but cancels: it is judged by what it is a difference of.
  if (s.dim > 1)
    CHECK(relative_error(gradient<T>(std::as_const(x), std::as_const(grad_y)), want_grad) < tolerance<T>(2 * s.dim));
}

bool same_bits(const Tensor<float, 4>& a, const Tensor<float, 4>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace

TEST_CASE_TEMPLATE("forward and backward match the reference", T, float, double, Eigen::bfloat16, Eigen::half) {
  for (const Shape& s : shapes)
    for (double size : {1.0, 1e4}) check_shape<T>(s, size);
}

TEST_CASE("the gradient agrees with central differences") {
  Tensor<double, 4> x = random_tensor<double>(1, 2, 2, 2, 5);
  const auto grad_y = random_tensor<double>(2, 2, 2, 2, 5);
  const auto loss = [&] {
    const auto y = normed<double>(std::as_const(x));
    return weighted_sum<4>(y, grad_y);
  };
  for (double size : {1.0, 1e-3}) {  // 1e-3: as long as epsilon's root
    fill_random(x.view(), 3, -size, size);
    const auto grad_x = gradient<double>(std::as_const(x), grad_y);
    CHECK(gradient_error<4>(loss, x, grad_x, 1e-5 * size) < gradient_tolerance);
    Tensor<double, 4> reference_grad(x.extents());
    reference::l2_norm_backward(std::as_const(x), 1e-6, grad_y, reference_grad);
    CHECK(gradient_error<4>(loss, x, reference_grad, 1e-5 * size) < gradient_tolerance);
  }
}

TEST_CASE("rows are of unit length, and a row of zeros gives zeros and a finite gradient") {
  Tensor<float, 4> x = random_tensor<float>(1, 1, 2, 1, 40);
  for (Index i = 0; i < 40; ++i) x(0, 1, 0, i) = 0;
  const auto grad_y = random_tensor<float>(2, 1, 2, 1, 40);
  const auto y = normed<float>(std::as_const(x)), grad_x = gradient<float>(std::as_const(x), grad_y);
  double square = 0;
  for (Index i = 0; i < 40; ++i) {
    square += double(y(0, 0, 0, i)) * y(0, 0, 0, i);
    CHECK(y(0, 1, 0, i) == 0);
    CHECK(grad_x(0, 1, 0, i) == doctest::Approx(grad_y(0, 1, 0, i) * 1e3));
  }
  CHECK(square == doctest::Approx(1).epsilon(1e-6));
}

TEST_CASE("entries of any size neither overflow nor underflow") {
  for (float size : {1e-30f, 1e-20f, 1e-3f, 1e4f, 1e18f, 1e25f, 1e36f})
    for (double epsilon : {1e-6, 1e-36}) {
      CAPTURE(size);
      CAPTURE(epsilon);
      Tensor<float, 4> x(1, 1, 1, 20);
      fill_random(x.view(), 4, -1, 1);
      for (float& entry : x) entry *= size;
      const auto grad_y = random_tensor<float>(2, 1, 1, 1, 20);
      const auto wide_x = converted<double>(x.view()), wide_grad = converted<double>(grad_y.view());
      auto want = wide_x, want_grad = wide_x;
      reference::l2_norm(wide_x, epsilon, want);
      reference::l2_norm_backward(wide_x, epsilon, wide_grad, want_grad);
      CHECK(relative_error(normed<float>(std::as_const(x), epsilon), want) < tolerance<float>(20));
      CHECK(relative_error(gradient<float>(std::as_const(x), grad_y, epsilon), want_grad) < tolerance<float>(40));
    }
}

TEST_CASE("NaN stays in its own row") {
  Tensor<float, 4> x = random_tensor<float>(1, 1, 3, 2, 8);
  const auto clean = normed<float>(std::as_const(x));
  x(0, 1, 1, 3) = std::numeric_limits<float>::quiet_NaN();
  const auto y = normed<float>(std::as_const(x));
  for_each_index(y.view(), [&](Index b, Index t, Index h, Index i) {
    CHECK(((t == 1 && h == 1) ? std::isnan(y(b, t, h, i)) : y(b, t, h, i) == clean(b, t, h, i)));
  });
}

TEST_CASE("neither workers, nor strides, nor working in place change a bit") {
  struct ManyWorkers : SerialExecutor {
    int workers() const { return 16; }
  };
  const auto x = random_tensor<float>(1, 2, 170, 3, 21), grad_y = random_tensor<float>(2, 2, 170, 3, 21);
  const auto y = normed<float>(x), grad_x = gradient<float>(x, grad_y);
  auto other = nan_tensor<float>(2, 170, 3, 21);
  REQUIRE(cpu::l2_norm(L2NormArgs<float>{.x = x, .y = other}, ManyWorkers{}).ok());
  CHECK(same_bits(other, y));
  REQUIRE(cpu::l2_norm_backward(L2NormBackwardArgs<float>{.x = x, .grad_y = grad_y, .grad_x = other}, DefaultExecutor{})
              .ok());
  CHECK(same_bits(other, grad_x));

  // Stored as [batch, head, dim, token], backwards in time; the outputs inside a wider buffer.
  Tensor<float, 4> scattered(2, 3, 21, 170), scattered_grad(2, 3, 21, 170);
  const auto as_tokens = [](auto view) { return reversed(transposed(transposed(view, 1, 3), 2, 3), 1); };
  const auto from = as_tokens(scattered.view()), grad_from = as_tokens(scattered_grad.view());
  for_each_index(from, [&](auto... i) { from(i...) = x(i...), grad_from(i...) = grad_y(i...); });
  Tensor<float, 4> wide({2, 170, 5, 30}, -7.f);
  const auto inside = run(run(wide.view(), 2, 1, 3), 3, 4, 21);
  REQUIRE(cpu::l2_norm(L2NormArgs<float>{.x = from, .y = inside}, SerialExecutor{}).ok());
  CHECK(relative_error(inside, y.view()) == 0);
  REQUIRE(cpu::l2_norm_backward(L2NormBackwardArgs<float>{.x = from, .grad_y = grad_from, .grad_x = inside},
                                SerialExecutor{})
              .ok());
  CHECK(relative_error(inside, grad_x.view()) == 0);
  Index untouched = 0;
  for (float entry : wide) untouched += entry == -7.f;
  CHECK(untouched == wide.size() - inside.size());

  Tensor<float, 4> in_place = x, grad_in_place = grad_y;
  REQUIRE(cpu::l2_norm(L2NormArgs<float>{.x = in_place, .y = in_place}, SerialExecutor{}).ok());
  CHECK(same_bits(in_place, y));
  REQUIRE(cpu::l2_norm_backward(L2NormBackwardArgs<float>{.x = x, .grad_y = grad_in_place, .grad_x = grad_in_place},
                                SerialExecutor{})
              .ok());
  CHECK(same_bits(grad_in_place, grad_x));
}

TEST_CASE("arguments that do not fit are refused by name") {
  const auto x = random_tensor<float>(1, 1, 2, 3, 4);
  auto y = nan_tensor<float>(1, 2, 3, 4);
  const auto refused = [&](auto change, const std::string& word) {
    L2NormArgs<float> args{.x = x, .y = y};
    change(args);
    const Status s = cpu::l2_norm(args, SerialExecutor{});
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  CHECK(refused([](auto& a) { a.x.data = nullptr; }, "x needs data"));
  CHECK(refused([](auto& a) { a.epsilon = 0; }, "epsilon must be positive"));
  CHECK(refused([](auto& a) { a.epsilon = 1e-60; }, "epsilon must be positive"));
  CHECK(refused([](auto& a) { a.epsilon = std::numeric_limits<double>::quiet_NaN(); }, "epsilon"));
  CHECK(refused([](auto& a) { a.y.extents[3] = 3; }, "y must have"));
  CHECK(refused([](auto& a) { a.y.strides[1] = 0; }, "broadcast"));

  const auto backward_refused = [&](auto change, const std::string& word) {
    L2NormBackwardArgs<float> args{.x = x, .grad_y = x, .grad_x = y};
    change(args);
    const Status s = cpu::l2_norm_backward(args, SerialExecutor{});
    INFO(s.why);
    return !s.ok() && std::string(s.why).find(word) != std::string::npos;
  };
  CHECK(backward_refused([](auto& a) { a.x.extents[1] = -1; }, "zero or more"));
  CHECK(backward_refused([](auto& a) { a.epsilon = -1; }, "epsilon"));
  CHECK(backward_refused([](auto& a) { a.grad_y.extents[1] = 1; }, "grad_y must have"));
  CHECK(backward_refused([](auto& a) { a.grad_x.data = nullptr; }, "grad_x must have"));
  CHECK(backward_refused([](auto& a) { a.grad_x.strides[2] = 0; }, "broadcast"));
}
