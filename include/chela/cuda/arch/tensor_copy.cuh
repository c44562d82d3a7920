#pragma once
// Copies of whole tiles between global and shared memory by the copy engine (sm_90), and the barriers in shared memory
// that say when they are done.
#include <cuda.h>

#include <cstdint>

#include "chela/cuda/arch/target.cuh"

namespace chela::cuda::arch {

/// Prepares a barrier that `arrivals` threads must reach in each of its phases. One thread; then fence_barriers.
__device__ inline void init_barrier(std::uint32_t barrier, int arrivals) {
#if CHELA_SM90A
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
#endif
}

/// Shows barriers just prepared to the copy engine. A __syncthreads must follow to show them to the other threads.
__device__ inline void fence_barriers() {
#if CHELA_SM90A
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Arrives, and lets the phase wait for `bytes` more from the copy engine.
__device__ inline void arrive_expecting(std::uint32_t barrier, int bytes) {
#if CHELA_SM90A
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ inline void arrive(std::uint32_t barrier) {
#if CHELA_SM90A
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/// Waits for the end of the phase of this parity: phases are counted from 0.
__device__ inline void wait_barrier(std::uint32_t barrier, std::uint32_t parity) {
#if CHELA_SM90A
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

/// Starts the copy of the box of `map` at these coordinates (innermost first) into shared memory; `barrier` gets its
/// bytes. What lies outside of the tensor arrives as zeros. One thread.
__device__ inline void load_tensor(std::uint32_t to, const CUtensorMap* map, std::uint32_t barrier, int c0, int c1,
                                   int c2, int c3, int c4) {
#if CHELA_SM90A
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

/// Starts the copy of a box from shared memory, as a group of its own; what lies outside of the tensor is dropped. One
/// thread, after fence_copies by the threads that wrote and a barrier.
__device__ inline void store_tensor(const CUtensorMap* map, std::uint32_t from, int c0, int c1, int c2, int c3,
                                    int c4) {
#if CHELA_SM90A
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// Waits until the stores that this thread started have read their shared memory.
__device__ inline void wait_stores_read() {
#if CHELA_SM90A
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

/// Waits until the stores that this thread started are done.
__device__ inline void wait_stores() {
#if CHELA_SM90A
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

/// Shows what this thread wrote to shared memory to the copy engine and to warpgroup products. Before the barrier that
/// hands it over.
__device__ inline void fence_copies() {
#if CHELA_SM90A
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace chela::cuda::arch
