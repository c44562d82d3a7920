// expect: no match for call|no matching function for call
#include "chela/core/tensor_view.hpp"

float corner(chela::TensorView<float, 3> view) {
#if defined(WITHIN_LIMITS)
  return view(0, 0, 0);
#else
  return view(0, 0);
#endif
}
