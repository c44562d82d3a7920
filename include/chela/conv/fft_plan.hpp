#pragma once
// Sizes and tables of the right-angle transform, which computes linear convolutions of length N with one complex
// transform of N points per real channel. It works modulo x^N - i: of the product of two real polynomials of degree
// below N, the real part of the remainder holds coefficients 0 to N - 1 and the imaginary part the ones above, so
// nothing wraps around.
//
// Forward: a tree. Node n (root 1, children 2n and 2n + 1) stands for x^m - exp(2 pi i th_n), and splits into
// x^{m/2} -+ exp(i pi th_n), so one twiddle serves a whole node:
//
//   th_1 = 1/4     th_{2n} = th_n / 2     th_{2n+1} = th_n / 2 + 1/2     twiddle(n) = exp(i pi th_n)
//
// N is 2^a, or 3, 5, 7 or 9 times 2^a. Then the root splits R ways first, into x^{N/R} - exp(2 pi i th) with
// th = (1/4 + k) / R, and a tree of twos hangs from each. R is the odd number, or 6 for 3: parts half as
// large stay in a nearer cache.
//
// Inverse: butterflies of the ordinary inverse transform on values in tree order, which leave coefficient j multiplied
// by N exp(i pi j / 2N); `output_weight` undoes the angle, and whoever makes a spectrum of a kernel undoes the N.
#include <algorithm>
#include <cmath>
#include <vector>

#include "chela/core/index.hpp"

namespace chela {

/// The fewest points for which the transform of `tokens` inputs, `taps` causal and `back_taps` anticausal taps is
/// exact. `with_state`: inputs before the first token take part, taps - 1 of them, and no tap is dropped. Lag -m sits
/// where lag N - m would, times -i; with all lags at most N that is exact as long as inputs and lags together span no
/// more than 2N.
constexpr Index right_angle_least_points(Index tokens, Index taps, Index back_taps, bool with_state) {
  if (!with_state) return tokens;
  const Index ahead = std::min(back_taps, std::max<Index>(tokens - 1, 0));
  return std::max({tokens, taps, ceil_div(tokens + taps - 1 + ahead, 2)});
}

/// Points of a transform: `odd` times a power of two.
struct RightAngleSize {
  Index points = 0;
  int odd = 1;
};

/// The least size that is enough. What hangs from an odd root is one innermost block of 8, or has a pass above it.
constexpr RightAngleSize right_angle_size(Index at_least) {
  constexpr Index least = 32, middle = 8;
  Index power = least;
  while (power < at_least) power *= 2;
  for (int odd : {9, 5, 3, 7}) {  // 9/16, 5/8, 3/4 and 7/8 of the power of two
    const Index part = power / (odd > 8 ? 16 : odd > 4 ? 8 : 4);
    if (part * odd >= at_least && part * odd > least && part >= middle && part != 2 * middle) return {part * odd, odd};
  }
  return {power, 1};
}

/// Whether a pass of this radix is at a root that does not split in two.
constexpr bool splits_root(int radix) { return (radix & (radix - 1)) != 0; }

/// One complex transform: which radices, at which strides, with which twiddles. Immutable; one plan serves all threads.
template <class A>
class RightAnglePlan {
 public:
  /// The innermost block, which forward pass, product and inverse pass share without leaving the registers.
  static constexpr int middle = 8;

  /// A pass over blocks of radix * stride points. The inverse pass of radix 4 or 8 reads radix twiddle values (re, im
  /// pairs) per position: exp(-2 pi i j / 2h), / 4h, and for radix 8 also / 8h and the same for position j + h, where h
  /// is the stride. The outermost pass may split a root; then the twiddles are exp(-2 pi i k j / N) for k from 1 to
  /// radix - 1.
  struct Pass {
    int radix = 0;
    Index stride = 0;
    Index twiddles = 0;
  };

  RightAnglePlan() = default;

  /// At least `at_least` points. Radix 8 needs some 24 registers; `largest_radix` 4 suits machines with 16.
  explicit RightAnglePlan(Index at_least, int largest_radix = 8) {
    const RightAngleSize size = right_angle_size(at_least);
    points_ = size.points, root_ = size.odd;
    if (root_ == 3 && passed_levels(points_ / root_) > 2) root_ = 6;
    const std::vector<double> quarter = quarter_circle();
    fill_node_twiddles(quarter);
    fill_passes(quarter, largest_radix);
    output_weights_.resize(std::size_t(2 * points_));
    std::copy(quarter.begin(), quarter.end(), output_weights_.begin());
  }

  Index points() const { return points_; }
  int passes() const { return int(passes_.size()); }
  const Pass& pass(int i) const { return passes_[std::size_t(i)]; }
  const A* inverse_twiddles(const Pass& pass) const { return inverse_twiddles_.data() + pass.twiddles; }

  /// The twiddles exp(i pi th_n) as (re, im) at 2 n of every node n of the tree of twos; below a split root, of its
  /// child's.
  const A* tree(Index child = 0) const { return node_twiddles_.data() + child * (2 * points_ / root_); }

  /// exp(2 pi i k / R) and exp(2 pi i k / 4R) as (re, im), k from 0 to R - 1.
  const A* root_circle() const { return root_circle_.data(); }
  const A* root_angles() const { return root_circle_.data() + 2 * root_; }

  /// exp(i pi row / 2N) as (re, im).
  const A* output_weight(Index row) const { return output_weights_.data() + 2 * row; }

 private:
  struct Root {
    double re, im;
  };

  /// exp(2 pi i k / 4N) for k < N, as (re, im) pairs: products of two short tables, each straight from sine and cosine.
  std::vector<double> quarter_circle() const {
    const double angle = std::acos(-1.0) / double(2 * points_);
    Index fine = 1;
    while (fine * fine < points_) fine *= 2;
    std::vector<Root> step;
    for (Index k = 0; k < fine; ++k) step.push_back({std::cos(angle * double(k)), std::sin(angle * double(k))});
    std::vector<double> roots(std::size_t(2 * points_));
    for (Index k = 0; k < points_; k += fine) {
      const double re = std::cos(angle * double(k)), im = std::sin(angle * double(k));
      double* to = roots.data() + 2 * k;
      for (Index i = 0; i < std::min(fine, points_ - k); ++i) {
        const Root& s = step[std::size_t(i)];
        *to++ = re * s.re - im * s.im, *to++ = re * s.im + im * s.re;
      }
    }
    return roots;
  }

  /// exp(2 pi i k / 4N) for any k >= 0.
  Root root(const std::vector<double>& quarter, Index k) const {
    const double* r = quarter.data() + 2 * (k % points_);
    switch ((k / points_) & 3) {
      case 0:
        return {r[0], r[1]};
      case 1:
        return {-r[1], r[0]};
      case 2:
        return {-r[0], -r[1]};
      default:
        return {r[1], -r[0]};
    }
  }

  static void put(std::vector<A>& to, const Root& r) { to.push_back(A(r.re)), to.push_back(A(r.im)); }

  /// Levels of a tree of twos over so many points, above its innermost blocks.
  static int passed_levels(Index points) {
    int levels = 0;
    for (Index b = points; b > middle; b /= 2) ++levels;
    return levels;
  }

  void fill_node_twiddles(const std::vector<double>& quarter) {
    const Index part = points_ / root_;
    std::vector<Index> turn(std::size_t(part), 0);  // th_n in units of 1 / 2N
    node_twiddles_.reserve(std::size_t(2 * points_));
    for (int child = 0; child < root_; ++child) {
      put(node_twiddles_, {0, 0});  // nodes are counted from 1
      turn[1] = part / 2 + 2 * part * child;
      for (Index n = 1; n < part; ++n) {
        if (n > 1) turn[std::size_t(n)] = turn[std::size_t(n / 2)] / 2 + (n & 1) * points_;
        put(node_twiddles_, root(quarter, turn[std::size_t(n)]));
      }
    }
    for (int k = 0; k < root_; ++k) put(root_circle_, root(quarter, 4 * part * k));
    for (int k = 0; k < root_; ++k) put(root_circle_, root(quarter, part * k));
  }

  void fill_passes(const std::vector<double>& quarter, int largest_radix) {
    const auto append = [&](Index order, Index j) {
      const Root r = root(quarter, j * (4 * points_ / order));
      put(inverse_twiddles_, {r.re, -r.im});
    };
    Index block = points_;
    if (root_ > 1) {
      block /= root_;
      passes_.push_back({root_, block, 0});
      for (Index j = 0; j < block; ++j)
        for (int k = 1; k < root_; ++k) append(points_, k * j);
    }
    const int levels = passed_levels(block);  // eights first, then fours
    const int fours = largest_radix >= 8 ? (3 - levels % 3) % 3 : (levels - 3 * (levels % 2)) / 2;
    const int eights = (levels - 2 * fours) / 3;
    for (int p = 0; p < eights + fours; ++p) {
      Pass pass{p < eights ? 8 : 4};
      pass.stride = block / pass.radix;
      pass.twiddles = Index(inverse_twiddles_.size());
      for (Index j = 0, h = pass.stride; j < h; ++j) {
        append(2 * h, j), append(4 * h, j);
        if (pass.radix == 8) append(8 * h, j), append(8 * h, j + h);
      }
      passes_.push_back(pass);
      block = pass.stride;
    }
  }

  Index points_ = 0;
  int root_ = 1;  // R, or 1 where the root splits in two
  std::vector<A> node_twiddles_, root_circle_, inverse_twiddles_, output_weights_;
  std::vector<Pass> passes_;
};

}  // namespace chela
