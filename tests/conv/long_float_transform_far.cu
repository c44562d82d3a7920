// Transforms in float that pass through memory on a GPU, up to 2^20 tokens, against sums in double at sampled places.
#include "conv/long_far.cuh"

namespace chela::test {

constexpr LongConvPolicy in_floats{.method = LongConvMethod::transform, .arithmetic = TransformArithmetic::accumulator};

TEST_CASE_TEMPLATE("sequences longer than a thread block's rows", T, float, __nv_bfloat16) {
  for (Index tokens : {16385, 24576, 24577, 32749, 32768, 40000, 65536, 65537, 98304, 131071, 131072, 190000})
    check_far<in_floats, T>({.batch = 2,
                             .tokens = tokens,
                             .channels = tokens == 32749 || tokens == 131071 ? 9 : 2,
                             .taps = tokens,
                             .skip = true,
                             .layout = tokens % 4 == 0 ? Layout::tokens_last : Layout::channels_last});
}

TEST_CASE_TEMPLATE("two sides and states", T, float, __nv_bfloat16) {
  check_far<in_floats, T>({.batch = 1, .tokens = 20011, .channels = 2, .taps = 9001, .back_taps = 20010, .skip = true});
  check_far<in_floats, T>({.batch = 2, .tokens = 9001, .channels = 9, .taps = 30011, .state = true});
  check_far<in_floats, T>({.batch = 1,
                           .tokens = 33000,
                           .channels = 2,
                           .taps = 31000,
                           .back_taps = 777,
                           .state = true,
                           .layout = Layout::tokens_last});
}

TEST_CASE_TEMPLATE("up to 2^20 tokens", T, float, __nv_bfloat16) {
  for (Index tokens : {262144, 262147, 500009, 786432, 1 << 20})
    check_far<in_floats, T>(
        {.batch = 1, .tokens = tokens, .channels = 1, .taps = tokens, .layout = Layout::tokens_last});
}

/// The offsets leave room for many short sequences and for one that takes columns.
TEST_CASE_TEMPLATE("packed sequences, one of them long", T, float, __nv_bfloat16) {
  std::vector<Index> lengths(40, 3);
  lengths[7] = 17000, lengths[20] = 300, lengths[30] = 18000;
  const LongCase c = packed({.channels = 2, .taps = 50, .skip = true}, lengths);
  check_forward<in_floats, T>(c);
  check_backward<in_floats, T>(c);
}

}  // namespace chela::test
