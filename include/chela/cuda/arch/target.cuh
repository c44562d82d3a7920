#pragma once
// Which instructions the code at hand is compiled for. The only other place that asks is the guard around each
// instruction of sm_90a in this folder.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CHELA_SM90A 1
#else
#define CHELA_SM90A 0
#endif

namespace chela::cuda::arch {

/// Whether device code is being compiled for sm_90a: warpgroup products, tensor copies, register reallocation. A kernel
/// that needs them has an empty body elsewhere, and its launcher asks the device before it launches.
inline constexpr bool has_warpgroups = CHELA_SM90A;

}  // namespace chela::cuda::arch
