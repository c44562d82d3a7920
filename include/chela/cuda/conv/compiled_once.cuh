#pragma once
// Long and short-long convolutions that a project compiles in one source file.
//
// The kernels of all lengths of one policy and type take minutes to compile, in every file that calls them.
// Files that have
//
//   CHELA_LONG_CONV(extern, policy, __nv_bfloat16)
//
// outside of any namespace leave that to one file which has CHELA_LONG_CONV(, policy, __nv_bfloat16). `policy` is the name
// of a constexpr LongConvPolicy. CHELA_SHORT_LONG_CONV(extern, width, policy, type) is the same for short-long convolutions,
// of which the long stage is to be named besides.
#include "chela/cuda/conv/long_backward.cuh"
#include "chela/cuda/conv/short_long.cuh"

#define CHELA_LONG_CONV(Extern, Policy, T)                                                                      \
  Extern template chela::Status chela::cuda::prepare_kernel<Policy>(const chela::LongConvArgs<T>&,              \
                                                                    chela::cuda::PreparedKernel, cudaStream_t); \
  Extern template chela::Status chela::cuda::prepare_kernel<Policy>(const chela::LongConvBackwardArgs<T>&,      \
                                                                    chela::cuda::PreparedKernel, cudaStream_t); \
  Extern template chela::Status chela::cuda::long_conv<Policy>(                                                 \
      const chela::LongConvArgs<T>&, chela::cuda::PreparedKernel, chela::cuda::Workspace, cudaStream_t);        \
  Extern template chela::Status chela::cuda::long_conv_backward<Policy>(                                        \
      const chela::LongConvBackwardArgs<T>&, chela::cuda::PreparedKernel, chela::cuda::Workspace, cudaStream_t);

#define CHELA_SHORT_LONG_CONV(Extern, Width, Policy, T)                                                       \
  Extern template chela::Status chela::cuda::short_long_conv<Width, Policy>(                                  \
      const chela::ShortLongConvArgs<T>&, chela::cuda::PreparedKernel, chela::cuda::Workspace, cudaStream_t); \
  Extern template chela::Status chela::cuda::short_long_conv_backward<Width, Policy>(                         \
      const chela::ShortLongConvBackwardArgs<T>&, chela::cuda::PreparedKernel, chela::cuda::Workspace, cudaStream_t);
