#include "chela/chela.cuh"

bool second_file_refuses() { return !chela::cuda::from_cuda(cudaErrorInvalidValue).ok(); }
