#pragma once
#include <concepts>
#include <type_traits>

namespace chela {

/// Whether values of type T may be stored in tensors. A backend adds its 16-bit types: `cpu/element.hpp` adds
/// Eigen::bfloat16 and Eigen::half.
template <class T>
inline constexpr bool is_element = std::is_same_v<T, float> || std::is_same_v<T, double>;

/// Storage types of tensors. 16-bit types are storage only: everything is summed in `Accumulator<T>`.
template <class T>
concept Element = is_element<std::remove_const_t<T>>;

namespace detail {
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
}  // namespace detail

/// The type in which products of T are summed and in which states and parameters are kept: double for double, else float.
template <Element T>
using Accumulator = typename detail::AccumulatorOf<std::remove_const_t<T>>::type;

}  // namespace chela
