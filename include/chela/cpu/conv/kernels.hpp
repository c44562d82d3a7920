#pragma once
// Taps of long kernels from their parameters, and gradients back to them, on the CPU: see chela/conv/kernels.hpp. A task is one
// channel. The moving average as a recurrence: cpu/conv/ema.hpp.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

#include "chela/conv/kernels.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/channel_group.hpp"
#include "chela/cpu/conv/ema.hpp"

namespace chela::cpu {

namespace detail {

template <class A>
using Row = Eigen::Array<A, Eigen::Dynamic, 1>;

/// sum_j a[j] b[j], in an order that depends on `count` only.
template <class A>
A dot(const A* a, const A* b, Index count) {
  using namespace Eigen::internal;
  constexpr int lanes = lanes_of<A>;
  LanePacket<A> sum = pset1<LanePacket<A>>(A(0));
  const Index whole = count / lanes * lanes;
  for (Index j = 0; j < whole; j += lanes) sum = pmadd(ploadu<LanePacket<A>>(a + j), ploadu<LanePacket<A>>(b + j), sum);
  A partial[lanes], total = 0;
  pstoreu(partial, sum);
  for (int lane = 0; lane < lanes; ++lane) total += partial[lane];
  for (Index j = whole; j < count; ++j) total += a[j] * b[j];
  return total;
}

/// Walks an upsampled sub-kernel: `end(r, at, count)` for the constant taps before the first value's middle and after the last
/// one's, `line(r, at)` for the run of taps from the middle of value r to that of value r + 1.
template <class End, class Line>
void visit_runs(Index width, Index run, const End& end, const Line& line) {
  const Index half = run / 2;
  end(0, 0, half);
  for (Index r = 0; r + 1 < width; ++r) line(r, half + r * run);
  end(width - 1, half + (width - 1) * run, run - half);
}

/// How far along the line between two values each tap of a run lies.
template <class A>
Row<A> run_fractions(Index run) {
  Row<A> fractions(run);
  for (Index u = 0; u < run; ++u) fractions[u] = run == 1 ? A(0) : (A(u) + A(0.5)) / A(run);
  return fractions;
}

/// Powers of phi and their derivatives with respect to phi, by blocks: phi^(k block + j) = head^k * power[j].
struct EmaPowers {
  static constexpr int block = 64;
  Eigen::Array<double, block, 1> power, slope;
  double head = 1, head_slope = 0;

  explicit EmaPowers(double phi) {
    double p = 1, s = 0;
    for (int j = 0; j < block; ++j) {
      power[j] = p, slope[j] = s;
      s = s * phi + p, p *= phi;
    }
    head = p, head_slope = s;
  }
};

template <class A>
struct EmaChannel {
  double alpha, delta, beta, eta, phi;

  EmaChannel(const EmaParameters<const A>& p, Index d, Index n)
      : alpha(sigmoid(double(p.alpha(d, n)))),
        delta(sigmoid(double(p.delta(d, n)))),
        beta(double(p.beta(d, n))),
        eta(double(p.eta(d, n))),
        phi(1 - alpha * delta) {}

  static double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }
};

}  // namespace detail

template <std::floating_point A, Executor E = DefaultExecutor>
Status squash_taps(const SquashTapsArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  executor.for_each(a.taps.extents[0], [&](Index d, int) {
    for (Index j = 0; j < a.taps.extents[1]; ++j) {
      const A w = a.weights(d, j);
      a.taps(d, j) = w > a.threshold ? w - a.threshold : w < -a.threshold ? w + a.threshold : A(0) * w;
    }
  });
  return {};
}

template <std::floating_point A, Executor E = DefaultExecutor>
Status squash_taps_backward(const SquashTapsBackwardArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  executor.for_each(a.weights.extents[0], [&](Index d, int) {
    for (Index j = 0; j < a.weights.extents[1]; ++j)
      a.grad_weights(d, j) = std::abs(a.weights(d, j)) > a.threshold ? a.grad_taps(d, j) : A(0);
  });
  return {};
}

template <std::floating_point A, Executor E = DefaultExecutor>
Status sgconv_taps(const SgConvTapsArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const Index width = a.weights.extents[2], length = a.taps.extents[1];
  const Index scales = std::min(a.weights.extents[0], sgconv_scales(length, width)),
              reach = sgconv_reach(scales, width);
  const detail::Scratch<A> scratch(executor.workers() * reach);
  executor.for_each(a.taps.extents[0], [&](Index d, int worker) {
    A* const row = scratch.data() + worker * reach;
    A factor = A(1) / (a.norm.present() ? a.norm(d) : A(1));
    A* to = row;
    for (Index i = 0; i < scales; ++i, factor *= a.decay) {
      const Index run = Index(1) << i;
      const detail::Row<A> fractions = detail::run_fractions<A>(run);
      const auto value = [&](Index r) { return factor * a.weights(i, d, r); };
      detail::visit_runs(
          width, run, [&](Index r, Index at, Index count) { std::fill_n(to + at, count, value(r)); },
          [&](Index r, Index at) {
            Eigen::Map<detail::Row<A>>(to + at, run) = value(r) + (value(r + 1) - value(r)) * fractions;
          });
      to += width * run;
    }
    for (Index j = 0; j < length; ++j) a.taps(d, j) = row[j];
  });
  return {};
}

template <std::floating_point A, Executor E = DefaultExecutor>
Status sgconv_taps_backward(const SgConvTapsBackwardArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const Index width = a.grad_weights.extents[2], length = a.grad_taps.extents[1], scales = a.grad_weights.extents[0];
  const Index used = std::min(scales, sgconv_scales(length, width)), reach = sgconv_reach(used, width);
  const detail::Scratch<A> scratch(executor.workers() * reach);
  executor.for_each(a.grad_taps.extents[0], [&](Index d, int worker) {
    A* const row = scratch.data() + worker * reach;
    for (Index j = 0; j < reach; ++j) row[j] = j < length ? a.grad_taps(d, j) : A(0);
    A factor = A(1) / (a.norm.present() ? a.norm(d) : A(1));
    const A* from = row;
    for (Index i = 0; i < scales; ++i, factor *= a.decay) {
      for (Index r = 0; r < width; ++r) a.grad_weights(i, d, r) = A(0);
      if (i >= used) continue;
      const Index run = Index(1) << i;
      const detail::Row<A> to_next = detail::run_fractions<A>(run), to_this = A(1) - to_next;
      const detail::Row<A> ones = detail::Row<A>::Ones(run);
      const auto weigh = [&](const detail::Row<A>& weights, Index at, Index count) {
        return factor * detail::dot(from + at, weights.data(), count);
      };
      detail::visit_runs(
          width, run, [&](Index r, Index at, Index count) { a.grad_weights(i, d, r) += weigh(ones, at, count); },
          [&](Index r, Index at) {
            a.grad_weights(i, d, r) += weigh(to_this, at, run);
            a.grad_weights(i, d, r + 1) += weigh(to_next, at, run);
          });
      from += width * run;
    }
  });
  return {};
}

/// The norms to divide by from then on: those of the kernels of `a` as they are, with `a.norm` not read. `a.taps` is used as
/// scratch, so it holds the kernels before division.
template <std::floating_point A, Executor E = DefaultExecutor>
Status sgconv_norm(SgConvTapsArgs<A> a, TensorView<A, 1> norm, const E& executor = {}) {
  a.norm = {};
  if (Status s = require(has_extents(norm, a.taps.extents[0]) && writable(norm), Code::bad_shape,
                         "norm must be [channel] without a broadcast axis");
      !s.ok())
    return s;
  if (Status s = sgconv_taps(a, executor); !s.ok()) return s;
  for (Index d = 0; d < a.taps.extents[0]; ++d) {
    double sum = 0;
    for (Index j = 0; j < a.taps.extents[1]; ++j) sum += double(a.taps(d, j)) * double(a.taps(d, j));
    norm(d) = A(std::sqrt(sum));
  }
  return {};
}

template <std::floating_point A, Executor E = DefaultExecutor>
Status ema_taps(const EmaTapsArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  constexpr int block = detail::EmaPowers::block;
  const Index length = a.taps.extents[1], padded = round_up(length, block);
  const detail::Scratch<A> scratch(executor.workers() * padded);
  executor.for_each(a.taps.extents[0], [&](Index d, int worker) {
    A* const row = scratch.data() + worker * padded;
    std::fill_n(row, padded, A(0));
    for (Index n = 0; n < a.parameters.alpha.extents[1]; ++n) {
      const detail::EmaChannel<A> c(a.parameters, d, n);
      const detail::EmaPowers powers(c.phi);
      const Eigen::Array<A, block, 1> power = powers.power.template cast<A>();
      double factor = c.eta * c.alpha * c.beta;
      // What is left is below the smallest normal number, which is slow to compute with and adds nothing.
      for (Index j = 0; j < padded && std::abs(factor) >= double(std::numeric_limits<A>::min()); j += block) {
        Eigen::Map<Eigen::Array<A, block, 1>>(row + j) += A(factor) * power;
        factor *= powers.head;
      }
    }
    for (Index j = 0; j < length; ++j) a.taps(d, j) = row[j];
  });
  return {};
}

template <std::floating_point A, Executor E = DefaultExecutor>
Status ema_taps_backward(const EmaTapsBackwardArgs<A>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  constexpr int block = detail::EmaPowers::block;
  const Index length = a.grad_taps.extents[1], padded = round_up(length, block);
  const detail::Scratch<A> scratch(executor.workers() * padded);
  executor.for_each(a.grad_taps.extents[0], [&](Index d, int worker) {
    A* const row = scratch.data() + worker * padded;
    for (Index j = 0; j < padded; ++j) row[j] = j < length ? a.grad_taps(d, j) : A(0);
    for (Index n = 0; n < a.parameters.alpha.extents[1]; ++n) {
      const detail::EmaChannel<A> c(a.parameters, d, n);
      const detail::EmaPowers powers(c.phi);
      const Eigen::Array<A, block, 1> power = powers.power.template cast<A>(), slope = powers.slope.template cast<A>();
      double sum = 0, sum_slope = 0;        // of grad_taps phi^j, and of its derivative with respect to phi
      double factor = 1, factor_slope = 0;  // phi^(first tap of the block), and its derivative
      for (Index j = 0; j < padded; j += block) {
        if (std::abs(factor) + std::abs(factor_slope) < double(std::numeric_limits<A>::min())) break;
        const double here = double(detail::dot(row + j, power.data(), block));
        const double here_slope = double(detail::dot(row + j, slope.data(), block));
        sum += factor * here;
        sum_slope += factor * here_slope + factor_slope * here;
        factor_slope = factor_slope * powers.head + factor * powers.head_slope;
        factor *= powers.head;
      }
      const double grad_phi = c.eta * c.alpha * c.beta * sum_slope;
      a.grad.eta(d, n) = A(c.alpha * c.beta * sum);
      a.grad.beta(d, n) = A(c.eta * c.alpha * sum);
      a.grad.alpha(d, n) = A((c.eta * c.beta * sum - c.delta * grad_phi) * c.alpha * (1 - c.alpha));
      a.grad.delta(d, n) = A(-c.alpha * grad_phi * c.delta * (1 - c.delta));
    }
  });
  return {};
}

}  // namespace chela::cpu
