#pragma once

namespace chela::cuda::arch {
inline void wait_for_last_kernel() {}
inline void let_next_kernel_start() {}
inline void bring_nearer(const void*) {}
}  // namespace chela::cuda::arch
