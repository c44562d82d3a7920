// The short-long convolution of 16-bit data on a GPU: every size of a transform, layout and state, and one pass over x
// against both stages after each other.
#include "conv/compiled_once.cuh"
#include "conv/short_long_cuda.cuh"

namespace chela::test {

/// Every size of a transform, with rows that fill it, that end within a run, and within a unit.
inline std::vector<ShortLongCase> short_long_sizes() {
  std::vector<ShortLongCase> cases;
  for (Index points : {256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192, 12288, 16384})
    for (Index missing : {0, 1, 8}) {
      ShortLongCase c;
      c.batch = points > 2048 ? 1 : 2, c.channels = points > 4096 ? 1 : points > 1024 ? 2 : 5;
      c.tokens = c.taps = points - missing;
      c.short_state = missing != 1, c.short_final = true;
      cases.push_back(c);
    }
  return cases;
}

inline std::vector<ShortLongCase> short_long_kinds() {
  std::vector<ShortLongCase> cases;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last})
    for (bool state : {false, true}) {
      for (Index tokens : {1, 2, 3, 5, 100, 600})
        for (Index taps : {1, 17, 700})
          for (Index back_taps : {0, 90}) {
            ShortLongCase c;
            c.batch = 2, c.tokens = tokens, c.channels = 3, c.taps = taps, c.back_taps = back_taps, c.layout = layout;
            c.short_state = state, c.short_final = true, c.bias = taps != 17, c.skip = taps == 17;
            cases.push_back(c);
          }
      // Neighbouring channels in eights, that tiles take.
      for (Index tokens : {1, 255, 511, 768, 1025, 2048, 3001, 4096}) {
        ShortLongCase c;
        c.batch = tokens > 2048 ? 1 : 2, c.tokens = tokens, c.channels = tokens > 2048 ? 8 : 16, c.taps = tokens;
        c.layout = layout, c.short_state = state;
        cases.push_back(c);
      }
      // What takes both stages after each other.
      for (Index tokens : {1, 130, 700})
        for (Index taps : {2, 200}) {
          ShortLongCase c;
          c.batch = 2, c.tokens = tokens, c.channels = 11, c.taps = taps, c.layout = layout;
          c.short_state = state, c.long_state = !state, c.short_final = c.long_final = true, c.inner = taps == 2;
          cases.push_back(c);
        }
    }
  return cases;
}

TEST_CASE_TEMPLATE("outputs of every size", T, __nv_bfloat16, __half) {
  for (const ShortLongCase& c : short_long_sizes()) check_forward<4, in_halves, T>(c);
}

TEST_CASE_TEMPLATE("outputs of every kernel, layout and state", T, __nv_bfloat16, __half) {
  for (const ShortLongCase& c : short_long_kinds()) check_forward<4, in_halves, T>(c);
}

TEST_CASE("other widths") {
  for (Index tokens : {1, 7, 250, 256, 768, 1000, 1536, 2048, 3000})
    for (Layout layout : {Layout::tokens_last, Layout::channels_last}) {
      ShortLongCase c;
      c.batch = 1, c.tokens = tokens, c.channels = layout == Layout::tokens_last ? 3 : 8, c.taps = tokens;
      c.layout = layout, c.short_state = c.short_final = true;
      check_forward<8, in_halves, __nv_bfloat16>(c);
      check_forward<12, in_halves, __nv_bfloat16>(c);
    }
}

TEST_CASE("one pass over x gives the bits of both stages after each other") {
  using T = __nv_bfloat16;
  for (const auto& list : {short_long_sizes(), short_long_kinds()})
    for (ShortLongCase c : list) {
      CAPTURE(c);
      const auto got = short_long_conv_on_device<4, in_halves>(ShortLongInputs<T, 4>(c));
      c.inner = true;
      const auto want = short_long_conv_on_device<4, in_halves>(ShortLongInputs<T, 4>(c));
      CHECK(same_bits(got.z, want.z));
    }
}

TEST_CASE("captured into a graph, with a kernel that is kept") {
  using T = __nv_bfloat16;
  ShortLongCase c;
  c.batch = 2, c.tokens = c.taps = 1000, c.channels = 5;
  const ShortLongInputs<T, 4> in(c);
  const ShortLongOnDevice<T, 4> d(in);
  const DeviceRows<T> z(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout);
  auto a = d.template args<ShortLongConvArgs<T>>();
  a.z = z.view();
  const DeviceMemory kernel_memory(cuda::prepared_kernel_bytes<in_halves>(a)),
      scratch(cuda::workspace_bytes_with_kernel<in_halves>(a));
  const cuda::PreparedKernel kernel{kernel_memory.data(), kernel_memory.bytes()};
  const Stream stream;
  require_ok(cuda::prepare_kernel<in_halves>(a, kernel, stream));
  const Graph graph(stream, [&] {
    require_ok(cuda::short_long_conv<4, in_halves>(a, kernel, {scratch.data(), scratch.bytes()}, stream));
  });
  for (int i = 0; i < 2; ++i) graph.launch();
  stream.wait();
  CHECK(same_bits(z.host(), short_long_conv_on_device<4, in_halves>(in).z));
}

TEST_CASE("arguments that do not fit are refused by name") {
  using T = __nv_bfloat16;
  ShortLongCase c;
  c.batch = 2, c.tokens = c.taps = 20, c.channels = 3;
  const ShortLongInputs<T, 4> in(c);
  const ShortLongOnDevice<T, 4> d(in);
  const DeviceRows<T> z(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout);
  auto a = d.template args<ShortLongConvArgs<T>>();
  a.z = z.view();
  const auto refused = [&](const Status& s, const char* argument) {
    return !s.ok() && std::string(s.why).find(argument) != std::string::npos;
  };
  CHECK(refused(cuda::short_long_conv<4, in_halves>(a, Workspace{}, nullptr), "workspace"));
  CHECK(refused(cuda::short_long_conv<8, in_halves>(a, Workspace{}, nullptr), "short_taps"));
  a.z = run(z.view(), 1, 0, 5);
  CHECK(cuda::workspace_bytes<in_halves>(a) == 0);
  CHECK(refused(cuda::short_long_conv<4, in_halves>(a, Workspace{}, nullptr), "z"));
}

}  // namespace chela::test
