// Transforms in float on a GPU: every size of a transform, shapes on both sides of its boundaries, layouts, states and
// packed sequences. Those too long for a thread block are in long_float_transform_far.cu.
#include "conv/long_cuda.cuh"

namespace chela::test {

constexpr LongConvPolicy in_floats{.method = LongConvMethod::transform, .arithmetic = TransformArithmetic::accumulator};

TEST_CASE("outputs and final states") {
  for (const LongCase& c : long_conv_cases()) check_forward<in_floats, float>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_forward<in_floats, float>(c);
}

TEST_CASE("gradients") {
  for (const LongCase& c : long_conv_cases()) check_backward<in_floats, float>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_backward<in_floats, float>(c);
}

/// Sequences that just fill each transform that a thread block holds, and one token more, as rows that the kernel reads
/// itself and as rows that pass through memory.
TEST_CASE("every size of a transform") {
  for (Index points : {256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288})
    for (Index tokens : {points, points + 1})
      for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
        const bool small = points <= 2048;
        check_forward<in_floats, float>({.batch = small ? 2 : 1,
                                         .tokens = tokens,
                                         .channels = small ? 9 : 1,
                                         .taps = small ? tokens : 1021,
                                         .skip = true,
                                         .layout = layout});
        if (small)
          check_backward<in_floats, float>(
              {.batch = 2, .tokens = tokens, .channels = 9, .taps = tokens, .back_taps = 5, .layout = layout});
      }
}

TEST_CASE("the longest rows") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    const LongCase c{
        .batch = 1, .tokens = 16384, .channels = 1, .taps = 2039, .back_taps = 300, .skip = true, .layout = layout};
    check_forward<in_floats, float>(c);
    check_backward<in_floats, float>(c);
  }
}

/// With a state a kernel longer than the tokens takes part as a whole.
TEST_CASE("kernels longer than the sequence, with states") {
  for (Index taps : {129, 400, 1500, 5000})
    for (Index back_taps : {0, 40}) {
      const LongCase c{.batch = 2, .tokens = 100, .channels = 9, .taps = taps, .back_taps = back_taps, .state = true};
      check_forward<in_floats, float>(c);
      check_backward<in_floats, float>(c);
    }
}

TEST_CASE("packed sequences of every size at once") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last})
    for (bool state : {false, true}) {
      const LongCase c = packed({.channels = 9, .taps = 700, .skip = true, .layout = layout},
                                {1, 256, 257, 0, 900, 512, 513, 1024, 3, 1025, 2100});
      check_forward<in_floats, float>(c);
      LongCase with_state = c;
      with_state.state = state;
      check_backward<in_floats, float>(with_state);
    }
}

/// Offsets that lead anywhere: the outputs are worth nothing, and nothing else is touched.
TEST_CASE("wrong offsets of packed sequences touch nothing outside") {
  const LongInputs<float> in(packed({.channels = 3, .taps = 50}, {200, 200, 112}));
  const DeviceTensor<float, 3> x(in.p.x), y(nan_tensor<float>(1, 512, 3));
  const DeviceTensor<float, 2> taps(in.p.taps);
  Tensor<Index, 1> offsets(4);
  offsets(0) = -100, offsets(1) = 100000, offsets(2) = Index(1) << 40, offsets(3) = 5;
  const DeviceTensor<Index, 1> wrong(offsets);
  LongConvArgs<float> a{.x = x.view(), .taps = taps.view(), .y = y.view()};
  a.cu_seqlens = wrong.view();
  const DeviceTensor<char, 1> scratch(Tensor<char, 1>({Index(cuda::workspace_bytes<in_floats>(a))}, char(0xff)));
  const Stream stream;
  require_ok(cuda::long_conv<in_floats>(a, Workspace{scratch.view().data, std::size_t(scratch.view().size())}, stream));
  stream.wait();
  CHECK(y.guards_intact());
  CHECK(scratch.guards_intact());
  CHECK(same_bits(x.host(), in.p.x));
}

Tensor<float, 3> outputs(const LongInputs<float>& in) { return long_conv_on_device<in_floats>(in).y; }

TEST_CASE("nothing wraps around") {
  for (Index tokens : {1024, 1536, 4096, 20000}) {
    LongInputs<float> in({.batch = 1, .tokens = tokens, .channels = 2, .taps = tokens});
    for_each_index(in.p.x.view(), [&](Index b, Index t, Index d) { in.p.x(b, t, d) = t < tokens / 2 ? 0 : 1; });
    const Tensor<float, 3> y = outputs(in);
    double early = 0, late = 0;
    for_each_index(y.view(), [&](Index b, Index t, Index d) {
      double& most = t < tokens / 2 ? early : late;
      most = std::max(most, std::abs(double(y(b, t, d))));
    });
    CHECK(early < 2e-6 * late);
  }
}

TEST_CASE("outputs are linear in the inputs") {
  LongInputs<float> a({.batch = 1, .tokens = 3000, .channels = 2, .taps = 3000}), b(a), sum(a);
  b.p.x = random_tensor<float>(21, 1, 3000, 2);
  for (Index i = 0; i < sum.p.x.size(); ++i) sum.p.x.data()[i] = 2 * a.p.x.data()[i] - b.p.x.data()[i];
  const Tensor<float, 3> ya = outputs(a), yb = outputs(b);
  Tensor<double, 3> want(1, 3000, 2);
  for (Index i = 0; i < want.size(); ++i) want.data()[i] = 2 * double(ya.data()[i]) - double(yb.data()[i]);
  CHECK(relative_error(outputs(sum), want) < long_conv_tolerance<float>());
}

double dot(const Tensor<float, 3>& a, const Tensor<float, 3>& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i) sum += double(a.data()[i]) * double(b.data()[i]);
  return sum;
}

TEST_CASE("gradients are the adjoint") {
  for (Index tokens : {700, 5000, 20000}) {
    LongInputs<float> in({.batch = 1, .tokens = tokens, .channels = 2, .taps = tokens});
    const Tensor<float, 3> y = outputs(in);
    const LongGradientOutputs<float> gradient = long_conv_backward_on_device<in_floats>(in);
    double taps = 0;
    for (Index i = 0; i < in.p.taps.size(); ++i) taps += double(gradient.taps.data()[i]) * double(in.p.taps.data()[i]);
    const double scale = std::sqrt(dot(y, y) * dot(in.p.grad_y, in.p.grad_y));
    CHECK(std::abs(dot(y, in.p.grad_y) - dot(in.p.x, gradient.x)) < 1e-6 * scale);
    CHECK(std::abs(dot(y, in.p.grad_y) - taps) < 1e-6 * scale);
  }
}

TEST_CASE("a sequence in pieces is the whole sequence") {
  const Index tokens = 2500, taps = 600, channels = 9;
  const LongInputs<float> in({.batch = 1, .tokens = tokens, .channels = channels, .taps = taps});
  const Tensor<float, 3> y = outputs(in);
  Tensor<float, 3> state(1, taps - 1, channels);
  state.fill(0);
  Tensor<float, 3> together = nan_tensor<float>(1, tokens, channels);
  Index begin = 0;
  for (Index count : {1, 700, 299, 1500}) {
    LongInputs<float> piece({.batch = 1, .tokens = count, .channels = channels, .taps = taps, .state = true});
    piece.p.taps = in.p.taps, piece.p.state = state;
    piece.p.x = converted<float>(run(in.p.x.view(), 1, begin, count));
    const LongOutputs<float> got = long_conv_on_device<in_floats>(piece);
    for_each_index(got.y.view(), [&](Index b, Index t, Index d) { together(b, begin + t, d) = got.y(b, t, d); });
    state = got.final_state, begin += count;
  }
  CHECK(relative_error(together, y) < long_conv_tolerance<float>());
}

}  // namespace chela::test
