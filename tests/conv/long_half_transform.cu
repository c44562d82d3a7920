// Long convolutions of 16-bit data by transforms on tensor cores: every size of a transform, layout, state and type.
#include <cmath>

#include "conv/compiled_once.cuh"
#include "conv/long_cuda.cuh"

namespace chela::test {

/// Both sides of every size of a transform.
inline std::vector<LongCase> half_transform_sizes() {
  std::vector<LongCase> cases;
  for (Index points : {256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192, 12288, 16384})
    for (Index tokens : {points - 1, points, points + 1}) {
      if (tokens > 16384) continue;
      const Index channels = tokens > 4096 ? 1 : tokens > 1024 ? 2 : 5;
      cases.push_back({.batch = tokens > 2048 ? Index(1) : Index(2),
                       .tokens = tokens,
                       .channels = channels,
                       .taps = tokens,
                       .skip = true,
                       .layout = Layout::tokens_last});
    }
  for (Index tokens : {1, 2, 7, 64, 255, 997, 1021, 1000, 2039, 3001})
    cases.push_back({.batch = 3, .tokens = tokens, .channels = 3, .taps = tokens, .layout = Layout::tokens_last});
  return cases;
}

/// Kernels shorter and longer than the sequence, that look ahead, and with states, in both layouts.
inline std::vector<LongCase> half_transform_kernels() {
  std::vector<LongCase> cases;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last}) {
    for (Index back_taps : {0, 1, 300, 599})
      for (Index taps : {1, 17, 600, 800})
        cases.push_back({.batch = 2,
                         .tokens = 600,
                         .channels = 66,
                         .taps = taps,
                         .back_taps = back_taps,
                         .skip = taps == 17,
                         .layout = layout});
    for (Index tokens : {1, 130, 700, 2100})
      for (Index taps : {2, 200, 1024, 4097})
        for (Index back_taps : {0, 50})
          cases.push_back({.batch = 1,
                           .tokens = tokens,
                           .channels = 3,
                           .taps = taps,
                           .back_taps = back_taps,
                           .state = true,
                           .skip = true,
                           .layout = layout});
    cases.push_back({.batch = 1, .tokens = 5000, .channels = 2, .taps = 5000, .back_taps = 4999, .layout = layout});
    cases.push_back({.batch = 1, .tokens = 9000, .channels = 1, .taps = 9000, .state = true, .layout = layout});
    cases.push_back({.batch = 1, .tokens = 13000, .channels = 1, .taps = 1, .back_taps = 12999, .layout = layout});
    cases.push_back({.batch = 1, .tokens = 100, .channels = 1, .taps = 16384, .state = true, .layout = layout});
  }
  return cases;
}

/// Channels that lie next to each other, in eights.
inline std::vector<LongCase> half_transform_tiles() {
  std::vector<LongCase> cases;
  for (Index tokens : {1, 2, 255, 256, 257, 511, 700, 1023, 1025, 1280, 1537, 2048, 2049, 3073, 4097, 6145, 8201, 9003})
    cases.push_back({.batch = tokens > 2048 ? Index(1) : Index(2),
                     .tokens = tokens,
                     .channels = tokens > 2048 ? 8 : 16,
                     .taps = tokens,
                     .back_taps = tokens == 700 ? Index(600) : Index(0),
                     .skip = true});
  return cases;
}

/// The operator by a graph that it was captured into.
template <class T>
Tensor<T, 3> replayed(const LongInputs<T>& in) {
  const DeviceRows<T> x(in.p.x, in.c.layout), y(nan_tensor<T>(in.c.batch, in.c.tokens, in.c.channels), in.c.layout);
  const DeviceTensor<float, 2> taps(in.p.taps);
  const LongConvArgs<T> a{.x = x.view(), .taps = taps.view(), .y = y.view()};
  const DeviceMemory scratch(cuda::workspace_bytes<in_halves>(a));
  const Stream stream;
  const Graph graph(stream, [&] {
    require_ok(cuda::long_conv<in_halves>(a, Workspace{scratch.data(), scratch.bytes()}, stream));
  });
  for (int i = 0; i < 2; ++i) graph.launch();
  stream.wait();
  return y.host();
}

template <class T>
void copy_elements(TensorView<const T, 3> from, TensorView<T, 3> to) {
  for (Index i = 0; i < from.extents[0]; ++i)
    for (Index j = 0; j < from.extents[1]; ++j)
      for (Index k = 0; k < from.extents[2]; ++k) to(i, j, k) = from(i, j, k);
}

TEST_CASE_TEMPLATE("outputs of every size", T, __nv_bfloat16, __half) {
  for (const LongCase& c : half_transform_sizes()) check_forward<in_halves, T>(c);
}

TEST_CASE_TEMPLATE("outputs of every kernel, layout and state", T, __nv_bfloat16, __half) {
  for (const LongCase& c : half_transform_kernels()) check_forward<in_halves, T>(c);
}

TEST_CASE_TEMPLATE("outputs of neighbouring channels", T, __nv_bfloat16, __half) {
  for (const LongCase& c : half_transform_tiles()) check_forward<in_halves, T>(c);
}

TEST_CASE("inputs times a power of two give outputs times it, bit for bit") {
  using T = __nv_bfloat16;
  for (Index tokens : {300, 1000, 1023, 5000})
    for (double factor : {0x1p-66, 0x1p66}) {
      LongInputs<T> in({.batch = 2, .tokens = tokens, .channels = 3, .taps = tokens, .layout = Layout::tokens_last});
      LongOutputs<T> want = long_conv_on_device<in_halves>(in);
      for (Tensor<T, 3>* x : {&in.p.x, &want.y})
        for (Index i = 0; i < x->size(); ++i)
          x->data()[i] = T(float(factor * double(static_cast<float>(x->data()[i]))));
      CHECK(same_bits(long_conv_on_device<in_halves>(in).y, want.y));
    }
}

TEST_CASE("an impulse gives the kernel, and nothing before it") {
  using T = __nv_bfloat16;
  for (Index tokens : {256, 1000, 4096, 16384})
    for (Index at : {Index(0), tokens / 2, tokens - 1}) {
      LongInputs<T> in({.batch = 1, .tokens = tokens, .channels = 2, .taps = tokens, .layout = Layout::tokens_last});
      for (Index t = 0; t < tokens; ++t)
        for (Index d = 0; d < 2; ++d) in.p.x(0, t, d) = T(t == at ? 1.0f : 0.0f);
      const LongOutputs<T> got = long_conv_on_device<in_halves>(in);
      // A row's error is that of the kernel's whole spectrum, wherever the outputs are.
      double error = 0, size = 0;
      for (Index t = 0; t < tokens; ++t)
        for (Index d = 0; d < 2; ++d) {
          const double want = t < at ? 0.0 : double(in.p.taps(d, t - at)), whole_kernel = in.p.taps(d, t);
          const double off = double(static_cast<float>(got.y(0, t, d))) - want;
          error += off * off, size += whole_kernel * whole_kernel;
        }
      CHECK(std::sqrt(error / size) < long_conv_tolerance<T>());
    }
}

/// Rows that begin anywhere, of tensors that are wider than what takes part.
TEST_CASE("views into wider tensors") {
  using T = __nv_bfloat16;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last})
    for (Index tokens : {5, 100, 513, 1000, 2500})
      for (Index before : {0, 1, 2, 3}) {
        CAPTURE(tokens);
        CAPTURE(before);
        const bool tokens_last = layout == Layout::tokens_last;
        const LongInputs<T> in({.batch = 2, .tokens = tokens, .channels = 3, .taps = tokens, .layout = layout});
        Tensor<T, 3> wide_x =
            tokens_last ? random_tensor<T>(11, 2, 3, tokens + 3 + before) : random_tensor<T>(11, 2, tokens, 8 + before);
        const auto cut = [&](TensorView<T, 3> wide) {
          return tokens_last ? run(transposed(wide, 1, 2), 1, before, tokens) : run(wide, 2, before, 3);
        };
        copy_elements(TensorView<const T, 3>(in.p.x.view()), cut(wide_x.view()));
        const DeviceTensor<T, 3> x(wide_x), y(wide_x);
        const DeviceTensor<float, 2> taps(in.p.taps);
        const LongConvArgs<T> a{.x = cut(x.view()), .taps = taps.view(), .y = cut(y.view())};
        const DeviceMemory scratch(cuda::workspace_bytes<in_halves>(a));
        const Stream stream;
        require_ok(cuda::long_conv<in_halves>(a, Workspace{scratch.data(), scratch.bytes()}, stream));
        stream.wait();
        // Nothing else is written, and outputs are those of rows that lie by themselves.
        const LongOutputs<T> want = long_conv_on_device<in_halves>(in);
        copy_elements(TensorView<const T, 3>(want.y.view()), cut(wide_x.view()));
        CHECK(same_bits(y.host(), wide_x));
        CHECK(y.guards_intact());
      }
}

TEST_CASE("captured into a graph") {
  using T = __nv_bfloat16;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last})
    for (Index tokens : {700, 3000}) {
      const LongInputs<T> in({.batch = 2, .tokens = tokens, .channels = 5, .taps = tokens, .layout = layout});
      CHECK(same_bits(replayed(in), long_conv_on_device<in_halves>(in).y));
    }
}

}  // namespace chela::test
