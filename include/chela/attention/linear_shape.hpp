#pragma once
// Sizes of a linear attention problem, and the checks that its passes share (attention/linear.hpp).
#include <algorithm>
#include <cmath>

#include "chela/attention/member.hpp"
#include "chela/chunk/ragged.hpp"
#include "chela/chunk/state_slots.hpp"
#include "chela/core/status.hpp"

namespace chela {

/// Sizes of a problem, once its arguments have passed `check`.
struct LinearAttentionShape {
  Index batch = 0, tokens = 0;
  Index query_heads = 0, key_heads = 0, value_heads = 0;
  Index key_dim = 0, value_dim = 0;

  constexpr Index state_heads() const { return std::max(key_heads, value_heads); }
  constexpr Index output_heads() const { return std::max(query_heads, state_heads()); }
};

template <class Q, class K, class V>
constexpr LinearAttentionShape linear_attention_shape(TensorView<Q, 4> q, TensorView<K, 4> k, TensorView<V, 4> v) {
  return {q.extents[0], q.extents[1], q.extents[2], k.extents[2], v.extents[2], q.extents[3], v.extents[3]};
}

/// The factor that multiplies q: the caller's, or key_dim^-1/2.
template <class A>
A attention_scale(A scale, const LinearAttentionShape& shape) {
  return scale != A(0) ? scale : A(1) / std::sqrt(A(std::max<Index>(shape.key_dim, 1)));
}

namespace detail {

template <class Q, class K, class V>
constexpr Status check_linear_attention_inputs(TensorView<Q, 4> q, TensorView<K, 4> k, TensorView<V, 4> v) {
  const LinearAttentionShape s = linear_attention_shape(q, k, v);
  const auto divides = [](Index part, Index whole) { return part > 0 && whole % part == 0; };
  return first_failure(
      require(readable(q) && readable(k) && readable(v), Code::bad_shape,
              "q, k and v need data and extents of zero or more"),
      require(k.extents[0] == s.batch && v.extents[0] == s.batch, Code::bad_shape,
              "q, k and v must have the same batch extent (axis 0)"),
      require(k.extents[1] == s.tokens && v.extents[1] == s.tokens, Code::bad_shape,
              "q, k and v must have the same token extent (axis 1)"),
      require(k.extents[3] == s.key_dim, Code::bad_shape, "q and k must have the same key_dim (axis 3)"),
      require(s.key_dim > 0 && s.value_dim > 0, Code::bad_shape, "key_dim and value_dim must be at least 1"),
      require(divides(s.key_heads, s.state_heads()) && divides(s.value_heads, s.state_heads()), Code::bad_shape,
              "of the head counts of k and v, one must be a multiple of the other"),
      require(
          s.state_heads() > 0 && divides(s.query_heads, s.output_heads()) && divides(s.state_heads(), s.output_heads()),
          Code::bad_shape, "of the head counts of q and of the states, one must be a multiple of the other"));
}

/// Absent, or states [entry, state_head, key_dim, value_dim] in the layout of the form, one entry for each sequence or, when
/// slots say which, any number.
template <AttentionForm F, class S>
constexpr bool fits_states(TensorView<S, 4> states, Index sequences, const LinearAttentionShape& s, bool pooled) {
  if (!states.present()) return true;
  states = key_major<F>(states);
  return readable(states) && (pooled || states.extents[0] == sequences) &&
         has_extents(states, states.extents[0], s.state_heads(), s.key_dim, s.value_dim);
}

/// Absent, or several states per sequence: [sequence, count, state_head, key_dim, value_dim], and nothing to write to twice.
template <AttentionForm F, class S>
constexpr bool fits_saved_states(TensorView<S, 5> states, Index sequences, const LinearAttentionShape& s) {
  if (!states.present()) return true;
  states = key_major<F>(states);
  return writable(states) && has_extents(states, sequences, states.extents[1], s.state_heads(), s.key_dim, s.value_dim);
}

/// Absent, or log-decays and betas of the member's shapes.
template <DecayKind D, RuleKind R, class G, class B>
constexpr Status check_gates(TensorView<G, log_decay_rank(D)> log_decay, TensorView<B, 3> beta,
                             const LinearAttentionShape& s) {
  if constexpr (D == DecayKind::none) {
    if (log_decay.present())
      return {Code::bad_value, "log_decay is given, but this member has none: name its DecayKind"};
  } else if constexpr (D == DecayKind::per_head) {
    if (!has_extents(log_decay, s.state_heads()) || !readable(log_decay))
      return {Code::bad_shape, "log_decay must be [state_head] for a decay per head"};
  } else if constexpr (D == DecayKind::per_token) {
    if (!has_extents(log_decay, s.batch, s.tokens, s.state_heads()) || !readable(log_decay))
      return {Code::bad_shape, "log_decay must be [batch, token, state_head] for a decay per token"};
  } else {
    if (!has_extents(log_decay, s.batch, s.tokens, s.state_heads(), s.key_dim) || !readable(log_decay))
      return {Code::bad_shape, "log_decay must be [batch, token, state_head, key_dim] for a decay per key"};
  }
  if constexpr (R == RuleKind::additive) {
    return require(!beta.present(), Code::bad_value,
                   "beta is given, but belongs to the delta rule: name RuleKind::delta");
  } else {
    return require(has_extents(beta, s.batch, s.tokens, s.state_heads()) && readable(beta), Code::bad_shape,
                   "beta must be [batch, token, state_head] for the delta rule");
  }
}

/// Absent, or a rate for each head and a bias for each number that the gate makes of a token.
template <DecayKind D, AttentionForm F, class A>
constexpr Status check_gate_parameters(TensorView<A, 1> log_rate, TensorView<A, gate_bias_rank(D)> bias,
                                       const LinearAttentionShape& s) {
  using Gate = typename F::LogDecayGate;
  static_assert(
      std::is_same_v<Gate, GivenLogDecay> || D == DecayKind::per_token || D == DecayKind::per_key,
      "a LogDecayGate makes log-decays per token or per key; for one per head, give the log-decays themselves");
  bool bias_fits = bias.extents[0] == s.state_heads();
  if constexpr (D == DecayKind::per_key) bias_fits = bias_fits && bias.extents[1] == s.key_dim;
  return first_failure(
      require(Gate::takes_parameters || !(log_rate.present() || bias.present()), Code::bad_value,
              "gate_log_rate or gate_bias is given, but the form's gate takes none: name SoftplusGate or BoundedGate"),
      require(!log_rate.present() || has_extents(log_rate, s.state_heads()), Code::bad_shape,
              "gate_log_rate must be [state_head], or absent for a rate of 1"),
      require(!bias.present() || bias_fits, Code::bad_shape,
              "gate_bias must be [state_head] for a decay per token and [state_head, key_dim] for a decay per key, or "
              "absent for 0"));
}

template <RuleKind R>
constexpr Status check_span(Span span) {
  return require(span == Span::causal || R == RuleKind::additive, Code::unsupported,
                 "a bidirectional span is for the additive rule; run a causal pass in each direction");
}

/// Absent, or like the tensor it is the gradient of.
template <class G, class X, int Rank>
constexpr bool fits_gradient(TensorView<G, Rank> grad, TensorView<X, Rank> of) {
  return !grad.present() || (same_extents(grad, of) && writable(grad));
}

/// [batch, rest...] -> [batch, 1, rest...].
template <class T, int Rank>
constexpr TensorView<T, Rank + 1> with_token_axis(TensorView<T, Rank> view) {
  TensorView<T, Rank + 1> out{view.data};
  for (int axis = 0; axis < Rank; ++axis) {
    out.extents[axis == 0 ? 0 : axis + 1] = view.extents[axis];
    out.strides[axis == 0 ? 0 : axis + 1] = view.strides[axis];
  }
  out.extents[1] = 1;
  return out;
}

}  // namespace detail

/// The log-decay of every batch entry, token, state head and key, whatever it depends on: missing axes are broadcast.
template <class G, int Rank>
constexpr TensorView<G, 4> spread_log_decay(TensorView<G, Rank> log_decay, const LinearAttentionShape& s) {
  constexpr int first = Rank == 1 ? 2 : 0;
  TensorView<G, 4> out{log_decay.data, {s.batch, s.tokens, s.state_heads(), s.key_dim}};
  for (int axis = 0; axis < Rank; ++axis) out.strides[first + axis] = log_decay.strides[axis];
  return out;
}

}  // namespace chela
