// Gradients of linear attention on a GPU with half-precision data.
#include <cuda_fp16.h>

namespace chela::test {
using TestElement = __half;
}

#include "attention/linear_backward_cuda.cuh"
