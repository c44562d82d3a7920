#pragma once
// Marks functions that run on both sides, so that one definition serves a plain compiler and nvcc.

#if defined(__CUDACC__)
#define CHELA_HOST_DEVICE __host__ __device__
#else
#define CHELA_HOST_DEVICE
#endif

// GCC at -O2 leaves short loops over arrays of packets rolled, and the arrays then live in memory instead of registers:
// half the speed. Put this above every loop whose trip count is a compile-time constant and whose body indexes registers.
#if defined(__clang__)
#define CHELA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define CHELA_UNROLL _Pragma("GCC unroll 64")
#else
#define CHELA_UNROLL
#endif

#if defined(__GNUC__)
#define CHELA_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define CHELA_ALWAYS_INLINE inline
#endif
