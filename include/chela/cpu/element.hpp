#pragma once
// The 16-bit element types of the CPU backend. They are storage only: operators sum in float.
#include <Eigen/Core>

#include "chela/core/element.hpp"

namespace chela {

template <>
inline constexpr bool is_element<Eigen::bfloat16> = true;
template <>
inline constexpr bool is_element<Eigen::half> = true;

}  // namespace chela
