// The ways of evaluating one long convolution, and what all of them must honour: states and their gradients, ragged
// batches, partial kernels.
#include <doctest/doctest.h>

#include <complex>
#include <string>
#include <vector>

#include "chela/cpu/conv/long.hpp"
#include "chela/reference/long.hpp"
#include "conv/long_problem.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

namespace chela {
namespace {

using namespace test;

template <LongConvPolicy P, class T>
void check_strategy(const LongShape& shape) {
  CAPTURE(shape);
  const LongProblem<T> p(shape);
  const LongProblem<double> exact = p.in_double();
  LongForward<T> got(shape);
  LongForward<double> want(shape);
  const auto a = exact.args();
  reference::long_conv(a.x, a.taps, a.back_taps, a.skip, a.initial_state, want.y, want.final_state);
  REQUIRE(cpu::long_conv<P>(got.into(p.args())).ok());
  CHECK(relative_error(got.y, want.y) <= tolerance<T>(p.terms()));
  CHECK(relative_error(got.final_state, want.final_state) == 0);

  const auto grad_final = random_tensor<T>(8, shape.batch, shape.taps - 1, shape.channels);
  const auto exact_grad_final = converted<double>(grad_final.view());
  LongGradients<T> gradients(shape);
  LongGradients<double> want_gradients(shape);
  const auto b = exact.backward_args();
  reference::long_conv_backward(b.x, b.taps, b.back_taps, b.skip, b.initial_state, b.grad_y, want_gradients.x,
                                want_gradients.taps, want_gradients.back_taps, want_gradients.skip,
                                want_gradients.state, exact_grad_final);
  LongConvBackwardArgs<T> args = gradients.into(p.backward_args());
  args.grad_final_state = grad_final;
  REQUIRE(cpu::long_conv_backward<P>(args).ok());
  const Index kernel_terms = shape.batch * shape.tokens;
  CHECK(relative_error(gradients.x, want_gradients.x) <= 2 * tolerance<T>(p.terms()));
  CHECK(relative_error(gradients.taps, want_gradients.taps) <= tolerance<Accumulator<T>>(kernel_terms));
  CHECK(relative_error(gradients.skip, want_gradients.skip) <= tolerance<Accumulator<T>>(kernel_terms));
  if (shape.back_taps > 0)
    CHECK(relative_error(gradients.back_taps, want_gradients.back_taps) <= tolerance<Accumulator<T>>(kernel_terms));
  if (shape.state) CHECK(relative_error(gradients.state, want_gradients.state) <= 2 * tolerance<T>(p.terms()));
}

TEST_CASE_TEMPLATE("every way gives the sums and their gradients", T, float, double, Eigen::bfloat16) {
  for (Index tokens : {0, 1, 7, 8, 9, 33, 100, 129})
    for (Index taps : {Index(1), Index(5), Index(32), tokens + 1, 2 * tokens + 3})
      for (bool state : {false, true}) {
        const LongShape causal{2, tokens, taps % 2 == 0 ? 16 : 19, taps, 0, state, true};
        check_strategy<direct, T>(causal);
        check_strategy<whole, T>(causal);
        check_strategy<blocks, T>(causal);
        check_strategy<LongConvPolicy{}, T>(causal);
        const LongShape two_sided{1, tokens, 17, taps, tokens / 2 + 1, state, false};
        check_strategy<direct, T>(two_sided);
        check_strategy<blocks, T>(two_sided);  // which looks ahead: the whole at once
      }
}

TEST_CASE_TEMPLATE("a backward call that wants no gradient does nothing", P, LongConvPolicyConstant<direct>,
                   LongConvPolicyConstant<whole>, LongConvPolicyConstant<blocks>) {
  const LongProblem<float> p({2, 70, 17, 33, 0, true, true});
  CHECK(cpu::long_conv_backward<P::value>(p.backward_args()).ok());
}

TEST_CASE("a root that splits in six") {
  check_strategy<whole, float>({1, 330, 17, 330, 0, false, true});
  check_strategy<whole, double>({1, 160, 3, 200, 30, true, true});
}

TEST_CASE("the sums go chunk by chunk") {
  check_strategy<direct, float>({1, 1030, 3, 20, 9, true, true});
  check_strategy<direct, float>({2, 512, 16, 520, 0, false, false});
  check_strategy<direct, double>({1, 513, 5, 3, 600, true, false});
}

TEST_CASE("the choice follows from sizes") {
  const auto method = [](Index tokens, Index taps, Index back = 0) {
    return choose_long_conv(LongConvPolicy{}, tokens, taps, back, false).method;
  };
  CHECK(method(50, 50) == LongConvMethod::direct);
  CHECK(method(64, 64) == LongConvMethod::transform);
  CHECK(method(100, 100) == LongConvMethod::transform);
  CHECK(method(1 << 20, 28) == LongConvMethod::direct);
  CHECK(method(1 << 20, 100) == LongConvMethod::blocks);
  CHECK(method(1 << 20, 100, 100) == LongConvMethod::transform);
  CHECK(method(1000, 700) == LongConvMethod::transform);  // two blocks would take more points
  CHECK(choose_long_conv(LongConvPolicy{}, 4096, 1000, 0, false).points == 1024);
  for (Index tokens = 1; tokens < 3000; ++tokens) {
    const Index points = choose_long_conv(whole, tokens, tokens, 0, false).points;
    CHECK(points >= tokens);
    if (tokens > 48) CHECK(double(points) <= 1.34 * double(tokens));
    if (tokens > 512) CHECK(double(points) <= 1.21 * double(tokens));
  }
}

TEST_CASE("a kernel made ready keeps its way") {
  const LongShape shape{2, 150, 20, 40, 0, true, true};
  const LongProblem<double> p(shape);
  LongForward<double> want(shape);
  LongGradients<double> want_gradients(shape);
  REQUIRE(cpu::long_conv<whole>(want.into(p.args())).ok());
  REQUIRE(cpu::long_conv_backward<whole>(want_gradients.into(p.backward_args())).ok());
  const auto check_with = [&](const cpu::KernelSpectrum<double>& kernel, LongConvMethod method) {
    CHECK(kernel.method() == method);
    LongForward<double> got(shape);
    LongGradients<double> gradients(shape);
    REQUIRE(cpu::long_conv(got.into(p.args()), kernel).ok());
    REQUIRE(cpu::long_conv_backward(gradients.into(p.backward_args()), kernel).ok());
    CHECK(relative_error(got.y, want.y) < tolerance<double>(40));
    CHECK(relative_error(gradients.x, want_gradients.x) < tolerance<double>(40));
    CHECK(relative_error(gradients.taps, want_gradients.taps) < tolerance<double>(300));
    CHECK(relative_error(gradients.state, want_gradients.state) < tolerance<double>(40));
  };
  const auto taps = p.taps.view();
  check_with(cpu::kernel_spectrum<direct>(taps, {}, 150, SerialExecutor{}, {.with_state = true}),
             LongConvMethod::direct);
  check_with(cpu::kernel_spectrum<blocks>(taps, {}, 150, SerialExecutor{}, {.with_state = true}),
             LongConvMethod::blocks);
  check_with(cpu::kernel_spectrum(taps, {}, 150, SerialExecutor{}, {.with_state = true}), LongConvMethod::transform);
}

template <LongConvPolicy P>
void check_partial() {
  const LongShape shape{2, 90, 18, 60, 0, true, true};
  LongProblem<double> p(shape);
  LongForward<double> got(shape), want(shape);
  LongGradients<double> got_gradients(shape), want_gradients(shape);
  REQUIRE(cpu::long_conv<P>(got.into(p.args())).ok());
  REQUIRE(cpu::long_conv_backward<P>(got_gradients.into(p.backward_args())).ok());
  for (Index d = 0; d < shape.channels; ++d)
    for (Index j = P.taps; j < shape.taps; ++j) p.taps(d, j) = 0;
  REQUIRE(cpu::long_conv<whole>(want.into(p.args())).ok());
  REQUIRE(cpu::long_conv_backward<whole>(want_gradients.into(p.backward_args())).ok());
  CHECK(relative_error(got.y, want.y) < tolerance<double>(60));
  CHECK(relative_error(got.final_state, want.final_state) == 0);
  CHECK(relative_error(got_gradients.x, want_gradients.x) < tolerance<double>(60));
  const auto head = [](auto& taps) { return run(taps.view(), 1, 0, P.taps); };
  CHECK(relative_error(head(got_gradients.taps), head(want_gradients.taps)) < tolerance<double>(180));
  for (Index d = 0; d < shape.channels; ++d)
    for (Index j = P.taps; j < shape.taps; ++j) CHECK(got_gradients.taps(d, j) == 0);
  CHECK(relative_error(got_gradients.state, want_gradients.state) < tolerance<double>(60));
}

TEST_CASE("a partial kernel is one with zeros, at less work") {
  check_partial<LongConvPolicy{.method = LongConvMethod::direct, .taps = 20}>();
  check_partial<LongConvPolicy{.method = LongConvMethod::transform, .taps = 20}>();
  check_partial<LongConvPolicy{.method = LongConvMethod::blocks, .least_block = 32, .taps = 20}>();
  constexpr LongConvPolicy partial{.taps = 1000};
  CHECK(choose_long_conv(partial, 65536, 1000, 0, false).points == 1024);
}

template <int Eighths>
constexpr LongConvPolicy sparse{.eighths = Eighths};

/// The product of one channel's inputs and taps at the kept roots of x^N - i, turned back, as sums.
std::vector<double> low_frequencies(const LongProblem<double>& p, Index n, int eighths) {
  const double circle = 2 * std::acos(-1.0);
  std::vector<double> y(std::size_t(p.shape.tokens));
  for (Index q = 0; q < n; ++q) {
    const Index octant = 8 * q / n;
    if (octant >= eighths / 2 && octant < 8 - eighths / 2) continue;
    const double angle = circle * (double(q) + 0.25) / double(n);
    std::complex<double> x = 0, k = 0;
    for (Index t = 0; t < p.shape.tokens; ++t) {
      x += std::polar(p.x(0, t, 0), angle * double(t));
      k += std::polar(p.taps(0, t), angle * double(t));
    }
    for (Index t = 0; t < p.shape.tokens; ++t)
      y[std::size_t(t)] += (x * k * std::polar(1.0, -angle * double(t))).real() / double(n);
  }
  return y;
}

template <int Eighths>
void check_sparse(Index tokens) {
  CAPTURE(tokens);
  constexpr LongConvPolicy policy = sparse<Eighths>;
  const LongShape shape{1, tokens, 3, tokens, 0, false, false};
  const LongProblem<double> p(shape);
  LongForward<double> got(shape), with_spectrum(shape);
  REQUIRE(cpu::long_conv<policy>(got.into(p.args())).ok());
  const auto want = low_frequencies(p, right_angle_size(tokens).points, Eighths);
  double difference = 0;
  for (Index t = 0; t < tokens; ++t) difference = std::max(difference, std::abs(got.y(0, t, 0) - want[std::size_t(t)]));
  CHECK(difference < 1e-11);
  const auto spectrum = cpu::kernel_spectrum<policy>(p.taps.view(), {}, tokens, SerialExecutor{});
  REQUIRE(cpu::long_conv(with_spectrum.into(p.args()), spectrum).ok());
  CHECK(relative_error(with_spectrum.y, got.y) == 0);

  LongGradients<double> g(shape);
  REQUIRE(cpu::long_conv_backward<policy>(g.into(p.backward_args())).ok());
  const double y = weighted_sum<3>(got.y, p.grad_y);
  CHECK(weighted_sum<3>(g.x, p.x) == doctest::Approx(y).epsilon(1e-11));
  CHECK(weighted_sum<2>(g.taps, p.taps) == doctest::Approx(y).epsilon(1e-11));
}

TEST_CASE("frequency-sparse kernels drop frequencies, at less work") {
  for (Index tokens : {32, 50, 64, 90, 128, 144}) {
    check_sparse<2>(tokens);
    check_sparse<4>(tokens);
    check_sparse<6>(tokens);
  }
}

/// Against the dense kernel, one as smooth as a sum of slow exponentials.
template <int Eighths>
double sparse_error(Index tokens) {
  const LongShape shape{1, tokens, 4, tokens, 0, false, false};
  LongProblem<double> p(shape);
  for (Index d = 0; d < 4; ++d)
    for (Index j = 0; j < tokens; ++j) {
      const double u = double(j) / (40.0 * double(d + 1));
      p.taps(d, j) = u * std::exp(-u);
    }
  LongForward<double> got(shape), want(shape);
  REQUIRE(cpu::long_conv(want.into(p.args())).ok());
  REQUIRE(cpu::long_conv<sparse<Eighths>>(got.into(p.args())).ok());
  return relative_error(got.y, want.y);
}

TEST_CASE("the fewer frequencies, the further from the dense kernel; a smooth one hardly changes") {
  const double two = sparse_error<2>(1024), four = sparse_error<4>(1024), six = sparse_error<6>(1024);
  MESSAGE("relative error against dense with 2, 4 and 6 eighths: " << two << ", " << four << ", " << six);
  CHECK(six < four);
  CHECK(four < two);
  CHECK(two < 5e-3);
  CHECK(sparse_error<8>(1024) < 1e-14);
}

/// Packed sequences against each alone.
template <LongConvPolicy P>
void check_ragged(const std::vector<std::int64_t>& offsets, Index taps, Index back_taps) {
  const Index total = offsets.back(), sequences = Index(offsets.size()) - 1, channels = 19;
  LongProblem<double> p({1, total, channels, taps, back_taps, false, true});
  const auto state = random_tensor<double>(9, sequences, taps - 1, channels);
  const auto grad_final = random_tensor<double>(10, sequences, taps - 1, channels);
  const IndexView cu_seqlens(offsets.data(), Index(offsets.size()));
  auto y = nan_tensor<double>(1, total, channels), final_state = nan_tensor<double>(sequences, taps - 1, channels);
  auto grad_state = nan_tensor<double>(sequences, taps - 1, channels);
  LongConvArgs<double> a = p.args();
  a.y = y, a.initial_state = state, a.final_state = final_state, a.cu_seqlens = cu_seqlens;
  REQUIRE(cpu::long_conv<P>(a).ok());
  LongGradients<double> g(p.shape);
  LongConvBackwardArgs<double> b = g.into(p.backward_args());
  b.initial_state = state, b.grad_final_state = grad_final, b.grad_initial_state = grad_state;
  b.cu_seqlens = cu_seqlens;
  REQUIRE(cpu::long_conv_backward<P>(b).ok());

  Tensor<double, 2> sum_taps(channels, taps), sum_back(channels, back_taps);
  for (Index i = 0; i < sequences; ++i) {
    const Index begin = offsets[std::size_t(i)], count = offsets[std::size_t(i) + 1] - begin;
    CAPTURE(i);
    CAPTURE(count);
    LongConvArgs<double> one = p.args();
    auto y_one = nan_tensor<double>(1, count, channels), final_one = nan_tensor<double>(1, taps - 1, channels);
    one.x = run(a.x, 1, begin, count), one.y = y_one, one.final_state = final_one;
    one.initial_state = run(state.view(), 0, i, 1);
    REQUIRE(cpu::long_conv<direct>(one).ok());
    CHECK(relative_error(run(y.view(), 1, begin, count), y_one.view()) < tolerance<double>(taps + back_taps));
    CHECK(relative_error(run(final_state.view(), 0, i, 1), final_one.view()) == 0);

    LongGradients<double> g_one({1, count, channels, taps, back_taps, true, true});
    LongConvBackwardArgs<double> back = g_one.into(p.backward_args());
    back.x = one.x, back.grad_y = run(b.grad_y, 1, begin, count), back.initial_state = one.initial_state;
    back.grad_final_state = run(grad_final.view(), 0, i, 1);
    REQUIRE(cpu::long_conv_backward<direct>(back).ok());
    CHECK(relative_error(run(g.x.view(), 1, begin, count), g_one.x.view()) < tolerance<double>(taps + back_taps));
    CHECK(relative_error(run(grad_state.view(), 0, i, 1), g_one.state.view()) < tolerance<double>(taps));
    for (Index d = 0; d < channels; ++d) {
      for (Index j = 0; j < taps; ++j) sum_taps(d, j) += g_one.taps(d, j);
      for (Index j = 0; j < back_taps; ++j) sum_back(d, j) += g_one.back_taps(d, j);
    }
  }
  CHECK(relative_error(g.taps, sum_taps) < tolerance<double>(total));
  if (back_taps > 0) CHECK(relative_error(g.back_taps, sum_back) < tolerance<double>(total));
}

TEST_CASE("packed sequences are as each alone") {
  const std::vector<std::int64_t> lengths{0, 0, 1, 4, 104, 104, 500, 501, 701};
  check_ragged<LongConvPolicy{}>(lengths, 70, 0);
  check_ragged<LongConvPolicy{}>(lengths, 9, 3);
  check_ragged<LongConvPolicy{.direct_products = 0}>(lengths, 300, 120);
  check_ragged<blocks>(lengths, 30, 0);
  check_ragged<direct>(lengths, 30, 5);
  check_ragged<LongConvPolicy{}>({0, 0, 0}, 5, 2);
}

TEST_CASE("a given spectrum serves packed sequences, and refuses longer ones") {
  const LongProblem<double> p({1, 120, 5, 50, 0, false, false});
  const std::int32_t offsets[] = {0, 70, 120};
  auto y = nan_tensor<double>(1, 120, 5), want = nan_tensor<double>(1, 120, 5);
  LongConvArgs<double> a = p.args();
  a.cu_seqlens = IndexView(offsets, 3), a.y = want;
  REQUIRE(cpu::long_conv(a).ok());
  a.y = y;
  const auto enough = cpu::kernel_spectrum(p.taps.view(), {}, 70, SerialExecutor{});
  const auto short_one = cpu::kernel_spectrum(p.taps.view(), {}, 69, SerialExecutor{});
  REQUIRE(cpu::long_conv(a, enough).ok());
  CHECK(relative_error(y, want) < tolerance<double>(50));
  CHECK(cpu::long_conv(a, short_one).code == Code::bad_shape);
}

TEST_CASE("malformed offsets are refused before anything is read") {
  const LongShape shape{1, 10, 3, 4, 0, false, false};
  const LongProblem<float> p(shape);
  const auto code = [&](std::vector<std::int32_t> offsets, Index batch = 1) {
    offsets.reserve(1);
    LongForward<float> out(shape);
    LongConvArgs<float> a = out.into(p.args());
    a.final_state = {};
    a.x.extents[0] = a.y.extents[0] = batch;
    a.cu_seqlens = IndexView(offsets.data(), Index(offsets.size()));
    const Code forward = cpu::long_conv(a).code;
    LongGradients<float> g(shape);
    LongConvBackwardArgs<float> b = g.into(p.backward_args());
    b.x.extents[0] = b.grad_y.extents[0] = b.grad_x.extents[0] = batch;
    b.cu_seqlens = a.cu_seqlens;
    CHECK(cpu::long_conv_backward(b).code == forward);
    if (forward != Code::ok)
      for (float v : out.y) CHECK(std::isnan(v));
    return forward;
  };
  CHECK(code({0, 4, 10}) == Code::ok);
  CHECK(code({1, 4, 10}) == Code::bad_value);
  CHECK(code({0, 6, 4, 10}) == Code::bad_value);
  CHECK(code({0, 4, 11}) == Code::bad_value);
  CHECK(code({0, 4}) == Code::bad_value);
  CHECK(code({0, -4, 10}) == Code::bad_value);
  CHECK(code({}) == Code::bad_shape);
  CHECK(code({0, 10}, 2) == Code::bad_shape);
  LongForward<float> out(shape);
  LongConvArgs<float> a = out.into(p.args());
  const std::int32_t two[] = {0, 4, 10};
  a.cu_seqlens = IndexView(two, 3);  // and states for one sequence
  CHECK(cpu::long_conv(a).code == Code::bad_shape);
  LongGradients<float> g(shape);
  LongConvBackwardArgs<float> b = g.into(p.backward_args());
  const Tensor<float, 3> wrong(Index(1), Index(4), Index(3));
  b.grad_final_state = wrong;
  CHECK(cpu::long_conv_backward(b).code == Code::bad_shape);
}

TEST_CASE("gradients through the final state match finite differences, whatever the way") {
  const auto check = [](auto policy, Index tokens) {
    constexpr LongConvPolicy way = decltype(policy)::value;
    const LongShape shape{2, tokens, 2, 8, 0, true, true};
    LongProblem<double> p(shape);
    const auto weight = random_tensor<double>(11, 2, 7, 2);
    LongGradients<double> g(shape);
    LongConvBackwardArgs<double> b = g.into(p.backward_args());
    b.grad_final_state = weight;
    REQUIRE(cpu::long_conv_backward<way>(b).ok());
    const auto loss = [&] {
      LongForward<double> forward(shape);
      REQUIRE(cpu::long_conv<way>(forward.into(p.args()), SerialExecutor{}).ok());
      return weighted_sum<3>(forward.y, p.grad_y) + weighted_sum<3>(forward.final_state, weight);
    };
    CHECK(gradient_error<3>(loss, p.x, g.x) < gradient_tolerance);
    CHECK(gradient_error<2>(loss, p.taps, g.taps) < gradient_tolerance);
    CHECK(gradient_error<3>(loss, p.state, g.state) < gradient_tolerance);
  };
  for (Index tokens : {3, 12, 70}) {
    check(LongConvPolicyConstant<direct>{}, tokens);
    check(LongConvPolicyConstant<whole>{}, tokens);
    check(LongConvPolicyConstant<blocks>{}, tokens);
  }
}

}  // namespace
}  // namespace chela
