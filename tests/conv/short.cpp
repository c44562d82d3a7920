// Short depthwise convolution against its reference: widths, shapes, strides, states, steps, gradients, refusals.
#include "chela/cpu/conv/short.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "chela/reference/short_conv.hpp"
#include "support/gradients.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct Shape {
  Index batch, tokens, channels;
};

// Around the tile of 4 tokens, the run of 256 and 512 tokens, and packets of 4 to 16 channels.
constexpr Shape shapes[] = {{1, 0, 5},  {2, 1, 1},  {1, 2, 16},  {2, 3, 17},   {1, 4, 15},  {3, 5, 48},
                            {1, 9, 33}, {2, 70, 7}, {1, 255, 3}, {1, 257, 18}, {2, 517, 20}};

constexpr Shape wide_shapes[] = {{1, 6, 1030}, {2, 9, 260}};  // more than one block of channels

/// Random inputs of one pass with its gradients' inputs; outputs are NaN.
template <class T, int Width>
struct Problem {
  using S = Accumulator<T>;
  Tensor<T, 3> x, initial_state, y, final_state, grad_y, grad_final_state, grad_x, grad_initial_state;
  Tensor<S, 2> taps, grad_taps;
  Tensor<S, 1> bias, grad_bias;

  explicit Problem(Shape s)
      : x(random_tensor<T>(1, s.batch, s.tokens, s.channels)),
        initial_state(random_tensor<T>(2, s.batch, Width - 1, s.channels)),
        y(nan_tensor<T>(s.batch, s.tokens, s.channels)),
        final_state(nan_tensor<T>(s.batch, Width - 1, s.channels)),
        grad_y(random_tensor<T>(3, s.batch, s.tokens, s.channels)),
        grad_final_state(random_tensor<T>(4, s.batch, Width - 1, s.channels)),
        grad_x(nan_tensor<T>(s.batch, s.tokens, s.channels)),
        grad_initial_state(nan_tensor<T>(s.batch, Width - 1, s.channels)),
        taps(random_tensor<S>(5, s.channels, Width)),
        grad_taps(nan_tensor<S>(s.channels, Width)),
        bias(random_tensor<S>(6, s.channels)),
        grad_bias(nan_tensor<S>(s.channels)) {}

  ShortConvArgs<T> args() {
    return {.x = x, .taps = taps, .bias = bias, .y = y, .initial_state = initial_state, .final_state = final_state};
  }
  ShortConvBackwardArgs<T> backward_args() {
    return {.x = x,
            .taps = taps,
            .bias = bias,
            .initial_state = initial_state,
            .grad_y = grad_y,
            .grad_final_state = grad_final_state,
            .grad_x = grad_x,
            .grad_taps = grad_taps,
            .grad_bias = grad_bias,
            .grad_initial_state = grad_initial_state};
  }
};

template <class T, int Rank>
Tensor<double, Rank> as_double(TensorView<const T, Rank> view) {
  return view.present() ? converted<double>(view) : Tensor<double, Rank>();
}

/// Checks y and the final state of a pass that has been run.
template <class T>
void check_forward(const ShortConvArgs<T>& a, bool silu) {
  const Index width = a.taps.extents[1];
  auto y = converted<double>(a.y);
  Tensor<double, 3> state(a.x.extents[0], width - 1, a.x.extents[2]);
  reference::short_conv(as_double(a.x), as_double(a.taps), as_double(a.bias), as_double(a.initial_state), silu, y,
                        state);
  CHECK(relative_error(a.y, y.view()) < tolerance<T>(width + 1));
  if (a.final_state.present()) CHECK(relative_error(a.final_state, state.view()) == 0);
}

template <class T>
void check_backward(const ShortConvBackwardArgs<T>& a, bool silu) {
  const Index width = a.taps.extents[1], summed = a.x.extents[0] * a.x.extents[1];
  auto x = converted<double>(a.x), state = converted<double>(a.grad_initial_state);
  auto taps = converted<double>(a.grad_taps);
  auto bias = converted<double>(a.grad_bias);
  reference::short_conv_backward(as_double(a.x), as_double(a.taps), as_double(a.bias), as_double(a.initial_state), silu,
                                 as_double(a.grad_y), as_double(a.grad_final_state), x, taps, bias, state);
  using S = Accumulator<T>;
  CHECK(relative_error(a.grad_x, x.view()) < tolerance<T>(2 * width));
  CHECK(relative_error(a.grad_taps, taps.view()) < tolerance<S>(width + summed));
  CHECK(relative_error(a.grad_bias, bias.view()) < tolerance<S>(width + summed));
  CHECK(relative_error(a.grad_initial_state, state.view()) < tolerance<T>(2 * width));
}

template <class T, int Width, Activation A>
void check_shape(Shape s) {
  CAPTURE(Width);
  CAPTURE(s.batch);
  CAPTURE(s.tokens);
  CAPTURE(s.channels);
  Problem<T, Width> p(s);
  REQUIRE(cpu::short_conv<Width, A>(p.args(), SerialExecutor{}).ok());
  check_forward(p.args(), A == Activation::silu);
  REQUIRE(cpu::short_conv_backward<Width, A>(p.backward_args(), SerialExecutor{}).ok());
  check_backward(p.backward_args(), A == Activation::silu);
}

/// A view of the same extents over memory with gaps, axes stored in another order; filled with a copy of `from`.
template <class T>
struct Strided {
  Tensor<T, 1> memory;
  TensorView<T, 3> view;

  explicit Strided(TensorView<const T, 3> from)
      : memory(from.extents[0] * (from.extents[1] + 1) * (2 * from.extents[2] + 1)), view{memory.data()} {
    std::copy_n(from.extents, 3, view.extents);
    view.strides[1] = 1,
    view.strides[2] = 2 * (from.extents[1] + 1) - 1;  // tokens contiguous, as in [batch, channel, token]
    view.strides[0] = (from.extents[1] + 1) * (2 * from.extents[2] + 1);
    for_each_index(from, [&](auto... i) { view(i...) = from(i...); });
  }
};

template <int Rank, class T>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(T) * std::size_t(a.size())) == 0;
}

/// Tasks in reverse order, spread over three workers: what a pool may do.
struct ScrambledExecutor {
  int workers() const { return 3; }
  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index task = tasks - 1; task >= 0; --task) f(task, int(task % 3));
  }
};

}  // namespace

TEST_CASE("short_conv and its gradients match the reference at every shape") {
  for (Shape s : shapes) {
    check_shape<float, 4, Activation::silu>(s);
    check_shape<float, 1, Activation::none>(s);
    check_shape<float, 19, Activation::none>(s);
  }
  for (Shape s : wide_shapes) check_shape<float, 4, Activation::silu>(s);
}

TEST_CASE("every width up to the limit") {
  const Shape s{2, 75, 18};
  check_shape<float, 2, Activation::none>(s);
  check_shape<float, 3, Activation::silu>(s);
  check_shape<float, 8, Activation::silu>(s);
  check_shape<float, 64, Activation::silu>(s);
}

TEST_CASE_TEMPLATE("16-bit storage and double", T, double, Eigen::bfloat16, Eigen::half) {
  for (Shape s : {Shape{2, 1, 3}, Shape{1, 70, 37}}) check_shape<T, 4, Activation::silu>(s);
}

TEST_CASE("any strides") {
  Problem<float, 4> p({2, 11, 19});
  Strided<float> x(p.x.view()), y(p.y.view()), grad_y(p.grad_y.view()), grad_x(p.grad_x.view());
  Strided<float> initial(p.initial_state.view()), final_state(p.final_state.view());
  auto args = p.args();
  args.x = x.view, args.y = y.view, args.initial_state = initial.view, args.final_state = final_state.view;
  REQUIRE(cpu::short_conv<4>(args, SerialExecutor{}).ok());
  check_forward(args, false);
  auto backward = p.backward_args();
  backward.x = x.view, backward.grad_y = grad_y.view, backward.grad_x = grad_x.view;
  backward.initial_state = initial.view;
  REQUIRE(cpu::short_conv_backward<4>(backward, SerialExecutor{}).ok());
  check_backward(backward, false);

  SUBCASE("taps stored by channel are used as they are") {
    Tensor<float, 2> by_channel(4, 19);
    for_each_index(p.taps.view(), [&](Index d, Index j) { by_channel(j, d) = p.taps(d, j); });
    Problem<float, 4> q({2, 11, 19});
    auto packed = q.args();
    packed.taps = transposed(by_channel.view(), 0, 1);
    REQUIRE(cpu::short_conv<4>(packed, SerialExecutor{}).ok());
    REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
    CHECK(same_bits(p.y, q.y));
  }
  SUBCASE("an anticausal pass over reversed views") {
    Tensor<float, 3> back(2, 11, 19);
    auto mirrored = p.args();
    mirrored.x = reversed(mirrored.x, 1), mirrored.y = reversed(back.view(), 1);
    REQUIRE(cpu::short_conv<4>(mirrored, SerialExecutor{}).ok());
    check_forward(mirrored, false);
  }
}

TEST_CASE("bias and states may be absent") {
  Problem<float, 4> p({2, 9, 21});
  auto args = p.args();
  args.bias = {}, args.initial_state = {}, args.final_state = {};
  REQUIRE(cpu::short_conv<4, Activation::silu>(args, SerialExecutor{}).ok());
  check_forward(args, true);
  auto backward = p.backward_args();
  backward.bias = {}, backward.initial_state = {}, backward.grad_final_state = {};
  REQUIRE(cpu::short_conv_backward<4, Activation::silu>(backward, SerialExecutor{}).ok());
  check_backward(backward, true);

  Problem<float, 4> q({2, 9, 21});
  q.grad_taps.fill(-7), q.grad_bias.fill(-7), q.grad_initial_state.fill(-7);
  auto only_x = q.backward_args();
  only_x.bias = {}, only_x.initial_state = {}, only_x.grad_final_state = {};
  only_x.grad_taps = {}, only_x.grad_bias = {}, only_x.grad_initial_state = {};
  REQUIRE(cpu::short_conv_backward<4, Activation::silu>(only_x, SerialExecutor{}).ok());
  CHECK(same_bits(p.grad_x, q.grad_x));
  CHECK(q.grad_taps(0, 0) == -7);

  Problem<float, 4> r({2, 9, 21});
  auto only_taps = r.backward_args();
  only_taps.bias = {}, only_taps.initial_state = {}, only_taps.grad_final_state = {};
  only_taps.grad_x = {}, only_taps.grad_bias = {}, only_taps.grad_initial_state = {};
  REQUIRE(cpu::short_conv_backward<4, Activation::silu>(only_taps, SerialExecutor{}).ok());
  CHECK(same_bits(p.grad_taps, r.grad_taps));
}

TEST_CASE("calls that pass the state on equal one call, bit for bit") {
  constexpr int width = 5;
  Problem<float, width> p({2, 23, 18});
  REQUIRE(cpu::short_conv<width, Activation::silu>(p.args(), SerialExecutor{}).ok());
  auto state = p.initial_state;
  auto y = nan_tensor<float>(2, 23, 18);
  Index begin = 0;
  for (Index count : {1, 0, 2, 3, 7, 10}) {  // some shorter than the state, which then shifts in place
    auto piece = p.args();
    piece.x = run(piece.x, 1, begin, count), piece.y = run(y.view(), 1, begin, count);
    piece.initial_state = state, piece.final_state = state;
    REQUIRE(cpu::short_conv<width, Activation::silu>(piece, SerialExecutor{}).ok());
    begin += count;
  }
  CHECK(same_bits(y, p.y));
  CHECK(same_bits(state, p.final_state));
}

TEST_CASE_TEMPLATE("steps equal one call, bit for bit, in place", T, float, Eigen::bfloat16) {
  constexpr int width = 4;
  for (Index channels : {1, 16, 37}) {
    Problem<T, width> p({3, 9, channels});
    REQUIRE(cpu::short_conv<width, Activation::silu>(p.args(), SerialExecutor{}).ok());
    auto state = p.initial_state;
    auto x = p.x;
    for (Index t = 0; t < 9; ++t) {
      const auto token = slice_axis<1>(x.view(), t);
      REQUIRE(cpu::short_conv_step<width, Activation::silu>(
                  ShortConvStepArgs<T>{.x = token, .taps = p.taps, .bias = p.bias, .y = token, .state = state},
                  SerialExecutor{})
                  .ok());
    }
    CHECK(same_bits(x, p.y));
    CHECK(same_bits(state, p.final_state));
  }
}

TEST_CASE("a step on strided views, and one of width 1") {
  Problem<float, 4> p({2, 3, 5});
  Strided<float> state(p.initial_state.view()), x(p.x.view()), y(p.y.view());
  REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
  for (Index t = 0; t < 3; ++t) {
    const ShortConvStepArgs<float> step{.x = slice_axis<1>(x.view, t),
                                        .taps = p.taps,
                                        .bias = p.bias,
                                        .y = slice_axis<1>(y.view, t),
                                        .state = state.view};
    REQUIRE(cpu::short_conv_step<4>(step, SerialExecutor{}).ok());
  }
  CHECK(relative_error(y.view, p.y.view()) < tolerance<float>(5));

  Problem<float, 1> pointwise({2, 1, 20});
  REQUIRE(cpu::short_conv<1>(pointwise.args(), SerialExecutor{}).ok());
  auto y1 = nan_tensor<float>(2, 1, 20);
  REQUIRE(cpu::short_conv_step<1>(ShortConvStepArgs<float>{.x = slice_axis<1>(pointwise.x.view(), 0),
                                                           .taps = pointwise.taps,
                                                           .bias = pointwise.bias,
                                                           .y = slice_axis<1>(y1.view(), 0),
                                                           .state = pointwise.initial_state},
                                  SerialExecutor{})
              .ok());
  CHECK(same_bits(y1, pointwise.y));
}

TEST_CASE("later tokens and other channels never reach an output") {
  Problem<float, 4> p({1, 40, 20});
  REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
  const auto before = p.y;
  p.x(0, 30, 7) = std::numeric_limits<float>::quiet_NaN();
  REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
  for_each_index(p.y.view(), [&](Index b, Index t, Index d) {
    if (d == 7 && t >= 30 && t < 34)
      CHECK(std::isnan(p.y(b, t, d)));
    else
      CHECK(p.y(b, t, d) == before(b, t, d));
  });
}

TEST_CASE("workers and the order of tasks change no bit") {
  const Shape s{3, 1100, 300};
  Problem<float, 4> p(s), q(s);
  REQUIRE(cpu::short_conv<4, Activation::silu>(p.args(), SerialExecutor{}).ok());
  REQUIRE(cpu::short_conv<4, Activation::silu>(q.args(), ScrambledExecutor{}).ok());
  CHECK(same_bits(p.y, q.y));
  REQUIRE(cpu::short_conv_backward<4, Activation::silu>(p.backward_args(), SerialExecutor{}).ok());
  REQUIRE(cpu::short_conv_backward<4, Activation::silu>(q.backward_args(), ScrambledExecutor{}).ok());
  CHECK(same_bits(p.grad_x, q.grad_x));
  CHECK(same_bits(p.grad_taps, q.grad_taps));
  CHECK(same_bits(p.grad_bias, q.grad_bias));
  CHECK(same_bits(p.grad_initial_state, q.grad_initial_state));
  check_backward(p.backward_args(), true);
}

TEST_CASE("more runs than segments") {
  Problem<float, 2> p({130, 3, 2});
  REQUIRE(cpu::short_conv_backward<2>(p.backward_args(), SerialExecutor{}).ok());
  check_backward(p.backward_args(), false);
}

TEST_CASE("silu at its ends") {
  Problem<float, 1> p({1, 4, 16});
  p.taps.fill(1), p.bias.fill(0);
  for (Index d = 0; d < 16; ++d) p.x(0, 0, d) = -1000, p.x(0, 1, d) = 1000, p.x(0, 2, d) = -80, p.x(0, 3, d) = 0;
  REQUIRE(cpu::short_conv<1, Activation::silu>(p.args(), SerialExecutor{}).ok());
  CHECK(p.y(0, 0, 3) == doctest::Approx(0));
  CHECK(p.y(0, 1, 3) == 1000);
  CHECK(p.y(0, 3, 3) == 0);
  REQUIRE(cpu::short_conv_backward<1, Activation::silu>(p.backward_args(), SerialExecutor{}).ok());
  for (float g : p.grad_x) CHECK(std::isfinite(g));
}

TEST_CASE("gradients match finite differences") {
  constexpr int width = 4;
  for (Index tokens : {2, 7}) {  // fewer and more than the state has rows
    Problem<double, width> p({2, tokens, 3});
    const auto loss = [&] {
      REQUIRE(cpu::short_conv<width, Activation::silu>(p.args(), SerialExecutor{}).ok());
      return weighted_sum<3>(p.y, p.grad_y) + weighted_sum<3>(p.final_state, p.grad_final_state);
    };
    REQUIRE(cpu::short_conv_backward<width, Activation::silu>(p.backward_args(), SerialExecutor{}).ok());
    CHECK(gradient_error<3>(loss, p.x, p.grad_x) < gradient_tolerance);
    CHECK(gradient_error<2>(loss, p.taps, p.grad_taps) < gradient_tolerance);
    CHECK(gradient_error<1>(loss, p.bias, p.grad_bias) < gradient_tolerance);
    CHECK(gradient_error<3>(loss, p.initial_state, p.grad_initial_state) < gradient_tolerance);
  }
}

TEST_CASE("without tokens the state passes through") {
  Problem<float, 4> p({2, 0, 5});
  REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
  CHECK(same_bits(p.final_state, p.initial_state));
  REQUIRE(cpu::short_conv_backward<4>(p.backward_args(), SerialExecutor{}).ok());
  CHECK(same_bits(p.grad_initial_state, p.grad_final_state));
  for (float g : p.grad_taps) CHECK(g == 0);
  for (float g : p.grad_bias) CHECK(g == 0);
}

TEST_CASE("arguments that do not fit are refused by name") {
  Problem<float, 4> p({2, 6, 5}), other({2, 7, 5});
  const auto names = [](Status s, const char* argument) {
    return !s.ok() && std::string(s.why).find(argument) != std::string::npos;
  };
  auto args = p.args();
  CHECK(names(cpu::short_conv<3>(args, SerialExecutor{}), "taps"));
  args = p.args(), args.y = other.y;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "y"));
  args = p.args(), args.y.strides[1] = 0;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "y"));
  args = p.args(), args.x.data = nullptr;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "x"));
  args = p.args(), args.bias.extents[0] = 4;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "bias"));
  args = p.args(), args.initial_state = p.x;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "initial_state"));
  args = p.args(), args.final_state = p.y;
  CHECK(names(cpu::short_conv<4>(args, SerialExecutor{}), "final_state"));
  args = p.args(), args.final_state.strides[0] = 0;
  CHECK(cpu::short_conv<4>(args, SerialExecutor{}).code == Code::bad_stride);

  auto backward = p.backward_args();
  backward.grad_y = other.x;
  CHECK(names(cpu::short_conv_backward<4>(backward, SerialExecutor{}), "grad_y"));
  backward = p.backward_args(), backward.grad_taps.extents[1] = 3;
  CHECK(names(cpu::short_conv_backward<4>(backward, SerialExecutor{}), "grad_taps"));
  backward = p.backward_args(), backward.grad_bias.extents[0] = 3;
  CHECK(names(cpu::short_conv_backward<4>(backward, SerialExecutor{}), "grad_bias"));
  backward = p.backward_args(), backward.grad_final_state = p.x;
  CHECK(names(cpu::short_conv_backward<4>(backward, SerialExecutor{}), "grad_final_state"));
  backward = p.backward_args(), backward.grad_initial_state.strides[2] = 0;
  CHECK(cpu::short_conv_backward<4>(backward, SerialExecutor{}).code == Code::bad_stride);

  const auto token = slice_axis<1>(p.x.view(), 0);
  ShortConvStepArgs<float> step{.x = token, .taps = p.taps, .bias = p.bias, .y = token};
  CHECK(names(cpu::short_conv_step<4>(step, SerialExecutor{}), "state"));
}
