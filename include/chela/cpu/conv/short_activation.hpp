#pragma once
// silu and its slope for a packet of sums. They cost more than the convolution, so silu is computed to the accuracy of the type
// that it is stored as.
#include "chela/cpu/conv/lanes.hpp"

namespace chela::cpu::detail {

// As in lanes.hpp: GCC 12 takes the don't-care operand inside its own AVX-512 intrinsics for an uninitialised variable.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

/// exp(-a) for |a| <= 87, and exp(-+87) beyond, NaN included. `T` is what the result will be stored as.
///
/// 2^t = 2^n 2^f with n the nearest integer and f in [-1/2, 1/2]. Adding 2^23 + 2^22 rounds t and leaves n in the low bits,
/// from where a shift and an addition of integers bring it into the exponent, which spares the unit that multiplies. The
/// polynomials are minimax for the relative error: 7.5e-8 for 32 bits, where the rounding of a alone costs |a| 6e-8; 2.6e-6
/// for 16.
template <class T, class P>
CHELA_ALWAYS_INLINE P exp_of_negative(const P& a) {
  using namespace Eigen::internal;
  if constexpr (std::is_same_v<LaneScalar<P>, float> && lane_count < P >> 1) {
    using Bits = typename unpacket_traits<P>::integer_packet;
    const P limit = set_lanes<P>(87), rate = set_lanes<P>(-1.4426950408889634), rounder = set_lanes<P>(12582912.0);
    const P clamped = pmin(pmax(a, pnegate(limit)), limit);
    const P shifted = pmadd(clamped, rate, rounder);
    const P f = pmadd(clamped, rate, psub(rounder, shifted));
    constexpr double coefficients[] = {0.0013276472631950876, 0.009675541343121328, 0.055507132718556444,
                                       0.2402211972371072,    0.6931469670650352,   1.0000000716547142};
    constexpr double short_coefficients[] = {0.009570101863299818, 0.05591786034055626, 0.24024744831484726,
                                             0.6931218147430911, 0.9999992614416003};
    P power;
    if constexpr (sizeof(T) < sizeof(float)) {
      power = set_lanes<P>(short_coefficients[0]);
      CHELA_UNROLL for (int i = 1; i < 5; ++i) power = pmadd(power, f, set_lanes<P>(short_coefficients[i]));
    } else {
      power = set_lanes<P>(coefficients[0]);
      CHELA_UNROLL for (int i = 1; i < 6; ++i) power = pmadd(power, f, set_lanes<P>(coefficients[i]));
    }
    return preinterpret<P>(padd(preinterpret<Bits>(power), plogical_shift_left<23>(preinterpret<Bits>(shifted))));
  } else {
    return pexp(pnegate(a));
  }
}

/// a sigmoid(a), with one division.
template <class T, class P>
CHELA_ALWAYS_INLINE P silu_lanes(const P& a) {
  using namespace Eigen::internal;
  return pdiv(a, padd(set_lanes<P>(1), exp_of_negative<T>(a)));
}

/// The derivative of silu: s (1 + a (1 - s)) with s = sigmoid(a). Gradients of taps are sums of it in the accumulator.
template <class P>
CHELA_ALWAYS_INLINE P silu_slope_lanes(const P& a) {
  using namespace Eigen::internal;
  const P one = set_lanes<P>(1), s = pdiv(one, padd(one, exp_of_negative<LaneScalar<P>>(a)));
  return pmul(s, pmadd(a, psub(one, s), one));
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace chela::cpu::detail
