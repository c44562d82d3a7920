// Gradients of linear attention on a GPU with bfloat16 data.
#include <cuda_bf16.h>

namespace chela::test {
using TestElement = __nv_bfloat16;
}

#include "attention/linear_backward_cuda.cuh"
