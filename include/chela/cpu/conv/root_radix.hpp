#pragma once
// Discrete Fourier transforms of 3, 5, 6, 7 or 9 points on registers, for lengths that are no powers of two: the
// outermost passes of the right-angle transform when its root splits into that many trees.
#include "chela/cpu/conv/complex_lanes.hpp"

namespace chela::cpu::detail {

/// y_k = sum_e exp(2 pi i e k / Radix) x_e in place, `x` being `Step` apart. `circle` holds exp(2 pi i j / (Radix *
/// Step)). The points e and Radix - e meet conjugate roots, so their sum and difference take real factors.
template <int Radix, int Step = 1, class A>
CHELA_ALWAYS_INLINE void dft_prime(ComplexLanes<A>* x, const A* circle) {
  using namespace Eigen::internal;
  constexpr int half = Radix / 2;
  const ComplexLanes<A> first = x[0];
  ComplexLanes<A> sum[half], difference[half];
  CHELA_UNROLL
  for (int m = 0; m < half; ++m) {
    sum[m] = x[(m + 1) * Step], difference[m] = x[(Radix - 1 - m) * Step];
    butterfly_one(sum[m], difference[m]);
    x[0] = {padd(x[0].re, sum[m].re), padd(x[0].im, sum[m].im)};
  }
  CHELA_UNROLL
  for (int k = 1; k <= half; ++k) {
    ComplexLanes<A> even = first, odd;
    CHELA_UNROLL
    for (int m = 0; m < half; ++m) {
      const ComplexLanes<A> root = broadcast_root<A>(circle + 2 * Step * (k * (m + 1) % Radix));
      even = {pmadd(root.re, sum[m].re, even.re), pmadd(root.re, sum[m].im, even.im)};
      if (m == 0)
        odd = {pmul(root.im, difference[m].re), pmul(root.im, difference[m].im)};
      else
        odd = {pmadd(root.im, difference[m].re, odd.re), pmadd(root.im, difference[m].im, odd.im)};
    }
    x[k * Step] = {psub(even.re, odd.im), padd(even.im, odd.re)};
    x[(Radix - k) * Step] = {padd(even.re, odd.im), psub(even.im, odd.re)};
  }
}

/// The same for 6 points next to each other: by the Chinese remainder theorem threes by twos, with no twiddles between.
template <class A>
CHELA_ALWAYS_INLINE void dft_six(ComplexLanes<A>* x, const A* circle) {
  ComplexLanes<A> even[5] = {x[0], {}, x[2], {}, x[4]}, odd[5] = {x[3], {}, x[5], {}, x[1]};
  dft_prime<3, 2>(even, circle), dft_prime<3, 2>(odd, circle);
  CHELA_UNROLL
  for (int k = 0; k < 3; ++k) {
    butterfly_one(even[2 * k], odd[2 * k]);
    x[4 * k % 6] = even[2 * k], x[(4 * k + 3) % 6] = odd[2 * k];
  }
}

/// The same for every radix that splits a root.
template <int Radix, class A>
CHELA_ALWAYS_INLINE void dft_root(ComplexLanes<A>* x, const A* circle) {
  if constexpr (Radix == 6) {
    dft_six(x, circle);
  } else if constexpr (Radix != 9) {
    dft_prime<Radix>(x, circle);
  } else {  // three by three
    CHELA_UNROLL
    for (int e = 0; e < 3; ++e) {
      dft_prime<3, 3>(x + e, circle);
      if (e > 0) {
        x[e + 3] = times(x[e + 3], broadcast_root<A>(circle + 2 * e));
        x[e + 6] = times(x[e + 6], broadcast_root<A>(circle + 4 * e));
      }
    }
    ComplexLanes<A> y[9];
    CHELA_UNROLL
    for (int k = 0; k < 3; ++k) {
      ComplexLanes<A> z[7] = {x[3 * k], {}, {}, x[3 * k + 1], {}, {}, x[3 * k + 2]};
      dft_prime<3, 3>(z, circle);
      y[k] = z[0], y[k + 3] = z[3], y[k + 6] = z[6];
    }
    CHELA_UNROLL
    for (int k = 0; k < 9; ++k) x[k] = y[k];
  }
}

/// The forward pass: `angles` hold exp(2 pi i e / 4 Radix), which make x^N - i Radix shorter ones. `Real`:
/// the imaginary parts are zero and not read.
template <int Radix, bool Real, class A>
CHELA_ALWAYS_INLINE void forward_root(ComplexLanes<A>* x, const A* angles, const A* circle) {
  CHELA_UNROLL
  for (int e = 1; e < Radix; ++e) {
    const ComplexLanes<A> w = broadcast_root<A>(angles + 2 * e);
    if constexpr (Real)
      x[e] = {Eigen::internal::pmul(x[e].re, w.re), Eigen::internal::pmul(x[e].re, w.im)};
    else
      x[e] = times(x[e], w);
  }
  dft_root<Radix>(x, circle);
}

/// The inverse pass, with Radix - 1 table entries as in RightAnglePlan::Pass.
template <int Radix, class A>
CHELA_ALWAYS_INLINE void inverse_root(ComplexLanes<A>* x, const A* table, const A* circle) {
  CHELA_UNROLL
  for (int k = 1; k < Radix; ++k) x[k] = times(x[k], broadcast_root<A>(table + 2 * (k - 1)));
  dft_root<Radix>(x, circle);
  CHELA_UNROLL
  for (int e = 1; e <= Radix / 2; ++e) std::swap(x[e], x[Radix - e]);  // the roots' exponents are negative here
}

}  // namespace chela::cpu::detail
