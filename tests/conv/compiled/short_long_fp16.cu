#include "conv/compiled_once.cuh"

CHELA_SHORT_LONG_CONV(, 4, chela::test::in_halves, __half)
