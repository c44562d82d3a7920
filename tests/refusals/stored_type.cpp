// expect: stored_type_of knows float, double, int32, int64 and uint8
#include "chela/model/safetensors_header.hpp"

#if defined(WITHIN_LIMITS)
using T = float;
#else
using T = long double;
#endif

inline constexpr auto stored = chela::stored_type_of<T>;
