// Sums taken directly on a GPU: every shape, layout, state and type.
#include "conv/long_cuda.cuh"

namespace chela::test {

TEST_CASE_TEMPLATE("outputs and final states", T, float, __half, __nv_bfloat16) {
  for (const LongCase& c : long_conv_cases()) check_forward<direct, T>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_forward<direct, T>(c);
}

TEST_CASE_TEMPLATE("gradients", T, float, __half, __nv_bfloat16) {
  for (const LongCase& c : long_conv_cases()) check_backward<direct, T>(c);
  for (const LongCase& c : packed_long_conv_cases()) check_backward<direct, T>(c);
}

TEST_CASE("the final state may be the initial state's memory") {
  for (Index tokens : {1, 3, 64, 200})
    for (Index taps : {2, 64, 100, 2000})
      check_forward<direct, float>(
          {.batch = 2, .tokens = tokens, .channels = 33, .taps = taps, .state = true, .in_place = true});
}

}  // namespace chela::test
