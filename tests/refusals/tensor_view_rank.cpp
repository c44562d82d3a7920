// expect: TensorView has rank 1 to 5
#include "chela/core/tensor_view.hpp"

#if defined(WITHIN_LIMITS)
inline constexpr int rank = 5;
#else
inline constexpr int rank = 6;
#endif

chela::TensorView<float, rank> view;
