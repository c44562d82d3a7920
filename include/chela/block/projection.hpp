#pragma once
// A learned linear map of rows, y = activation(x W + bias), W in R^{in x out}: CHELA's projections (arXiv 2406.08128,
// section 3.3) and the matrices of its feed-forward layer.
#include "chela/block/parameters.hpp"
#include "chela/conv/short.hpp"
#include "chela/core/status.hpp"

namespace chela {

/// Parameters of a projection, by the module convention of block/parameters.hpp.
struct Projection {
  struct Shape {
    Index in = 0, out = 0;
    bool bias = true;
    double deviation = 0.02;  ///< standard deviation of the initial weight
  };

  template <class A>
  struct Parameters {
    TensorView<A, 2> weight;  ///< [in, out]
    TensorView<A, 1> bias;    ///< [out], or absent
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    f(ParameterInfo{"weight", {s.in, s.out}, normal_init(0, s.deviation), true}, p.weight...);
    if (s.bias) f(ParameterInfo{"bias", {s.out}}, p.bias...);
  }
};

/// Inputs and outputs of one forward pass over rows. T is float or double.
template <Element T>
struct ProjectionArgs {
  TensorView<const T, 2> x = {};       ///< [row, in]; last stride 1, as for every view here
  TensorView<const T, 2> weight = {};  ///< [in, out]
  TensorView<const T, 1> bias = {};    ///< [out], or absent for zero
  TensorView<T, 2> y = {};             ///< [row, out]; every element is written
  /// [row, out] x W + bias before the activation, which the backward pass reads; absent when not wanted.
  TensorView<T, 2> before = {};
  Activation activation = Activation::none;
};

/// Gradients of the same pass. Absent outputs are skipped; the others are overwritten, summed over rows in a fixed
/// order.
template <Element T>
struct ProjectionBackwardArgs {
  TensorView<const T, 2> x = {}, weight = {};  ///< as in the forward pass
  TensorView<const T, 2> before = {};          ///< as the forward pass wrote it; not read without an activation
  TensorView<const T, 2> grad_y = {};          ///< [row, out]
  /// [row, out] receives the gradient of `before`, which the sums need; may be grad_y's memory. Not used without an
  /// activation.
  TensorView<T, 2> grad_before = {};
  TensorView<T, 2> grad_x = {};       ///< like x
  TensorView<T, 2> grad_weight = {};  ///< like weight
  TensorView<T, 1> grad_bias = {};    ///< [out]
  Activation activation = Activation::none;
};

namespace detail {

template <class T, int Rank>
constexpr Status check_rows(TensorView<T, Rank> view) {
  return require(unit_last_stride(view), Code::bad_stride, "matrices of a projection need a unit last stride");
}

/// Absent, or with these extents and a place of its own for each element.
template <class T, int Rank, class... I>
constexpr bool absent_or(TensorView<T, Rank> view, I... extents) {
  return !view.present() || (has_extents(view, extents...) && writable(view));
}

}  // namespace detail

/// Refuses arguments that do not fit together.
template <Element T>
constexpr Status check(const ProjectionArgs<T>& a) {
  const Index rows = a.x.extents[0], in = a.x.extents[1], out = a.weight.extents[1];
  return first_failure(
      require(readable(a.x) && readable(a.weight), Code::bad_shape,
              "x and weight need data and extents of zero or more"),
      require(a.weight.extents[0] == in, Code::bad_shape, "weight must be [in, out] with in the width of x"),
      require(!a.bias.present() || has_extents(a.bias, out), Code::bad_shape, "bias must be [out], or absent"),
      require(has_extents(a.y, rows, out) && writable(a.y), Code::bad_shape, "y must be [row, out] with data"),
      require(detail::absent_or(a.before, rows, out), Code::bad_shape, "before must be [row, out], or absent"),
      detail::check_rows(a.x), detail::check_rows(a.weight), detail::check_rows(a.bias), detail::check_rows(a.y),
      detail::check_rows(a.before));
}

template <Element T>
constexpr Status check(const ProjectionBackwardArgs<T>& a) {
  const Index rows = a.x.extents[0], in = a.x.extents[1], out = a.weight.extents[1];
  const bool active = a.activation != Activation::none;
  return first_failure(
      require(readable(a.x) && readable(a.weight), Code::bad_shape,
              "x and weight need data and extents of zero or more"),
      require(a.weight.extents[0] == in, Code::bad_shape, "weight must be [in, out] with in the width of x"),
      require(has_extents(a.grad_y, rows, out) && readable(a.grad_y), Code::bad_shape, "grad_y must be [row, out]"),
      require(!active || (has_extents(a.before, rows, out) && readable(a.before)), Code::bad_shape,
              "before must be given as the forward pass wrote it when there is an activation"),
      require(!active || (has_extents(a.grad_before, rows, out) && writable(a.grad_before)), Code::bad_shape,
              "grad_before must be [row, out] when there is an activation; it may be grad_y's memory"),
      require(detail::absent_or(a.grad_x, rows, in) && detail::absent_or(a.grad_weight, in, out) &&
                  detail::absent_or(a.grad_bias, out),
              Code::bad_shape,
              "grad_x, grad_weight and grad_bias must have the shapes of x, weight and bias, or be absent"),
      detail::check_rows(a.x), detail::check_rows(a.weight), detail::check_rows(a.before), detail::check_rows(a.grad_y),
      detail::check_rows(a.grad_before), detail::check_rows(a.grad_x), detail::check_rows(a.grad_weight),
      detail::check_rows(a.grad_bias));
}

}  // namespace chela
