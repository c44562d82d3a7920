// Gradients of linear attention on a GPU with a decay per key and half-precision data.
#include <cuda_fp16.h>

#include "chela/attention/member.hpp"

#define CHELA_MEMBERS Member<DecayKind::per_key, RuleKind::additive>

namespace chela::test {
using TestElement = __half;
inline constexpr DecayKind plain_decay = DecayKind::per_key, test_decay = DecayKind::per_key;
}  // namespace chela::test

#include "attention/linear_backward_cuda.cuh"
