#pragma once
// Linear attention (CHELA, arXiv 2406.08128, section 3; linear transformers, arXiv 2006.16236):
//
//   causal          S_t = S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
//   bidirectional   S   = S_0 + sum_t k_t v_t^T      o_t = scale / T * S^T q_t
//
// with one state S in R^{key_dim x value_dim} per head. Head counts may differ: query heads are a multiple of key/value heads
// (grouped queries), value heads a multiple of key heads; head h of the larger count reads head h / (ratio) of the smaller.
#include <algorithm>
#include <cmath>

#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Which tokens an output sees: those up to its own, or all.
enum class Span { causal, bidirectional };

/// Inputs and outputs of one forward pass.
template <Element T>
struct LinearAttentionArgs {
  TensorView<const T, 4> q = {};  ///< [batch, token, query_head, key_dim]
  TensorView<const T, 4> k = {};  ///< [batch, token, key_head, key_dim]
  TensorView<const T, 4> v = {};  ///< [batch, token, value_head, value_dim]
  TensorView<T, 4> o = {};        ///< [batch, token, output_head, value_dim]; every element is written
  /// [batch, state_head, key_dim, value_dim], or absent for zero.
  TensorView<const Accumulator<T>, 4> initial_state = {};
  /// The same shape, or absent when not wanted. May be the initial state's memory.
  TensorView<Accumulator<T>, 4> final_state = {};
  Accumulator<T> scale = 0;  ///< multiplies q; 0 means key_dim^-1/2
  Span span = Span::causal;
};

/// Gradients of the same pass. Absent outputs are not computed.
template <Element T>
struct LinearAttentionBackwardArgs {
  TensorView<const T, 4> q = {}, k = {}, v = {};           ///< as in the forward pass
  TensorView<const T, 4> grad_o = {};                      ///< [batch, token, output_head, value_dim]
  TensorView<T, 4> grad_q = {};                            ///< like q
  TensorView<T, 4> grad_k = {};                            ///< like k
  TensorView<T, 4> grad_v = {};                            ///< like v
  TensorView<const Accumulator<T>, 4> initial_state = {};  ///< as in the forward pass
  TensorView<const Accumulator<T>, 4> grad_final_state =
      {};                                                 ///< gradient flowing into the final state, or absent for zero
  TensorView<Accumulator<T>, 4> grad_initial_state = {};  ///< may be the memory of `grad_final_state`
  Accumulator<T> scale = 0;
  Span span = Span::causal;
};

/// One token per sequence; `state` is read and written in place. Causal.
template <Element T>
struct LinearAttentionStepArgs {
  TensorView<const T, 3> q = {};             ///< [batch, query_head, key_dim]
  TensorView<const T, 3> k = {};             ///< [batch, key_head, key_dim]
  TensorView<const T, 3> v = {};             ///< [batch, value_head, value_dim]
  TensorView<T, 3> o = {};                   ///< [batch, output_head, value_dim]
  TensorView<Accumulator<T>, 4> state = {};  ///< [batch, state_head, key_dim, value_dim]
  Accumulator<T> scale = 0;
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

}  // namespace detail

/// Refuses arguments that do not fit together; both backends call it first.
template <Element T>
constexpr Status check(const LinearAttentionArgs<T>& a) {
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  return first_failure(
      require(has_extents(a.o, s.batch, s.tokens, s.output_heads(), s.value_dim) && writable(a.o), Code::bad_shape,
              "o must be [batch, token, max(heads), value_dim] with data and without broadcast axes"),
      detail::check_state(a.initial_state, s,
                          "initial_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.final_state, s, "final_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      require(writable(a.final_state) || !a.final_state.present(), Code::bad_stride,
              "final_state must not have broadcast axes"));
}

template <Element T>
constexpr Status check(const LinearAttentionBackwardArgs<T>& a) {
  if (Status inputs = detail::check_linear_attention_inputs(a.q, a.k, a.v); !inputs.ok()) return inputs;
  const LinearAttentionShape s = linear_attention_shape(a.q, a.k, a.v);
  const auto fits = [](auto grad, auto of) { return !grad.present() || (same_extents(grad, of) && writable(grad)); };
  return first_failure(
      require(has_extents(a.grad_o, s.batch, s.tokens, s.output_heads(), s.value_dim) && readable(a.grad_o),
              Code::bad_shape, "grad_o must be [batch, token, max(heads), value_dim]"),
      require(fits(a.grad_q, a.q) && fits(a.grad_k, a.k) && fits(a.grad_v, a.v), Code::bad_shape,
              "grad_q, grad_k and grad_v must have the shapes of q, k and v, without broadcast axes"),
      detail::check_state(a.initial_state, s,
                          "initial_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.grad_final_state, s,
                          "grad_final_state must be [batch, max(key, value heads), key_dim, value_dim]"),
      detail::check_state(a.grad_initial_state, s,
                          "grad_initial_state must be [batch, max(key, value heads), key_dim, value_dim]"));
}

template <Element T>
constexpr Status check(const LinearAttentionStepArgs<T>& a) {
  const auto with_token = [](auto view) {  // [batch, head, dim] -> [batch, 1, head, dim]
    TensorView<typename decltype(view)::Value, 4> out{view.data};
    for (int axis = 0; axis < 3; ++axis) {
      out.extents[axis == 0 ? 0 : axis + 1] = view.extents[axis];
      out.strides[axis == 0 ? 0 : axis + 1] = view.strides[axis];
    }
    out.extents[1] = 1;
    return out;
  };
  LinearAttentionArgs<T> as_pass{with_token(a.q), with_token(a.k), with_token(a.v), with_token(a.o),
                                 a.state,         a.state,         a.scale};
  if (!a.state.present()) return {Code::bad_shape, "state must be given: a step reads and writes it"};
  return check(as_pass);
}

}  // namespace chela
