// The short convolution on a GPU in float: against its reference, and against itself in other layouts, pieces and
// steps.
#include "short_device.cuh"

namespace chela::test {
namespace {

constexpr Activation silu = Activation::silu, none = Activation::none;

// Around runs of 4 and 8 tokens, walks of 128, 256 and 2048, tiles of 64, and what one warp and one block have of
// channels.
constexpr Shape shapes[] = {{2, 1, 1},   {1, 2, 16},   {2, 3, 17},   {1, 4, 15},   {3, 5, 48},   {1, 7, 2},
                            {1, 8, 16},  {1, 9, 33},   {2, 63, 8},   {1, 64, 40},  {1, 65, 132}, {2, 70, 7},
                            {1, 255, 3}, {1, 257, 18}, {2, 517, 20}, {1, 1030, 5}, {2, 9, 516}};

TEST_CASE("every shape and layout") {
  for (Shape s : shapes) {
    check_layouts<float, 4, silu>(s);
    check_layouts<float, 1, none>(s);
    check_layouts<float, 16, silu>(s);
  }
  check_layouts<float, 4, silu>({3, 2600, 36});
}

TEST_CASE("every width up to the limit, and fewer tokens than the width") {
  for (Shape s : {Shape{2, 75, 18}, Shape{1, 1, 5}, Shape{2, 2, 20}, Shape{1, 600, 36}}) {
    check_layouts<float, 2, none>(s);
    check_layouts<float, 3, silu>(s);
    check_layouts<float, 5, silu>(s);
    check_layouts<float, 8, none>(s);
    check_layouts<float, 31, none>(s);
    check_layouts<float, 64, silu>(s);
  }
}

/// Lengths of packed sequences: empty ones, shorter than the state, across runs and parts.
const std::vector<Index> lengths = {0, 3, 1, 0, 0, 250, 7, 2, 300, 12, 40, 0};
constexpr Index total = 615;

TEST_CASE("ragged sequences") {
  for (Index channels : {1, 21, 40}) {
    check_layouts<float, 4, silu>({1, total, channels}, lengths);
    check_layouts<float, 17, silu>({1, total, channels}, lengths);
  }
  check_layouts<float, 1, none>({1, total, 8}, lengths);
  check_layouts<float, 4, silu>({1, 5, 8}, {0, 0, 5, 0});
  check_layouts<float, 4, silu>({1, 5107, 6}, {2000, 100, 3004, 0, 3});
}

TEST_CASE("layouts change no bit of outputs and gradients of inputs, reversed ones included") {
  const Problem<float, 4> p({2, 75, 24});
  const DeviceProblem<float, 4> plain(p);
  plain.forward<silu>(plain.args()), plain.backward<silu>(plain.backward_args());
  for (Layout layout : every_layout) {
    CAPTURE(int(layout));
    const DeviceProblem<float, 4> d(p, layout);
    d.forward<silu>(d.args()), d.backward<silu>(d.backward_args());
    CHECK(same_bits(d.y.host(), plain.y.host()));
    CHECK(same_bits(d.grad_x.host(), plain.grad_x.host()));
    CHECK(same_bits(d.grad_initial_state.host(), plain.grad_initial_state.host()));
  }
  // An anticausal pass over a sequence written backwards.
  Problem<float, 4> turned = p;
  for_each_index(p.x.view(), [&](auto b, auto t, auto c) {
    turned.x(b, 74 - t, c) = p.x(b, t, c), turned.grad_y(b, 74 - t, c) = p.grad_y(b, t, c);
  });
  for (Layout layout : every_layout) {
    CAPTURE(int(layout));
    const DeviceProblem<float, 4> d(turned, layout);
    auto args = d.args();
    auto backward = d.backward_args();
    for (auto* view : {&args.x, &backward.x, &backward.grad_y}) *view = reversed(*view, 1);
    for (auto* view : {&args.y, &backward.grad_x}) *view = reversed(*view, 1);
    d.forward<silu>(args), d.backward<silu>(backward);
    const auto y = d.y.host(), grad_x = d.grad_x.host(), want = plain.y.host(), want_grad = plain.grad_x.host();
    bool same = true;
    for_each_index(want.view(), [&](auto b, auto t, auto c) {
      same = same && y(b, 74 - t, c) == want(b, t, c) && grad_x(b, 74 - t, c) == want_grad(b, t, c);
    });
    CHECK(same);
    CHECK(d.guards_intact());
  }
}

TEST_CASE("taps in any strides, and broadcast inputs") {
  Problem<float, 4> p({2, 20, 24});
  Tensor<float, 2> by_tap(4, 24);
  for_each_index(p.taps.view(), [&](auto d, auto j) { by_tap(j, d) = p.taps(d, j); });
  const DeviceTensor<float, 2> turned(by_tap);
  const DeviceProblem<float, 4> d(p), plain(p);
  auto args = d.args();
  args.taps = transposed(turned.view(), 0, 1);
  d.forward<silu>(args), plain.forward<silu>(plain.args());
  CHECK(same_bits(d.y.host(), plain.y.host()));

  for_each_index(p.x.view(), [&](auto b, auto t, auto c) { p.x(b, t, c) = p.x(0, t, 0); });
  const DeviceProblem<float, 4> spread(p);
  spread.forward<silu>(spread.args());
  args = d.args(), args.x.strides[0] = args.x.strides[2] = 0;
  d.forward<silu>(args);
  CHECK(same_bits(d.y.host(), spread.y.host()));
}

TEST_CASE("bias, states and gradients may be absent") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    const auto check_width = [&]<int Width>(std::integral_constant<int, Width>) {
      CAPTURE(int(layout));
      CAPTURE(Width);
      const Problem<float, Width> p({2, 90, 20});
      const Answer want = answer(p, true, false, false);
      const auto without = [](auto args) {
        args.bias = {}, args.initial_state = {};
        return args;
      };
      const DeviceProblem<float, Width> d(p, layout), only_x(p, layout), only_taps(p, layout);
      d.template forward<silu>(without(d.args()));
      check_forward(d, want);
      auto backward = without(d.backward_args());
      backward.grad_final_state = {};
      d.template backward<silu>(backward);
      check_backward(d, want);

      backward = without(only_x.backward_args());
      backward.grad_final_state = {}, backward.grad_taps = {}, backward.grad_bias = {};
      backward.grad_initial_state = {};
      CHECK(cuda::workspace_bytes(backward) == 0);
      only_x.template backward<silu>(backward);
      CHECK(same_bits(only_x.grad_x.host(), d.grad_x.host()));
      backward = without(only_taps.backward_args());
      backward.grad_final_state = {}, backward.grad_x = {}, backward.grad_bias = {}, backward.grad_initial_state = {};
      only_taps.template backward<silu>(backward);
      CHECK(same_bits(only_taps.grad_taps.host(), d.grad_taps.host()));
      CHECK(std::isnan(only_taps.grad_bias.host()(0)));
      CHECK(std::isnan(only_taps.grad_x.host()(0, 0, 0)));
    };
    check_width(std::integral_constant<int, 4>{});
    check_width(std::integral_constant<int, 16>{});
  }
}

TEST_CASE("later tokens, other channels and other sequences never reach an output") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    CAPTURE(int(layout));
    Problem<float, 4> p({2, 40, 20});
    const DeviceProblem<float, 4> clean(p, layout);
    clean.forward<none>(clean.args());
    p.x(0, 30, 7) = p.x(0, 39, 3) = std::numeric_limits<float>::quiet_NaN();
    const DeviceProblem<float, 4> dirty(p, layout);
    dirty.forward<none>(dirty.args());
    const auto got = dirty.y.host(), want = clean.y.host();
    bool right = true;
    for_each_index(want.view(), [&](auto b, auto t, auto c) {
      const bool reached = b == 0 && ((c == 7 && t >= 30 && t < 34) || (c == 3 && t == 39));
      right = right && (reached ? std::isnan(got(b, t, c)) : got(b, t, c) == want(b, t, c));
    });
    CHECK(right);
  }
}

TEST_CASE("silu at its ends") {
  Problem<float, 1> p({1, 6, 16});
  p.taps.fill(1), p.bias.fill(0);
  const float ends[] = {-1000, 1000, -80, 0, -20, 20};
  for_each_index(p.x.view(), [&](auto b, auto t, auto d) { p.x(b, t, d) = ends[t]; });
  const DeviceProblem<float, 1> d(p);
  d.forward<silu>(d.args()), d.backward<silu>(d.backward_args());
  const auto y = d.y.host();
  CHECK(y(0, 0, 3) == 0);
  CHECK(y(0, 1, 3) == 1000);
  CHECK(y(0, 3, 3) == 0);
  for (Index t : {2, 4, 5}) {
    const double a = ends[t], want = a / (1 + std::exp(-a));
    CHECK(std::abs(y(0, t, 3) / want - 1) < 32 * unit_roundoff<float>());
  }
  for (float g : d.grad_x.host()) CHECK(std::isfinite(g));
}

TEST_CASE("calls that pass the state on equal one call, bit for bit, in place") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    for (Layout layout : every_layout) {
      CAPTURE(Width);
      CAPTURE(int(layout));
      const Problem<float, Width> p({2, 53, 20});
      const DeviceProblem<float, Width> whole(p, layout), cut(p, layout);
      whole.template forward<silu>(whole.args());
      Index begin = 0;
      for (Index count : {1, 0, 2, 3, 7, 10, 30}) {  // some shorter than the state, which then shifts in place
        auto piece = cut.args();
        piece.x = run(piece.x, 1, begin, count), piece.y = run(piece.y, 1, begin, count);
        piece.final_state = cut.initial_state;
        cut.template forward<silu>(piece);
        begin += count;
      }
      CHECK(same_bits(cut.y.host(), whole.y.host()));
      CHECK(same_bits(cut.initial_state.host(), whole.final_state.host()));
    }
  };
  check_width(std::integral_constant<int, 5>{});
  check_width(std::integral_constant<int, 16>{});
}

/// One step of a token of a problem, in x's memory or y's.
template <int Width>
ShortConvStepArgs<float> step_of(const DeviceProblem<float, Width>& d, Index t, bool in_place) {
  return {.x = slice_axis<1>(d.x.view(), t),
          .taps = d.taps,
          .bias = d.bias,
          .y = slice_axis<1>(in_place ? d.x.view() : d.y.view(), t),
          .state = d.initial_state,
          .position = t};
}

TEST_CASE("steps equal one call, bit for bit, in place") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    for (Index channels : {1, 16, 37, 200})
      for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
        CAPTURE(Width);
        CAPTURE(channels);
        const Problem<float, Width> p({5, 10, channels});
        const DeviceProblem<float, Width> whole(p, layout), stepped(p, layout);
        whole.template forward<silu>(whole.args());
        for (Index t = 0; t < 10; ++t)
          require_ok(cuda::short_conv_step<Width, silu>(step_of(stepped, t, true), stepped.stream));
        stepped.stream.wait();
        CHECK(same_bits(stepped.x.host(), whole.y.host()));
        const auto ring = stepped.initial_state.host(), want = whole.final_state.host();
        bool same = true;
        for_each_index(want.view(), [&](auto i, auto s, auto d) {
          same = same && ring(i, (s + 10) % (Width - 1), d) == want(i, s, d);
        });
        CHECK(same);
        CHECK(stepped.x.guards_intact());
        CHECK(stepped.initial_state.guards_intact());
      }
  };
  check_width(std::integral_constant<int, 4>{});
  check_width(std::integral_constant<int, 2>{});
  check_width(std::integral_constant<int, 31>{});
  const DeviceProblem<float, 1> whole(Problem<float, 1>({2, 1, 20})), stepped(whole.p);
  whole.forward<silu>(whole.args());
  require_ok(cuda::short_conv_step<1, silu>(step_of(stepped, 0, false), stepped.stream));
  stepped.stream.wait();
  CHECK(same_bits(stepped.y.host(), whole.y.host()));
}

TEST_CASE("sequences of a pool, each at a position of its own; slots outside of it are left alone") {
  constexpr int width = 4;
  const std::vector<Index> slots = {5, 0, 3}, positions = {7, 0, 2};
  const Problem<float, width> p({3, 2, 36});
  auto pool = random_tensor<float>(11, 6, width - 1, 36);
  for_each_index(p.initial_state.view(), [&](auto i, auto s, auto d) {
    pool(slots[std::size_t(i)], (s + positions[std::size_t(i)]) % (width - 1), d) = p.initial_state(i, s, d);
  });
  const DeviceProblem<float, width> plain(p);
  plain.forward<silu>(plain.args());
  const auto want = plain.final_state.host();
  const auto check_indices = [&]<class I>(I) {
    const DeviceTensor<I, 1> device_slots(tensor_of<I>(slots)), device_positions(tensor_of<I>(positions));
    const DeviceProblem<float, width> passed(p), stepped(p);
    const DeviceTensor<float, 3> after_pass(pool), after_steps(pool);
    auto args = passed.args();
    args.initial_state = after_pass, args.final_state = after_pass;
    args.state_slots = IndexView(device_slots.view()), args.positions = IndexView(device_positions.view());
    passed.forward<silu>(args);
    CHECK(same_bits(passed.y.host(), plain.y.host()));
    for (Index t = 0; t < 2; ++t) {
      std::vector<Index> at = positions;
      for (Index& position : at) position += t;
      const DeviceTensor<I, 1> now(tensor_of<I>(at));
      auto step = step_of(stepped, t, false);
      step.state = after_steps, step.positions = IndexView(now.view()), step.state_slots = args.state_slots;
      require_ok(cuda::short_conv_step<width, silu>(step, stepped.stream));
      stepped.stream.wait();
    }
    CHECK(same_bits(stepped.y.host(), plain.y.host()));
    auto want_pass = pool, want_steps = pool;
    for_each_index(want.view(), [&](auto i, auto s, auto d) {
      const Index slot = slots[std::size_t(i)], steps = positions[std::size_t(i)] + 2;
      want_pass(slot, s, d) = want_steps(slot, (s + steps) % (width - 1), d) = want(i, s, d);
    });
    CHECK(same_bits(after_pass.host(), want_pass));
    CHECK(same_bits(after_steps.host(), want_steps));
  };
  check_indices(std::int32_t{});
  check_indices(std::int64_t{});

  const DeviceTensor<std::int64_t, 1> outside(tensor_of<std::int64_t>({6, -1, Index(1) << 40}));
  const DeviceProblem<float, width> passed(p), stepped(p), zero(p);
  const DeviceTensor<float, 3> states(pool);
  auto args = passed.args();
  args.initial_state = states, args.final_state = states, args.state_slots = IndexView(outside.view());
  passed.forward<silu>(args);
  auto step = step_of(stepped, 0, false);
  step.state = states, step.state_slots = args.state_slots;
  require_ok(cuda::short_conv_step<width, silu>(step, stepped.stream));
  stepped.stream.wait();
  args = zero.args(), args.initial_state = {};
  zero.forward<silu>(args);
  CHECK(same_bits(passed.y.host(), zero.y.host()));
  CHECK(stepped.y.host()(1, 0, 5) == zero.y.host()(1, 0, 5));
  CHECK(same_bits(states.host(), pool));
  CHECK(states.guards_intact());
}

TEST_CASE("ragged sequences in slots equal separate calls, bit for bit") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    for (Layout layout : every_layout) {
      CAPTURE(Width);
      CAPTURE(int(layout));
      const Problem<float, Width> p({1, total, 20}, lengths);
      const Index count = p.sequences();
      const DeviceProblem<float, Width> packed(p, layout), apart(p, layout);
      std::vector<Index> slots;
      for (Index i = 0; i < count; ++i) slots.push_back((5 * i + 3) % 13);
      auto pool = random_tensor<float>(12, 13, Width - 1, 20);
      for_each_index(p.initial_state.view(),
                     [&](auto i, auto... at) { pool(slots[std::size_t(i)], at...) = p.initial_state(i, at...); });
      const DeviceTensor<std::int32_t, 1> device_slots(tensor_of<std::int32_t>(slots)),
          narrow_offsets(tensor_of<std::int32_t>(p.offsets));
      const DeviceTensor<float, 3> states(pool);
      auto args = packed.args();
      args.cu_seqlens = IndexView(narrow_offsets.view()), args.state_slots = IndexView(device_slots.view());
      args.initial_state = states, args.final_state = states;
      packed.template forward<silu>(args);
      packed.template backward<silu>(packed.backward_args());
      for (Index i = 0; i < count; ++i) {
        const auto own = [&](auto& view) { view = run(view, 1, p.offsets[std::size_t(i)], lengths[std::size_t(i)]); };
        const auto state = [&](auto& view) { view = run(view, 0, i, 1); };
        auto one = apart.args();
        auto back = apart.backward_args();
        one.cu_seqlens = back.cu_seqlens = {};
        own(one.x), own(one.y), state(one.initial_state), state(one.final_state);
        own(back.x), own(back.grad_y), own(back.grad_x), state(back.initial_state), state(back.grad_final_state);
        state(back.grad_initial_state);
        apart.template forward<silu>(one), apart.template backward<silu>(back);
      }
      const auto want = apart.final_state.host();
      for_each_index(want.view(), [&](auto i, auto... at) { pool(slots[std::size_t(i)], at...) = want(i, at...); });
      CHECK(same_bits(packed.y.host(), apart.y.host()));
      CHECK(same_bits(states.host(), pool));
      CHECK(same_bits(packed.grad_x.host(), apart.grad_x.host()));
      CHECK(same_bits(packed.grad_initial_state.host(), apart.grad_initial_state.host()));
    }
  };
  check_width(std::integral_constant<int, 4>{});
  check_width(std::integral_constant<int, 17>{});
}

TEST_CASE("offsets that do not fit reach no other memory") {
  const std::vector<Index> wrong[] = {{3, 1, 40, 50},
                                      {0, 60, 20, 90},
                                      {0, -5, 1000000, 90},
                                      {-7, -6, -5, -4},
                                      {0, 10, Index(1) << 60, -(Index(1) << 60)},
                                      {91, 92, 93, 94}};
  const auto check_width = [&]<int Width>(std::integral_constant<int, Width>) {
    for (const auto& offsets : wrong)
      for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
        Problem<float, Width> p({1, 90, 20}, {30, 30, 30});
        p.offsets = offsets;
        const DeviceProblem<float, Width> d(p, layout);
        d.template forward<silu>(d.args());
        d.template backward<silu>(d.backward_args());
        CHECK(d.guards_intact());
      }
  };
  check_width(std::integral_constant<int, 4>{});
  check_width(std::integral_constant<int, 17>{});
}

TEST_CASE("without tokens the state passes through") {
  const DeviceProblem<float, 4> d(Problem<float, 4>({2, 0, 5}));
  d.forward<none>(d.args()), d.backward<none>(d.backward_args());
  CHECK(same_bits(d.final_state.host(), d.initial_state.host()));
  CHECK(same_bits(d.grad_initial_state.host(), d.grad_final_state.host()));
  for (float g : d.grad_taps.host()) CHECK(g == 0);
  for (float g : d.grad_bias.host()) CHECK(g == 0);
  const DeviceProblem<float, 4> no_channels(Problem<float, 4>({2, 3, 0})), no_batch(Problem<float, 4>({0, 3, 5}));
  no_channels.forward<none>(no_channels.args()), no_channels.backward<none>(no_channels.backward_args());
  no_batch.forward<none>(no_batch.args()), no_batch.backward<none>(no_batch.backward_args());
  for (float g : no_batch.grad_bias.host()) CHECK(g == 0);
}

TEST_CASE("two runs give the same bits, and a graph replays them") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
      const Problem<float, Width> p({3, 1100, 132});
      const DeviceProblem<float, Width> first(p, layout), second(p, layout);
      first.template forward<silu>(first.args()), first.template backward<silu>(first.backward_args());
      const auto args = second.backward_args();
      const DeviceMemory scratch(cuda::workspace_bytes(args));
      const Graph graph(second.stream, [&] {
        require_ok(cuda::short_conv<Width, silu>(second.args(), second.stream));
        require_ok(cuda::short_conv_backward<Width, silu>(args, {scratch.data(), scratch.bytes()}, second.stream));
      });
      for (int i = 0; i < 2; ++i) graph.launch();
      second.stream.wait();
      CHECK(same_bits(first.y.host(), second.y.host()));
      CHECK(same_bits(first.final_state.host(), second.final_state.host()));
      CHECK(same_bits(first.grad_x.host(), second.grad_x.host()));
      CHECK(same_bits(first.grad_taps.host(), second.grad_taps.host()));
      CHECK(same_bits(first.grad_bias.host(), second.grad_bias.host()));
      CHECK(same_bits(first.grad_initial_state.host(), second.grad_initial_state.host()));
    }
  };
  check_width(std::integral_constant<int, 4>{});
  check_width(std::integral_constant<int, 16>{});
}

// Without bias the pass is linear in x and the state: <y, grad_y> + <final, grad_final> = <x, grad_x> + <initial,
// grad_initial>.
TEST_CASE("the gradient is the adjoint") {
  const auto dot = [](const auto& a, const auto& b) {
    double sum = 0;
    for_each_index(a.view(), [&](auto... i) { sum += double(a(i...)) * double(b(i...)); });
    return sum;
  };
  const auto check_width = [&]<int Width>(std::integral_constant<int, Width>) {
    for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
      const Problem<float, Width> p({1, total, 20}, lengths);
      const DeviceProblem<float, Width> d(p, layout);
      auto args = d.args();
      args.bias = {};
      d.template forward<none>(args), d.template backward<none>(d.backward_args());
      const double out = dot(d.y.host(), p.grad_y) + dot(d.final_state.host(), p.grad_final_state);
      const double in = dot(d.grad_x.host(), p.x) + dot(d.grad_initial_state.host(), p.initial_state);
      const double size = std::sqrt(dot(p.x, p.x) * dot(p.grad_y, p.grad_y));
      CHECK(std::abs(out - in) < tolerance<float>(Width) * size);
      CHECK(std::abs(dot(d.grad_taps.host(), p.taps) - dot(d.y.host(), p.grad_y)) < tolerance<float>(total) * size);
    }
  };
  check_width(std::integral_constant<int, 4>{});
  check_width(std::integral_constant<int, 64>{});
}

TEST_CASE("arguments that do not fit are refused by name") {
  const DeviceProblem<float, 4> d(Problem<float, 4>({2, 6, 5})), other(Problem<float, 4>({2, 7, 5}));
  const auto refused = [](Status s, const char* word) {
    CAPTURE(std::string(s.why));
    CHECK(!s.ok());
    CHECK(std::string(s.why).find(word) != std::string::npos);
    CHECK(cudaPeekAtLastError() == cudaSuccess);
  };
  auto args = d.args();
  refused(cuda::short_conv<3>(args, nullptr), "taps");
  args.y = other.y.view();
  refused(cuda::short_conv<4>(args, nullptr), "y");
  args = d.args(), args.bias.extents[0] = 4;
  refused(cuda::short_conv<4>(args, nullptr), "bias");
  args = d.args(), args.initial_state = d.x.view();
  refused(cuda::short_conv<4>(args, nullptr), "initial_state");
  args = d.args(), args.final_state.strides[0] = 0;
  refused(cuda::short_conv<4>(args, nullptr), "final_state");
  const std::int64_t* const anywhere = reinterpret_cast<const std::int64_t*>(d.taps.view().data);
  args = d.args(), args.cu_seqlens = IndexView(anywhere, 2);
  refused(cuda::short_conv<4>(args, nullptr), "cu_seqlens");
  auto backward = d.backward_args();
  const DeviceMemory scratch(cuda::workspace_bytes(backward));
  refused(cuda::short_conv_backward<4>(backward, {scratch.data(), scratch.bytes() - 1}, nullptr), "workspace");
  refused(cuda::short_conv_backward<4>(backward, {}, nullptr), "workspace");
  backward.grad_y = other.x.view();
  refused(cuda::short_conv_backward<4>(backward, {scratch.data(), scratch.bytes()}, nullptr), "grad_y");
  auto step = step_of(d, 0, false);
  step.state.extents[1] = 2;
  refused(cuda::short_conv_step<4>(step, nullptr), "state");
}

}  // namespace
}  // namespace chela::test
