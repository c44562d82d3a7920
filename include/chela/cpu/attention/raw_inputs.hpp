#pragma once
// From the inputs that a form asks for to those that the walks take: log-decays and betas out of their gates, queries and
// keys of unit length; and gradients back through them.
#include <type_traits>
#include <utility>

#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/gates.hpp"
#include "chela/cpu/attention/l2_norm.hpp"

namespace chela::cpu::detail {

/// The same call in another form, without the inputs and gradients that `prepare` and `backward_through_gates` fill in.
template <AttentionForm G, class T, DecayKind D, RuleKind R, AttentionForm F>
LinearAttentionArgs<T, D, R, G> in_form(const LinearAttentionArgs<T, D, R, F>& a) {
  return {.q = a.q,
          .k = a.k,
          .v = a.v,
          .o = a.o,
          .initial_state = a.initial_state,
          .final_state = a.final_state,
          .scale = a.scale,
          .span = a.span,
          .cu_seqlens = a.cu_seqlens,
          .state_slots = a.state_slots,
          .boundary_states = a.boundary_states,
          .boundary_every = a.boundary_every,
          .last_states = a.last_states};
}
template <AttentionForm G, class T, DecayKind D, RuleKind R, AttentionForm F>
LinearAttentionBackwardArgs<T, D, R, G> in_form(const LinearAttentionBackwardArgs<T, D, R, F>& a) {
  return {.q = a.q,
          .k = a.k,
          .v = a.v,
          .grad_o = a.grad_o,
          .grad_q = a.grad_q,
          .grad_k = a.grad_k,
          .grad_v = a.grad_v,
          .initial_state = a.initial_state,
          .grad_final_state = a.grad_final_state,
          .grad_initial_state = a.grad_initial_state,
          .scale = a.scale,
          .span = a.span,
          .cu_seqlens = a.cu_seqlens};
}

/// Memory of the inputs that were made.
template <class T, DecayKind D>
struct PreparedInputs {
  Tensor<T, 4> q, k;
  Tensor<Accumulator<T>, log_decay_rank(D)> log_decay;
  Tensor<Accumulator<T>, 3> beta;
};

/// Fills `prepared` from the arguments of a forward or backward pass, and points `plain` at it, or at what was given.
template <AttentionForm F, class T, DecayKind D, class Args, class PlainArgs, Executor E>
Status prepare(const Args& args, PreparedInputs<T, D>& prepared, PlainArgs& plain, const E& executor) {
  using Gate = typename F::LogDecayGate;
  using Rate = typename F::BetaRate;
  if constexpr (std::is_same_v<Gate, GivenLogDecay>) {
    plain.log_decay = args.log_decay;
  } else {
    prepared.log_decay = tensor_like<Accumulator<T>>(args.log_decay);
    plain.log_decay = prepared.log_decay;
    const DecayGateArgs<T, Gate, log_decay_rank(D)> gate{args.log_decay, args.gate_log_rate, args.gate_bias,
                                                         prepared.log_decay};
    if (Status s = decay_gate(gate, executor); !s.ok()) return s;
  }
  if constexpr (std::is_same_v<Rate, GivenBeta>) {
    plain.beta = args.beta;
  } else if (args.beta.present()) {
    prepared.beta = tensor_like<Accumulator<T>>(args.beta);
    plain.beta = prepared.beta;
    if (Status s = beta_gate(BetaGateArgs<T, Rate>{args.beta, prepared.beta}, executor); !s.ok()) return s;
  }
  if constexpr (F::unit_queries_and_keys) {
    prepared.q = tensor_like<T>(args.q), prepared.k = tensor_like<T>(args.k);
    plain.q = prepared.q, plain.k = prepared.k;
    if (Status s = l2_norm(L2NormArgs<T>{args.q, prepared.q}, executor); !s.ok()) return s;
    if (Status s = l2_norm(L2NormArgs<T>{args.k, prepared.k}, executor); !s.ok()) return s;
  }
  return {};
}

/// Runs `backward(plain arguments)` on the prepared inputs, and takes its gradients back to those that were given.
template <class T, DecayKind D, RuleKind R, AttentionForm F, class Backward, Executor E>
Status backward_through_gates(const LinearAttentionBackwardArgs<T, D, R, F>& args, const Backward& backward,
                              const E& executor) {
  using Gate = typename F::LogDecayGate;
  using Rate = typename F::BetaRate;
  constexpr bool gated_decay = !std::is_same_v<Gate, GivenLogDecay>, gated_beta = !std::is_same_v<Rate, GivenBeta>;
  PreparedInputs<T, D> prepared;
  auto plain = in_form<FormOfStates<F>>(args);
  if (Status s = prepare<F>(args, prepared, plain, executor); !s.ok()) return s;

  PreparedInputs<T, D> grad;
  if constexpr (!gated_decay) {
    plain.grad_log_decay = args.grad_log_decay;
  } else if (args.grad_log_decay.present() || args.grad_gate_log_rate.present() || args.grad_gate_bias.present()) {
    grad.log_decay = tensor_like<Accumulator<T>>(args.log_decay);
    plain.grad_log_decay = grad.log_decay;
  }
  if constexpr (!gated_beta) {
    plain.grad_beta = args.grad_beta;
  } else if (args.grad_beta.present()) {
    grad.beta = tensor_like<Accumulator<T>>(args.beta);
    plain.grad_beta = grad.beta;
  }
  backward(plain);

  if constexpr (gated_decay) {
    const DecayGateBackwardArgs<T, Gate, log_decay_rank(D)> gate{.logits = args.log_decay,
                                                                 .log_rate = args.gate_log_rate,
                                                                 .bias = args.gate_bias,
                                                                 .grad_log_decay = plain.grad_log_decay,
                                                                 .grad_logits = args.grad_log_decay,
                                                                 .grad_log_rate = args.grad_gate_log_rate,
                                                                 .grad_bias = args.grad_gate_bias};
    if (plain.grad_log_decay.present())
      if (Status s = decay_gate_backward(gate, executor); !s.ok()) return s;
  }
  if constexpr (gated_beta) {
    const BetaGateBackwardArgs<T, Rate> gate{args.beta, plain.grad_beta, args.grad_beta};
    if (plain.grad_beta.present())
      if (Status s = beta_gate_backward(gate, executor); !s.ok()) return s;
  }
  if constexpr (F::unit_queries_and_keys) {
    for (const auto& [x, grad_x] : {std::pair(args.q, args.grad_q), std::pair(args.k, args.grad_k)})
      if (grad_x.present())
        if (Status s = l2_norm_backward(L2NormBackwardArgs<T>{x, grad_x, grad_x}, executor); !s.ok()) return s;
  }
  return {};
}

}  // namespace chela::cpu::detail
