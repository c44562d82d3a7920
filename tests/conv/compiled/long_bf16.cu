#include "conv/compiled_once.cuh"

CHELA_LONG_CONV(, chela::test::in_halves, __nv_bfloat16)
CHELA_LONG_CONV(, chela::test::transform_by_sizes, __nv_bfloat16)
CHELA_LONG_CONV(, chela::test::automatic, __nv_bfloat16)
