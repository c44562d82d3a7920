// The core and the contracts mean the same to nvcc: views are indexed in a kernel that the host fills in. Two files
// that include everything link into one program. Ends with 77, which CTest takes as skipped, when there is no device.
#include <cuda_runtime.h>

#include <cstdio>

#include "chela/chela.cuh"
#include "chela/conv/long.hpp"
#include "chela/conv/short.hpp"
#include "chela/core/executor.hpp"
#include "chela/tile/policy.hpp"

namespace {

constexpr chela::Index rows = 3, columns = 5;

__global__ void copy(const __grid_constant__ chela::TensorView<const float, 2> from,
                     const __grid_constant__ chela::TensorView<float, 2> to) {
  const chela::Index row = blockIdx.x, column = threadIdx.x;
  to(row, column) = from(row, column);
}

bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  return error == cudaSuccess;
}

}  // namespace

bool second_file_refuses();

int main() {
  if (!second_file_refuses()) return 1;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 77;

  float* memory = nullptr;
  if (!succeeded(cudaMallocManaged(&memory, 2 * rows * columns * sizeof(float)))) return 1;
  for (int i = 0; i < rows * columns; ++i) memory[i] = float(i);
  const auto source = chela::contiguous(memory, rows, columns);
  const auto turned = chela::transposed(chela::reversed(source, 0), 0, 1);
  copy<<<columns, rows>>>(turned, chela::contiguous(memory + rows * columns, columns, rows));
  if (!succeeded(cudaGetLastError()) || !succeeded(cudaDeviceSynchronize())) return 1;

  int wrong = 0;
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column)
      wrong += memory[rows * columns + column * rows + row] != source(rows - 1 - row, column);
  cudaFree(memory);
  return wrong ? 1 : 0;
}
