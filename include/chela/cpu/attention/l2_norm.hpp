#pragma once
// Rows of unit length on the CPU: each row is packed once, in the accumulator type, and is then worked on in the L1
// cache.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

#include "chela/attention/l2_norm.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

namespace detail {

/// A packed row: aligned and of whole cache lines, so that Eigen sums it in one order.
template <class A>
using PackedRow = Eigen::Map<Eigen::Array<A, Eigen::Dynamic, 1>, Eigen::Aligned64>;

/// sqrt(sum x^2 + epsilon).
template <class A>
A length_of(const PackedRow<A>& x, A epsilon) {
  // Below `least`, what the squares of small entries lose to underflow would show.
  constexpr A least = std::numeric_limits<A>::min() / std::numeric_limits<A>::epsilon();
  const A square = x.square().sum() + epsilon;
  if ((square >= least && square <= std::numeric_limits<A>::max()) || std::isnan(square)) return std::sqrt(square);
  const A largest = x.abs().maxCoeff();
  if (largest == A(0)) return std::sqrt(epsilon);
  return largest * std::sqrt((x / largest).square().sum() + epsilon / largest / largest);
}

// The passes over one row. Each is compiled once, not once per executor that it is inlined into: compilers fuse
// multiplications and additions as their surroundings suggest, and the last bit would depend on who hands out the
// tasks.

/// x = x / |x|.
template <class A>
[[gnu::noinline]] void to_unit_length(A* data, Index padded, A epsilon) {
  PackedRow<A> x(data, padded);
  x /= length_of<A>(x, epsilon);
}

/// grad = (grad - y (y . grad)) / |x|; x becomes y.
template <class A>
[[gnu::noinline]] void to_unit_length_backward(A* data, A* grad_data, Index padded, A epsilon) {
  PackedRow<A> y(data, padded), grad(grad_data, padded);
  const A length = length_of<A>(y, epsilon);
  y /= length;
  const A along = (y * grad).sum();
  grad = (grad - along * y) / length;
}

/// Calls f(row's index on each axis but the last, worker) for every row.
template <Executor E, class F>
void for_each_unit_row(const Index (&extents)[4], const E& executor, F&& f) {
  constexpr Index share = 256;  // rows of one task
  const Index tokens = extents[1], heads = extents[2], rows = extents[0] * tokens * heads;
  executor.for_each(extents[3] > 0 ? ceil_div(rows, share) : 0, [&](Index task, int worker) {
    for (Index row = task * share; row < std::min(rows, (task + 1) * share); ++row)
      f(row / heads / tokens, row / heads % tokens, row % heads, worker);
  });
}

}  // namespace detail

/// y = x / sqrt(sum x^2 + epsilon), see chela/attention/l2_norm.hpp. Scratch: one row per worker.
template <Element T, Executor E>
Status l2_norm(const L2NormArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const Index dim = args.x.extents[3], padded = round_up(dim, 16);
  Tensor<A, 2> scratch(executor.workers(), padded);
  detail::for_each_unit_row(args.x.extents, executor, [&](Index b, Index t, Index h, int worker) {
    A* x = &scratch(worker, 0);
    detail::pack_row(&args.x(b, t, h, 0), args.x.strides[3], dim, A(1), x, padded);
    detail::to_unit_length(x, padded, A(args.epsilon));
    detail::unpack_row(x, dim, &args.y(b, t, h, 0), args.y.strides[3]);
  });
  return {};
}

/// Gradient of the same pass. Scratch: two rows per worker.
template <Element T, Executor E>
Status l2_norm_backward(const L2NormBackwardArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const Index dim = args.x.extents[3], padded = round_up(dim, 16);
  Tensor<A, 2> scratch(executor.workers(), 2 * padded);
  detail::for_each_unit_row(args.x.extents, executor, [&](Index b, Index t, Index h, int worker) {
    A *x = &scratch(worker, 0), *grad = x + padded;
    detail::pack_row(&args.x(b, t, h, 0), args.x.strides[3], dim, A(1), x, padded);
    detail::pack_row(&args.grad_y(b, t, h, 0), args.grad_y.strides[3], dim, A(1), grad, padded);
    detail::to_unit_length_backward(x, grad, padded, A(args.epsilon));
    detail::unpack_row(grad, dim, &args.grad_x(b, t, h, 0), args.grad_x.strides[3]);
  });
  return {};
}

}  // namespace chela::cpu
