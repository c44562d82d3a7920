#pragma once
// What the depthwise convolutions do to one group of neighbouring channels at a time. `P` is an Eigen packet of
// accumulators, or the accumulator itself: the same template then serves strided channels and the last few of a row.
#include <Eigen/Core>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu::detail {

// GCC 12 takes the don't-care operand inside its own AVX-512 intrinsics, which the 16-bit conversions use, for
// an uninitialised variable.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/// The widest packet of accumulators of T.
template <class T>
using LanePacket = typename Eigen::internal::packet_traits<Accumulator<T>>::type;

/// Channels in one P.
template <class P>
inline constexpr int lane_count = Eigen::internal::unpacket_traits<P>::size;

template <class P>
using LaneScalar = typename Eigen::internal::unpacket_traits<P>::type;

/// Whether Eigen converts a whole packet of T to and from P.
template <class P, class T>
inline constexpr bool has_packet_cast =
    lane_count<P> > 1 &&
    Eigen::internal::packet_traits<T>::Vectorizable&& int(Eigen::internal::packet_traits<T>::size) == lane_count<P>;

template <class P, class T>
CHELA_ALWAYS_INLINE P load_lanes(const T* from) {
  using S = LaneScalar<P>;
  if constexpr (std::is_same_v<T, S>) {
    return Eigen::internal::ploadu<P>(from);
  } else if constexpr (lane_count<P> == 1) {
    return static_cast<S>(*from);
  } else if constexpr (has_packet_cast<P, T>) {
    using Stored = typename Eigen::internal::packet_traits<T>::type;
    return Eigen::internal::pcast<Stored, P>(Eigen::internal::ploadu<Stored>(from));
  } else {
    S lanes[lane_count<P>];
    for (int i = 0; i < lane_count<P>; ++i) lanes[i] = static_cast<S>(from[i]);
    return Eigen::internal::ploadu<P>(lanes);
  }
}

template <class P, class T>
CHELA_ALWAYS_INLINE void store_lanes(T* to, const P& value) {
  using S = LaneScalar<P>;
  if constexpr (std::is_same_v<T, S>) {
    Eigen::internal::pstoreu(to, value);
  } else if constexpr (lane_count<P> == 1) {
    *to = static_cast<T>(value);
  } else if constexpr (has_packet_cast<P, T>) {
    using Stored = typename Eigen::internal::packet_traits<T>::type;
    Eigen::internal::pstoreu(to, Eigen::internal::pcast<P, Stored>(value));
  } else {
    S lanes[lane_count<P>];
    Eigen::internal::pstoreu(lanes, value);
    for (int i = 0; i < lane_count<P>; ++i) to[i] = static_cast<T>(lanes[i]);
  }
}

template <class P>
CHELA_ALWAYS_INLINE P set_lanes(double value) {
  return Eigen::internal::pset1<P>(LaneScalar<P>(value));
}

/// Hides that a value came from memory: GCC otherwise loads it again for each use, and loads are what these loops run
/// out of.
template <class P>
CHELA_ALWAYS_INLINE P in_register(P value) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  __asm__("" : "+v"(value));
#endif
  return value;
}

/// Asks for a cache line to be brought as near as the second-level cache; where compilers have no word for it, for
/// nothing.
CHELA_ALWAYS_INLINE void fetch_to_read([[maybe_unused]] const void* line) {
#if defined(__GNUC__)
  __builtin_prefetch(line, 0, 2);
#endif
}
CHELA_ALWAYS_INLINE void fetch_to_write([[maybe_unused]] const void* line) {
#if defined(__GNUC__)
  __builtin_prefetch(line, 1, 2);
#endif
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace chela::cpu::detail
