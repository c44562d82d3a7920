#pragma once
// How linear attention is cut on a GPU. Chunks have 64 tokens, the rows of one warpgroup product.

namespace chela::cuda {

/// The instructions that multiply tiles.
enum class Instructions {
  automatic,  ///< warpgroup where they can be had and the shape fits, else warp
  warp,       ///< mma.sync and cp.async: sm_80 and later, key_dim and value_dim multiples of 16 up to 256
  warpgroup,  ///< wgmma and the copy engine: sm_90a, key_dim and value_dim 64 or 128
};

/// How float data is multiplied. Tensor cores take floats with 10 bits behind the point.
enum class FloatProducts {
  none,        ///< not at all: float data is refused
  tf32,        ///< rounded to these: errors as of __half data
  three_tf32,  ///< in two parts each, three products of them: errors as of float arithmetic
};

/// Zeros and `automatic` mean the measured defaults (cuda/attention/linear_tuning.cuh).
struct LinearPolicy {
  Instructions instructions = Instructions::automatic;
  int value_tile =
      0;  ///< value columns of one block, 64 or 128: smaller ones give more blocks, and read q and k more often
  int stages = 0;  ///< chunks in flight
  int segments =
      0;  ///< blocks that share one sequence. 1: its states are summed in token order, and continuing from one in
          ///< a later call gives the bits of one call
  FloatProducts float_products = FloatProducts::none;  ///< of float data

  friend bool operator==(const LinearPolicy&, const LinearPolicy&) = default;
};

/// Carries a policy as a type, and is the one place where a policy is judged.
template <LinearPolicy P>
struct LinearPolicyConstant {
  static constexpr LinearPolicy value = P;
  static_assert(
      P.value_tile == 0 || P.value_tile == 64 || P.value_tile == 128,
      "LinearPolicy::value_tile must be 64 or 128, the columns of one or two warpgroups; 0 takes the default");
  static_assert(P.stages >= 0 && P.stages <= 8 && P.stages != 1,
                "LinearPolicy::stages must be 2 to 8 chunks in flight; 0 takes the default");
  static_assert(P.segments >= 0 && P.segments <= 1024,
                "LinearPolicy::segments must be 1 to 1024 blocks per sequence; 0 takes the default");
  static_assert(P.instructions != Instructions::warp || P.stages == 0 || P.stages >= 3,
                "LinearPolicy::stages must be 3 or more with Instructions::warp: scores are made one chunk ahead");
  static_assert(P.instructions != Instructions::warp || P.value_tile == 0,
                "LinearPolicy::value_tile must be 0 with Instructions::warp: it follows from key_dim there");
  static_assert(P.segments <= 1 || P.instructions != Instructions::warp,
                "LinearPolicy::segments above 1 need Instructions::warpgroup: no kernel of the warp's sums segments");
};

}  // namespace chela::cuda
