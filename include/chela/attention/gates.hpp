#pragma once
// Gates: from the raw logits that a projection gives to the log-decays and betas that linear attention takes. With
// z = logit + bias and rate = exp(log_rate), all per state head,
//
//   decay gate       log_decay                            member
//   GivenLogDecay    z                                    the caller's own, <= 0
//   LogSigmoidGate   logsigmoid(z) / normalizer           GLA (arXiv 2312.06635, section 4.4)
//   SoftplusGate     -rate * softplus(z)                  Mamba-2 (2405.21060), Gated DeltaNet (2412.06464), KDA
//                                                         (2510.26692)
//   BoundedGate      lower_bound * sigmoid(rate * z)      KDA with a bounded decay, exp(lower_bound) at least
//
//   beta gate        beta                                 member
//   GivenBeta        logit                                the caller's own
//   SigmoidBeta      factor * sigmoid(logit)              DeltaNet (2406.06484); factor 2 allows negative
//                                                         eigenvalues (2411.12537)
//
//   logits, log_decay   [batch, token, head] for a decay per token, [batch, token, head, key_dim] for a decay per key
//   log_rate            [head]; `A_log` in model files
//   bias                [head] per token, [head, key_dim] per key; `dt_bias` in model files
//   beta                [batch, token, head]
//
// Log-decays are natural logarithms, and those of all gates but the given one are <= 0 for every logit that is not NaN,
// infinite ones included: there a gate takes its limit, and a rate or softplus of zero outweighs an infinite factor.
// A decoding step is a pass over one token.
#include <cmath>
#include <concepts>
#include <ratio>
#include <type_traits>

#include "chela/core/element.hpp"
#include "chela/core/host_device.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

namespace detail {

// Gates are written over a type V: float or double on either side, or a vector of a backend's own, which brings along
// exp, abs, choose and log1p_of_unit.

template <std::floating_point A>
CHELA_HOST_DEVICE inline A choose(bool condition, A yes, A no) {
  return condition ? yes : no;
}

/// log(1 + x) for x in [0, 1].
template <std::floating_point A>
CHELA_HOST_DEVICE inline A log1p_of_unit(A x) {
  return std::log1p(x);
}

/// e^-|x|: the one exponential that all gates are made of. It cannot overflow.
template <class V>
CHELA_HOST_DEVICE inline V exp_of_minus_abs(V x) {
  using std::abs, std::exp;
  return exp(-abs(x));
}

/// a * b, where zero times infinity is zero. NaN stays NaN.
template <class V>
CHELA_HOST_DEVICE inline V product(V a, V b) {
  const V plain = a * b, sum = a + b;  // zero and infinity have a sum that is a number, NaN and anything has none
  return choose(plain == plain, plain, choose(sum == sum, V(0), plain));
}

/// log(1 + e^x).
template <class V>
CHELA_HOST_DEVICE inline V softplus(V x) {
  return choose(x > V(0), x, V(0)) + log1p_of_unit(exp_of_minus_abs(x));
}

/// 1 / (1 + e^-x).
template <class V>
CHELA_HOST_DEVICE inline V sigmoid(V x) {
  const V e = exp_of_minus_abs(x);
  return choose(x > V(0), V(1), e) / (V(1) + e);
}

/// d sigmoid(x) / dx.
template <class V>
CHELA_HOST_DEVICE inline V sigmoid_derivative(V x) {
  const V e = exp_of_minus_abs(x), whole = V(1) + e;
  return e / (whole * whole);
}

}  // namespace detail

/// Derivatives of a log-decay.
template <class V>
struct GateDerivatives {
  V by_logit;     ///< and by the bias
  V by_log_rate;  ///< zero for a gate without parameters
};

/// A stateless map from z = logit + bias and rate = exp(log_rate) to a log-decay. Gates of your own may take float and
/// double only; templates over any V like those below run on whole vectors.
template <class G>
concept DecayGate = std::is_empty_v<G> && requires(float x, double y) {
  { G::takes_parameters } -> std::convertible_to<bool>;
  { G::log_decay(x, x) } -> std::same_as<float>;
  { G::log_decay(y, y) } -> std::same_as<double>;
  { G::derivatives(x, x) } -> std::same_as<GateDerivatives<float>>;
  { G::derivatives(y, y) } -> std::same_as<GateDerivatives<double>>;
};

/// The logits are log-decays already. They are not clamped: the caller keeps them <= 0.
struct GivenLogDecay {
  static constexpr bool takes_parameters = false;

  template <class V>
  CHELA_HOST_DEVICE static V log_decay(V z, V) {
    return z;
  }
  template <class V>
  CHELA_HOST_DEVICE static GateDerivatives<V> derivatives(V, V) {
    return {V(1), V(0)};
  }
};

/// logsigmoid(z) / Normalizer. The larger the normalizer, the longer the memory at first.
template <int Normalizer = 16>
struct LogSigmoidGate {
  static_assert(Normalizer >= 1, "LogSigmoidGate needs a normalizer of at least 1; 1 is the plain logsigmoid");
  static constexpr bool takes_parameters = false;

  template <class V>
  CHELA_HOST_DEVICE static V log_decay(V z, V) {
    return -detail::softplus(-z) / V(Normalizer);
  }
  template <class V>
  CHELA_HOST_DEVICE static GateDerivatives<V> derivatives(V z, V) {
    return {detail::sigmoid(-z) / V(Normalizer), V(0)};
  }
};

/// -rate * softplus(z).
struct SoftplusGate {
  static constexpr bool takes_parameters = true;

  template <class V>
  CHELA_HOST_DEVICE static V log_decay(V z, V rate) {
    return -detail::product(rate, detail::softplus(z));
  }
  template <class V>
  CHELA_HOST_DEVICE static GateDerivatives<V> derivatives(V z, V rate) {
    return {-detail::product(rate, detail::sigmoid(z)), log_decay(z, rate)};
  }
};

/// lower_bound * sigmoid(rate * z). The bound is a std::ratio, so that it is part of the type: std::ratio<-5, 2> is
/// -2.5.
template <class LowerBound = std::ratio<-5>>
struct BoundedGate {
  static_assert(LowerBound::num < 0, "BoundedGate needs a lower bound below 0, as std::ratio<-5>");
  static constexpr bool takes_parameters = true;
  static constexpr double lower_bound = double(LowerBound::num) / double(LowerBound::den);

  template <class V>
  CHELA_HOST_DEVICE static V log_decay(V z, V rate) {
    return V(lower_bound) * detail::sigmoid(detail::product(rate, z));
  }
  template <class V>
  CHELA_HOST_DEVICE static GateDerivatives<V> derivatives(V z, V rate) {
    const V inner = detail::product(rate, z);
    const V slope = V(lower_bound) * detail::sigmoid_derivative(inner);
    return {detail::product(slope, rate), detail::product(slope, inner)};
  }
};

/// A stateless map from a logit to beta, the strength with which the delta rule writes.
template <class G>
concept BetaGate = std::is_empty_v<G> && requires(float x, double y) {
  { G::beta(x) } -> std::same_as<float>;
  { G::beta(y) } -> std::same_as<double>;
  { G::derivative(x) } -> std::same_as<float>;
  { G::derivative(y) } -> std::same_as<double>;
};

/// The logits are betas already.
struct GivenBeta {
  template <class V>
  CHELA_HOST_DEVICE static V beta(V x) {
    return x;
  }
  template <class V>
  CHELA_HOST_DEVICE static V derivative(V) {
    return V(1);
  }
};

/// Factor * sigmoid(x), in [0, Factor].
template <int Factor = 1>
struct SigmoidBeta {
  static_assert(Factor == 1 || Factor == 2,
                "SigmoidBeta has factor 1, or 2 for negative eigenvalues; beyond 2 the delta rule's state grows");

  template <class V>
  CHELA_HOST_DEVICE static V beta(V x) {
    return V(Factor) * detail::sigmoid(x);
  }
  template <class V>
  CHELA_HOST_DEVICE static V derivative(V x) {
    return V(Factor) * detail::sigmoid_derivative(x);
  }
};

/// Inputs and outputs of a decay gate. Rank is 3 for a decay per token, 4 for a decay per key; any strides.
template <Element T, DecayGate G, int Rank = 3>
requires(Rank == 3 || Rank == 4) struct DecayGateArgs {
  TensorView<const T, Rank> logits = {};                 ///< [batch, token, head] or [batch, token, head, key_dim]
  TensorView<const Accumulator<T>, 1> log_rate = {};     ///< [head], finite; absent for a rate of 1
  TensorView<const Accumulator<T>, Rank - 2> bias = {};  ///< [head] or [head, key_dim], finite; absent for 0
  TensorView<Accumulator<T>, Rank> log_decay = {};       ///< like logits; may be their memory
};

/// Gradients of the same pass. Absent outputs are not computed; those of parameters are summed over batch and tokens,
/// in one order whatever the number of workers.
template <Element T, DecayGate G, int Rank = 3>
requires(Rank == 3 || Rank == 4) struct DecayGateBackwardArgs {
  TensorView<const T, Rank> logits = {};                       ///< as in the forward pass
  TensorView<const Accumulator<T>, 1> log_rate = {};           ///< as in the forward pass
  TensorView<const Accumulator<T>, Rank - 2> bias = {};        ///< as in the forward pass
  TensorView<const Accumulator<T>, Rank> grad_log_decay = {};  ///< like logits
  TensorView<T, Rank> grad_logits = {};                        ///< like logits; may be the memory of `grad_log_decay`
  TensorView<Accumulator<T>, 1> grad_log_rate = {};            ///< like log_rate, which must be given
  TensorView<Accumulator<T>, Rank - 2> grad_bias = {};         ///< like bias, which must be given
};

/// Inputs and outputs of a beta gate; any strides.
template <Element T, BetaGate G>
struct BetaGateArgs {
  TensorView<const T, 3> logits = {};       ///< [batch, token, head]
  TensorView<Accumulator<T>, 3> beta = {};  ///< like logits; may be their memory
};

/// Gradient of the same pass.
template <Element T, BetaGate G>
struct BetaGateBackwardArgs {
  TensorView<const T, 3> logits = {};                  ///< as in the forward pass
  TensorView<const Accumulator<T>, 3> grad_beta = {};  ///< like logits
  TensorView<T, 3> grad_logits = {};                   ///< like logits; may be the memory of `grad_beta`
};

namespace detail {

template <DecayGate G, class X, class R, class B, int Rank>
constexpr Status check_gate_inputs(TensorView<X, Rank> logits, TensorView<R, 1> log_rate,
                                   TensorView<B, Rank - 2> bias) {
  bool bias_fits = bias.extents[0] == logits.extents[2];
  if constexpr (Rank == 4) bias_fits = bias_fits && bias.extents[1] == logits.extents[3];
  return first_failure(
      require(readable(logits), Code::bad_shape, "logits need data and extents of zero or more"),
      require(G::takes_parameters || !log_rate.present(), Code::bad_value,
              "log_rate is given, but this gate has none: leave it out, or name SoftplusGate or BoundedGate"),
      require(G::takes_parameters || !bias.present(), Code::bad_value,
              "bias is given, but this gate has none: add it to the logits, or name SoftplusGate or BoundedGate"),
      require(!log_rate.present() || has_extents(log_rate, logits.extents[2]), Code::bad_shape,
              "log_rate must be [head] with the head count of logits (axis 2), or absent for a rate of 1"),
      require(!bias.present() || bias_fits, Code::bad_shape,
              "bias must be [head] for a decay per token and [head, key_dim] for a decay per key, or absent for 0"));
}

}  // namespace detail

/// Refuses arguments that do not fit together; both backends call it first.
template <Element T, DecayGate G, int Rank>
constexpr Status check(const DecayGateArgs<T, G, Rank>& a) {
  return first_failure(detail::check_gate_inputs<G>(a.logits, a.log_rate, a.bias),
                       require(same_extents(a.log_decay, a.logits) && writable(a.log_decay), Code::bad_shape,
                               "log_decay must have the extents of logits, data and no broadcast axes"));
}

template <Element T, DecayGate G, int Rank>
constexpr Status check(const DecayGateBackwardArgs<T, G, Rank>& a) {
  const auto fits = [](auto grad, auto of) {
    return !grad.present() || (of.present() && same_extents(grad, of) && writable(grad));
  };
  return first_failure(
      detail::check_gate_inputs<G>(a.logits, a.log_rate, a.bias),
      require(same_extents(a.grad_log_decay, a.logits) && readable(a.grad_log_decay), Code::bad_shape,
              "grad_log_decay must have the extents of logits, and data"),
      require(fits(a.grad_logits, a.logits), Code::bad_shape,
              "grad_logits must have the extents of logits without broadcast axes, or be absent"),
      require(fits(a.grad_log_rate, a.log_rate), Code::bad_shape,
              "grad_log_rate needs log_rate and its extents without broadcast axes; give zeros for a rate of 1"),
      require(fits(a.grad_bias, a.bias), Code::bad_shape,
              "grad_bias needs bias and its extents without broadcast axes; give zeros for none"));
}

template <Element T, BetaGate G>
constexpr Status check(const BetaGateArgs<T, G>& a) {
  return first_failure(
      require(readable(a.logits), Code::bad_shape, "logits need data and extents of zero or more"),
      require(same_extents(a.beta, a.logits) && writable(a.beta), Code::bad_shape,
              "beta must have the extents of logits [batch, token, head], data and no broadcast axes"));
}

template <Element T, BetaGate G>
constexpr Status check(const BetaGateBackwardArgs<T, G>& a) {
  return first_failure(require(readable(a.logits), Code::bad_shape, "logits need data and extents of zero or more"),
                       require(same_extents(a.grad_beta, a.logits) && readable(a.grad_beta), Code::bad_shape,
                               "grad_beta must have the extents of logits [batch, token, head], and data"),
                       require(same_extents(a.grad_logits, a.logits) && writable(a.grad_logits), Code::bad_shape,
                               "grad_logits must have the extents of logits, data and no broadcast axes"));
}

}  // namespace chela
