// expect: constraint
#include "chela/attention/linear.hpp"

#if defined(WITHIN_LIMITS)
using T = double;
#else
using T = int;
#endif

chela::LinearAttentionArgs<T> args;
