#pragma once
// Linear attention on the CPU; contract and equations in attention/linear.hpp. The decay and the rule are those of the
// arguments' type.
#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/delta_pass.hpp"
#include "chela/cpu/attention/gated_backward.hpp"
#include "chela/cpu/attention/linear_backward.hpp"
#include "chela/cpu/attention/linear_pass.hpp"
#include "chela/cpu/attention/linear_step.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu {

/// Outputs and final state of one pass. Any strides, any sizes, token counts of zero included. A call that continues from the
/// final state of another gives the same bits as one call over both when the cut is a multiple of the policy's chunk_len (and
/// for any cut without decay by token recurrence), else the same answer to rounding.
template <ChunkPolicy P = ChunkPolicy{}, Element T, DecayKind D, RuleKind R, Executor E>
Status linear_attention(const LinearAttentionArgs<T, D, R>& args, const E& executor) {
  using A = Accumulator<T>;
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, args.span, shape);
  detail::WalkDecay<A> decay;
  if constexpr (D != DecayKind::none) decay = {spread_log_decay(args.log_decay, shape), DecaySide::keys, false};
  if constexpr (R == RuleKind::additive) {
    detail::run_pass<P, D != DecayKind::none>(
        detail::LinearPass<T, T, T, T>{.q = args.q,
                                       .k = args.k,
                                       .v = args.v,
                                       .o = args.o,
                                       .initial_state = args.initial_state,
                                       .final_state = args.final_state,
                                       .query_factor = scale,
                                       .everything = args.span == Span::bidirectional,
                                       .decay = decay},
        executor);
  } else {
    detail::delta_pass<P, D != DecayKind::none>(detail::DeltaPass<T, T>{.q = args.q,
                                                                        .k = args.k,
                                                                        .v = args.v,
                                                                        .beta = args.beta,
                                                                        .o = args.o,
                                                                        .initial_state = args.initial_state,
                                                                        .final_state = args.final_state,
                                                                        .query_factor = scale,
                                                                        .decay = decay,
                                                                        .heads = shape.output_heads()},
                                                executor);
  }
  return {};
}

/// Gradients with respect to q, k, v, log-decay, beta and the initial state; those that are absent are not computed. Nothing of
/// the forward pass needs keeping. Shared heads sum the parts of their run in order.
template <ChunkPolicy P = ChunkPolicy{}, Element T, DecayKind D, RuleKind R, Executor E>
Status linear_attention_backward(const LinearAttentionBackwardArgs<T, D, R>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  if constexpr (D == DecayKind::none && R == RuleKind::additive)
    detail::plain_backward<P>(args, executor);
  else
    detail::gated_backward<P>(args, executor);
  return {};
}

/// One token per sequence: the state is swept once, in place. Without decay the same bits as a pass of one token.
template <Element T, DecayKind D, RuleKind R, Executor E>
Status linear_attention_step(const LinearAttentionStepArgs<T, D, R>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  detail::step_states(args, executor);
  return {};
}

}  // namespace chela::cpu
