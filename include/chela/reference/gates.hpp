#pragma once
// Gates by their equations, in double, one entry at a time; math in chela/attention/gates.hpp.
#include <cmath>

#include "chela/core/tensor_view.hpp"

namespace chela::reference {

enum class Gate { given, log_sigmoid, softplus, bounded };

/// [batch, token, head, key]; a decay per token has one key.
struct DecayGateProblem {
  Gate gate = Gate::given;
  double constant = 1;  ///< the normalizer of `log_sigmoid`, the lower bound of `bounded`
  TensorView<const double, 4> logits = {};
  TensorView<const double, 1> log_rate = {};  ///< [head]; absent for a rate of 1
  TensorView<const double, 2> bias = {};      ///< [head, key]; absent for 0
};

/// The gradients of the parameters are overwritten; absent views are left out.
struct DecayGateGradients {
  TensorView<double, 4> logits = {};
  TensorView<double, 1> log_rate = {};
  TensorView<double, 2> bias = {};
};

namespace detail {

/// log(1 + e^x).
inline double log_one_plus_exp(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

/// 1 / (1 + e^-x).
inline double logistic_of(double x) { return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

template <class F>
void for_each_logit(const DecayGateProblem& p, F&& f) {
  for (Index b = 0; b < p.logits.extents[0]; ++b)
    for (Index t = 0; t < p.logits.extents[1]; ++t)
      for (Index h = 0; h < p.logits.extents[2]; ++h)
        for (Index i = 0; i < p.logits.extents[3]; ++i) f(b, t, h, i);
}

}  // namespace detail

inline void decay_gate(const DecayGateProblem& p, TensorView<double, 4> log_decay) {
  detail::for_each_logit(p, [&](Index b, Index t, Index h, Index i) {
    const double z = p.logits(b, t, h, i) + (p.bias.present() ? p.bias(h, i) : 0.0);
    const double rate = p.log_rate.present() ? std::exp(p.log_rate(h)) : 1.0;
    log_decay(b, t, h, i) = p.gate == Gate::given         ? z
                            : p.gate == Gate::log_sigmoid ? -detail::log_one_plus_exp(-z) / p.constant
                            : p.gate == Gate::softplus    ? -rate * detail::log_one_plus_exp(z)
                                                          : p.constant * detail::logistic_of(rate * z);
  });
}

inline void decay_gate_backward(const DecayGateProblem& p, TensorView<const double, 4> grad_log_decay,
                                const DecayGateGradients& grad) {
  for (Index h = 0; h < p.logits.extents[2]; ++h) {
    if (grad.log_rate.present()) grad.log_rate(h) = 0;
    for (Index i = 0; grad.bias.present() && i < p.logits.extents[3]; ++i) grad.bias(h, i) = 0;
  }
  detail::for_each_logit(p, [&](Index b, Index t, Index h, Index i) {
    const double z = p.logits(b, t, h, i) + (p.bias.present() ? p.bias(h, i) : 0.0);
    const double rate = p.log_rate.present() ? std::exp(p.log_rate(h)) : 1.0;
    double by_logit = 1, by_log_rate = 0;
    if (p.gate == Gate::log_sigmoid) {
      by_logit = detail::logistic_of(-z) / p.constant;
    } else if (p.gate == Gate::softplus) {
      by_logit = -rate * detail::logistic_of(z);
      by_log_rate = -rate * detail::log_one_plus_exp(z);
    } else if (p.gate == Gate::bounded) {
      by_logit = p.constant * detail::logistic_of(rate * z) * detail::logistic_of(-rate * z) * rate;
      by_log_rate = by_logit * z;
    }
    const double g = grad_log_decay(b, t, h, i);
    if (grad.logits.present()) grad.logits(b, t, h, i) = g * by_logit;
    if (grad.log_rate.present()) grad.log_rate(h) += g * by_log_rate;
    if (grad.bias.present()) grad.bias(h, i) += g * by_logit;
  });
}

/// beta = factor * sigmoid(logits), both [batch, token, head].
inline void sigmoid_beta(double factor, TensorView<const double, 3> logits, TensorView<double, 3> beta) {
  for (Index b = 0; b < logits.extents[0]; ++b)
    for (Index t = 0; t < logits.extents[1]; ++t)
      for (Index h = 0; h < logits.extents[2]; ++h) beta(b, t, h) = factor * detail::logistic_of(logits(b, t, h));
}

inline void sigmoid_beta_backward(double factor, TensorView<const double, 3> logits,
                                  TensorView<const double, 3> grad_beta, TensorView<double, 3> grad_logits) {
  for (Index b = 0; b < logits.extents[0]; ++b)
    for (Index t = 0; t < logits.extents[1]; ++t)
      for (Index h = 0; h < logits.extents[2]; ++h) {
        const double x = logits(b, t, h);
        grad_logits(b, t, h) = grad_beta(b, t, h) * factor * detail::logistic_of(x) * detail::logistic_of(-x);
      }
}

}  // namespace chela::reference
