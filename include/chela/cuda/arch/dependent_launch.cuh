#pragma once
// Kernels that may start before the one before them in the stream has ended (device.cuh, `launch_early`). sm_90; the host
// asks no such launch of code for older ones, where these do nothing.

namespace chela::cuda::arch {

/// Waits until the kernel before this one in the stream has ended and what it wrote can be read. Every kernel that is
/// launched early calls it, since later ones take its end for that of all before it. What that kernel wrote and is read as
/// a constant (__ldg) is read through a pointer `made_anew` after it: the compiler moves such reads.
__device__ inline void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Has what is at this address brought into the second-level cache. This reads nothing: a kernel may do so before it
/// waits, and later sees what was written meanwhile.
__device__ inline void bring_nearer(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

/// Lets the next kernel start, if it is launched early, once all blocks have come here.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace chela::cuda::arch
