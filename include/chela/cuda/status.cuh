#pragma once
#include <cuda_runtime.h>

#include "chela/core/status.hpp"

namespace chela::cuda {

/// The runtime's answer as a status. An error that the next launch would be blamed for is cleared.
inline Status from_cuda(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {Code::cuda_error, cudaGetErrorString(error)};
}

}  // namespace chela::cuda
