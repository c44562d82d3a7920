#pragma once
// Parameterisations of long kernels: what is learned, and the taps [channel, L] that the long convolution reads. Explicit taps
// are their own parameters.
//
//   Squash   arXiv 2302.06646   k_j = sign(w_j) max(|w_j| - threshold, 0)
//   SGConv   arXiv 2210.09298   k = [s_0, s_1, s_2, ..] / norm,  s_i = decay^i * upsample(w_i, 2^i)
//   EMA      arXiv 2209.10655   k_j = sum_n eta_n alpha_n beta_n phi_n^j,  phi = 1 - alpha delta      (Mega, section 3.1)
//            or, with a state of constant size,  z_t = phi z_{t-1} + x_t,  y_t = sum_n eta_n alpha_n beta_n z_{t,n}
//
// `upsample` draws a line through the w values of a sub-kernel, placed at the middles of runs of 2^i taps and constant beyond
// the first and last middle. alpha and delta are sigmoids of the raw parameters, as in Mega. Mega's own programs multiply eta
// by n^-1/2, which an initialisation can do as well.
#include <algorithm>
#include <concepts>

#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

template <std::floating_point A>
struct SquashTapsArgs {
  TensorView<const A, 2> weights = {};  ///< [channel, L]
  TensorView<A, 2> taps = {};           ///< [channel, L]; every element is written, and may be the weights' memory
  A threshold = 0;                      ///< zero or more
};

/// The gradient is one where |weight| > threshold, and zero elsewhere.
template <std::floating_point A>
struct SquashTapsBackwardArgs {
  TensorView<const A, 2> weights = {};    ///< as in the forward pass
  TensorView<const A, 2> grad_taps = {};  ///< [channel, L]
  TensorView<A, 2> grad_weights = {};     ///< like weights; overwritten
  A threshold = 0;
};

/// Taps that `scales` sub-kernels of `width` values reach: width + 2 width + 4 width + ..
constexpr Index sgconv_reach(Index scales, Index width) { return width * ((Index(1) << scales) - 1); }

/// The fewest sub-kernels that reach `length` taps.
constexpr Index sgconv_scales(Index length, Index width) {
  Index scales = 1;
  while (width > 0 && sgconv_reach(scales, width) < length) ++scales;
  return scales;
}

template <std::floating_point A>
struct SgConvTapsArgs {
  TensorView<const A, 3> weights = {};  ///< [scale, channel, width]
  TensorView<const A, 1> norm = {};     ///< [channel], a constant: the kernels' norms at the start; or absent for one
  TensorView<A, 2> taps = {};  ///< [channel, L], L at most sgconv_reach(scales, width); every element is written
  A decay = A(0.5);            ///< weight of each sub-kernel relative to the one before
};

template <std::floating_point A>
struct SgConvTapsBackwardArgs {
  TensorView<const A, 1> norm = {};       ///< as in the forward pass
  TensorView<const A, 2> grad_taps = {};  ///< [channel, L]
  TensorView<A, 3> grad_weights = {};     ///< [scale, channel, width]; overwritten
  A decay = A(0.5);
};

/// The parameters of a multi-dimensional damped moving average, all [channel, n].
template <class A>
struct EmaParameters {
  TensorView<A, 2> alpha = {};  ///< raw: alpha = sigmoid of this
  TensorView<A, 2> delta = {};  ///< raw: delta = sigmoid of this
  TensorView<A, 2> beta = {};   ///< how the input enters each average
  TensorView<A, 2> eta = {};    ///< how the averages are read
};

template <std::floating_point A>
struct EmaTapsArgs {
  EmaParameters<const A> parameters = {};
  TensorView<A, 2> taps = {};  ///< [channel, L]; every element is written
};

template <std::floating_point A>
struct EmaTapsBackwardArgs {
  EmaParameters<const A> parameters = {};  ///< as in the forward pass
  TensorView<const A, 2> grad_taps = {};   ///< [channel, L]
  EmaParameters<A> grad = {};              ///< like the parameters, with respect to the raw ones; overwritten
};

/// The same filter as a recurrence over any number of tokens, with no limit to how far it looks back.
template <Element T>
struct EmaArgs {
  TensorView<const T, 3> x = {};  ///< [batch, token, channel]
  EmaParameters<const Accumulator<T>> parameters = {};
  TensorView<T, 3> y = {};                                 ///< [batch, token, channel]; may be x's memory
  TensorView<const Accumulator<T>, 3> initial_state = {};  ///< z: [batch, channel, n], or absent for zero
  TensorView<Accumulator<T>, 3> final_state = {};          ///< the same, or absent; may be the initial state's memory
};

/// One token per sequence; `state` is read and written in place.
template <Element T>
struct EmaStepArgs {
  TensorView<const T, 2> x = {};  ///< [batch, channel]
  EmaParameters<const Accumulator<T>> parameters = {};
  TensorView<T, 2> y = {};                   ///< [batch, channel]; may be x's memory
  TensorView<Accumulator<T>, 3> state = {};  ///< z: [batch, channel, n]
};

namespace detail {

template <class A>
constexpr Status check_sgconv(TensorView<const A, 1> norm, Index scales, Index channels, Index width, Index length,
                              A decay) {
  return first_failure(require(scales >= 1 && scales < 48 && width >= 1, Code::bad_shape,
                               "SGConv weights must be [scale, channel, width] with at least one scale of one value"),
                       require(length <= sgconv_reach(std::clamp<Index>(scales, 0, 47), width), Code::bad_shape,
                               "taps are longer than the sub-kernels reach; use sgconv_scales(length, width) of them"),
                       require(!norm.present() || has_extents(norm, channels), Code::bad_shape,
                               "norm must be [channel], or absent for one"),
                       require(decay > 0, Code::bad_value, "decay must be greater than zero"));
}

template <class A>
constexpr Status check_ema(const EmaParameters<A>& p, Index channels) {
  const Index n = p.alpha.extents[1];
  const auto fits = [&](const TensorView<A, 2>& view) { return has_extents(view, channels, n) && readable(view); };
  return require(n >= 1 && fits(p.alpha) && fits(p.delta) && fits(p.beta) && fits(p.eta), Code::bad_shape,
                 "alpha, delta, beta and eta must all be [channel, n] with n at least 1");
}

}  // namespace detail

/// Refuses arguments that do not fit together; both backends call it first.
template <class A>
constexpr Status check(const SquashTapsArgs<A>& a) {
  return first_failure(require(same_extents(a.weights, a.taps) && readable(a.weights) && writable(a.taps),
                               Code::bad_shape, "weights and taps must both be [channel, L]"),
                       require(a.threshold >= 0, Code::bad_value, "threshold must be zero or more"));
}

template <class A>
constexpr Status check(const SquashTapsBackwardArgs<A>& a) {
  return first_failure(require(same_extents(a.weights, a.grad_taps) && same_extents(a.weights, a.grad_weights) &&
                                   readable(a.weights) && readable(a.grad_taps) && writable(a.grad_weights),
                               Code::bad_shape, "weights, grad_taps and grad_weights must all be [channel, L]"),
                       require(a.threshold >= 0, Code::bad_value, "threshold must be zero or more"));
}

template <class A>
constexpr Status check(const SgConvTapsArgs<A>& a) {
  return first_failure(
      require(readable(a.weights) && writable(a.taps) && a.weights.extents[1] == a.taps.extents[0], Code::bad_shape,
              "weights [scale, channel, width] and taps [channel, L] need data and the same number of channels"),
      detail::check_sgconv(a.norm, a.weights.extents[0], a.taps.extents[0], a.weights.extents[2], a.taps.extents[1],
                           a.decay));
}

template <class A>
constexpr Status check(const SgConvTapsBackwardArgs<A>& a) {
  return first_failure(
      require(
          writable(a.grad_weights) && readable(a.grad_taps) && a.grad_weights.extents[1] == a.grad_taps.extents[0],
          Code::bad_shape,
          "grad_weights [scale, channel, width] and grad_taps [channel, L] need data and the same number of channels"),
      detail::check_sgconv(a.norm, a.grad_weights.extents[0], a.grad_taps.extents[0], a.grad_weights.extents[2],
                           a.grad_taps.extents[1], a.decay));
}

template <class A>
constexpr Status check(const EmaTapsArgs<A>& a) {
  return first_failure(require(writable(a.taps), Code::bad_shape, "taps must be [channel, L] without broadcast axes"),
                       detail::check_ema(a.parameters, a.taps.extents[0]));
}

template <class A>
constexpr Status check(const EmaTapsBackwardArgs<A>& a) {
  const EmaParameters<A>& g = a.grad;
  return first_failure(
      require(readable(a.grad_taps), Code::bad_shape, "grad_taps must be [channel, L]"),
      detail::check_ema(a.parameters, a.grad_taps.extents[0]),
      require(a.parameters.alpha.extents[1] == g.alpha.extents[1] && writable(g.alpha) && writable(g.delta) &&
                  writable(g.beta) && writable(g.eta),
              Code::bad_shape, "the four gradients must have the extents of the parameters, without broadcast axes"),
      detail::check_ema(g, a.grad_taps.extents[0]));
}

template <Element T>
constexpr Status check(const EmaArgs<T>& a) {
  const Index batch = a.x.extents[0], channels = a.x.extents[2], n = a.parameters.alpha.extents[1];
  return first_failure(
      require(readable(a.x), Code::bad_shape, "x needs data and extents of zero or more"),
      detail::check_ema(a.parameters, channels),
      require(same_extents(a.y, a.x) && writable(a.y), Code::bad_shape,
              "y must have the extents of x, with data and without broadcast axes"),
      require(!a.initial_state.present() || has_extents(a.initial_state, batch, channels, n), Code::bad_shape,
              "initial_state must be [batch, channel, n], or absent for zero"),
      require(!a.final_state.present() || (has_extents(a.final_state, batch, channels, n) && writable(a.final_state)),
              Code::bad_shape, "final_state must be [batch, channel, n] without broadcast axes, or absent"));
}

/// A step as a pass over one token.
template <Element T>
constexpr EmaArgs<T> as_pass(const EmaStepArgs<T>& a) {
  const auto with_token = [](auto view) {  // [batch, channel] -> [batch, 1, channel]
    return TensorView<typename decltype(view)::Value, 3>{
        view.data, {view.extents[0], 1, view.extents[1]}, {view.strides[0], 0, view.strides[1]}};
  };
  return {with_token(a.x), a.parameters, with_token(a.y), a.state, a.state};
}

template <Element T>
constexpr Status check(const EmaStepArgs<T>& a) {
  if (!a.state.present()) return {Code::bad_shape, "state must be given: a step reads and writes it"};
  return check(as_pass(a));
}

}  // namespace chela
