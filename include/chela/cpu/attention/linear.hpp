#pragma once
// Linear attention on the CPU; contract and equations in attention/linear.hpp. The decay and the rule are those of the
// arguments' type.
#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/decayed_backward.hpp"
#include "chela/cpu/attention/delta_backward.hpp"
#include "chela/cpu/attention/delta_pass.hpp"
#include "chela/cpu/attention/linear_backward.hpp"
#include "chela/cpu/attention/linear_pass.hpp"
#include "chela/cpu/attention/linear_step.hpp"
#include "chela/cpu/attention/raw_inputs.hpp"
#include "chela/cpu/attention/two_way.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu {

namespace detail {

/// The states of a forward pass as its walk sees them.
template <class T, DecayKind D, RuleKind R, AttentionForm F>
WalkStates<StateOf<T, F>> states_of(const LinearAttentionArgs<T, D, R, F>& args) {
  return {.initial = key_major<F>(args.initial_state),
          .final = key_major<F>(args.final_state),
          .slots = args.state_slots,
          .boundary = key_major<F>(args.boundary_states),
          .boundary_every = args.boundary_every,
          .last = key_major<F>(args.last_states)};
}

template <ChunkPolicy P, class T, DecayKind D, AttentionForm F, Executor E>
void forward(const LinearAttentionArgs<T, D, RuleKind::additive, F>& args, const E& executor) {
  constexpr bool decays = D != DecayKind::none;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const bool everything = args.span == Span::bidirectional;
  LinearPass<T, T, T, T, StateOf<T, F>> pass{.sequences = sequences_of(args),
                                             .q = args.q,
                                             .k = args.k,
                                             .v = args.v,
                                             .o = args.o,
                                             .states = states_of(args),
                                             .query_factor = attention_scale(args.scale, shape)};
  if constexpr (decays) {
    if (everything) return two_way_pass<P>(args, executor);
    pass.decay = {spread_log_decay(args.log_decay, shape), DecaySide::keys, false};
  } else {
    if (everything) pass.everything = Everything::over_queries;
  }
  run_pass<P, decays>(pass, executor);
}

template <ChunkPolicy P, class T, DecayKind D, AttentionForm F, Executor E>
void forward(const LinearAttentionArgs<T, D, RuleKind::delta, F>& args, const E& executor) {
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  DeltaPass<T, T, StateOf<T, F>> pass{.sequences = sequences_of(args),
                                      .q = args.q,
                                      .k = args.k,
                                      .v = args.v,
                                      .beta = args.beta,
                                      .o = args.o,
                                      .states = states_of(args),
                                      .query_factor = attention_scale(args.scale, shape),
                                      .heads = shape.output_heads()};
  if constexpr (D != DecayKind::none) pass.decay = {spread_log_decay(args.log_decay, shape), DecaySide::keys, false};
  run_delta_pass<P, D != DecayKind::none>(pass, executor);
}

template <ChunkPolicy P, class T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
void backward(const LinearAttentionBackwardArgs<T, D, R, F>& args, const E& executor) {
  if constexpr (D == DecayKind::none && R == RuleKind::additive) {
    plain_backward<P>(args, executor);
  } else {
    const GradientTargets<T, Accumulator<T>, D> to{args.grad_q,         args.grad_k,
                                                   args.grad_v,         key_major<F>(args.grad_initial_state),
                                                   args.grad_log_decay, args.grad_beta};
    if constexpr (R == RuleKind::delta)
      delta_backward<P>(args, to, executor);
    else if (args.span == Span::bidirectional)
      two_way_backward<P>(args, executor);
    else
      decayed_backward<P>(args, sequences_of(args), to, executor);
  }
}

/// Runs `pass(arguments)` once the inputs are what walks take.
template <class T, DecayKind D, RuleKind R, AttentionForm F, class Pass, Executor E>
Status with_plain_inputs(const LinearAttentionArgs<T, D, R, F>& args, const Pass& pass, const E& executor) {
  if constexpr (takes_inputs_as_given<F>) {
    pass(args);
  } else {
    PreparedInputs<T, D> prepared;
    auto plain = in_form<FormOfStates<F>>(args);
    if (Status s = prepare<F>(args, prepared, plain, executor); !s.ok()) return s;
    pass(plain);
  }
  return {};
}

}  // namespace detail

/// Outputs and states of one pass. Any strides, any sizes, token counts of zero included. A call that continues from the final
/// state of another gives the same bits as one call over both when the cut is a multiple of the policy's chunk_len (and for
/// any cut without decay by token recurrence), else the same answer to rounding.
template <ChunkPolicy P = ChunkPolicy{}, Element T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
Status linear_attention(const LinearAttentionArgs<T, D, R, F>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  if (Status s = check_indices(args); !s.ok()) return s;
  if (args.boundary_states.present() && args.boundary_every % P.chunk_len != 0)
    return {Code::bad_value,
            "boundary_every must be a multiple of the policy's chunk_len: states are kept between chunks"};
  return detail::with_plain_inputs(
      args, [&](const auto& plain) { detail::forward<PolicyConstant<P>::value>(plain, executor); }, executor);
}

/// Gradients with respect to q, k, v, log-decay, beta and the initial state; those that are absent are not computed. Nothing of
/// the forward pass needs keeping. Shared heads sum the parts of their run in order. With decay or the delta rule every walk is
/// a token recurrence, whatever the policy's evaluation.
template <ChunkPolicy P = ChunkPolicy{}, Element T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
Status linear_attention_backward(const LinearAttentionBackwardArgs<T, D, R, F>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  if (Status s = check_offsets(sequences_of(args)); !s.ok()) return s;
  const auto backward = [&](const auto& plain) { detail::backward<PolicyConstant<P>::value>(plain, executor); };
  if constexpr (takes_inputs_as_given<F>)
    return backward(args), Status{};
  else
    return detail::backward_through_gates(args, backward, executor);
}

/// One token per sequence, the state updated in place. Without decay the same bits as a pass of one token.
template <Element T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
Status linear_attention_step(const LinearAttentionStepArgs<T, D, R, F>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionArgs<T, D, R, F> pass = as_pass(args);
  if (Status s = check_indices(pass); !s.ok()) return s;
  return detail::with_plain_inputs(
      pass, [&](const auto& plain) { detail::step_states(plain, executor); }, executor);
}

}  // namespace chela::cpu
