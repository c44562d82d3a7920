#pragma once
// Linear attention, one family (CHELA, arXiv 2406.08128, section 3). One state S in R^{key_dim x value_dim} per head, decayed
// by a_t = exp(log_decay_t) in (0, 1] before each token, is written by a rule and read by the query:
//
//   additive rule   S_t = Diag(a_t) S_{t-1} + k_t v_t^T
//   delta rule      S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T
//   read-out        o_t = scale * S_t^T q_t                                                   causal
//                   o_t = scale / T * (S_0 + sum_s k_s v_s^T)^T q_t                           bidirectional, without decay
//
//   decay       additive                                        delta
//   none        CHELA, linear transformer (arXiv 2006.16236)    DeltaNet (2406.06484)
//   per_head    RetNet (2307.08621), Lightning (2401.04658)
//   per_token   Mamba-2 (2405.21060), simple GLA                Gated DeltaNet (2412.06464)
//   per_key     GLA (2312.06635), HGRN-2                        KDA (2510.26692)
//
// A log-decay of 0 keeps the state, -infinity resets it; both are ordinary inputs. Head counts may differ: query heads are a
// multiple of key/value heads (grouped queries), value heads a multiple of key heads; head h of the larger count reads head
// h / (ratio) of the smaller. States, log-decays and betas have one head per state: the larger of the key and value heads.
#include <algorithm>
#include <cmath>

#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Which tokens an output sees: those up to its own, or all.
enum class Span { causal, bidirectional };

/// What a log-decay depends on: nothing (there is none), the head, also the token, or also the key dimension.
enum class DecayKind { none, per_head, per_token, per_key };

/// What a token writes: its value, or (delta) its value less what the state already answers for its key.
enum class RuleKind { additive, delta };

/// Rank of the log-decay's tensor: [head], [batch, token, head] or [batch, token, head, key_dim]. Without decay it is absent.
constexpr int log_decay_rank(DecayKind kind) {
  return kind == DecayKind::per_key ? 4 : kind == DecayKind::per_token ? 3 : 1;
}

/// Inputs and outputs of one forward pass. Element types, decay and rule are those of the struct: the operator follows.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive>
struct LinearAttentionArgs {
  TensorView<const T, 4> q = {};  ///< [batch, token, query_head, key_dim]
  TensorView<const T, 4> k = {};  ///< [batch, token, key_head, key_dim]; of unit length or less for the delta rule
  TensorView<const T, 4> v = {};  ///< [batch, token, value_head, value_dim]
  TensorView<T, 4> o = {};        ///< [batch, token, output_head, value_dim]; every element is written
  /// [batch, state_head, key_dim, value_dim], or absent for zero.
  TensorView<const Accumulator<T>, 4> initial_state = {};
  /// The same shape, or absent when not wanted. May be the initial state's memory.
  TensorView<Accumulator<T>, 4> final_state = {};
  Accumulator<T> scale = 0;  ///< multiplies q; 0 means key_dim^-1/2
  Span span = Span::causal;
  TensorView<const Accumulator<T>, log_decay_rank(D)> log_decay = {};  ///< <= 0, natural logarithm
  TensorView<const Accumulator<T>, 3> beta = {};                       ///< [batch, token, state_head]; delta rule only
};

/// Gradients of the same pass. Absent outputs are not computed.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive>
struct LinearAttentionBackwardArgs {
  TensorView<const T, 4> q = {}, k = {}, v = {};           ///< as in the forward pass
  TensorView<const T, 4> grad_o = {};                      ///< [batch, token, output_head, value_dim]
  TensorView<T, 4> grad_q = {};                            ///< like q
  TensorView<T, 4> grad_k = {};                            ///< like k
  TensorView<T, 4> grad_v = {};                            ///< like v
  TensorView<const Accumulator<T>, 4> initial_state = {};  ///< as in the forward pass
  /// Gradient flowing into the final state, or absent for zero.
  TensorView<const Accumulator<T>, 4> grad_final_state = {};
  TensorView<Accumulator<T>, 4> grad_initial_state = {};  ///< may be the memory of `grad_final_state`
  Accumulator<T> scale = 0;
  Span span = Span::causal;
  TensorView<const Accumulator<T>, log_decay_rank(D)> log_decay = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 3> beta = {};                       ///< as in the forward pass
  TensorView<Accumulator<T>, log_decay_rank(D)> grad_log_decay = {};   ///< like log_decay
  TensorView<Accumulator<T>, 3> grad_beta = {};                        ///< like beta
};

/// One token per sequence; `state` is read and written in place. Causal.
template <Element T, DecayKind D = DecayKind::none, RuleKind R = RuleKind::additive>
struct LinearAttentionStepArgs {
  static constexpr int decay_rank = D == DecayKind::per_key ? 3 : D == DecayKind::per_token ? 2 : 1;
  TensorView<const T, 3> q = {};             ///< [batch, query_head, key_dim]
  TensorView<const T, 3> k = {};             ///< [batch, key_head, key_dim]
  TensorView<const T, 3> v = {};             ///< [batch, value_head, value_dim]
  TensorView<T, 3> o = {};                   ///< [batch, output_head, value_dim]
  TensorView<Accumulator<T>, 4> state = {};  ///< [batch, state_head, key_dim, value_dim]
  Accumulator<T> scale = 0;
  TensorView<const Accumulator<T>, decay_rank> log_decay = {};  ///< [state_head], [batch, state_head] or [.., key_dim]
  TensorView<const Accumulator<T>, 2> beta = {};                ///< [batch, state_head]; delta rule only
};

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

/// The factor that multiplies q: the caller's, or key_dim^-1/2; over the token count when every token sees all.
template <class A>
A attention_scale(A scale, Span span, const LinearAttentionShape& shape) {
  A factor = scale != A(0) ? scale : A(1) / std::sqrt(A(std::max<Index>(shape.key_dim, 1)));
  return span == Span::bidirectional ? factor / A(std::max<Index>(shape.tokens, 1)) : factor;
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

template <class S>
constexpr Status check_state(TensorView<S, 4> state, const LinearAttentionShape& s, const char* why) {
  return require(!state.present() || has_extents(state, s.batch, s.state_heads(), s.key_dim, s.value_dim),
                 Code::bad_shape, why);
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

template <DecayKind D, RuleKind R>
constexpr Status check_span(Span span) {
  return require(span == Span::causal || (D == DecayKind::none && R == RuleKind::additive), Code::unsupported,
                 "a bidirectional span is for the additive rule without decay; run a causal pass in each direction");
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

/// A step's arguments as those of a pass over one token.
template <Element T, DecayKind D, RuleKind R>
constexpr LinearAttentionArgs<T, D, R> as_pass(const LinearAttentionStepArgs<T, D, R>& a) {
  using detail::with_token_axis;
  LinearAttentionArgs<T, D, R> pass{.q = with_token_axis(a.q),
                                    .k = with_token_axis(a.k),
                                    .v = with_token_axis(a.v),
                                    .o = with_token_axis(a.o),
                                    .initial_state = a.state,
                                    .final_state = a.state,
                                    .scale = a.scale};
  if constexpr (D == DecayKind::per_token || D == DecayKind::per_key)
    pass.log_decay = with_token_axis(a.log_decay);
  else
    pass.log_decay = a.log_decay;
  if (a.beta.present()) pass.beta = with_token_axis(a.beta);
  return pass;
}

/// Refuses arguments that do not fit together; both backends call it first.
template <Element T, DecayKind D, RuleKind R>
constexpr Status check(const LinearAttentionArgs<T, D, R>& a) {
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  return first_failure(
      require(has_extents(a.o, s.batch, s.tokens, s.output_heads(), s.value_dim) && writable(a.o), Code::bad_shape,
              "o must be [batch, token, max(heads), value_dim] with data and without broadcast axes"),
      detail::check_state(a.initial_state, s,
                          "initial_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.final_state, s, "final_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      require(writable(a.final_state) || !a.final_state.present(), Code::bad_stride,
              "final_state must not have broadcast axes"),
      detail::check_gates<D, R>(a.log_decay, a.beta, s), detail::check_span<D, R>(a.span));
}

template <Element T, DecayKind D, RuleKind R>
constexpr Status check(const LinearAttentionBackwardArgs<T, D, R>& a) {
  using detail::fits_gradient;
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  return first_failure(
      require(has_extents(a.grad_o, s.batch, s.tokens, s.output_heads(), s.value_dim) && readable(a.grad_o),
              Code::bad_shape, "grad_o must be [batch, token, max(heads), value_dim]"),
      require(fits_gradient(a.grad_q, a.q) && fits_gradient(a.grad_k, a.k) && fits_gradient(a.grad_v, a.v),
              Code::bad_shape, "grad_q, grad_k and grad_v must have the shapes of q, k and v, without broadcast axes"),
      detail::check_state(a.initial_state, s,
                          "initial_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.grad_final_state, s,
                          "grad_final_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.grad_initial_state, s,
                          "grad_initial_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_gates<D, R>(a.log_decay, a.beta, s), detail::check_span<D, R>(a.span),
      require(fits_gradient(a.grad_log_decay, a.log_decay) && fits_gradient(a.grad_beta, a.beta), Code::bad_shape,
              "grad_log_decay and grad_beta must have the shapes of log_decay and beta, without broadcast axes"));
}

template <Element T, DecayKind D, RuleKind R>
constexpr Status check(const LinearAttentionStepArgs<T, D, R>& a) {
  if (!a.state.present()) return {Code::bad_shape, "state must be given: a step reads and writes it"};
  return check(as_pass(a));
}

}  // namespace chela
