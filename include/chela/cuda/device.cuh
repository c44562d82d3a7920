#pragma once
// What launchers ask of the current device.
#include <cuda_runtime.h>

#include <type_traits>

#include "chela/cuda/status.cuh"

namespace chela::cuda {

struct Device {
  int capability = 0;  ///< 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  ///< the most that one block may have
};

/// The current device of the calling thread. Never waits for it.
inline Status current_device(Device& device) {
  int id = 0, major = 0, minor = 0;
  const auto ask = [&](int& answer, cudaDeviceAttr what) { return cudaDeviceGetAttribute(&answer, what, id); };
  cudaError_t error = cudaGetDevice(&id);
  if (error == cudaSuccess) error = ask(major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = ask(minor, cudaDevAttrComputeCapabilityMinor);
  if (error == cudaSuccess) error = ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * major + minor;
  return from_cuda(error);
}

namespace detail {

template <class Args>
Status launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Args), dim3 blocks, int threads, int shared_bytes,
                   cudaStream_t stream, const Args& args) {
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess)
    return from_cuda(error);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = std::size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attribute, config.numAttrs = attribute ? 1 : 0;
  return from_cuda(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace detail

/// Launches `kernel` with one argument struct and `shared_bytes` of dynamic shared memory.
template <class Args>
Status launch(void (*kernel)(Args), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
              const std::type_identity_t<Args>& args) {
  return detail::launch_with(nullptr, kernel, blocks, threads, shared_bytes, stream, args);
}

/// The same for a kernel that waits for the one before it itself (arch/dependent_launch.cuh): where its code was compiled
/// for sm_90 or later it may start before that one has ended.
template <class Args>
Status launch_early(void (*kernel)(Args), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
                    const std::type_identity_t<Args>& args) {
  cudaFuncAttributes code{};
  if (cudaError_t error = cudaFuncGetAttributes(&code, kernel); error != cudaSuccess) return from_cuda(error);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return detail::launch_with(code.ptxVersion >= 90 ? &early : nullptr, kernel, blocks, threads, shared_bytes, stream,
                             args);
}

}  // namespace chela::cuda
