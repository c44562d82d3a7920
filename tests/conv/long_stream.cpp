// The long convolution token by token: the same outputs as over the whole, from any beginning, with work spread over
// tokens.
#include <doctest/doctest.h>

#include "chela/cpu/conv/long.hpp"
#include "conv/long_problem.hpp"
#include "support/tolerance.hpp"

namespace chela {
namespace {

using namespace test;

/// Streams tokens from `begin` on after a prefill with those before it.
template <class T>
void check_stream(const LongShape& shape, Index begin) {
  CAPTURE(shape);
  CAPTURE(begin);
  const LongProblem<T> p(shape);
  LongForward<T> want(shape);
  REQUIRE(cpu::long_conv<whole>(want.into(p.args())).ok());
  const cpu::LongConvStreamKernel<Accumulator<T>> kernel(p.taps.view(), SerialExecutor{});
  cpu::LongConvStream<Accumulator<T>> stream(kernel, shape.batch);
  if (begin > 0) REQUIRE(cpu::long_conv_stream_prefill(run(p.x.view(), 1, 0, begin), kernel, stream).ok());
  Tensor<T, 3> y = nan_tensor<T>(shape.batch, shape.tokens, shape.channels);
  for (Index t = begin; t < shape.tokens; ++t)
    REQUIRE(cpu::long_conv_stream_step(
                LongConvStreamArgs<T>{
                    .x = slice_axis<1>(p.x.view(), t), .skip = p.args().skip, .y = slice_axis<1>(y.view(), t)},
                kernel, stream)
                .ok());
  const Index count = shape.tokens - begin;
  CHECK(relative_error(run(y.view(), 1, begin, count), run(want.y.view(), 1, begin, count)) <=
        2 * tolerance<T>(p.terms()));
}

TEST_CASE_TEMPLATE("a stream gives what the whole gives", T, float, double, Eigen::bfloat16) {
  for (Index taps : {1, 5, 63, 64, 65, 66, 127, 128, 129, 300, 512, 700}) {
    check_stream<T>({1, 600, 5, taps, 0, false, true}, 0);
    check_stream<T>({3, 260, 35, taps, 0, false, false}, 0);
  }
  check_stream<T>({1, 3000, 3, 3000, 0, false, true}, 0);
}

TEST_CASE("a stream goes on from any beginning") {
  for (Index taps : {3, 64, 100, 257, 600})
    for (Index begin : {1, 31, 32, 33, 64, 100, 128, 256, 300, 511})
      check_stream<double>({2, 700, 19, taps, 0, false, true}, begin);
}

TEST_CASE("a stream begins from a final state, and its copy goes another way") {
  const LongShape shape{2, 400, 20, 200, 0, true, true};
  const LongProblem<double> p(shape);
  LongForward<double> want(shape);
  REQUIRE(cpu::long_conv(want.into(p.args())).ok());
  const cpu::LongConvStreamKernel<double> kernel(p.taps.view(), SerialExecutor{});
  cpu::LongConvStream<double> stream(kernel, 2), kept;
  REQUIRE(cpu::long_conv_stream_prefill(p.state.view(), kernel, stream).ok());
  Tensor<double, 3> y = nan_tensor<double>(2, 400, 20), again = nan_tensor<double>(2, 400, 20);
  const auto step = [&](cpu::LongConvStream<double>& s, Tensor<double, 3>& to, Index t) {
    REQUIRE(cpu::long_conv_stream_step(
                LongConvStreamArgs<double>{
                    .x = slice_axis<1>(p.x.view(), t), .skip = p.skip, .y = slice_axis<1>(to.view(), t)},
                kernel, s)
                .ok());
  };
  for (Index t = 0; t < 400; ++t) {
    if (t == 150) kept = stream;
    step(stream, y, t);
  }
  for (Index t = 150; t < 400; ++t) step(kept, again, t);
  CHECK(relative_error(y, want.y) < 2 * tolerance<double>(200));
  CHECK(relative_error(run(again.view(), 1, 150, 250), run(y.view(), 1, 150, 250)) == 0);
}

TEST_CASE("a stream's bits do not depend on the workers") {
  const LongShape shape{2, 300, 70, 300, 0, false, true};
  const LongProblem<float> p(shape);
  const cpu::LongConvStreamKernel<float> kernel(p.taps.view(), SerialExecutor{});
  cpu::LongConvStream<float> one(kernel, 2), many(kernel, 2);
  Tensor<float, 2> a(Index(2), Index(70)), b(Index(2), Index(70));
  const auto args = [&](Index t, Tensor<float, 2>& y) {
    return LongConvStreamArgs<float>{.x = slice_axis<1>(p.x.view(), t), .y = y};
  };
  for (Index t = 0; t < 300; ++t) {
    REQUIRE(cpu::long_conv_stream_step(args(t, a), kernel, one, SerialExecutor{}).ok());
    REQUIRE(cpu::long_conv_stream_step(args(t, b), kernel, many, DefaultExecutor{}).ok());
    CHECK(std::equal(a.begin(), a.end(), b.begin()));
  }
}

TEST_CASE("streams and kernels that do not fit are refused") {
  const LongProblem<float> p({2, 4, 3, 70, 0, false, false});
  const cpu::LongConvStreamKernel<float> kernel(p.taps.view(), SerialExecutor{});
  const cpu::LongConvStreamKernel<float> other(run(p.taps.view(), 1, 0, 69), SerialExecutor{});
  cpu::LongConvStream<float> stream(kernel, 2), narrow(kernel, 1), empty;
  Tensor<float, 2> y(Index(2), Index(3));
  const LongConvStreamArgs<float> a{.x = slice_axis<1>(p.x.view(), 0), .y = y};
  CHECK(cpu::long_conv_stream_step(a, kernel, stream).code == Code::ok);
  CHECK(cpu::long_conv_stream_step(a, other, stream).code == Code::bad_shape);
  CHECK(cpu::long_conv_stream_step(a, kernel, narrow).code == Code::bad_shape);
  CHECK(cpu::long_conv_stream_step(a, kernel, empty).code == Code::bad_shape);
  CHECK(cpu::long_conv_stream_step(a, cpu::LongConvStreamKernel<float>{}, stream).code == Code::bad_value);
  LongConvStreamArgs<float> wrong = a;
  wrong.y.strides[0] = 0;
  CHECK(cpu::long_conv_stream_step(wrong, kernel, stream).code == Code::bad_shape);
  CHECK(cpu::long_conv_stream_prefill(run(p.x.view(), 2, 0, 2), kernel, stream).code == Code::bad_shape);
}

}  // namespace
}  // namespace chela
