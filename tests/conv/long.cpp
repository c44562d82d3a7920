#include "chela/cpu/conv/long.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "chela/reference/long.hpp"
#include "conv/long_problem.hpp"
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
using test::whole;

using Shape = test::LongShape;
template <class T>
using Problem = test::LongProblem<T>;
template <class T>
using Forward = test::LongForward<T>;
template <class T>
using Gradients = test::LongGradients<T>;

template <class T>
void check_against_reference(const Shape& shape) {
  CAPTURE(shape);
  const Problem<T> p(shape);
  const Problem<double> exact = p.in_double();
  {
    Forward<T> got(shape);
    Forward<double> want(shape);
    const auto a = exact.args();
    reference::long_conv(a.x, a.taps, a.back_taps, a.skip, a.initial_state, want.y, want.final_state);
    REQUIRE(cpu::long_conv(got.into(p.args())).ok());
    CHECK(relative_error(got.y, want.y) <= tolerance<T>(p.terms()));
    CHECK(relative_error(got.final_state, want.final_state) == 0);
  }
  Gradients<T> got(shape);
  Gradients<double> want(shape);
  const auto a = exact.backward_args();
  reference::long_conv_backward(a.x, a.taps, a.back_taps, a.skip, a.initial_state, a.grad_y, want.x, want.taps,
                                want.back_taps, want.skip, want.state);
  REQUIRE(cpu::long_conv_backward(got.into(p.backward_args())).ok());
  const Index kernel_terms = shape.batch * shape.tokens;
  CHECK(relative_error(got.x, want.x) <= tolerance<T>(p.terms()));
  CHECK(relative_error(got.taps, want.taps) <= tolerance<Accumulator<T>>(kernel_terms));
  CHECK(relative_error(got.skip, want.skip) <= tolerance<Accumulator<T>>(kernel_terms));
  if (shape.back_taps > 0)
    CHECK(relative_error(got.back_taps, want.back_taps) <= tolerance<Accumulator<T>>(kernel_terms));
  if (shape.state) CHECK(relative_error(got.state, want.state) <= tolerance<T>(p.terms()));
}

constexpr Index token_counts[] = {0, 1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 127, 128, 129, 257, 1000, 1024};

TEST_CASE_TEMPLATE("every length, with kernels shorter, equal and longer, matches the sums", T, float, double) {
  for (Index tokens : token_counts) {
    const Index channels = tokens < 200 ? 19 : 3;  // a whole packet and a part of one, or a part
    for (Index taps : {Index(1), tokens / 2 + 1, tokens + 1, tokens + tokens / 2 + 2})
      check_against_reference<T>({2, tokens, channels, taps, 0, false, taps % 2 == 0});
  }
}

TEST_CASE_TEMPLATE("two-sided kernels and earlier inputs match the sums", T, float, double) {
  for (Index tokens : {0, 1, 3, 16, 31, 33, 64, 100, 129}) {
    for (Index back : {Index(1), tokens / 2 + 1, 2 * tokens + 3}) {
      check_against_reference<T>({1, tokens, 17, tokens / 2 + 1, back, false, true});
      for (Index taps : {Index(1), tokens / 2 + 1, tokens + 1, 2 * tokens + 5})
        check_against_reference<T>({2, tokens, 5, taps, back, true, false});
    }
    for (Index taps : {Index(1), tokens / 2 + 1, tokens + 1, 3 * tokens + 5})
      check_against_reference<T>({1, tokens, 17, taps, 0, true, true});
  }
}

TEST_CASE_TEMPLATE("16-bit elements are summed in float", T, Eigen::bfloat16, Eigen::half) {
  check_against_reference<T>({2, 100, 19, 100, 0, false, true});
  check_against_reference<T>({1, 64, 32, 20, 7, true, false});
}

TEST_CASE("no sequences and no channels are legal") {
  check_against_reference<float>({0, 8, 5, 4, 2, true, true});
  check_against_reference<float>({2, 8, 0, 4, 0, false, true});
}

TEST_CASE("an impulse gives the kernel back") {
  constexpr Index tokens = 96, channels = 16;
  Tensor<double, 3> x(Index(1), tokens, channels), y = nan_tensor<double>(1, tokens, channels);
  for (Index d = 0; d < channels; ++d) x(0, 40, d) = 1;
  const auto taps = random_tensor<double>(1, channels, tokens), back_taps = random_tensor<double>(2, channels, tokens);
  REQUIRE(cpu::long_conv(LongConvArgs<double>{.x = x, .taps = taps, .back_taps = back_taps, .y = y}).ok());
  for (Index t = 0; t < tokens; ++t)
    for (Index d = 0; d < channels; ++d) {
      const double want = t >= 40 ? taps(d, t - 40) : back_taps(d, 39 - t);
      CHECK(y(0, t, d) == doctest::Approx(want).epsilon(1e-13));
    }
}

TEST_CASE("pieces that pass the state equal one call") {
  const Shape whole{2, 150, 20, 70, 0, true, true};
  const Problem<double> p(whole);
  Forward<double> want(whole);
  REQUIRE(cpu::long_conv(want.into(p.args())).ok());
  Tensor<double, 3> y = nan_tensor<double>(2, 150, 20), state = p.state;
  for (Index begin : {0, 1, 8, 100, 100}) {
    const Index end = begin == 0 ? 1 : begin == 1 ? 8 : begin == 8 ? 100 : 150;
    LongConvArgs<double> a = p.args();
    if (begin == 100 && !std::isnan(y(0, 149, 0))) break;
    a.x = run(a.x, 1, begin, end - begin), a.y = run(y.view(), 1, begin, end - begin);
    a.initial_state = state, a.final_state = state;  // in place
    REQUIRE(cpu::long_conv(a).ok());
  }
  CHECK(relative_error(y, want.y) < tolerance<double>(70));
  CHECK(relative_error(state, want.final_state) == 0);
}

template <class T>
void check_steps(Index batch, Index tokens, Index channels, Index taps, Index ring, bool channel_major) {
  const Shape shape{batch, tokens, channels, taps, 0, false, true};
  CAPTURE(shape);
  const Problem<T> p(shape);
  const Problem<double> exact = p.in_double();
  Tensor<double, 3> want(batch, tokens, channels);
  const auto a = exact.args();
  reference::long_conv(a.x, a.taps, {}, a.skip, {}, want, {});
  Tensor<T, 3> y = nan_tensor<T>(batch, tokens, channels), memory = nan_tensor<T>(batch, ring, channels);
  const auto ring_view =
      channel_major ? transposed(contiguous(memory.data(), batch, channels, ring), 1, 2) : memory.view();
  for (Index t = 0; t < tokens; ++t) {
    const auto y_t = slice_axis<1>(y.view(), t);
    test::for_each_index(y_t, [&](auto... i) { y_t(i...) = slice_axis<1>(p.x.view(), t)(i...); });
    REQUIRE(
        cpu::long_conv_step(
            LongConvStepArgs<T>{.x = y_t, .taps = p.taps, .skip = p.skip, .y = y_t, .ring = ring_view, .position = t})
            .ok());
  }
  CHECK(relative_error(y, want) <= tolerance<T>(taps + 1));
}

TEST_CASE_TEMPLATE("token by token equals the whole, whatever the ring", T, float, double, Eigen::bfloat16) {
  check_steps<T>(1, 40, 19, 1, 1, false);
  check_steps<T>(2, 40, 16, 9, 9, false);
  check_steps<T>(9, 150, 35, 70, 70, false);
  check_steps<T>(1, 150, 5, 129, 140, false);
  check_steps<T>(2, 60, 32, 70, 100, true);
}

TEST_CASE("a step refuses a ring that is too short") {
  const Problem<float> p({1, 4, 3, 5, 0, false, false});
  Tensor<float, 2> y(Index(1), Index(3));
  Tensor<float, 3> ring(Index(1), Index(4), Index(3));
  LongConvStepArgs<float> a{.x = slice_axis<1>(p.x.view(), 0), .taps = p.taps, .y = y, .ring = ring};
  CHECK(cpu::long_conv_step(a).code == Code::bad_shape);
  a.taps = run(a.taps, 1, 0, 4);
  CHECK(cpu::long_conv_step(a).code == Code::ok);
  a.position = -1;
  CHECK(cpu::long_conv_step(a).code == Code::bad_value);
  a.position = 0, a.ring.data = nullptr;
  CHECK(cpu::long_conv_step(a).code == Code::bad_shape);
}

TEST_CASE("a later token never reaches an earlier output of a causal kernel") {
  const Shape shape{1, 64, 16, 64, 0, false, false};
  Problem<double> p(shape);
  Forward<double> before(shape), after(shape);
  REQUIRE(cpu::long_conv(before.into(p.args())).ok());
  for (Index d = 0; d < 16; ++d) p.x(0, 40, d) += 1e3;
  REQUIRE(cpu::long_conv(after.into(p.args())).ok());
  const auto head = [](Tensor<double, 3>& y) { return run(y.view(), 1, 0, 40); };
  CHECK(relative_error(head(after.y), head(before.y)) < 1e-12);
  CHECK(relative_error(after.y, before.y) > 1);
}

TEST_CASE("any strides: channel-major, broadcast and reversed views") {
  for (Index channels : {5, 16, 35}) {
    const Shape shape{2, 70, channels, 70, 9, true, true};
    const Problem<float> p(shape);
    Forward<float> want(shape), unused(shape);
    Gradients<float> want_gradients(shape);
    REQUIRE(cpu::long_conv(want.into(p.args())).ok());
    REQUIRE(cpu::long_conv_backward(want_gradients.into(p.backward_args())).ok());

    const auto channel_major = [](const auto& tensor) {
      auto copy = tensor;
      auto view =
          transposed(contiguous(copy.data(), tensor.extents()[0], tensor.extents()[2], tensor.extents()[1]), 1, 2);
      test::for_each_index(view, [&](auto... i) { view(i...) = tensor(i...); });
      return std::pair(std::move(copy), view);
    };
    const auto [x, x_view] = channel_major(p.x);
    const auto [grad_y, grad_y_view] = channel_major(p.grad_y);
    const auto [y, y_view] = channel_major(nan_tensor<float>(2, 70, channels));
    const auto [grad_x, grad_x_view] = channel_major(nan_tensor<float>(2, 70, channels));
    Tensor<float, 2> taps = nan_tensor<float>(70, channels), grad_taps = nan_tensor<float>(70, channels);
    const auto taps_view = transposed(taps.view(), 0, 1);
    test::for_each_index(taps_view, [&](auto... i) { taps_view(i...) = p.taps(i...); });

    LongConvArgs<float> a = unused.into(p.args());
    a.x = x_view, a.taps = taps_view, a.y = y_view;
    REQUIRE(cpu::long_conv(a).ok());
    CHECK(relative_error(y_view, want.y.view()) == 0);

    Gradients<float> got(shape);
    LongConvBackwardArgs<float> g = got.into(p.backward_args());
    g.x = x_view, g.taps = taps_view, g.grad_y = grad_y_view;
    g.grad_x = grad_x_view, g.grad_taps = transposed(grad_taps.view(), 0, 1);
    REQUIRE(cpu::long_conv_backward(g).ok());
    CHECK(relative_error(grad_x_view, want_gradients.x.view()) == 0);
    CHECK(relative_error(g.grad_taps, want_gradients.taps.view()) == 0);
    CHECK(relative_error(got.state, want_gradients.state) == 0);
  }
  // Time run backwards turns a causal kernel into one that looks ahead.
  const Shape shape{1, 40, 16, 40, 0, false, false};
  const Problem<double> p(shape);
  Tensor<double, 3> y = nan_tensor<double>(1, 40, 16), want = nan_tensor<double>(1, 40, 16);
  const Tensor<double, 2> zero(Index(16), Index(1));
  REQUIRE(cpu::long_conv(LongConvArgs<double>{.x = reversed(p.x.view(), 1), .taps = p.taps, .y = reversed(y.view(), 1)})
              .ok());
  REQUIRE(cpu::long_conv(
              LongConvArgs<double>{
                  .x = p.x, .taps = run(p.taps.view(), 1, 0, 1), .back_taps = run(p.taps.view(), 1, 1, 39), .y = want})
              .ok());
  CHECK(relative_error(y, want) < tolerance<double>(40));
}

TEST_CASE("the backward pass is the transpose of the forward pass") {
  for (const Shape& shape : {Shape{2, 1000, 3, 1000, 500, false, true}, Shape{1, 257, 20, 300, 0, true, true}}) {
    CAPTURE(shape);
    const Problem<double> p(shape);
    Forward<double> forward(shape);
    Gradients<double> gradients(shape);
    REQUIRE(cpu::long_conv(forward.into(p.args())).ok());
    REQUIRE(cpu::long_conv_backward(gradients.into(p.backward_args())).ok());
    const double through = test::weighted_sum<3>(forward.y, p.grad_y);
    double back = test::weighted_sum<3>(gradients.x, p.x);
    if (shape.state) back += test::weighted_sum<3>(gradients.state, p.state);
    CHECK(std::abs(through - back) < 1e-12 * p.x.size());
    double kernel = test::weighted_sum<2>(gradients.taps, p.taps) + test::weighted_sum<1>(gradients.skip, p.skip);
    if (shape.back_taps > 0) kernel += test::weighted_sum<2>(gradients.back_taps, p.back_taps);
    CHECK(std::abs(through - kernel) < 1e-12 * p.x.size());
  }
}

TEST_CASE("gradients match finite differences") {
  const Shape shape{2, 9, 3, 7, 4, true, true};
  Problem<double> p(shape);
  Gradients<double> g(shape);
  REQUIRE(cpu::long_conv_backward(g.into(p.backward_args())).ok());
  const auto loss = [&] {
    Forward<double> forward(shape);
    REQUIRE(cpu::long_conv(forward.into(p.args()), SerialExecutor{}).ok());
    return test::weighted_sum<3>(forward.y, p.grad_y);
  };
  CHECK(test::gradient_error<3>(loss, p.x, g.x) < test::gradient_tolerance);
  CHECK(test::gradient_error<2>(loss, p.taps, g.taps) < test::gradient_tolerance);
  CHECK(test::gradient_error<2>(loss, p.back_taps, g.back_taps) < test::gradient_tolerance);
  CHECK(test::gradient_error<1>(loss, p.skip, g.skip) < test::gradient_tolerance);
  CHECK(test::gradient_error<3>(loss, p.state, g.state) < test::gradient_tolerance);
}

/// Runs tasks last to first, each on another worker.
struct BackwardsExecutor {
  int count;
  int workers() const { return count; }
  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index task = tasks - 1; task >= 0; --task) f(task, int(task % count));
  }
};

TEST_CASE("the bits do not depend on the workers") {
  for (const Shape& shape : {Shape{5, 100, 20, 100, 0, false, true}, Shape{3, 40, 300, 60, 10, true, false}}) {
    const Problem<float> p(shape);
    Forward<float> one(shape), many(shape);
    REQUIRE(cpu::long_conv(one.into(p.args()), SerialExecutor{}).ok());
    REQUIRE(cpu::long_conv(many.into(p.args()), BackwardsExecutor{7}).ok());
    CHECK(std::equal(one.y.begin(), one.y.end(), many.y.begin()));
    Gradients<float> g_one(shape), g_many(shape);
    REQUIRE(cpu::long_conv_backward(g_one.into(p.backward_args()), SerialExecutor{}).ok());
    REQUIRE(cpu::long_conv_backward(g_many.into(p.backward_args()), BackwardsExecutor{7}).ok());
    CHECK(std::equal(g_one.x.begin(), g_one.x.end(), g_many.x.begin()));
    CHECK(std::equal(g_one.taps.begin(), g_one.taps.end(), g_many.taps.begin()));
    CHECK(std::equal(g_one.back_taps.begin(), g_one.back_taps.end(),
                     shape.back_taps > 0 ? g_many.back_taps.begin() : g_one.back_taps.begin()));
    CHECK(std::equal(g_one.skip.begin(), g_one.skip.end(), g_many.skip.begin()));
  }
}

TEST_CASE("each absent gradient leaves the others as they are") {
  const Shape shape{2, 50, 18, 30, 5, true, true};
  const Problem<float> p(shape);
  Gradients<float> want(shape);
  REQUIRE(cpu::long_conv_backward(want.into(p.backward_args())).ok());
  for (int only = 0; only < 5; ++only) {
    Gradients<float> got(shape);
    LongConvBackwardArgs<float> a = got.into(p.backward_args());
    if (only != 0) a.grad_x = {};
    if (only != 1) a.grad_taps = {};
    if (only != 2) a.grad_back_taps = {};
    if (only != 3) a.grad_skip = {};
    if (only != 4) a.grad_initial_state = {};
    REQUIRE(cpu::long_conv_backward(a).ok());
    if (only == 0) CHECK(relative_error(got.x, want.x) == 0);
    if (only == 1) CHECK(relative_error(got.taps, want.taps) == 0);
    if (only == 2) CHECK(relative_error(got.back_taps, want.back_taps) == 0);
    if (only == 3) CHECK(relative_error(got.skip, want.skip) == 0);
    if (only == 4) CHECK(relative_error(got.state, want.state) == 0);
  }
}

TEST_CASE("a spectrum made once serves every shorter call") {
  const Shape shape{2, 90, 20, 120, 11, true, true};
  const Problem<double> p(shape);
  const auto args = p.args();
  const auto with_state = cpu::kernel_spectrum(args.taps, args.back_taps, 90, SerialExecutor{}, {.with_state = true});
  const auto without = cpu::kernel_spectrum(p.taps.view(), {}, 90, SerialExecutor{});
  REQUIRE(with_state.status().ok());
  REQUIRE(without.status().ok());
  for (Index tokens : {1, 40, 90}) {
    Shape part = shape;
    part.tokens = tokens;
    Problem<double> q(part);
    q.taps = p.taps, q.back_taps = p.back_taps;
    Forward<double> got(part), want(part);
    REQUIRE(cpu::long_conv(want.into(q.args())).ok());
    LongConvArgs<double> a = got.into(q.args());
    a.taps = {}, a.back_taps = {};
    REQUIRE(cpu::long_conv(a, with_state).ok());
    CHECK(relative_error(got.y, want.y) < tolerance<double>(120));

    Gradients<double> got_gradients(part), want_gradients(part);
    REQUIRE(cpu::long_conv_backward(want_gradients.into(q.backward_args())).ok());
    LongConvBackwardArgs<double> g = got_gradients.into(q.backward_args());
    g.taps = {}, g.back_taps = {};
    REQUIRE(cpu::long_conv_backward(g, with_state).ok());
    CHECK(relative_error(got_gradients.x, want_gradients.x) < tolerance<double>(120));
    CHECK(relative_error(got_gradients.taps, want_gradients.taps) < tolerance<double>(120));
    CHECK(relative_error(got_gradients.back_taps, want_gradients.back_taps) < tolerance<double>(120));
    CHECK(relative_error(got_gradients.state, want_gradients.state) < tolerance<double>(120));

    part.state = false, part.back_taps = 0;
    q.shape = part;
    Forward<double> causal(part), causal_want(part);
    REQUIRE(cpu::long_conv(causal_want.into(q.args())).ok());
    REQUIRE(cpu::long_conv(causal.into(q.args()), without).ok());
    CHECK(relative_error(causal.y, causal_want.y) < tolerance<double>(120));
  }
  Forward<double> out(shape);
  CHECK(cpu::long_conv(out.into(p.args()), without).code == Code::bad_value);
  CHECK(cpu::long_conv(out.into(p.args()), cpu::KernelSpectrum<double>{}).code == Code::bad_value);
  const auto short_one = cpu::kernel_spectrum(p.taps.view(), {}, 89, SerialExecutor{}, {.with_state = true});
  CHECK(cpu::long_conv(out.into(p.args()), short_one).code == Code::bad_shape);
  const auto refused = cpu::kernel_spectrum(TensorView<const double, 2>{}, {}, 8, SerialExecutor{});
  CHECK(refused.status().code == Code::bad_shape);
}

TEST_CASE("a sum over 65536 tokens keeps six digits") {
  constexpr Index tokens = 65536, channels = 16;
  const auto x = random_tensor<float>(1, 1, tokens, channels);
  const auto taps = random_tensor<float>(2, channels, tokens);
  Tensor<float, 3> y = nan_tensor<float>(1, tokens, channels);
  REQUIRE(cpu::long_conv(LongConvArgs<float>{.x = x, .taps = taps, .y = y}).ok());
  double difference = 0, norm = 0;
  for (Index t = 0; t < tokens; t += t < 16 ? 1 : 1021)
    for (Index d : {0, 7, 15}) {
      double want = 0;
      for (Index j = 0; j <= t; ++j) want += double(taps(d, j)) * double(x(0, t - j, d));
      difference += (y(0, t, d) - want) * (y(0, t, d) - want), norm += want * want;
    }
  CHECK(std::sqrt(difference / norm) < 1e-6);
}

TEST_CASE("results that go past the caches are the same") {
  const Shape shape{1, 66000, 32, 50, 0, false, false};  // 8 MB and a little
  const Problem<float> p(shape);
  const Index size = shape.tokens * shape.channels;
  std::vector<float> shifted(std::size_t(size + 32), 7.0f);
  float* const odd = shifted.data() + (reinterpret_cast<std::uintptr_t>(shifted.data()) % 64 == 0 ? 1 : 0);
  const auto by_cache = contiguous(odd, shape.batch, shape.tokens, shape.channels);
  Tensor<float, 3> streamed = nan_tensor<float>(shape.batch, shape.tokens, shape.channels);
  LongConvArgs<float> a = p.args();
  a.y = streamed;
  REQUIRE(cpu::long_conv<whole>(a).ok());
  a.y = by_cache;
  REQUIRE(cpu::long_conv<whole>(a).ok());
  CHECK(std::equal(streamed.begin(), streamed.end(), odd));
  CHECK(odd[size] == 7.0f);

  LongConvBackwardArgs<float> b = p.backward_args();
  b.grad_x = streamed;
  REQUIRE(cpu::long_conv_backward<whole>(b).ok());
  b.grad_x = by_cache;
  REQUIRE(cpu::long_conv_backward<whole>(b).ok());
  CHECK(std::equal(streamed.begin(), streamed.end(), odd));
  CHECK(odd[size] == 7.0f);
}

TEST_CASE("what does not fit together is refused") {
  const Shape shape{2, 10, 4, 5, 3, true, true};
  const Problem<float> p(shape);
  const auto refuses = [&](auto&& change) {
    Forward<float> out(shape);
    LongConvArgs<float> a = out.into(p.args());
    change(a);
    return cpu::long_conv(a).code;
  };
  CHECK(refuses([](auto&) {}) == Code::ok);
  CHECK(refuses([](auto& a) { a.x.data = nullptr; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.taps.extents[0] = 3; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.taps.extents[1] = 0; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.back_taps.extents[0] = 3; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.skip.extents[0] = 3; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.y.extents[1] = 9; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.y.strides[0] = 0; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.initial_state.extents[1] = 5; }) == Code::bad_shape);
  CHECK(refuses([](auto& a) { a.final_state.extents[1] = 5; }) == Code::bad_shape);

  const auto refuses_backward = [&](auto&& change) {
    Gradients<float> out(shape);
    LongConvBackwardArgs<float> a = out.into(p.backward_args());
    change(a);
    return cpu::long_conv_backward(a).code;
  };
  CHECK(refuses_backward([](auto&) {}) == Code::ok);
  CHECK(refuses_backward([](auto& a) { a.x.data = nullptr; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_y.extents[0] = 1; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_x.extents[0] = 1; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_taps.extents[1] = 4; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_back_taps.extents[1] = 4; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_skip.strides[0] = 0; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.initial_state.extents[2] = 3; }) == Code::bad_shape);
  CHECK(refuses_backward([](auto& a) { a.grad_initial_state.extents[2] = 3; }) == Code::bad_shape);
}

}  // namespace
}  // namespace chela
