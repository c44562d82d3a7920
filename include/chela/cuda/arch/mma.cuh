#pragma once
// Products of one warp (sm_80): d [16, 8] += a [16, 16] b [16, 8] of 16-bit elements, or a [16, 8] b [8, 8] of floats,
// summed in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace chela::cuda::arch {

/// With g = lane / 4 and c = 2 (lane % 4), a register pair of T at a time:
///   a   (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8)        one row's neighbours in a register: load_matrices of a
///   b   (c, g), (c + 8, g)                                    one column's neighbours in a register
///   d   (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)
/// so that d of one product, packed in pairs, is a of the next, and d of a transposed one is b.
template <class T>
__device__ inline void multiply_add(float* d, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// As multiply_add of __half, summed in __half from zero: d's pairs are those of d above, so that d is at once a pair of
/// registers of a, and b of the transposed product. Left to the compiler to move.
__device__ inline void multiply_halves(std::uint32_t (&d)[2], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
      : "=r"(d[0]), "=r"(d[1])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(0));
}

/// The same, added to d.
__device__ inline void multiply_add_halves(std::uint32_t (&d)[2], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/// As multiply_add of __half. Left to the compiler to move.
__device__ inline void multiply_add_halves(float (&d)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/// d [16, 8] += a [16, 8] b [8, 8] of floats, each cut to 10 bits behind the point. With g = lane / 4 and c = lane % 4,
/// a float at a time:
///   a   (g, c), (g + 8, c), (g, c + 4), (g + 8, c + 4)        load_matrices of a, its floats taken for pairs
///   b   (c, g), (c + 4, g)
/// and d as above, so that a's first and third registers are b for the product with a's first 8 rows, transposed, and
/// the others for that with its last 8.
__device__ inline void multiply_add_floats(float* d, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace chela::cuda::arch
