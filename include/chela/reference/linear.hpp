#pragma once
// Linear attention by its definition, in double, every head by itself. Shapes as in attention/linear.hpp; output head h reads
// head h * heads(x) / heads(o) of x.
#include <algorithm>

#include "chela/core/tensor.hpp"

namespace chela::reference {

struct LinearAttentionProblem {
  TensorView<const double, 4> q, k, v;
  TensorView<const double, 4> initial_state = {};
  double scale = 1;  ///< multiplies q; bidirectional outputs are also divided by the token count
  bool bidirectional = false;
};

/// o and, if present, final_state.
inline void linear_attention(const LinearAttentionProblem& p, TensorView<double, 4> o,
                             TensorView<double, 4> final_state = {}) {
  const Index batch = o.extents[0], tokens = o.extents[1], heads = o.extents[2];
  const Index key_dim = p.q.extents[3], value_dim = o.extents[3];
  const Index state_heads = std::max(p.k.extents[2], p.v.extents[2]);
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const Index hq = h * p.q.extents[2] / heads, hk = h * p.k.extents[2] / heads, hv = h * p.v.extents[2] / heads;
      const Index hs = h * state_heads / heads;
      Tensor<double, 2> s(key_dim, value_dim);
      if (p.initial_state.present())
        for (Index i = 0; i < key_dim; ++i)
          for (Index j = 0; j < value_dim; ++j) s(i, j) = p.initial_state(b, hs, i, j);
      const auto write = [&](Index t) {
        for (Index i = 0; i < key_dim; ++i)
          for (Index j = 0; j < value_dim; ++j) s(i, j) += p.k(b, t, hk, i) * p.v(b, t, hv, j);
      };
      const auto read = [&](Index t, double scale) {
        for (Index j = 0; j < value_dim; ++j) {
          double sum = 0;
          for (Index i = 0; i < key_dim; ++i) sum += p.q(b, t, hq, i) * s(i, j);
          o(b, t, h, j) = scale * sum;
        }
      };
      if (p.bidirectional) {
        for (Index t = 0; t < tokens; ++t) write(t);
        for (Index t = 0; t < tokens; ++t) read(t, p.scale / double(tokens));
      } else {
        for (Index t = 0; t < tokens; ++t) write(t), read(t, p.scale);
      }
      if (final_state.present())
        for (Index i = 0; i < key_dim; ++i)
          for (Index j = 0; j < value_dim; ++j) final_state(b, hs, i, j) = s(i, j);
    }
  }
}

struct LinearAttentionGradients {
  TensorView<double, 4> q, k, v, initial_state;
};

/// Gradients by the sum over pairs of tokens, without any recurrence: o_t = scale sum_s (q_t . k_s) v_s + scale S_0^T q_t.
/// All four outputs must be present; they are overwritten.
inline void linear_attention_backward(const LinearAttentionProblem& p, TensorView<const double, 4> grad_o,
                                      TensorView<const double, 4> grad_final_state,
                                      const LinearAttentionGradients& grad) {
  const Index batch = grad_o.extents[0], tokens = grad_o.extents[1], heads = grad_o.extents[2];
  const Index key_dim = p.q.extents[3], value_dim = grad_o.extents[3];
  const Index state_heads = std::max(p.k.extents[2], p.v.extents[2]);
  const double scale = p.bidirectional ? p.scale / double(std::max<Index>(tokens, 1)) : p.scale;
  const auto clear = [](TensorView<double, 4> x) {
    for (Index a = 0; a < x.extents[0]; ++a)
      for (Index b = 0; b < x.extents[1]; ++b)
        for (Index c = 0; c < x.extents[2]; ++c)
          for (Index d = 0; d < x.extents[3]; ++d) x(a, b, c, d) = 0;
  };
  clear(grad.q), clear(grad.k), clear(grad.v), clear(grad.initial_state);
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const Index hq = h * p.q.extents[2] / heads, hk = h * p.k.extents[2] / heads, hv = h * p.v.extents[2] / heads;
      const Index hs = h * state_heads / heads;
      for (Index t = 0; t < tokens; ++t) {
        for (Index s = 0; s < (p.bidirectional ? tokens : t + 1); ++s) {
          double score = 0, grad_score = 0;
          for (Index i = 0; i < key_dim; ++i) score += p.q(b, t, hq, i) * p.k(b, s, hk, i);
          for (Index j = 0; j < value_dim; ++j) grad_score += grad_o(b, t, h, j) * p.v(b, s, hv, j);
          for (Index i = 0; i < key_dim; ++i) {
            grad.q(b, t, hq, i) += scale * grad_score * p.k(b, s, hk, i);
            grad.k(b, s, hk, i) += scale * grad_score * p.q(b, t, hq, i);
          }
          for (Index j = 0; j < value_dim; ++j) grad.v(b, s, hv, j) += scale * score * grad_o(b, t, h, j);
        }
        for (Index i = 0; i < key_dim; ++i)
          for (Index j = 0; j < value_dim; ++j) {
            const double initial = p.initial_state.present() ? p.initial_state(b, hs, i, j) : 0;
            grad.q(b, t, hq, i) += scale * initial * grad_o(b, t, h, j);
            grad.initial_state(b, hs, i, j) += scale * p.q(b, t, hq, i) * grad_o(b, t, h, j);
          }
      }
    }
    if (!grad_final_state.present()) continue;
    for (Index hs = 0; hs < state_heads; ++hs) {
      const Index hk = hs * p.k.extents[2] / state_heads, hv = hs * p.v.extents[2] / state_heads;
      for (Index i = 0; i < key_dim; ++i)
        for (Index j = 0; j < value_dim; ++j) {
          const double g = grad_final_state(b, hs, i, j);
          grad.initial_state(b, hs, i, j) += g;
          for (Index t = 0; t < tokens; ++t) {
            grad.k(b, t, hk, i) += g * p.v(b, t, hv, j);
            grad.v(b, t, hv, j) += g * p.k(b, t, hk, i);
          }
        }
    }
  }
}

}  // namespace chela::reference
