#pragma once
// Normalisation of rows, each cut into `groups` parts of `width` entries that are normalised on their own:
//
//   layer   y = gain (x - mean) / sqrt(variance + epsilon) + bias        arXiv 1607.06450
//   rms     y = gain x / sqrt(mean(x^2) + epsilon)                       arXiv 1910.07467
//   scale   y = gain x / sqrt(mean(x^2) + epsilon), one gain per part    arXiv 1910.05895; mean for sum, as in Mega
//   none    y = x
#include "chela/block/parameters.hpp"
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"

namespace chela {

enum class NormKind { none, layer, rms, scale };

/// Parameters of a norm, by the module convention of block/parameters.hpp.
struct Norm {
  struct Shape {
    NormKind kind = NormKind::layer;
    Index width = 0;        ///< entries of one part
    Index groups = 1;       ///< parts of a row: 1 for a whole row, the heads for attention outputs
    double epsilon = 1e-5;  ///< added to the variance or mean square, in the square of the inputs' unit
    constexpr Index row() const { return groups * width; }
  };

  template <class A>
  struct Parameters {
    TensorView<A, 1> gain;  ///< [groups * width]; [groups] for `scale`; absent for `none`
    TensorView<A, 1> bias;  ///< [groups * width] for `layer`; else absent
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    if (s.kind == NormKind::none) return;
    f(ParameterInfo{"gain", {s.kind == NormKind::scale ? s.groups : s.row()}, constant_init(1)}, p.gain...);
    if (s.kind == NormKind::layer) f(ParameterInfo{"bias", {s.row()}}, p.bias...);
  }
};

/// Inputs and outputs of one forward pass. T is float or double; last strides are 1.
template <Element T>
struct NormArgs {
  Norm::Shape shape = {};
  TensorView<const T, 2> x = {};  ///< [row, groups * width]
  Norm::Parameters<const T> parameters = {};
  TensorView<T, 2> y = {};  ///< like x; may be x's memory if no backward pass follows
  /// [row, groups, 2] mean and 1 / sqrt(... + epsilon) of each part, contiguous; absent when no backward pass follows.
  TensorView<T, 3> statistics = {};
};

/// Gradients of the same pass. Parameter gradients are overwritten, summed over rows in a fixed order.
template <Element T>
struct NormBackwardArgs {
  Norm::Shape shape = {};
  TensorView<const T, 2> x = {};
  Norm::Parameters<const T> parameters = {};
  TensorView<const T, 3> statistics = {};  ///< as the forward pass wrote them; not read for `none`
  TensorView<const T, 2> grad_y = {};      ///< like x
  TensorView<T, 2> grad_x = {};            ///< like x; may be grad_y's memory
  Norm::Parameters<T> grad_parameters = {};
};

namespace detail {

template <class A>
constexpr bool fits(const Norm::Shape& s, const Norm::Parameters<A>& p) {
  if (s.kind == NormKind::none) return true;
  const bool gain = has_extents(p.gain, s.kind == NormKind::scale ? s.groups : s.row()) && unit_last_stride(p.gain);
  return gain && (s.kind != NormKind::layer || (has_extents(p.bias, s.row()) && unit_last_stride(p.bias)));
}

template <class T>
constexpr Status check_norm(const Norm::Shape& s, TensorView<const T, 2> x, const Norm::Parameters<const T>& p) {
  return first_failure(
      require(s.width > 0 && s.groups > 0, Code::bad_shape, "a norm needs a width and groups of at least 1"),
      require(s.epsilon > 0 || s.kind == NormKind::none, Code::bad_value,
              "epsilon must be positive: a row may be all zero"),
      require(readable(x) && x.extents[1] == s.row(), Code::bad_shape, "x must be [row, groups * width]"),
      require(fits(s, p), Code::bad_shape, "gain and bias must be as Norm::visit describes them"),
      require(unit_last_stride(x), Code::bad_stride, "x needs a unit last stride"));
}

}  // namespace detail

/// Refuses arguments that do not fit together.
template <Element T>
constexpr Status check(const NormArgs<T>& a) {
  return first_failure(detail::check_norm(a.shape, a.x, a.parameters),
                       require(same_extents(a.y, a.x) && writable(a.y) && unit_last_stride(a.y), Code::bad_shape,
                               "y must have the extents of x, data and a unit last stride"),
                       require(!a.statistics.present() || has_extents(a.statistics, a.x.extents[0], a.shape.groups, 2),
                               Code::bad_shape, "statistics must be [row, groups, 2], or absent"));
}

template <Element T>
constexpr Status check(const NormBackwardArgs<T>& a) {
  const bool none = a.shape.kind == NormKind::none;
  return first_failure(detail::check_norm(a.shape, a.x, a.parameters),
                       require(none || has_extents(a.statistics, a.x.extents[0], a.shape.groups, 2), Code::bad_shape,
                               "statistics must be [row, groups, 2] as the forward pass wrote them"),
                       require(same_extents(a.grad_y, a.x) && readable(a.grad_y) && unit_last_stride(a.grad_y),
                               Code::bad_shape, "grad_y must have the extents of x and a unit last stride"),
                       require(same_extents(a.grad_x, a.x) && writable(a.grad_x) && unit_last_stride(a.grad_x),
                               Code::bad_shape, "grad_x must have the extents of x, data and a unit last stride"),
                       require(detail::fits(a.shape, a.grad_parameters), Code::bad_shape,
                               "grad_parameters must be as Norm::visit describes them"));
}

}  // namespace chela
