// expect: the width of a short convolution must be 1 to 64
#include "chela/cpu/conv/short.hpp"

#if defined(WITHIN_LIMITS)
inline constexpr int width = 64;
#else
inline constexpr int width = 65;
#endif

chela::Status wide(const chela::ShortConvArgs<float>& args) {
  return chela::cpu::short_conv<width>(args, chela::SerialExecutor{});
}
