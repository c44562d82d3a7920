// The short convolution on a GPU with elements of 16 bits, against its reference; conv/short.cu has the properties.
#include "short_device.cuh"

namespace chela::test {
namespace {

constexpr Activation silu = Activation::silu, none = Activation::none;

TEST_CASE_TEMPLATE("shapes, widths and layouts", T, __nv_bfloat16, __half) {
  for (Shape s : {Shape{2, 1, 3}, Shape{1, 70, 37}, Shape{1, 8, 16}, Shape{2, 15, 8}, Shape{1, 264, 272},
                  Shape{1, 530, 16}, Shape{3, 1030, 24}}) {
    check_layouts<T, 4, silu>(s);
    if (s.channels > 24) continue;
    check_layouts<T, 1, none>(s);
    check_layouts<T, 2, silu>(s);
    check_layouts<T, 7, silu>(s);
    check_layouts<T, 16, silu>(s);
  }
  const std::vector<Index> lengths = {0, 3, 1, 0, 0, 250, 7, 2, 300, 12, 40, 0};
  check_layouts<T, 4, silu>({1, 615, 24}, lengths);
  check_layouts<T, 16, silu>({1, 615, 8}, lengths);
}

TEST_CASE("the widest kernel") { check_layouts<__nv_bfloat16, 64, silu>({2, 333, 66}); }

TEST_CASE_TEMPLATE("calls that pass the state on, and steps, equal one call, bit for bit", T, __nv_bfloat16, __half) {
  for (Layout layout : every_layout) {
    CAPTURE(int(layout));
    const Problem<T, 4> p({3, 53, 40});
    const DeviceProblem<T, 4> whole(p, layout), cut(p, layout), stepped(p, layout);
    whole.template forward<silu>(whole.args());
    Index begin = 0;
    for (Index count : {1, 0, 2, 3, 7, 10, 30}) {
      auto piece = cut.args();
      piece.x = run(piece.x, 1, begin, count), piece.y = run(piece.y, 1, begin, count);
      piece.final_state = cut.initial_state;
      cut.template forward<silu>(piece);
      begin += count;
    }
    CHECK(same_bits(cut.y.host(), whole.y.host()));
    CHECK(same_bits(cut.initial_state.host(), whole.final_state.host()));
    for (Index t = 0; t < 53; ++t)
      require_ok(cuda::short_conv_step<4, silu>(ShortConvStepArgs<T>{.x = slice_axis<1>(stepped.x.view(), t),
                                                                     .taps = stepped.taps,
                                                                     .bias = stepped.bias,
                                                                     .y = slice_axis<1>(stepped.y.view(), t),
                                                                     .state = stepped.initial_state,
                                                                     .position = t},
                                                stepped.stream));
    stepped.stream.wait();
    CHECK(same_bits(stepped.y.host(), whole.y.host()));
  }
}

TEST_CASE_TEMPLATE("silu at its ends", T, __nv_bfloat16, __half) {
  Problem<T, 1> p({1, 6, 16});
  p.taps.fill(1), p.bias.fill(0);
  const float ends[] = {-1000, 1000, -8, 0, -5, 20};
  for_each_index(p.x.view(), [&](auto b, auto t, auto d) { p.x(b, t, d) = T(ends[t]); });
  const DeviceProblem<T, 1> d(p);
  d.template forward<silu>(d.args()), d.template backward<silu>(d.backward_args());
  const auto y = d.y.host();
  CHECK(float(y(0, 0, 3)) == 0);
  CHECK(float(y(0, 1, 3)) == 1000);
  CHECK(float(y(0, 3, 3)) == 0);
  for (Index t : {2, 4, 5}) {
    const double a = ends[t], want = a / (1 + std::exp(-a));
    CHECK(std::abs(double(y(0, t, 3)) / want - 1) < 2 * unit_roundoff<T>());
  }
  for (T g : d.grad_x.host()) CHECK(std::isfinite(float(g)));
}

TEST_CASE_TEMPLATE("many tokens meet the bounds on errors, and two runs give the same bits", T, __nv_bfloat16, __half) {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    CAPTURE(int(layout));
    const Problem<T, 4> p({2, 4200, 264});
    const Answer want = answer(p, true);
    const DeviceProblem<T, 4> first(p, layout), second(p, layout);
    for (const auto* d : {&first, &second})
      d->template forward<silu>(d->args()), d->template backward<silu>(d->backward_args());
    check_forward(first, want), check_backward(first, want);
    CHECK(same_bits(first.y.host(), second.y.host()));
    CHECK(same_bits(first.grad_x.host(), second.grad_x.host()));
    CHECK(same_bits(first.grad_taps.host(), second.grad_taps.host()));
    CHECK(same_bits(first.grad_bias.host(), second.grad_bias.host()));
    CHECK(first.guards_intact());
  }
}

}  // namespace
}  // namespace chela::test
