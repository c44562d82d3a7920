// Transforms of 16-bit data that pass through memory on a GPU, with rows in half precision, up to 2^20 tokens, against sums
// in double at sampled places.
#include "conv/compiled_once.cuh"
#include "conv/long_far.cuh"

namespace chela::test {

TEST_CASE_TEMPLATE("sequences longer than a thread block's rows", T, __nv_bfloat16, __half) {
  for (Index tokens : {16385, 24576, 24577, 32749, 32768, 40000, 65536, 65537, 98304, 131071, 131072, 190000})
    check_far<in_halves, T>({.batch = 2,
                             .tokens = tokens,
                             .channels = tokens == 32749 || tokens == 131071 ? 9 : 2,
                             .taps = tokens,
                             .skip = true,
                             .layout = tokens % 4 == 0 ? Layout::tokens_last : Layout::channels_last});
}

TEST_CASE("two sides and states") {
  using T = __nv_bfloat16;
  check_far<in_halves, T>({.batch = 1, .tokens = 20011, .channels = 2, .taps = 9001, .back_taps = 20010, .skip = true});
  check_far<in_halves, T>({.batch = 2, .tokens = 9001, .channels = 9, .taps = 30011, .state = true});
  check_far<in_halves, T>({.batch = 1,
                           .tokens = 33000,
                           .channels = 2,
                           .taps = 31000,
                           .back_taps = 777,
                           .state = true,
                           .layout = Layout::tokens_last});
}

TEST_CASE("up to 2^20 tokens") {
  for (Index tokens : {262144, 500009, 786432, 1 << 20})
    check_far<in_halves, __nv_bfloat16>(
        {.batch = 1, .tokens = tokens, .channels = 1, .taps = tokens, .layout = Layout::tokens_last});
}

/// Points of 16-bit data lie in halves, with scales that are powers of two: what is a power of two larger has the same
/// bits but for the exponent, far outside of a half's range.
TEST_CASE("scales of the data change no bits") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    const LongCase c{.batch = 1, .tokens = 20000, .channels = 9, .taps = 20000, .skip = true, .layout = layout};
    LongInputs<__nv_bfloat16> in(c);
    const LongOutputs<__nv_bfloat16> once = long_conv_on_device<in_halves>(in);
    for (float scale : {0x1p60f, 0x1p-60f}) {
      LongInputs<__nv_bfloat16> scaled(c);
      for_each_index(scaled.p.x.view(), [&](Index b, Index t, Index d) {
        scaled.p.x(b, t, d) = __nv_bfloat16(float(in.p.x(b, t, d)) * scale);
      });
      const LongOutputs<__nv_bfloat16> got = long_conv_on_device<in_halves>(scaled);
      Tensor<float, 3> want(1, c.tokens, c.channels), found(1, c.tokens, c.channels);
      for_each_index(want.view(), [&](Index b, Index t, Index d) {
        want(b, t, d) = float(once.y(b, t, d)) * scale, found(b, t, d) = float(got.y(b, t, d));
      });
      CHECK(same_bits(found, want));
    }
  }
}

/// The offsets leave room for many short sequences and for one that takes columns.
TEST_CASE("packed sequences, one of them long") {
  std::vector<Index> lengths(40, 3);
  lengths[7] = 17000, lengths[20] = 300, lengths[30] = 18000;
  const LongCase c = packed({.channels = 2, .taps = 50, .skip = true}, lengths);
  check_forward<transform_by_sizes, __nv_bfloat16>(c);
  check_backward<transform_by_sizes, __nv_bfloat16>(c);
}

}  // namespace chela::test
