#pragma once
// The right-angle transform (chela/conv/fft_plan.hpp) of a few points in a thread's registers: the part of a pass that
// one thread computes. Twiddles are not read from tables: every pass needs a turn by a small angle, which a short
// polynomial gives to the last bit or so, and powers of two of it, by doublings that keep its relative accuracy.
#include <cuda_runtime.h>

#include <cmath>
#include <utility>

#include "chela/core/host_device.hpp"

namespace chela::cuda::detail {

/// A number known at compile time. Unlike std::integral_constant it is one for the device too.
template <int N>
struct IntConstant {
  static constexpr int value = N;
  CHELA_HOST_DEVICE constexpr operator int() const { return N; }
};

/// Calls f(IntConstant<i>) for i from 0 to N - 1.
template <int N, class F>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void for_each_constant(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(IntConstant<I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

CHELA_HOST_DEVICE constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

/// The lowest `bits` bits of x in reverse order.
CHELA_HOST_DEVICE constexpr int reversed_bits(int x, int bits) {
  int y = 0;
  for (int i = 0; i < bits; ++i) y |= (x >> i & 1) << (bits - 1 - i);
  return y;
}

/// cos(pi x) and sin(pi x) at compile time, |x| at most 2.
CHELA_HOST_DEVICE constexpr double cosine(double x) {
  if (x < 0) x = -x;
  if (x > 1) x = 2 - x;
  if (x > 0.5) return -cosine(1 - x);
  const double angle = 3.14159265358979323846 * (x > 0.25 ? 0.5 - x : x);
  double term = x > 0.25 ? angle : 1, sum = term;
  for (int n = x > 0.25 ? 2 : 1; n < 24; n += 2) sum += term *= -angle * angle / (n * (n + 1));
  return sum;
}
CHELA_HOST_DEVICE constexpr double sine(double x) { return x < -1.5 ? cosine(x + 1.5) : cosine(x - 0.5); }

/// exp(i pi x) at compile time.
CHELA_HOST_DEVICE constexpr float2 constant_turn(double x) { return {float(cosine(x)), float(sine(x))}; }

CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE float2 times(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE float2 times_conjugate(float2 a, float2 b) {
  return {fmaf(a.x, b.x, a.y * b.y), fmaf(a.y, b.x, -a.x * b.y)};
}

/// w exp(i pi Num / Den).
template <int Num, int Den>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE float2 turned(float2 w) {
  constexpr float2 turn = constant_turn(double(Num) / Den);
  if constexpr (Num == 0)
    return w;
  else
    return times(w, turn);
}

/// (a, b) becomes (a + w b, a - w b), in six fused operations.
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void turned_pair(float2& a, float2& b, float2 w) {
  const float2 sum{fmaf(-w.y, b.y, fmaf(w.x, b.x, a.x)), fmaf(w.y, b.x, fmaf(w.x, b.y, a.y))};
  b = {fmaf(2.0f, a.x, -sum.x), fmaf(2.0f, a.y, -sum.y)};
  a = sum;
}

/// The same with w = exp(i pi Num / Den).
template <int Num, int Den>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void turned_pair(float2& a, float2& b) {
  constexpr float2 turn = constant_turn(double(Num) / Den);
  if constexpr (Num == 0 || 2 * Num == -Den) {
    const float2 c = Num == 0 ? b : float2{b.y, -b.x};
    b = {a.x - c.x, a.y - c.y}, a = {a.x + c.x, a.y + c.y};
  } else {
    turned_pair(a, b, turn);
  }
}

/// A turn by a small angle, as cosine less one and sine: doubling keeps the relative accuracy of both.
struct SmallTurn {
  float less, sine;

  /// exp(i pi x), |x| at most 1/4.
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE explicit SmallTurn(float x) {
    const float q = x * x;
    const float tail =
        fmaf(fmaf(fmaf(fmaf(0.082145886611f, q, -0.59926452932f), q, 2.5501640399f), q, -5.1677127800f), q,
             -8.7422780e-8f);  // pi is 3.14159274 and this
    sine = fmaf(x, 3.14159274f, x * tail);
    less = q * fmaf(fmaf(fmaf(fmaf(-0.025806891390f, q, 0.23533063036f), q, -1.3352627688f), q, 4.0587121264f), q,
                    -4.9348022005f);
  }
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void twice() {
    const float both = 2.0f * sine;
    const float before = sine;
    sine = fmaf(both, less, both), less = -both * before;
  }
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE float2 point() const { return {1.0f + less, sine}; }
};

/// exp(i pi x), |x| at most 1/2.
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE float2 turn_of(float x) {
  SmallTurn turn(0.5f * x);
  turn.twice();
  return turn.point();
}

/// What a tree over R points turns by: rung m is exp(i pi x 2^m), m below log2(R).
template <int R>
struct TurnLadder {
  static constexpr int rungs = log2_of(R);
  float2 rung[rungs > 0 ? rungs : 1];

  /// x at most 2 / R.
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE explicit TurnLadder(float x) {
    constexpr int below = R >= 8 ? 0 : R == 4 ? 1 : 2;  // doublings before the first rung, from an angle small enough
    SmallTurn turn(x * (1.0f / float(1 << below)));
    for_each_constant<below>([&](auto) { turn.twice(); });
    for_each_constant<rungs>([&](auto m) {
      rung[m] = turn.point();
      if constexpr (m + 1 < rungs) turn.twice();
    });
  }
};

/// The same where x = Num / Den.
template <int R, int Num, int Den>
struct ConstantLadder {
  float2 rung[TurnLadder<R>::rungs > 0 ? TurnLadder<R>::rungs : 1];
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE ConstantLadder() {
    for_each_constant<TurnLadder<R>::rungs>([&](auto m) {
      constexpr float2 turn = constant_turn(double(Num) / Den * (1 << m));
      rung[m] = turn;
    });
  }
};

/// Forward: the R children of the node x^m - exp(2 pi i th), in tree order. The ladder's x is 2 th / R.
template <int R, class Ladder>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void forward_tree(float2* x, const Ladder& ladder) {
  constexpr int levels = log2_of(R);
  for_each_constant<levels>([&](auto l) {
    constexpr int half = R >> (l + 1), nodes = 1 << l;
    for_each_constant<(nodes + 1) / 2>([&](auto m) {
      float2* node = x + 4 * half * m;
      const float2 w = turned<reversed_bits(2 * m, l), nodes>(ladder.rung[levels - 1 - l]);
      for_each_constant<half>([&](auto i) { turned_pair(node[i], node[half + i], w); });
      if constexpr (l > 0)  // the sibling turns a quarter of the circle further
        for_each_constant<half>([&](auto i) { turned_pair(node[2 * half + i], node[3 * half + i], {-w.y, w.x}); });
    });
  });
}

/// Inverse: butterflies of the ordinary inverse transform over R points that lie h apart, from tree order, at place j
/// of h. The ladder's x is 2 j / (h R).
template <int R, class Ladder>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void inverse_tree(float2* x, const Ladder& ladder) {
  constexpr int levels = log2_of(R);
  for_each_constant<levels>([&](auto from_inside) {
    constexpr int l = levels - 1 - from_inside, half = R >> (l + 1);
    for_each_constant<(half + 1) / 2>([&](auto i) {
      const float2 rung = ladder.rung[l];
      const float2 w = turned<-i, half>(float2{rung.x, -rung.y});
      for_each_constant<R / (2 * half)>(
          [&](auto k) { turned_pair(x[2 * half * k + i], x[2 * half * k + half + i], w); });
      if constexpr (half > 1)
        for_each_constant<R / (2 * half)>([&](auto k) {
          constexpr int low = 2 * half * k + half / 2 + i;
          turned_pair(x[low], x[low + half], {w.y, -w.x});
        });
    });
  });
}

/// The same at place 0, where the turns are constants and the first ones trivial.
template <int R>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void innermost_inverse_tree(float2* x) {
  constexpr int levels = log2_of(R);
  for_each_constant<levels>([&](auto from_inside) {
    constexpr int half = 1 << from_inside;
    for_each_constant<R / (2 * half)>([&](auto k) {
      for_each_constant<half>([&](auto i) {
        constexpr int low = 2 * half * k + i;
        turned_pair<-i, half>(x[low], x[low + half]);
      });
    });
  });
}

/// y_k = sum_e exp(Sign 2 pi i e k / Q) x_e in place for an odd prime Q, the points being Step apart: e and Q - e meet
/// conjugate roots, so their sum and difference take real factors.
template <int Q, int Sign, int Step>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void odd_transform(float2* x) {
  constexpr int half = Q / 2;
  const float2 first = x[0];
  float2 sum[half], difference[half];
  for_each_constant<half>([&](auto m) {
    const float2 a = x[(m + 1) * Step], b = x[(Q - 1 - m) * Step];
    sum[m] = {a.x + b.x, a.y + b.y}, difference[m] = {a.x - b.x, a.y - b.y};
    x[0] = {x[0].x + sum[m].x, x[0].y + sum[m].y};
  });
  for_each_constant<half>([&](auto less_one) {
    constexpr int k = less_one + 1;
    float2 even = first, odd{0, 0};
    for_each_constant<half>([&](auto m) {
      constexpr float2 root = constant_turn(2.0 * (k * (m + 1) % Q) / Q);
      even = {fmaf(root.x, sum[m].x, even.x), fmaf(root.x, sum[m].y, even.y)};
      odd = {fmaf(Sign * root.y, difference[m].x, odd.x), fmaf(Sign * root.y, difference[m].y, odd.y)};
    });
    x[k * Step] = {even.x - odd.y, even.y + odd.x};
    x[(Q - k) * Step] = {even.x + odd.y, even.y - odd.x};
  });
}

/// Forward over Q R points of the root x^N - i: Q trees of R points each, or the tree itself if Q is 1.
template <int Q, int R>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void forward_root(float2* x) {
  if constexpr (Q > 1) {
    for_each_constant<R>([&](auto i) {
      for_each_constant<Q - 1>([&](auto e) {
        constexpr float2 turn = constant_turn((e + 1) / (2.0 * Q));
        x[i + R * (e + 1)] = times(x[i + R * (e + 1)], turn);
      });
      odd_transform<Q, 1, R>(x + i);
    });
  }
  for_each_constant<Q>([&](auto k) { forward_tree<R>(x + R * k, ConstantLadder<R, 1 + 4 * k, 2 * Q * R>{}); });
}

/// Inverse over Q R points that lie h apart, at place j, without the turn by exp(-i pi n / 2N). `place` is j / h.
template <int Q, int R>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void inverse_root(float2* x, float place) {
  const TurnLadder<R> ladder(place * (2.0f / R));
  for_each_constant<Q>([&](auto k) { inverse_tree<R>(x + R * k, ladder); });
  if constexpr (Q > 1) {
    constexpr int below = Q * R >= 8 ? 0 : Q * R >= 4 ? 1 : 2;  // as in TurnLadder
    SmallTurn turn(place * (-2.0f / (Q * R << below)));
    for_each_constant<below>([&](auto) { turn.twice(); });
    const float2 one = turn.point();
    for_each_constant<R>([&](auto i) {
      float2 power = turned<-2 * i, Q * R>(one);
      const float2 first = power;
      for_each_constant<Q - 1>([&](auto e) {
        x[i + R * (e + 1)] = times(x[i + R * (e + 1)], power);
        if constexpr (e + 2 < Q) power = times(power, first);
      });
      odd_transform<Q, -1, R>(x + i);
    });
  }
}

}  // namespace chela::cuda::detail
