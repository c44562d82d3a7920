#pragma once
// Kernels that may start before the one before them in the stream has ended (device.cuh, `launch_early`). sm_90; the host
// asks no such launch of code for older ones, where these do nothing.

namespace chela::cuda::arch {

/// Waits until the kernel before this one in the stream has ended and what it wrote can be read. Every thread of a kernel
/// that is launched early calls it, since later kernels take its end for that of all before it. Constants read after it are
/// read through a pointer that is `made_anew` after it: the compiler moves reads of constants.
__device__ inline void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel start, if it is launched early, once all blocks have come here.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace chela::cuda::arch
