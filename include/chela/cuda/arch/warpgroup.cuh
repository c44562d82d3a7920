#pragma once
// Products of one warpgroup (sm_90a): d [64, N] = or += a [64, 16] b [16, N] of T, summed in float, b in shared memory
// and a there or in registers. They run in the background: between fence_products and wait_products the warpgroup
// touches neither d nor a register a. d and a lie in registers as those of multiply_add (mma.cuh) do, warp w of the
// four having rows 16 w and on.
#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "chela/cuda/arch/target.cuh"

namespace chela::cuda::arch {

/// How an operand lies in shared memory: with the 16 of the product's sum side by side, or with its own rows (a) or
/// columns (b) side by side.
enum class Major { sum, side };

/// Describes an operand that begins at `address` inside a tile of panels [panel][64 rows][64] (swizzled<64>).
/// Major::sum: rows of the tile are rows of a or columns of b; the next 16 of the sum are 32 bytes on, after 64 a panel
/// on. Major::side: rows of the tile are the sum; the next 16 are 2048 bytes on.
template <Major M>
__device__ inline std::uint64_t operand(std::uint32_t address) {
  constexpr std::uint64_t swizzle_128_bytes = std::uint64_t(1) << 62;
  constexpr std::uint64_t eight_rows = std::uint64_t(1024 >> 4) << 32;
  constexpr std::uint64_t panel = std::uint64_t((M == Major::sum ? 16 : 64 * 128) >> 4)
                                  << 16;  // not used by Major::sum
  return std::uint64_t((address & 0x3ffff) >> 4) | panel | eight_rows | swizzle_128_bytes;
}

/// The same operand `bytes` further on. Cheaper than to describe each part of a tile anew.
__device__ constexpr std::uint64_t further(std::uint64_t operand, int bytes) {
  return operand + std::uint64_t(bytes >> 4);
}

/// Shows registers and shared memory, as this warpgroup left them, to the products that it starts next.
__device__ inline void fence_products() {
#if CHELA_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Closes a group of products.
__device__ inline void commit_products() {
#if CHELA_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most `Pending` groups are under way. Pin what they wrote to before it is used.
template <int Pending>
__device__ inline void wait_products() {
#if CHELA_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// The operand lists of one instruction, eight registers at a time. N = 16 has 8 of them, N = 64 has 32, N = 128 has 64.
#define CHELA_D8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CHELA_D32 CHELA_D8(0), CHELA_D8(8), CHELA_D8(16), CHELA_D8(24)
#define CHELA_D64 CHELA_D32, CHELA_D8(32), CHELA_D8(40), CHELA_D8(48), CHELA_D8(56)
#define CHELA_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CHELA_NAMES32                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, "                                                                                                          \
  "%25, %26, %27, %28, %29, %30, %31"
#define CHELA_NAMES64                                                                                 \
  CHELA_NAMES32                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CHELA_FROM_SHARED(N, TYPES, NAMES, D, a0, b0, sum0, ta0, tb0)                                  \
  asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #sum0                                          \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" NAMES "}, %" #a0 ", %" #b0 \
               ", sum, 1, 1, %" #ta0 ", %" #tb0 ";\n}"                                                 \
               : D                                                                                     \
               : "l"(a), "l"(b), "r"(int(sum)), "n"(int(A == Major::side)), "n"(int(B == Major::side)))
#define CHELA_FROM_REGISTERS(N, TYPES, NAMES, D, r0, r1, r2, r3, b0, sum0, tb0)                                   \
  asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #sum0                                                     \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" NAMES "}, {%" #r0 ", %" #r1 ", %" #r2 \
               ", %" #r3 "}, %" #b0 ", sum, 1, 1, %" #tb0 ";\n}"                                                  \
               : D                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(sum)), "n"(int(B == Major::side)))

/// d = (sum ? d : 0) + a b, both operands in shared memory. `Registers` is N / 2.
template <class T, Major A, Major B, int Registers>
__device__ inline void start_product(float (&d)[Registers], std::uint64_t a, std::uint64_t b, bool sum) {
  static_assert(Registers == 8 || Registers == 32 || Registers == 64,
                "a warpgroup's product has 16, 64 or 128 columns here");
#if CHELA_SM90A
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (Registers == 8 && bf16) {
    CHELA_FROM_SHARED(16, "bf16.bf16", CHELA_NAMES8, CHELA_D8(0), 8, 9, 10, 11, 12);
  } else if constexpr (Registers == 8) {
    CHELA_FROM_SHARED(16, "f16.f16", CHELA_NAMES8, CHELA_D8(0), 8, 9, 10, 11, 12);
  } else if constexpr (Registers == 32 && bf16) {
    CHELA_FROM_SHARED(64, "bf16.bf16", CHELA_NAMES32, CHELA_D32, 32, 33, 34, 35, 36);
  } else if constexpr (Registers == 32) {
    CHELA_FROM_SHARED(64, "f16.f16", CHELA_NAMES32, CHELA_D32, 32, 33, 34, 35, 36);
  } else if constexpr (bf16) {
    CHELA_FROM_SHARED(128, "bf16.bf16", CHELA_NAMES64, CHELA_D64, 64, 65, 66, 67, 68);
  } else {
    CHELA_FROM_SHARED(128, "f16.f16", CHELA_NAMES64, CHELA_D64, 64, 65, 66, 67, 68);
  }
#endif
}

/// The same with a in registers.
template <class T, Major B, int Registers>
__device__ inline void start_product(float (&d)[Registers], const std::uint32_t* a, std::uint64_t b, bool sum) {
  static_assert(Registers == 8 || Registers == 32 || Registers == 64,
                "a warpgroup's product has 16, 64 or 128 columns here");
#if CHELA_SM90A
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (Registers == 8 && bf16) {
    CHELA_FROM_REGISTERS(16, "bf16.bf16", CHELA_NAMES8, CHELA_D8(0), 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (Registers == 8) {
    CHELA_FROM_REGISTERS(16, "f16.f16", CHELA_NAMES8, CHELA_D8(0), 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (Registers == 32 && bf16) {
    CHELA_FROM_REGISTERS(64, "bf16.bf16", CHELA_NAMES32, CHELA_D32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (Registers == 32) {
    CHELA_FROM_REGISTERS(64, "f16.f16", CHELA_NAMES32, CHELA_D32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (bf16) {
    CHELA_FROM_REGISTERS(128, "bf16.bf16", CHELA_NAMES64, CHELA_D64, 64, 65, 66, 67, 68, 69, 70);
  } else {
    CHELA_FROM_REGISTERS(128, "f16.f16", CHELA_NAMES64, CHELA_D64, 64, 65, 66, 67, 68, 69, 70);
  }
#endif
}

#undef CHELA_D8
#undef CHELA_D32
#undef CHELA_D64
#undef CHELA_NAMES8
#undef CHELA_NAMES32
#undef CHELA_NAMES64
#undef CHELA_FROM_SHARED
#undef CHELA_FROM_REGISTERS

/// Takes registers from, or gives them to, the other warpgroups of the block. The whole warpgroup; `Count` a multiple
/// of 8; in a kernel with __launch_bounds__(threads, 1).
template <int Count>
__device__ inline void give_registers() {
#if CHELA_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
__device__ inline void take_registers() {
#if CHELA_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

/// Waits for the other `threads - 1` threads at this barrier of the block. 0 is that of __syncthreads.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace chela::cuda::arch
