// The short-long convolution on a GPU by direct sums and in floats, and its gradients.
#include "conv/compiled_once.cuh"
#include "conv/short_long_cuda.cuh"

namespace chela::test {

inline std::vector<ShortLongCase> short_long_gradient_cases() {
  std::vector<ShortLongCase> cases;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last})
    for (Index tokens : {1, 33, 300})
      for (Index taps : {1, 20, 300})
        for (Index back_taps : {0, 25}) {
          ShortLongCase c;
          c.batch = 2, c.tokens = tokens, c.channels = 5, c.taps = taps, c.back_taps = back_taps, c.layout = layout;
          c.short_state = taps != 300, c.long_state = taps == 20, c.skip = taps != 1, c.bias = tokens != 33;
          cases.push_back(c);
        }
  return cases;
}

TEST_CASE("floats by direct sums") {
  for (ShortLongCase c : short_long_gradient_cases()) {
    check_backward<4, direct, float>(c);
    c.short_final = c.long_final = true, c.inner = c.tokens == 33;
    check_forward<4, direct, float>(c);
  }
}

TEST_CASE("gradients of 16-bit data by transforms") {
  for (ShortLongCase c : short_long_gradient_cases())
    if (c.tokens > 1) check_backward<4, in_halves, __nv_bfloat16>(c);
  ShortLongCase c;
  c.batch = 1, c.tokens = c.taps = 4096, c.channels = 2;
  check_backward<4, in_halves, __nv_bfloat16>(c);
}

TEST_CASE("an inner activation that is given changes no bit of the gradients") {
  using T = __nv_bfloat16;
  for (Layout layout : {Layout::tokens_last, Layout::channels_last}) {
    ShortLongCase c;
    c.batch = 2, c.tokens = 100, c.channels = 5, c.taps = 60, c.layout = layout, c.inner = true;
    const ShortLongInputs<T, 4> in(c);
    const Tensor<T, 3> inner = short_long_conv_on_device<4, in_halves>(in).inner;
    const auto got = short_long_conv_backward_on_device<4, in_halves>(in, &inner),
               want = short_long_conv_backward_on_device<4, in_halves>(in);
    CHECK(same_bits(got.x, want.x));
    CHECK(same_bits(got.short_taps, want.short_taps));
    CHECK(same_bits(got.taps, want.taps));
    CHECK(same_bits(got.skip, want.skip));
  }
}

}  // namespace chela::test
