// Gradients of linear attention on a GPU with half-precision data.
#include <cuda_fp16.h>

#include "chela/attention/member.hpp"

#define CHELA_MEMBERS                                                                           \
  Member<DecayKind::none, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>, \
      Member<DecayKind::per_token, RuleKind::additive>

namespace chela::test {
using TestElement = __half;
inline constexpr DecayKind plain_decay = DecayKind::none, test_decay = DecayKind::per_token;
}  // namespace chela::test

#include "attention/linear_backward_cuda.cuh"
