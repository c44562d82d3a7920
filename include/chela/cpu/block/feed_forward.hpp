#pragma once
// The feed-forward layer on the CPU: both products and what lies between them on one block of rows at a time.
#include "chela/block/feed_forward.hpp"
#include "chela/cpu/block/compute.hpp"
#include "chela/cpu/block/projection.hpp"

namespace chela::cpu {

namespace rowwise {

/// What a pass over these rows leaves for the backward pass.
template <class A>
struct FeedForwardActivations {
  TensorView<A, 2> expanded;  ///< [row, expanded] before the activation
  TensorView<A, 2> hidden;    ///< [row, hidden]
  FeedForwardActivations rows(Index first, Index count) const {
    return {row_range(expanded, first, count), row_range(hidden, first, count)};
  }
};

/// y = residual + F(x) on one thread; residual may be y's memory, x may not.
template <class A>
void feed_forward(const FeedForward::Shape& s, const FeedForward::Parameters<const A>& p, TensorView<const A, 2> x,
                  TensorView<const A, 2> residual, const FeedForwardActivations<A>& a, TensorView<A, 2> y) {
  project<A>(x, p.expand.weight, p.expand.bias, a.expanded);
  if (s.kind == FeedForwardKind::swiglu)
    map_rows(SwiGlu<A>{}, a.hidden, columns(a.expanded, 0, s.hidden), columns(a.expanded, s.hidden, s.hidden));
  else
    map_rows(Silu<A>{}, a.hidden, a.expanded);
  project<A>(a.hidden, p.contract.weight, p.contract.bias, y, residual);
}

/// grad_x = gradient of F on one thread, and grad_expanded for the sums over rows; `work` is [row, hidden].
template <class A>
void feed_forward_backward(const FeedForward::Shape& s, const FeedForward::Parameters<const A>& p,
                           const FeedForwardActivations<A>& a, TensorView<const A, 2> grad_y, TensorView<A, 2> work,
                           TensorView<A, 2> grad_expanded, TensorView<A, 2> grad_x) {
  project_back<A>(grad_y, p.contract.weight, work);
  if (s.kind == FeedForwardKind::swiglu) {
    const auto gate = columns(a.expanded, 0, s.hidden), up = columns(a.expanded, s.hidden, s.hidden);
    map_rows(SwiGlu<A>{}, columns(grad_expanded, s.hidden, s.hidden), gate, work);
    map_rows([](Lanes<A> before, Lanes<A> other,
                Lanes<A> gradient) { return SiluGradient<A>{}(before, Eigen::internal::pmul(other, gradient)); },
             columns(grad_expanded, 0, s.hidden), gate, up, work);
  } else {
    map_rows(SiluGradient<A>{}, grad_expanded, a.expanded, work);
  }
  project_back<A>(grad_expanded, p.expand.weight, grad_x);
}

}  // namespace rowwise

template <>
struct Compute<FeedForward> {
  using Shape = FeedForward::Shape;
  template <class A>
  using Parameters = FeedForward::Parameters<A>;

  template <class A>
  struct Cache {
    Tensor<A, 1> expanded, hidden, grad_expanded, work;
    rowwise::FeedForwardActivations<A> activations(const Shape& s, Index rows) {
      return {detail::reserve(expanded, rows, s.expanded()), detail::reserve(hidden, rows, s.hidden)};
    }
  };

  /// y = x + F(x) over rows [row, width] of unit last stride; y may be x's memory if no backward pass follows.
  template <class A, Executor E>
  static Status forward(const Shape& s, const std::type_identity_t<Parameters<const A>>& p,
                        std::type_identity_t<TensorView<const A, 2>> x, std::type_identity_t<TensorView<A, 2>> y,
                        Cache<A>& cache, const E& executor) {
    if (Status bad = check(s, x, y); !bad.ok()) return bad;
    const auto activations = cache.activations(s, x.extents[0]);
    rowwise::for_each_row_block(x.extents[0], executor, [&](Index first, Index count, int, Index) {
      const auto from = rowwise::row_range(x, first, count);
      const auto to = rowwise::row_range(y, first, count);
      if (s.kind == FeedForwardKind::none) {
        if (y.data != x.data) rowwise::as_rows(to) = rowwise::as_rows(from);
      } else {
        rowwise::feed_forward<A>(s, p, from, from, activations.rows(first, count), to);
      }
    });
    return {};
  }

  /// Gradients of the same pass; all are overwritten. `x` and `cache` as the forward pass saw and left them.
  template <class A, Executor E>
  static Status backward(const Shape& s, const std::type_identity_t<Parameters<const A>>& p, Cache<A>& cache,
                         std::type_identity_t<TensorView<const A, 2>> x,
                         std::type_identity_t<TensorView<const A, 2>> grad_y,
                         std::type_identity_t<TensorView<A, 2>> grad_x, const std::type_identity_t<Parameters<A>>& grad,
                         const E& executor) {
    if (Status bad = check(s, x, grad_x); !bad.ok()) return bad;
    if (Status bad = check(s, grad_y, grad_x); !bad.ok()) return bad;
    const Index rows = x.extents[0];
    const auto activations = cache.activations(s, rows);
    const auto grad_expanded = detail::reserve(cache.grad_expanded, rows, s.expanded());
    const auto work = detail::reserve(cache.work, executor.workers(), rowwise::row_block, s.hidden);
    rowwise::for_each_row_block(rows, executor, [&](Index first, Index count, int worker, Index) {
      const auto dy = rowwise::row_range(grad_y, first, count);
      const auto dx = rowwise::row_range(grad_x, first, count);
      if (s.kind == FeedForwardKind::none) {
        rowwise::as_rows(dx) = rowwise::as_rows(dy);
      } else {
        rowwise::feed_forward_backward<A>(s, p, activations.rows(first, count), dy,
                                          rowwise::row_range(slice(work, worker), 0, count),
                                          rowwise::row_range(grad_expanded, first, count), dx);
        rowwise::as_rows(dx) += rowwise::as_rows(dy);
      }
    });
    if (s.kind != FeedForwardKind::none)
      rowwise::weight_gradients<A>({{activations.hidden, grad_y, grad.contract.weight, grad.contract.bias},
                                    {x, grad_expanded, grad.expand.weight, grad.expand.bias}},
                                   executor);
    return {};
  }

 private:
  template <class X, class Y>
  static Status check(const Shape& s, TensorView<X, 2> x, TensorView<Y, 2> y) {
    return first_failure(
        FeedForward::check(s),
        require(readable(x) && x.extents[1] == s.width, Code::bad_shape, "x must be [row, width] of the layer"),
        require(same_extents(x, y) && writable(y), Code::bad_shape, "y must have the extents of x, with data"),
        require(unit_last_stride(x) && unit_last_stride(y), Code::bad_stride, "x and y need a unit last stride"));
  }
};

}  // namespace chela::cpu
