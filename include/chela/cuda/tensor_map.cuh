#pragma once
// Descriptions of tensors for the copy engine of sm_90. The driver's encoder is found at run time, so that a program
// need not be linked with it.
#include <cuda.h>
#include <cuda_runtime.h>

#include "chela/core/tensor_view.hpp"
#include "chela/cuda/element.cuh"
#include "chela/cuda/status.cuh"

namespace chela::cuda {

/// Whether the copy engine can walk a view [batch, token, head, dim]: it knows no broadcast and no reversed axes.
template <class T>
constexpr bool copies_by_tensor(TensorView<T, 4> view) {
  for (int axis = 0; axis < 3; ++axis)
    if (view.extents[axis] > 1 && view.strides[axis] <= 0) return false;
  return true;
}

/// Describes a view [batch, token, head, dim], dim a multiple of 64, for copies of boxes [64 tokens, 64 `panels` dims]
/// of one head, which lie in shared memory as swizzled<64> has it. Coordinates: 0, token, panel, head, batch. No extent
/// may be zero.
template <HalfElement T>
Status encode_tensor_map(CUtensorMap& map, TensorView<const T, 4> view, int panels) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return from_cuda(error);
  if (found != cudaDriverEntryPointSuccess)
    return {Code::cuda_error, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12"};

  const auto bytes = [&](int axis) {  // the stride of an axis with one entry is never used, but must look like one
    return cuuint64_t(view.extents[axis] > 1 ? view.strides[axis] * Index(sizeof(T)) : 128);
  };
  const cuuint64_t extents[] = {64, cuuint64_t(view.extents[1]), cuuint64_t(view.extents[3] / 64),
                                cuuint64_t(view.extents[2]), cuuint64_t(view.extents[0])};
  const cuuint64_t strides[] = {bytes(1), 128, bytes(2), bytes(0)};
  const cuuint32_t box[] = {64, 64, cuuint32_t(panels), 1, 1}, steps[] = {1, 1, 1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
      const_cast<T*>(view.data), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return require(result == CUDA_SUCCESS, Code::cuda_error,
                 "the driver refused to describe a tensor to the copy engine");
}

}  // namespace chela::cuda
