#pragma once
// What several tests and benchmarks of 16-bit convolutions call, compiled once in the files of conv/compiled.
#include "chela/cuda/conv/compiled_once.cuh"

namespace chela::test {

inline constexpr LongConvPolicy in_halves{.method = LongConvMethod::transform,
                                          .arithmetic = TransformArithmetic::element},
    transform_by_sizes{.method = LongConvMethod::transform}, automatic{};

}  // namespace chela::test

CHELA_LONG_CONV(extern, chela::test::in_halves, __nv_bfloat16)
CHELA_LONG_CONV(extern, chela::test::transform_by_sizes, __nv_bfloat16)
CHELA_LONG_CONV(extern, chela::test::automatic, __nv_bfloat16)
CHELA_SHORT_LONG_CONV(extern, 4, chela::test::in_halves, __nv_bfloat16)

CHELA_LONG_CONV(extern, chela::test::in_halves, __half)
CHELA_SHORT_LONG_CONV(extern, 4, chela::test::in_halves, __half)
