#pragma once
// As the header of this name: an emulated device, to which a launch is a call.
#include <cuda_runtime.h>

#include <type_traits>

#include "block.hpp"
#include "chela/cuda/status.cuh"

namespace chela::cuda {

struct Device {
  int capability = 0, multiprocessors = 0, shared_bytes = 0;
};

inline Status current_device(Device& device) {
  device = {80, 132, emulation::most_shared_bytes};
  return {};
}

template <class Args>
Status launch(void (*kernel)(Args), dim3 blocks, int threads, int shared_bytes, cudaStream_t,
              const std::type_identity_t<Args>& args) {
  emulation::launch({blocks.x, blocks.y, blocks.z}, threads, shared_bytes, [=] { kernel(args); });
  return {};
}
template <class Args>
Status launch_early(void (*kernel)(Args), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
                    const std::type_identity_t<Args>& args) {
  return launch(kernel, blocks, threads, shared_bytes, stream, args);
}

}  // namespace chela::cuda
