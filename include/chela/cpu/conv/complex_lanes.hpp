#pragma once
// Complex numbers of one packet of channels, and the butterflies of the right-angle transform on registers. Each butterfly is
// six fused multiply-adds: (a, b) -> (a + w b, a - w b) with the second as 2 a minus the first.
#include <Eigen/Core>

#include "chela/core/host_device.hpp"
#include "chela/cpu/conv/lanes.hpp"

namespace chela::cpu::detail {

/// c - a b.
template <class P>
CHELA_ALWAYS_INLINE P negated_madd(const P& a, const P& b, const P& c) {
  return Eigen::internal::psub(c, Eigen::internal::pmul(a, b));
}
/// a b - c.
template <class P>
CHELA_ALWAYS_INLINE P multiply_subtract(const P& a, const P& b, const P& c) {
  return Eigen::internal::psub(Eigen::internal::pmul(a, b), c);
}

// Eigen 3.4 fuses only a b + c; compilers do not fuse the forms above when told to keep to the source's roundings.
#if defined(__FMA__)
CHELA_ALWAYS_INLINE __m128 negated_madd(__m128 a, __m128 b, __m128 c) { return _mm_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m256 negated_madd(__m256 a, __m256 b, __m256 c) { return _mm256_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m128d negated_madd(__m128d a, __m128d b, __m128d c) { return _mm_fnmadd_pd(a, b, c); }
CHELA_ALWAYS_INLINE __m256d negated_madd(__m256d a, __m256d b, __m256d c) { return _mm256_fnmadd_pd(a, b, c); }
CHELA_ALWAYS_INLINE __m128 multiply_subtract(__m128 a, __m128 b, __m128 c) { return _mm_fmsub_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m256 multiply_subtract(__m256 a, __m256 b, __m256 c) { return _mm256_fmsub_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m128d multiply_subtract(__m128d a, __m128d b, __m128d c) { return _mm_fmsub_pd(a, b, c); }
CHELA_ALWAYS_INLINE __m256d multiply_subtract(__m256d a, __m256d b, __m256d c) { return _mm256_fmsub_pd(a, b, c); }
#endif
#if defined(__AVX512F__)
CHELA_ALWAYS_INLINE __m512 negated_madd(__m512 a, __m512 b, __m512 c) { return _mm512_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m512d negated_madd(__m512d a, __m512d b, __m512d c) { return _mm512_fnmadd_pd(a, b, c); }
CHELA_ALWAYS_INLINE __m512 multiply_subtract(__m512 a, __m512 b, __m512 c) { return _mm512_fmsub_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m512d multiply_subtract(__m512d a, __m512d b, __m512d c) { return _mm512_fmsub_pd(a, b, c); }
#endif

/// Channels in one packet of A.
template <class A>
inline constexpr int lanes_of = Eigen::internal::packet_traits<A>::size;

/// One complex number per channel of a packet.
template <class A>
struct ComplexLanes {
  LanePacket<A> re, im;
};

/// Elements that one point takes in memory: a packet of real parts, then one of imaginary parts.
template <class A>
inline constexpr Index point_size = 2 * lanes_of<A>;

template <class A>
CHELA_ALWAYS_INLINE ComplexLanes<A> load_point(const A* from) {
  return {Eigen::internal::ploadu<LanePacket<A>>(from), Eigen::internal::ploadu<LanePacket<A>>(from + lanes_of<A>)};
}

template <class A>
CHELA_ALWAYS_INLINE void store_point(A* to, const ComplexLanes<A>& x) {
  Eigen::internal::pstoreu(to, x.re);
  Eigen::internal::pstoreu(to + lanes_of<A>, x.im);
}

/// The same number in every channel, from a (re, im) pair of a table.
template <class A>
CHELA_ALWAYS_INLINE ComplexLanes<A> broadcast_root(const A* from) {
  return {Eigen::internal::pset1<LanePacket<A>>(from[0]), Eigen::internal::pset1<LanePacket<A>>(from[1])};
}

template <class A>
CHELA_ALWAYS_INLINE void finish_butterfly(ComplexLanes<A>& a, ComplexLanes<A>& b, const LanePacket<A>& re,
                                          const LanePacket<A>& im) {
  const LanePacket<A> two = Eigen::internal::pset1<LanePacket<A>>(2);
  b = {multiply_subtract(two, a.re, re), multiply_subtract(two, a.im, im)};
  a = {re, im};
}

/// (a, b) -> (a + w b, a - w b).
template <class A>
CHELA_ALWAYS_INLINE void butterfly(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using Eigen::internal::pmadd;
  finish_butterfly(a, b, LanePacket<A>(negated_madd(w.im, b.im, pmadd(w.re, b.re, a.re))),
                   LanePacket<A>(pmadd(w.im, b.re, pmadd(w.re, b.im, a.im))));
}

/// The same with i w for w.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_i(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using Eigen::internal::pmadd;
  finish_butterfly(a, b, LanePacket<A>(negated_madd(w.im, b.re, LanePacket<A>(negated_madd(w.re, b.im, a.re)))),
                   LanePacket<A>(negated_madd(w.im, b.im, pmadd(w.re, b.re, a.im))));
}

/// The same with -i w for w.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_minus_i(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using Eigen::internal::pmadd;
  finish_butterfly(a, b, LanePacket<A>(pmadd(w.im, b.re, pmadd(w.re, b.im, a.re))),
                   LanePacket<A>(pmadd(w.im, b.im, LanePacket<A>(negated_madd(w.re, b.re, a.im)))));
}

/// The same for w = 1.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_one(ComplexLanes<A>& a, ComplexLanes<A>& b) {
  using namespace Eigen::internal;
  const ComplexLanes<A> sum{padd(a.re, b.re), padd(a.im, b.im)};
  b = {psub(a.re, b.re), psub(a.im, b.im)};
  a = sum;
}

/// The same for real a and b.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_real(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using namespace Eigen::internal;
  const LanePacket<A> x = a.re, y = b.re, minus_im = pnegate(w.im);
  a = {pmadd(w.re, y, x), pmul(w.im, y)};
  b = {negated_madd(w.re, y, x), pmul(minus_im, y)};
}

/// The twiddles of a node's forward pass: its own, its first child's, and for radix 8 those of the first and third
/// grandchildren. The siblings' are i times these.
template <class A, int Radix>
struct NodeTwiddles {
  ComplexLanes<A> w[Radix / 2];
};

/// Below the first level of a forward pass of radix 4 or 8.
template <int Radix, class A>
CHELA_ALWAYS_INLINE void forward_lower_levels(ComplexLanes<A>* x, const NodeTwiddles<A, Radix>& t) {
  if constexpr (Radix == 8) {
    butterfly(x[0], x[2], t.w[1]), butterfly(x[1], x[3], t.w[1]);
    butterfly_i(x[4], x[6], t.w[1]), butterfly_i(x[5], x[7], t.w[1]);
    butterfly(x[0], x[1], t.w[2]), butterfly_i(x[2], x[3], t.w[2]);
    butterfly(x[4], x[5], t.w[3]), butterfly_i(x[6], x[7], t.w[3]);
  } else {
    butterfly(x[0], x[1], t.w[1]), butterfly_i(x[2], x[3], t.w[1]);
  }
}

/// Forward over Radix points. `Real`: the imaginary parts are zero and not read.
template <int Radix, bool Real, class A>
CHELA_ALWAYS_INLINE void forward_radix(ComplexLanes<A>* x, const NodeTwiddles<A, Radix>& t) {
  CHELA_UNROLL
  for (int e = 0; e < Radix / 2; ++e) {
    if constexpr (Real)
      butterfly_real(x[e], x[e + Radix / 2], t.w[0]);
    else
      butterfly(x[e], x[e + Radix / 2], t.w[0]);
  }
  forward_lower_levels<Radix>(x, t);
}

/// Inverse over Radix points with `Radix` table entries: (re, im) pairs as in RightAnglePlan::Pass.
template <int Radix, class A>
CHELA_ALWAYS_INLINE void inverse_radix(ComplexLanes<A>* x, const A* table) {
  const ComplexLanes<A> w2 = broadcast_root<A>(table), w4 = broadcast_root<A>(table + 2);
  CHELA_UNROLL
  for (int e = 0; e < Radix; e += 2) butterfly(x[e], x[e + 1], w2);
  CHELA_UNROLL
  for (int e = 0; e < Radix; e += 4) butterfly(x[e], x[e + 2], w4), butterfly_minus_i(x[e + 1], x[e + 3], w4);
  if constexpr (Radix == 8) {
    const ComplexLanes<A> w8 = broadcast_root<A>(table + 4), w8_next = broadcast_root<A>(table + 6);
    butterfly(x[0], x[4], w8), butterfly(x[1], x[5], w8_next);
    butterfly_minus_i(x[2], x[6], w8), butterfly_minus_i(x[3], x[7], w8_next);
  }
}

/// The innermost inverse pass, radix 8 at stride 1: its twiddles are the eighth roots of one.
template <class A>
CHELA_ALWAYS_INLINE void inverse_innermost(ComplexLanes<A>* x) {
  const auto times_minus_i = [](ComplexLanes<A>& a) { a = {a.im, Eigen::internal::pnegate(a.re)}; };
  const LanePacket<A> half_root = set_lanes<LanePacket<A>>(0.70710678118654752440);
  const ComplexLanes<A> eighth{half_root, half_root};  // exp(i pi / 4); -i times it is exp(-i pi / 4)
  const ComplexLanes<A> minus_eighth{half_root, Eigen::internal::pnegate(half_root)};
  CHELA_UNROLL
  for (int e = 0; e < 8; e += 2) butterfly_one(x[e], x[e + 1]);
  times_minus_i(x[3]), times_minus_i(x[7]);
  CHELA_UNROLL
  for (int e = 0; e < 8; e += 4) butterfly_one(x[e], x[e + 2]), butterfly_one(x[e + 1], x[e + 3]);
  times_minus_i(x[6]);
  butterfly_one(x[0], x[4]), butterfly_one(x[2], x[6]);
  butterfly_minus_i(x[1], x[5], eighth), butterfly_minus_i(x[3], x[7], minus_eighth);
}

}  // namespace chela::cpu::detail
