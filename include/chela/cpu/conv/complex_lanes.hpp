#pragma once
// Complex numbers of one packet of channels, and the butterflies of the right-angle transform on registers. A butterfly
// (a, b) -> (a + w b, a - w b) is four multiplications, two of them fused, and four additions: cores with adders beside
// their multipliers (Zen) do the additions meanwhile, and are 1.5 times as fast as with six fused multiply-adds.
#include <Eigen/Core>
#include <utility>

#include "chela/core/host_device.hpp"
#include "chela/cpu/conv/lanes.hpp"

namespace chela::cpu::detail {

/// c - a b.
template <class P>
CHELA_ALWAYS_INLINE P negated_madd(const P& a, const P& b, const P& c) {
  return Eigen::internal::psub(c, Eigen::internal::pmul(a, b));
}
// Eigen 3.4 fuses only a b + c; compilers do not fuse the form above when told to keep to the source's roundings.
#if defined(__FMA__)
CHELA_ALWAYS_INLINE __m128 negated_madd(__m128 a, __m128 b, __m128 c) { return _mm_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m256 negated_madd(__m256 a, __m256 b, __m256 c) { return _mm256_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m128d negated_madd(__m128d a, __m128d b, __m128d c) { return _mm_fnmadd_pd(a, b, c); }
CHELA_ALWAYS_INLINE __m256d negated_madd(__m256d a, __m256d b, __m256d c) { return _mm256_fnmadd_pd(a, b, c); }
#endif
#if defined(__AVX512F__)
CHELA_ALWAYS_INLINE __m512 negated_madd(__m512 a, __m512 b, __m512 c) { return _mm512_fnmadd_ps(a, b, c); }
CHELA_ALWAYS_INLINE __m512d negated_madd(__m512d a, __m512d b, __m512d c) { return _mm512_fnmadd_pd(a, b, c); }
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

/// a w.
template <class A>
CHELA_ALWAYS_INLINE ComplexLanes<A> times(const ComplexLanes<A>& a, const ComplexLanes<A>& w) {
  using namespace Eigen::internal;
  return {negated_madd(a.im, w.im, pmul(a.re, w.re)), pmadd(a.im, w.re, pmul(a.re, w.im))};
}

/// a times the conjugate of w.
template <class A>
CHELA_ALWAYS_INLINE ComplexLanes<A> times_conjugate(const ComplexLanes<A>& a, const ComplexLanes<A>& w) {
  using namespace Eigen::internal;
  return {pmadd(a.im, w.im, pmul(a.re, w.re)), negated_madd(a.re, w.im, pmul(a.im, w.re))};
}

/// (a, b) -> (a + t, a - t).
template <class A>
CHELA_ALWAYS_INLINE void add_and_subtract(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& t) {
  using namespace Eigen::internal;
  b = {psub(a.re, t.re), psub(a.im, t.im)};
  a = {padd(a.re, t.re), padd(a.im, t.im)};
}

/// (a, b) -> (a + w b, a - w b).
template <class A>
CHELA_ALWAYS_INLINE void butterfly(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  add_and_subtract(a, b, times(b, w));
}

/// The same with i w for w.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_i(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using namespace Eigen::internal;
  const ComplexLanes<A> t = times(b, w), top = a;
  a = {psub(top.re, t.im), padd(top.im, t.re)};
  b = {padd(top.re, t.im), psub(top.im, t.re)};
}

/// The same with -i w for w.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_minus_i(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  butterfly_i(a, b, w);
  std::swap(a, b);
}

/// The same for w = 1.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_one(ComplexLanes<A>& a, ComplexLanes<A>& b) {
  add_and_subtract(a, b, ComplexLanes<A>(b));
}

/// The same for w = -i.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_one_minus_i(ComplexLanes<A>& a, ComplexLanes<A>& b) {
  using namespace Eigen::internal;
  const ComplexLanes<A> t = b, top = a;
  a = {padd(top.re, t.im), psub(top.im, t.re)};
  b = {psub(top.re, t.im), padd(top.im, t.re)};
}

/// The same for w = exp(-i pi / 4), or exp(-3 i pi / 4) = -i times that.
template <bool Third, class A>
CHELA_ALWAYS_INLINE void butterfly_eighth(ComplexLanes<A>& a, ComplexLanes<A>& b) {
  using namespace Eigen::internal;
  const LanePacket<A> half_root = set_lanes<LanePacket<A>>(0.70710678118654752440);
  const LanePacket<A> sum = padd(b.re, b.im), difference = psub(b.im, b.re);
  const ComplexLanes<A> top = a;
  if constexpr (Third) {
    a = {pmadd(half_root, difference, top.re), negated_madd(half_root, sum, top.im)};
    b = {negated_madd(half_root, difference, top.re), pmadd(half_root, sum, top.im)};
  } else {
    a = {pmadd(half_root, sum, top.re), pmadd(half_root, difference, top.im)};
    b = {negated_madd(half_root, sum, top.re), negated_madd(half_root, difference, top.im)};
  }
}

/// The same for real a and b.
template <class A>
CHELA_ALWAYS_INLINE void butterfly_real(ComplexLanes<A>& a, ComplexLanes<A>& b, const ComplexLanes<A>& w) {
  using namespace Eigen::internal;
  const LanePacket<A> x = a.re, re = pmul(w.re, b.re), im = pmul(w.im, b.re);
  a = {padd(x, re), im};
  b = {psub(x, re), pnegate(im)};
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

/// A butterfly of the innermost inverse pass, of which one side or both may be known to be zero. Turn: w = exp(-i pi
/// Turn / 4).
template <int Turn, bool HasA, bool HasB, class A>
CHELA_ALWAYS_INLINE void innermost_butterfly(ComplexLanes<A>& a, ComplexLanes<A>& b) {
  using namespace Eigen::internal;
  if constexpr (!HasA && HasB) {
    a = {pset1<LanePacket<A>>(A(0)), pset1<LanePacket<A>>(A(0))};
  }
  if constexpr (!HasB) {
    b = a;
  } else if constexpr (Turn == 0) {
    butterfly_one(a, b);
  } else if constexpr (Turn == 2) {
    butterfly_one_minus_i(a, b);
  } else {
    butterfly_eighth<Turn == 3>(a, b);
  }
}

/// The innermost inverse pass, radix 8 at stride 1: its twiddles are the eighth roots of one. Point e is read if bit e
/// of `Kept` is set, and zero if not.
template <unsigned Kept = 0xff, class A>
CHELA_ALWAYS_INLINE void inverse_innermost(ComplexLanes<A>* x) {
  constexpr auto has = [](int first, int count) { return ((Kept >> first) & ((1u << count) - 1)) != 0; };
  innermost_butterfly<0, has(0, 1), has(1, 1)>(x[0], x[1]), innermost_butterfly<0, has(2, 1), has(3, 1)>(x[2], x[3]);
  innermost_butterfly<0, has(4, 1), has(5, 1)>(x[4], x[5]), innermost_butterfly<0, has(6, 1), has(7, 1)>(x[6], x[7]);
  innermost_butterfly<0, has(0, 2), has(2, 2)>(x[0], x[2]), innermost_butterfly<2, has(0, 2), has(2, 2)>(x[1], x[3]);
  innermost_butterfly<0, has(4, 2), has(6, 2)>(x[4], x[6]), innermost_butterfly<2, has(4, 2), has(6, 2)>(x[5], x[7]);
  innermost_butterfly<0, has(0, 4), has(4, 4)>(x[0], x[4]), innermost_butterfly<1, has(0, 4), has(4, 4)>(x[1], x[5]);
  innermost_butterfly<2, has(0, 4), has(4, 4)>(x[2], x[6]), innermost_butterfly<3, has(0, 4), has(4, 4)>(x[3], x[7]);
}

}  // namespace chela::cpu::detail
