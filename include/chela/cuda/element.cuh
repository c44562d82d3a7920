#pragma once
// The GPU's 16-bit types as element types.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <concepts>

#include "chela/core/element.hpp"

namespace chela {

template <>
inline constexpr bool is_element<__nv_bfloat16> = true;
template <>
inline constexpr bool is_element<__half> = true;

namespace cuda {

/// What the tensor cores multiply.
template <class T>
concept HalfElement = std::same_as<T, __nv_bfloat16> || std::same_as<T, __half>;

/// Likewise, with floats, which they cut: where a policy says how they are to be multiplied.
template <class T>
concept TensorCoreElement = HalfElement<T> || std::same_as<T, float>;

}  // namespace cuda
}  // namespace chela
