#pragma once
// Linear attention, one family (CHELA, arXiv 2406.08128, section 3). One state S in R^{key_dim x value_dim} per head, decayed
// by a_t = exp(log_decay_t) in (0, 1] before each token, is written by a rule and read by the query:
//
//   additive rule   S_t = Diag(a_t) S_{t-1} + k_t v_t^T
//   delta rule      S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T
//   read-out        o_t = scale * S_t^T q_t                                                   causal
//                   o_t = scale / T * (S_0 + sum_s k_s v_s^T)^T q_t                           bidirectional, without decay
//                   o_t = scale * (S_t + Diag(a_t) R_{t+1})^T q_t,                            bidirectional, with decay
//                         R_t = Diag(a_t) R_{t+1} + k_t v_t^T, R_{T+1} = 0
//
//   decay       additive                                        delta
//   none        CHELA, linear transformer (arXiv 2006.16236)    DeltaNet (2406.06484)
//   per_head    RetNet (2307.08621), Lightning (2401.04658)
//   per_token   Mamba-2 (2405.21060), simple GLA                Gated DeltaNet (2412.06464)
//   per_key     GLA (2312.06635), HGRN-2                        KDA (2510.26692)
//
// The bidirectional span is for the additive rule. A log-decay of 0 keeps the state, -infinity resets it; both are ordinary inputs. Head counts may differ: query heads are a
// multiple of key/value heads (grouped queries), value heads a multiple of key heads; head h of the larger count reads head
// h / (ratio) of the smaller. States, log-decays and betas have one head per state: the larger of the key and value heads.
#include "chela/attention/linear_shape.hpp"
#include "chela/attention/member.hpp"

namespace chela {

/// Inputs and outputs of one forward pass. Element types, decay, rule and form are those of the struct: the operator follows.
/// A sequence is a batch entry, or with `cu_seqlens` a run of tokens of the only one (chunk/ragged.hpp). States are
/// [sequence, state_head, key_dim, value_dim], the last two exchanged in a value_major form.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive,
          AttentionForm F = LinearAttentionForm>
struct LinearAttentionArgs {
  using State = StateOf<T, F>;
  TensorView<const T, 4> q = {};  ///< [batch, token, query_head, key_dim]
  TensorView<const T, 4> k = {};  ///< [batch, token, key_head, key_dim]; delta rule: of unit length or less
  TensorView<const T, 4> v = {};  ///< [batch, token, value_head, value_dim]
  TensorView<T, 4> o = {};        ///< [batch, token, output_head, value_dim]; every element is written
  TensorView<const State, 4> initial_state = {};  ///< absent for zero
  TensorView<State, 4> final_state = {};          ///< absent when not wanted; may be the initial state's memory
  Accumulator<T> scale = 0;                       ///< multiplies q; 0 means key_dim^-1/2
  Span span = Span::causal;
  TensorView<const LogDecayOf<T, F>, log_decay_rank(D)> log_decay = {};  ///< <= 0, or logits of the form's gate
  TensorView<const BetaOf<T, F>, 3> beta = {};                         ///< [batch, token, state_head]; delta rule only
  TensorView<const Accumulator<T>, 1> gate_log_rate = {};              ///< [state_head]: of the gate, or absent
  TensorView<const Accumulator<T>, gate_bias_rank(D)> gate_bias = {};  ///< [state_head] or [state_head, key_dim]
  IndexView cu_seqlens = {};                                           ///< [sequences + 1], or absent
  /// [sequence]: the entry of the states' first axis that is each sequence's own, or absent for their order. Then that axis
  /// may be a pool of any size. No two sequences may share an entry.
  IndexView state_slots = {};
  /// [sequence, boundary, state_head, key_dim, value_dim], or absent: the state after every `boundary_every` tokens, a
  /// multiple of the policy's chunk_len. As many boundaries as the longest sequence has; those past the end of a shorter one
  /// are left alone. Continuing from one gives the bits of the uncut pass.
  TensorView<State, 5> boundary_states = {};
  Index boundary_every = 0;
  /// [sequence, n, state_head, key_dim, value_dim], or absent: the states after the last n tokens, the final state last; where
  /// a sequence is shorter, its initial state. To undo a speculated token, continue from the entry before it.
  TensorView<State, 5> last_states = {};
};

/// Gradients of the same pass. Absent outputs are not computed. Gradients of states have their shape and layout.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive,
          AttentionForm F = LinearAttentionForm>
struct LinearAttentionBackwardArgs {
  using State = StateOf<T, F>;
  TensorView<const T, 4> q = {}, k = {}, v = {};  ///< as in the forward pass
  TensorView<const T, 4> grad_o = {};             ///< [batch, token, output_head, value_dim]
  TensorView<T, 4> grad_q = {};                   ///< like q
  TensorView<T, 4> grad_k = {};                   ///< like k
  TensorView<T, 4> grad_v = {};                   ///< like v
  TensorView<const State, 4> initial_state = {};  ///< as in the forward pass
  /// Gradient flowing into the final state, or absent for zero.
  TensorView<const Accumulator<T>, 4> grad_final_state = {};
  TensorView<Accumulator<T>, 4> grad_initial_state = {};  ///< may be the memory of `grad_final_state`
  Accumulator<T> scale = 0;
  Span span = Span::causal;
  TensorView<const LogDecayOf<T, F>, log_decay_rank(D)> log_decay = {};  ///< as in the forward pass
  TensorView<const BetaOf<T, F>, 3> beta = {};                           ///< as in the forward pass
  TensorView<const Accumulator<T>, 1> gate_log_rate = {};                ///< as in the forward pass
  TensorView<const Accumulator<T>, gate_bias_rank(D)> gate_bias = {};    ///< as in the forward pass
  TensorView<LogDecayOf<T, F>, log_decay_rank(D)> grad_log_decay = {};   ///< like log_decay
  TensorView<BetaOf<T, F>, 3> grad_beta = {};                            ///< like beta
  TensorView<Accumulator<T>, 1> grad_gate_log_rate = {};                 ///< like gate_log_rate, which must be given
  TensorView<Accumulator<T>, gate_bias_rank(D)> grad_gate_bias = {};     ///< like gate_bias, which must be given
  IndexView cu_seqlens = {};                                             ///< as in the forward pass
};

/// One token per sequence; `state` is read and written in place. Causal.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive,
          AttentionForm F = LinearAttentionForm>
struct LinearAttentionStepArgs {
  static constexpr int decay_rank = D == DecayKind::per_key ? 3 : D == DecayKind::per_token ? 2 : 1;
  TensorView<const T, 3> q = {};            ///< [sequence, query_head, key_dim]
  TensorView<const T, 3> k = {};            ///< [sequence, key_head, key_dim]
  TensorView<const T, 3> v = {};            ///< [sequence, value_head, value_dim]
  TensorView<T, 3> o = {};                  ///< [sequence, output_head, value_dim]
  TensorView<StateOf<T, F>, 4> state = {};  ///< [sequence or slot, state_head, key_dim, value_dim]
  Accumulator<T> scale = 0;
  /// [state_head], [sequence, state_head] or [sequence, state_head, key_dim]
  TensorView<const LogDecayOf<T, F>, decay_rank> log_decay = {};
  TensorView<const BetaOf<T, F>, 2> beta = {};                         ///< [sequence, state_head]; delta rule only
  TensorView<const Accumulator<T>, 1> gate_log_rate = {};              ///< as in the forward pass
  TensorView<const Accumulator<T>, gate_bias_rank(D)> gate_bias = {};  ///< as in the forward pass
  IndexView state_slots = {};                                          ///< as in the forward pass
};

template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr SequenceBatch sequences_of(const LinearAttentionArgs<T, D, R, F>& a) {
  return {a.q.extents[0], a.q.extents[1], a.cu_seqlens};
}
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr SequenceBatch sequences_of(const LinearAttentionBackwardArgs<T, D, R, F>& a) {
  return {a.q.extents[0], a.q.extents[1], a.cu_seqlens};
}

/// A step's arguments as those of a pass over one token.
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr LinearAttentionArgs<T, D, R, F> as_pass(const LinearAttentionStepArgs<T, D, R, F>& a) {
  using detail::with_token_axis;
  LinearAttentionArgs<T, D, R, F> pass{.q = with_token_axis(a.q),
                                       .k = with_token_axis(a.k),
                                       .v = with_token_axis(a.v),
                                       .o = with_token_axis(a.o),
                                       .initial_state = a.state,
                                       .final_state = a.state,
                                       .scale = a.scale,
                                       .gate_log_rate = a.gate_log_rate,
                                       .gate_bias = a.gate_bias,
                                       .state_slots = a.state_slots};
  if constexpr (D == DecayKind::per_token || D == DecayKind::per_key)
    pass.log_decay = with_token_axis(a.log_decay);
  else
    pass.log_decay = a.log_decay;
  if (a.beta.present()) pass.beta = with_token_axis(a.beta);
  return pass;
}

/// Refuses arguments that do not fit together; both backends call it first. It reads no tensor.
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr Status check(const LinearAttentionArgs<T, D, R, F>& a) {
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  if (Status ragged = check_ragged(sequences_of(a)); !ragged.ok()) return ragged;
  const Index sequences = sequences_of(a).size();
  const bool pooled = a.state_slots.present();
  return first_failure(
      require(has_extents(a.o, s.batch, s.tokens, s.output_heads(), s.value_dim) && writable(a.o), Code::bad_shape,
              "o must be [batch, token, max(heads), value_dim] with data and without broadcast axes"),
      require(
          detail::fits_states<F>(a.initial_state, sequences, s, pooled), Code::bad_shape,
          "initial_state must be [sequence, max(key, value heads), key_dim, value_dim], or value_dim before key_dim "
          "in a value_major form"),
      require(
          detail::fits_states<F>(a.final_state, sequences, s, pooled), Code::bad_shape,
          "final_state must be [sequence, max(key, value heads), key_dim, value_dim], or value_dim before key_dim in "
          "a value_major form"),
      require(writable(a.final_state) || !a.final_state.present(), Code::bad_stride,
              "final_state must not have broadcast axes"),
      detail::check_slots(a.state_slots, sequences),
      require(detail::fits_saved_states<F>(a.boundary_states, sequences, s), Code::bad_shape,
              "boundary_states must be [sequence, boundary, max(key, value heads), key_dim, value_dim] in the form's "
              "layout, without broadcast axes"),
      require(!a.boundary_states.present() || a.boundary_every > 0, Code::bad_value,
              "boundary_every must be the tokens from one of boundary_states to the next: a multiple of the chunk_len"),
      require(detail::fits_saved_states<F>(a.last_states, sequences, s), Code::bad_shape,
              "last_states must be [sequence, count, max(key, value heads), key_dim, value_dim] in the form's layout, "
              "without broadcast axes"),
      detail::check_gates<D, R>(a.log_decay, a.beta, s),
      detail::check_gate_parameters<D, F>(a.gate_log_rate, a.gate_bias, s), detail::check_span<R>(a.span),
      require(
          a.span == Span::causal || !(a.boundary_states.present() || a.last_states.present()), Code::unsupported,
          "boundary_states and last_states belong to a causal span: a bidirectional pass does not stop on the way"));
}

template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr Status check(const LinearAttentionBackwardArgs<T, D, R, F>& a) {
  using detail::fits_gradient;
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  if (Status ragged = check_ragged(sequences_of(a)); !ragged.ok()) return ragged;
  const Index sequences = sequences_of(a).size();
  return first_failure(
      require(has_extents(a.grad_o, s.batch, s.tokens, s.output_heads(), s.value_dim) && readable(a.grad_o),
              Code::bad_shape, "grad_o must be [batch, token, max(heads), value_dim]"),
      require(fits_gradient(a.grad_q, a.q) && fits_gradient(a.grad_k, a.k) && fits_gradient(a.grad_v, a.v),
              Code::bad_shape, "grad_q, grad_k and grad_v must have the shapes of q, k and v, without broadcast axes"),
      require(
          detail::fits_states<F>(a.initial_state, sequences, s, false), Code::bad_shape,
          "initial_state must be [sequence, max(key, value heads), key_dim, value_dim], or value_dim before key_dim "
          "in a value_major form"),
      require(detail::fits_states<F>(a.grad_final_state, sequences, s, false), Code::bad_shape,
              "grad_final_state must have the shape of the final state"),
      require(detail::fits_states<F>(a.grad_initial_state, sequences, s, false) &&
                  (writable(a.grad_initial_state) || !a.grad_initial_state.present()),
              Code::bad_shape, "grad_initial_state must have the shape of the initial state, without broadcast axes"),
      detail::check_gates<D, R>(a.log_decay, a.beta, s),
      detail::check_gate_parameters<D, F>(a.gate_log_rate, a.gate_bias, s), detail::check_span<R>(a.span),
      require(fits_gradient(a.grad_log_decay, a.log_decay) && fits_gradient(a.grad_beta, a.beta), Code::bad_shape,
              "grad_log_decay and grad_beta must have the shapes of log_decay and beta, without broadcast axes"),
      require(fits_gradient(a.grad_gate_log_rate, a.gate_log_rate) && fits_gradient(a.grad_gate_bias, a.gate_bias),
              Code::bad_shape,
              "grad_gate_log_rate and grad_gate_bias need the parameters they belong to, and their shapes"));
}

template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr Status check(const LinearAttentionStepArgs<T, D, R, F>& a) {
  if (!a.state.present()) return {Code::bad_shape, "state must be given: a step reads and writes it"};
  return check(as_pass(a));
}

/// Refuses offsets and slots that would lead outside of the tensors. It reads them: they must be in host memory.
template <Element T, DecayKind D, RuleKind R, AttentionForm F>
constexpr Status check_indices(const LinearAttentionArgs<T, D, R, F>& a) {
  const SequenceBatch sequences = sequences_of(a);
  if (Status offsets = check_offsets(sequences); !offsets.ok()) return offsets;
  Index longest = 0;
  for (Index i = 0; i < sequences.size(); ++i) longest = std::max(longest, sequences[i].count);
  return first_failure(
      detail::check_slot_values(a.state_slots, a.initial_state),
      detail::check_slot_values(a.state_slots, a.final_state),
      require(
          !a.boundary_states.present() || a.boundary_states.extents[1] >= longest / a.boundary_every, Code::bad_shape,
          "boundary_states must have room for every boundary of the longest sequence: its tokens / boundary_every"));
}

}  // namespace chela
