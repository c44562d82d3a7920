// Sums taken directly on a GPU: every shape, layout, state and type, and what only they promise: strict causality.
#include <limits>

#include "conv/long_cuda.cuh"

namespace chela::test {

constexpr LongConvPolicy few_taps{.method = LongConvMethod::direct, .taps = 5};

/// Shapes around the sizes of tiles and slabs.
inline std::vector<LongCase> tile_cases() {
  std::vector<LongCase> cases;
  for (Index tokens : {127, 128, 129, 255, 256, 257, 383, 385, 511, 512, 513, 1023, 1024, 1025, 2100})
    for (Layout layout : {Layout::channels_last, Layout::tokens_last})
      cases.push_back({.batch = 2, .tokens = tokens, .channels = 16, .taps = tokens, .skip = true, .layout = layout});
  for (Index taps : {15, 16, 24, 250, 520, 1100})
    for (Index back_taps : {0, 7, 15, 16, 530})
      cases.push_back({.batch = 2,
                       .tokens = 1200,
                       .channels = 9,
                       .taps = taps,
                       .back_taps = back_taps,
                       .state = taps > 100,
                       .layout = back_taps % 2 ? Layout::tokens_last : Layout::channels_last});
  return cases;
}

TEST_CASE_TEMPLATE("outputs and final states", T, float, __half, __nv_bfloat16) {
  for (const LongCase& c : long_conv_cases()) check_forward<direct, T>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_forward<direct, T>(c);
  for (const LongCase& c : tile_cases()) check_forward<direct, T>(c);
}

TEST_CASE_TEMPLATE("gradients", T, float, __half, __nv_bfloat16) {
  for (const LongCase& c : long_conv_cases()) check_backward<direct, T>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_backward<direct, T>(c);
  for (const LongCase& c : tile_cases()) check_backward<direct, T>(c);
}

TEST_CASE_TEMPLATE("many sequences and channels share blocks", T, float, __half, __nv_bfloat16) {
  const LongCase c{.batch = 70, .tokens = 100, .channels = 300, .taps = 20, .skip = true};
  check_forward<direct, T>(c);
  check_backward<direct, T>(c);
}

TEST_CASE_TEMPLATE("partial kernels", T, float, __half, __nv_bfloat16) {
  for (Index taps : {3, 5, 6, 40})
    for (bool state : {false, true}) {
      const LongCase c{.batch = 2, .tokens = 30, .channels = 24, .taps = taps, .back_taps = 3, .state = state};
      check_forward<few_taps, T>(c);
      check_backward<few_taps, T>(c);
    }
}

TEST_CASE("the final state may be the initial state's memory") {
  for (Index tokens : {1, 3, 64, 200})
    for (Index taps : {2, 64, 100, 2000})
      check_forward<direct, float>(
          {.batch = 2, .tokens = tokens, .channels = 33, .taps = taps, .state = true, .in_place = true});
}

template <class T>
bool same_element(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

TEST_CASE_TEMPLATE("no output depends on a later input, not even in its bits", T, float, __half, __nv_bfloat16) {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last})
    for (Index tokens : {40, 300, 1200}) {
      const LongCase c{.batch = 1, .tokens = tokens, .channels = 12, .taps = tokens, .skip = true, .layout = layout};
      LongInputs<T> in(c);
      for (Index t = 0; t < tokens; ++t)  // as small as a later input is large
        for (Index d = 0; d < c.channels; ++d) in.p.x(0, t, d) = T(static_cast<float>(in.p.x(0, t, d)) * 1e-3f);
      const LongOutputs<T> want = long_conv_on_device<direct>(in);
      for (float later : {1e4f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
        for (Index first : {Index(1), Index(7), Index(8), Index(9), Index(23), tokens / 2, tokens - 1}) {
          CAPTURE(c);
          CAPTURE(later);
          CAPTURE(first);
          LongInputs<T> changed = in;
          for (Index t = first; t < tokens; ++t)
            for (Index d = 0; d < c.channels; ++d) changed.p.x(0, t, d) = T(later);
          const LongOutputs<T> got = long_conv_on_device<direct>(changed);
          bool same = true, all_changed = true;
          for (Index t = 0; t < tokens; ++t)
            for (Index d = 0; d < c.channels; ++d)
              (t < first ? same : all_changed) &= same_element(got.y(0, t, d), want.y(0, t, d)) == (t < first);
          CHECK(same);
          CHECK(all_changed);
        }
    }
}

TEST_CASE_TEMPLATE("a NaN reaches the outputs whose kernel meets it and no others", T, float, __half, __nv_bfloat16) {
  for (Index taps : {1, 5, 20, 40, 300})
    for (Index back_taps : {0, 3, 33})
      for (Index at : {0, 13, 200, 699}) {
        const LongCase c{.batch = 1, .tokens = 700, .channels = 8, .taps = taps, .back_taps = back_taps};
        CAPTURE(c);
        CAPTURE(at);
        LongInputs<T> in(c);
        const LongOutputs<T> want = long_conv_on_device<direct>(in);
        for (Index d = 0; d < c.channels; ++d) in.p.x(0, at, d) = T(std::numeric_limits<float>::quiet_NaN());
        const LongOutputs<T> got = long_conv_on_device<direct>(in);
        bool as_wanted = true;
        for (Index t = 0; t < c.tokens; ++t)
          for (Index d = 0; d < c.channels; ++d) {
            const auto y = static_cast<float>(got.y(0, t, d));
            const bool met = t >= at - back_taps && t < at + taps;
            as_wanted = as_wanted && (met ? y != y : same_element(got.y(0, t, d), want.y(0, t, d)));
          }
        CHECK(as_wanted);
      }
}

TEST_CASE_TEMPLATE("taps of any size", T, __half, __nv_bfloat16) {
  for (float size : {1e-20f, 1e-6f, 1e3f}) {
    const LongCase c{.batch = 1, .tokens = 100, .channels = 16, .taps = 100};
    LongInputs<T> in(c);
    const LongOutputs<T> plain = long_conv_on_device<direct>(in);
    for (Index k = 0; k < in.p.taps.size(); ++k) in.p.taps.data()[k] *= size;
    if (size < 1)  // half the outputs must be numbers of the type
      for (Index k = 0; k < in.p.x.size(); ++k) in.p.x.data()[k] = T(static_cast<float>(in.p.x.data()[k]) * 256);
    const LongOutputs<T> got = long_conv_on_device<direct>(in);
    if (std::same_as<T, __half> && size == 1e-20f) continue;
    Tensor<double, 3> want = converted<double>(plain.y.view());
    for (Index k = 0; k < want.size(); ++k) want.data()[k] *= double(size) * (size < 1 ? 256 : 1);
    CHECK(relative_error(got.y, want) < 2 * long_conv_tolerance<T>());
  }
}

TEST_CASE("each gradient alone is what it is among the others") {
  const LongCase c{.batch = 2, .tokens = 200, .channels = 20, .taps = 90, .back_taps = 12, .state = true, .skip = true};
  const LongInputs<__nv_bfloat16> in(c);
  const LongGradientOutputs<__nv_bfloat16> all = long_conv_backward_on_device<direct>(in);
  for (int only = 0; only < 5; ++only) {
    const auto one = long_conv_backward_on_device<direct>(in, [&](auto& a) {
      if (only != 0) a.grad_x = {};
      if (only != 1) a.grad_taps = {};
      if (only != 2) a.grad_back_taps = {};
      if (only != 3) a.grad_skip = {};
      if (only != 4) a.grad_initial_state = {};
    });
    CHECK((only != 0 || same_bits(one.x, all.x)));
    CHECK((only != 1 || same_bits(one.taps, all.taps)));
    CHECK((only != 2 || same_bits(one.back_taps, all.back_taps)));
    CHECK((only != 3 || same_bits(one.skip, all.skip)));
    CHECK((only != 4 || same_bits(one.state, all.state)));
  }
}

TEST_CASE_TEMPLATE("pieces that pass the state give what one call gives", T, float, __half, __nv_bfloat16) {
  const LongCase c{.batch = 2, .tokens = 700, .channels = 16, .taps = 150, .state = true};
  const LongInputs<T> in(c);
  const LongOutputs<T> whole = long_conv_on_device<direct>(in);
  Tensor<T, 3> state = in.p.state, y = nan_tensor<T>(c.batch, c.tokens, c.channels);
  for (Index begin = 0, count = 1; begin < c.tokens; begin += count, count = std::min(3 * count, c.tokens - begin)) {
    LongCase piece = c;
    piece.tokens = count;
    LongInputs<T> part(piece);
    part.p.taps = in.p.taps, part.p.state = state;
    part.p.x = converted<T>(run(TensorView<const T, 3>(in.p.x.view()), 1, begin, count));
    const LongOutputs<T> out = long_conv_on_device<direct>(part);
    state = out.final_state;
    for_each_index(out.y.view(), [&](Index b, Index t, Index d) { y(b, begin + t, d) = out.y(b, t, d); });
  }
  CHECK(relative_error(y, whole.y) < long_conv_tolerance<T>());
  CHECK(same_bits(state, whole.final_state));
}

TEST_CASE_TEMPLATE("offsets that are wrong touch nothing outside", T, float, __half, __nv_bfloat16) {
  for (const std::vector<Index>& offsets :
       {std::vector<Index>{0, 1000, 1 << 30, 50}, {-5, -9, 20, 64}, {64, 0, 64, 0}, {70, 80, 90, 100}}) {
    LongCase c = packed({.channels = 20, .taps = 40, .state = true}, {20, 20, 24});
    c.offsets = offsets;
    const LongInputs<T> in(c);
    long_conv_on_device<direct>(in);
    long_conv_backward_on_device<direct>(in);
  }
}

TEST_CASE("a prepared kernel serves many calls, captured into a graph") {
  using T = __nv_bfloat16;
  const LongCase c{.batch = 2, .tokens = 300, .channels = 24, .taps = 300};
  const LongInputs<T> in(c);
  const LongOutputs<T> want = long_conv_on_device<direct>(in);
  const DeviceTensor<T, 3> x(in.p.x), y(nan_tensor<T>(c.batch, c.tokens, c.channels));
  const DeviceTensor<float, 2> taps(in.p.taps);
  const LongConvArgs<T> args{.x = x.view(), .taps = taps.view(), .y = y.view()};
  const DeviceMemory kernel(cuda::prepared_kernel_bytes<direct>(args)),
      scratch(cuda::workspace_bytes_with_kernel<direct>(args));
  const cuda::PreparedKernel prepared{kernel.data(), kernel.bytes()};
  const Stream stream;
  require_ok(cuda::prepare_kernel<direct>(args, prepared, stream));
  stream.wait();
  const Graph graph(stream, [&] {
    require_ok(cuda::long_conv<direct>(args, prepared, Workspace{scratch.data(), scratch.bytes()}, stream));
  });
  graph.launch();
  stream.wait();
  CHECK(same_bits(y.host(), want.y));
  const cuda::PreparedKernel short_one{kernel.data(), kernel.bytes() - 16};
  CHECK(cuda::long_conv<direct>(args, short_one, {}, stream).code == Code::bad_shape);
  CHECK(cuda::prepare_kernel<direct>(args, short_one, stream).code == Code::bad_shape);
  CHECK(cuda::long_conv<direct>(args, Workspace{}, stream).code == Code::bad_shape);
  LongConvArgs<T> wrong = args;
  wrong.y.extents[1] = 299;
  CHECK(cuda::long_conv<direct>(wrong, Workspace{}, stream).code == Code::bad_shape);
}

TEST_CASE_TEMPLATE("no tokens, no channels, no sequences", T, float, __nv_bfloat16) {
  for (const LongCase& c : {LongCase{.batch = 2, .tokens = 0, .channels = 8, .taps = 5, .back_taps = 2, .state = true},
                            LongCase{.batch = 2, .tokens = 9, .channels = 0, .taps = 5, .state = true},
                            LongCase{.batch = 0, .tokens = 9, .channels = 8, .taps = 5, .state = true}}) {
    check_forward<direct, T>(c);
    check_backward<direct, T>(c);
  }
}

}  // namespace chela::test
