// expect: constraint
#include "chela/cpu/adaptors.hpp"

#if defined(WITHIN_LIMITS)
Eigen::MatrixXf named;
auto view = chela::cpu::as_view(named);
#else
auto view = chela::cpu::as_view(Eigen::MatrixXf(2, 2));
#endif
