// Short depthwise convolution against its reference: widths, shapes, layouts, gradients, element types, refusals.
#include "chela/cpu/conv/short.hpp"

#include <doctest/doctest.h>

#include "short_problem.hpp"
#include "support/gradients.hpp"

using namespace chela;
using namespace chela::test;

namespace {

// Around tiles of 4 and 8 tokens, runs of 256 and 512 and packets of 4 to 16 channels.
constexpr Shape shapes[] = {{1, 0, 5},  {2, 1, 1},  {1, 2, 16}, {2, 3, 17},  {1, 4, 15},   {3, 5, 48},  {1, 7, 2},
                            {1, 8, 16}, {1, 9, 33}, {2, 70, 7}, {1, 255, 3}, {1, 257, 18}, {2, 517, 20}};

constexpr Shape wide_shapes[] = {{1, 6, 1030}, {2, 9, 516}};  // more than one block of channels

// Around the packets and the spans of tokens.
constexpr Shape long_shapes[] = {{1, 15, 3},  {1, 16, 9},  {2, 63, 2},  {1, 65, 5},
                                 {1, 512, 2}, {1, 513, 3}, {1, 4100, 2}};

template <class T, int Width, Activation A>
void check_shape(Shape s, bool by_channel) {
  CAPTURE(Width);
  CAPTURE(s.batch);
  CAPTURE(s.tokens);
  CAPTURE(s.channels);
  CAPTURE(by_channel);
  Problem<T, Width> p(s);
  auto args = p.args();
  auto backward = p.backward_args();
  ByChannel<T> x(p.x.view()), y(p.y.view()), grad_y(p.grad_y.view()), grad_x(p.grad_x.view());
  if (by_channel) {
    args.x = backward.x = x.view();
    args.y = y.view();
    backward.grad_y = grad_y.view();
    backward.grad_x = grad_x.view();
  }
  REQUIRE(cpu::short_conv<Width, A>(args, SerialExecutor{}).ok());
  check_forward(args, A == Activation::silu);
  REQUIRE(cpu::short_conv_backward<Width, A>(backward, SerialExecutor{}).ok());
  check_backward(backward, A == Activation::silu);
}

template <class T, int Width, Activation A>
void check_layouts(Shape s) {
  check_shape<T, Width, A>(s, false);
  check_shape<T, Width, A>(s, true);
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

TEST_CASE("short_conv and its gradients match the reference at every shape, channels or tokens first in memory") {
  for (Shape s : shapes) {
    check_layouts<float, 4, Activation::silu>(s);
    check_layouts<float, 1, Activation::none>(s);
    check_layouts<float, 16, Activation::silu>(s);
  }
  for (Shape s : wide_shapes) {
    check_shape<float, 4, Activation::silu>(s, false);
    check_shape<float, 16, Activation::silu>(s, false);
  }
  for (Shape s : long_shapes) check_layouts<float, 4, Activation::silu>(s);
}

TEST_CASE("every width up to the limit, and fewer tokens than the width") {
  for (Shape s : {Shape{2, 75, 18}, Shape{1, 1, 5}, Shape{2, 2, 17}}) {
    check_layouts<float, 2, Activation::none>(s);
    check_layouts<float, 3, Activation::silu>(s);
    check_layouts<float, 5, Activation::silu>(s);
    check_layouts<float, 8, Activation::none>(s);
    check_layouts<float, 31, Activation::none>(s);
    check_layouts<float, 64, Activation::silu>(s);
  }
  check_layouts<float, 31, Activation::none>({1, 30, 16});
  check_layouts<float, 64, Activation::silu>({1, 600, 130});
}

TEST_CASE_TEMPLATE("16-bit storage and double", T, double, Eigen::bfloat16, Eigen::half) {
  for (Shape s : {Shape{2, 1, 3}, Shape{1, 70, 37}, Shape{1, 530, 16}}) check_layouts<T, 4, Activation::silu>(s);
}

TEST_CASE("wide kernels convert 16-bit rows once") {
  check_layouts<Eigen::bfloat16, 16, Activation::silu>({2, 33, 145});
}

TEST_CASE("any strides") {
  Problem<float, 4> p({2, 11, 19});
  Strided<float> x(p.x.view()), y(p.y.view()), grad_y(p.grad_y.view()), grad_x(p.grad_x.view());
  Strided<float> initial(p.initial_state.view()), final_state(p.final_state.view());
  auto args = p.args();
  args.x = x.view, args.y = y.view, args.initial_state = initial.view, args.final_state = final_state.view;
  REQUIRE(cpu::short_conv<4>(args, SerialExecutor{}).ok());
  check_forward(args, false);
  REQUIRE(cpu::short_conv<4>(p.args(), SerialExecutor{}).ok());
  CHECK(relative_error(y.view, p.y.view()) == 0);  // the layout does not show in the sums
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
  for (bool by_channel : {false, true}) {
    CAPTURE(by_channel);
    Problem<float, 4> p({2, 9, 21}), q({2, 9, 21}), r({2, 9, 21});
    ByChannel<float> x(p.x.view());
    const auto inputs = [&](auto args) {
      if (by_channel) args.x = x.view();
      args.bias = {}, args.initial_state = {};
      return args;
    };
    auto args = inputs(p.args());
    args.final_state = {};
    REQUIRE(cpu::short_conv<4, Activation::silu>(args, SerialExecutor{}).ok());
    check_forward(args, true);
    auto backward = inputs(p.backward_args());
    backward.grad_final_state = {};
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(backward, SerialExecutor{}).ok());
    check_backward(backward, true);

    q.grad_taps.fill(-7), q.grad_bias.fill(-7), q.grad_initial_state.fill(-7);
    auto only_x = inputs(q.backward_args());
    only_x.grad_final_state = {}, only_x.grad_taps = {}, only_x.grad_bias = {}, only_x.grad_initial_state = {};
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(only_x, SerialExecutor{}).ok());
    CHECK(same_bits(p.grad_x, q.grad_x));
    CHECK(q.grad_taps(0, 0) == -7);

    auto only_taps = inputs(r.backward_args());
    only_taps.grad_final_state = {}, only_taps.grad_x = {}, only_taps.grad_bias = {};
    only_taps.grad_initial_state = {};
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(only_taps, SerialExecutor{}).ok());
    CHECK(same_bits(p.grad_taps, r.grad_taps));
  }
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
  for (bool by_channel : {false, true}) {
    CAPTURE(by_channel);
    Problem<float, 4> p(s), q(s);
    ByChannel<float> x(p.x.view());
    const auto inputs = [&](auto args) {
      if (by_channel) args.x = x.view();
      return args;
    };
    REQUIRE(cpu::short_conv<4, Activation::silu>(inputs(p.args()), SerialExecutor{}).ok());
    REQUIRE(cpu::short_conv<4, Activation::silu>(inputs(q.args()), ScrambledExecutor{}).ok());
    CHECK(same_bits(p.y, q.y));
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(inputs(p.backward_args()), SerialExecutor{}).ok());
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(inputs(q.backward_args()), ScrambledExecutor{}).ok());
    CHECK(same_bits(p.grad_x, q.grad_x));
    CHECK(same_bits(p.grad_taps, q.grad_taps));
    CHECK(same_bits(p.grad_bias, q.grad_bias));
    CHECK(same_bits(p.grad_initial_state, q.grad_initial_state));
    check_backward(p.backward_args(), true);
  }
}

TEST_CASE("more runs than segments") {
  Problem<float, 2> p({130, 3, 2});
  REQUIRE(cpu::short_conv_backward<2>(p.backward_args(), SerialExecutor{}).ok());
  check_backward(p.backward_args(), false);
}

TEST_CASE_TEMPLATE("silu at its ends", T, float, double, Eigen::bfloat16) {
  Problem<T, 1> p({1, 6, 16});
  p.taps.fill(1), p.bias.fill(0);
  const float ends[] = {-1000, 1000, -80, 0, -20, 20};
  for (Index t = 0; t < 6; ++t)
    for (Index d = 0; d < 16; ++d) p.x(0, t, d) = T(ends[t]);
  REQUIRE(cpu::short_conv<1, Activation::silu>(p.args(), SerialExecutor{}).ok());
  const auto y = [&](Index t) { return static_cast<double>(p.y(0, t, 3)); };
  CHECK(y(0) == doctest::Approx(0));
  CHECK(y(1) == 1000);
  CHECK(y(3) == 0);
  for (Index t : {Index(2), Index(4), Index(5)}) {  // relative, however small
    const double a = ends[t], want = a / (1 + std::exp(-a));
    CHECK(std::abs(y(t) / want - 1) < 32 * unit_roundoff<T>());
  }
  p.x(0, 2, 0) = T(std::numeric_limits<float>::quiet_NaN());
  REQUIRE(cpu::short_conv<1, Activation::silu>(p.args(), SerialExecutor{}).ok());
  CHECK(std::isnan(static_cast<double>(p.y(0, 2, 0))));
  p.x(0, 2, 0) = T(0);
  REQUIRE(cpu::short_conv_backward<1, Activation::silu>(p.backward_args(), SerialExecutor{}).ok());
  for (T g : p.grad_x) CHECK(std::isfinite(static_cast<double>(g)));
}

// Results past a size are stored past the caches where their rows are aligned; a view that is not must have the same bits.
TEST_CASE_TEMPLATE("large aligned results", T, float, Eigen::bfloat16) {
  const Index tokens = (Index(1) << 25) / Index(sizeof(T)) / 64 + 32;
  Problem<T, 4> p({1, tokens, 64});
  Tensor<T, 1> y_memory(tokens * 64 + 1), grad_memory(tokens * 64 + 1);
  const auto shifted = [&](Tensor<T, 1>& memory, TensorView<T, 3> like) {
    like.data = memory.data() + 1;
    return like;
  };
  const auto same = [&](TensorView<T, 3> a, TensorView<T, 3> b) {
    return std::memcmp(static_cast<const void*>(a.data), static_cast<const void*>(b.data),
                       sizeof(T) * std::size_t(a.size())) == 0;
  };
  for (bool by_channel : {false, true}) {
    CAPTURE(by_channel);
    // The same memory taken for [batch, channel, token].
    const auto as = [&](auto view) {
      if (by_channel)
        view.extents[1] = 64, view.extents[2] = tokens, view.strides[1] = tokens, view = transposed(view, 1, 2);
      return view;
    };
    auto args = p.args();
    auto backward = p.backward_args();
    args.x = as(args.x), args.y = as(args.y);
    backward.x = as(backward.x), backward.grad_y = as(backward.grad_y), backward.grad_x = as(backward.grad_x);
    auto args2 = args;
    auto backward2 = backward;
    args2.y = shifted(y_memory, args.y), backward2.grad_x = shifted(grad_memory, backward.grad_x);
    REQUIRE(cpu::short_conv<4, Activation::silu>(args, SerialExecutor{}).ok());
    REQUIRE(cpu::short_conv<4, Activation::silu>(args2, SerialExecutor{}).ok());
    CHECK(same(args.y, args2.y));
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(backward, SerialExecutor{}).ok());
    REQUIRE(cpu::short_conv_backward<4, Activation::silu>(backward2, SerialExecutor{}).ok());
    CHECK(same(backward.grad_x, backward2.grad_x));
  }
}

TEST_CASE("gradients match finite differences") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>, bool by_channel) {
    for (Index tokens : {2, 7}) {  // fewer and more than the state has rows
      CAPTURE(Width);
      CAPTURE(tokens);
      CAPTURE(by_channel);
      Problem<double, Width> p({2, tokens, 3});
      ByChannel<double> grad_x(p.grad_x.view());
      const auto loss = [&] {
        REQUIRE(cpu::short_conv<Width, Activation::silu>(p.args(), SerialExecutor{}).ok());
        return weighted_sum<3>(p.y, p.grad_y) + weighted_sum<3>(p.final_state, p.grad_final_state);
      };
      auto backward = p.backward_args();
      if (by_channel) backward.grad_x = grad_x.view();
      REQUIRE(cpu::short_conv_backward<Width, Activation::silu>(backward, SerialExecutor{}).ok());
      CHECK(gradient_error<3>(loss, p.x, backward.grad_x) < gradient_tolerance);
      CHECK(gradient_error<2>(loss, p.taps, p.grad_taps) < gradient_tolerance);
      CHECK(gradient_error<1>(loss, p.bias, p.grad_bias) < gradient_tolerance);
      CHECK(gradient_error<3>(loss, p.initial_state, p.grad_initial_state) < gradient_tolerance);
    }
  };
  for (bool by_channel : {false, true}) {
    check_width(std::integral_constant<int, 4>{}, by_channel);
    check_width(std::integral_constant<int, 10>{}, by_channel);
  }
}

TEST_CASE("arguments that do not fit are refused by name") {
  Problem<float, 4> p({2, 6, 5}), other({2, 7, 5});
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
}
