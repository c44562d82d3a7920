#include "conv/compiled_once.cuh"

CHELA_LONG_CONV(, chela::test::in_halves, __half)
