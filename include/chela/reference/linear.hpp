#pragma once
// Linear attention by its definition, in double, every output head by itself: all members, forward and backward. Shapes as in
// attention/linear.hpp; output head h reads head h * heads(x) / heads(o) of x. Backward keeps the state of every token.
#include <algorithm>
#include <cmath>
#include <vector>

#include "chela/core/tensor.hpp"

namespace chela::reference {

struct LinearAttentionProblem {
  TensorView<const double, 4> q, k, v;
  TensorView<const double, 4> initial_state = {};
  double scale = 1;  ///< multiplies q; bidirectional outputs without decay are also divided by the token count
  bool bidirectional = false;                  ///< with the additive rule only
  TensorView<const double, 4> log_decay = {};  ///< [batch, token, state_head, key_dim], or absent for no decay
  TensorView<const double, 3> beta = {};       ///< [batch, token, state_head], or absent for the additive rule
};

struct LinearAttentionGradients {
  TensorView<double, 4> q, k, v, initial_state;
  TensorView<double, 4> log_decay = {};  ///< absent like the log-decay
  TensorView<double, 3> beta = {};       ///< absent like beta
};

namespace detail {

/// One output head of one batch entry: heads of the tensors it reads, and its states, S_0 first.
struct LinearAttentionHead {
  const LinearAttentionProblem& p;
  Index b, hq, hk, hv, hs;
  Index tokens, key_dim, value_dim;
  std::vector<Tensor<double, 2>> states;

  LinearAttentionHead(const LinearAttentionProblem& problem, Index batch, Index h, Index heads)
      : p(problem),
        b(batch),
        hq(h * p.q.extents[2] / heads),
        hk(h * p.k.extents[2] / heads),
        hv(h * p.v.extents[2] / heads),
        hs(h * std::max(p.k.extents[2], p.v.extents[2]) / heads),
        tokens(p.q.extents[1]),
        key_dim(p.q.extents[3]),
        value_dim(p.v.extents[3]) {
    Tensor<double, 2> s(key_dim, value_dim);
    for (Index i = 0; i < key_dim; ++i)
      for (Index j = 0; j < value_dim; ++j) s(i, j) = p.initial_state.present() ? p.initial_state(b, hs, i, j) : 0;
    states.push_back(s);
    for (Index t = 0; t < tokens; ++t) {
      s = decayed(t);
      const std::vector<double> u = written(t, s);
      for (Index i = 0; i < key_dim; ++i)
        for (Index j = 0; j < value_dim; ++j) s(i, j) += p.k(b, t, hk, i) * u[std::size_t(j)];
      states.push_back(s);
    }
  }

  double keep(Index t, Index i) const { return p.log_decay.present() ? std::exp(p.log_decay(b, t, hs, i)) : 1; }

  /// Diag(a_t) S_{t-1}, where states[t] is S_{t-1} in the counting from one.
  Tensor<double, 2> decayed(Index t) const {
    Tensor<double, 2> s = states[std::size_t(t)];
    for (Index i = 0; i < key_dim; ++i)
      for (Index j = 0; j < value_dim; ++j) s(i, j) *= keep(t, i);
    return s;
  }

  /// v - S'^T k for the delta rule, else v.
  std::vector<double> error(Index t, const Tensor<double, 2>& decayed_state) const {
    std::vector<double> e;
    for (Index j = 0; j < value_dim; ++j) {
      e.push_back(p.v(b, t, hv, j));
      for (Index i = 0; i < key_dim && p.beta.present(); ++i) e.back() -= decayed_state(i, j) * p.k(b, t, hk, i);
    }
    return e;
  }
  double rate(Index t) const { return p.beta.present() ? p.beta(b, t, hs) : 1; }
  std::vector<double> written(Index t, const Tensor<double, 2>& decayed_state) const {
    std::vector<double> u = error(t, decayed_state);
    for (double& x : u) x *= rate(t);
    return u;
  }

  double scale() const { return p.bidirectional ? p.scale / double(std::max<Index>(tokens, 1)) : p.scale; }
  /// The state that token t reads.
  const Tensor<double, 2>& read(Index t) const { return states[std::size_t(p.bidirectional ? tokens : t + 1)]; }
};

/// scale q_t . k_t: the weight of a token's own value in its output.
inline double own_weight(const LinearAttentionProblem& p, Index b, Index t, Index h, Index heads) {
  double sum = 0;
  for (Index i = 0; i < p.q.extents[3]; ++i)
    sum += p.q(b, t, h * p.q.extents[2] / heads, i) * p.k(b, t, h * p.k.extents[2] / heads, i);
  return p.scale * sum;
}

/// The problem whose outputs see their own and later tokens only, as a causal one along reversed views.
inline LinearAttentionProblem turned(LinearAttentionProblem p) {
  p.bidirectional = false, p.initial_state = {};
  p.q = reversed(p.q, 1), p.k = reversed(p.k, 1), p.v = reversed(p.v, 1), p.log_decay = reversed(p.log_decay, 1);
  return p;
}

}  // namespace detail

/// o and, if present, final_state.
inline void linear_attention(const LinearAttentionProblem& p, TensorView<double, 4> o,
                             TensorView<double, 4> final_state = {}) {
  if (p.bidirectional &&
      p.log_decay.present()) {  // what came before, what comes after, and what both count taken off once
    LinearAttentionProblem causal = p;
    causal.bidirectional = false;
    linear_attention(causal, o, final_state);
    Tensor<double, 4> after(o.extents[0], o.extents[1], o.extents[2], o.extents[3]);
    linear_attention(detail::turned(p), reversed(after.view(), 1));
    for (Index b = 0; b < o.extents[0]; ++b)
      for (Index t = 0; t < o.extents[1]; ++t)
        for (Index h = 0; h < o.extents[2]; ++h)
          for (Index j = 0; j < o.extents[3]; ++j)
            o(b, t, h, j) += after(b, t, h, j) - detail::own_weight(p, b, t, h, o.extents[2]) *
                                                     p.v(b, t, h * p.v.extents[2] / o.extents[2], j);
    return;
  }
  for (Index b = 0; b < o.extents[0]; ++b)
    for (Index h = 0; h < o.extents[2]; ++h) {
      const detail::LinearAttentionHead head(p, b, h, o.extents[2]);
      for (Index t = 0; t < head.tokens; ++t)
        for (Index j = 0; j < head.value_dim; ++j) {
          double sum = 0;
          for (Index i = 0; i < head.key_dim; ++i) sum += p.q(b, t, head.hq, i) * head.read(t)(i, j);
          o(b, t, h, j) = head.scale() * sum;
        }
      for (Index i = 0; i < head.key_dim && final_state.present(); ++i)
        for (Index j = 0; j < head.value_dim; ++j) final_state(b, head.hs, i, j) = head.states.back()(i, j);
    }
}

inline void linear_attention_backward(const LinearAttentionProblem& p, TensorView<const double, 4> grad_o,
                                      TensorView<const double, 4> grad_final_state,
                                      const LinearAttentionGradients& grad);

namespace detail {

/// The bidirectional span with decay: the gradients of both directions, less those of the own terms that both count.
inline void two_way_backward(const LinearAttentionProblem& p, TensorView<const double, 4> grad_o,
                             TensorView<const double, 4> grad_final_state, const LinearAttentionGradients& grad) {
  LinearAttentionProblem causal = p;
  causal.bidirectional = false;
  linear_attention_backward(causal, grad_o, grad_final_state, grad);

  const auto like = [](TensorView<const double, 4> x) {
    return Tensor<double, 4>(x.extents[0], x.extents[1], x.extents[2], x.extents[3]);
  };
  Tensor<double, 4> q = like(grad.q), k = like(grad.k), v = like(grad.v), g = like(grad.log_decay);
  Tensor<double, 4> nobody = like(grad.initial_state);
  linear_attention_backward(turned(p), reversed(grad_o, 1), {}, {q, k, v, nobody, g});
  const auto add_reversed = [](TensorView<double, 4> to, TensorView<double, 4> from) {
    from = reversed(from, 1);
    for (Index b = 0; b < to.extents[0]; ++b)
      for (Index t = 0; t < to.extents[1]; ++t)
        for (Index h = 0; h < to.extents[2]; ++h)
          for (Index i = 0; i < to.extents[3]; ++i) to(b, t, h, i) += from(b, t, h, i);
  };
  add_reversed(grad.q, q), add_reversed(grad.k, k), add_reversed(grad.v, v), add_reversed(grad.log_decay, g);

  const Index heads = grad_o.extents[2];
  for (Index b = 0; b < grad_o.extents[0]; ++b)
    for (Index t = 0; t < grad_o.extents[1]; ++t)
      for (Index h = 0; h < heads; ++h) {
        const Index hq = h * p.q.extents[2] / heads, hk = h * p.k.extents[2] / heads, hv = h * p.v.extents[2] / heads;
        double from_weight = 0;
        for (Index j = 0; j < p.v.extents[3]; ++j) {
          from_weight += p.scale * grad_o(b, t, h, j) * p.v(b, t, hv, j);
          grad.v(b, t, hv, j) -= own_weight(p, b, t, h, heads) * grad_o(b, t, h, j);
        }
        for (Index i = 0; i < p.q.extents[3]; ++i) {
          grad.q(b, t, hq, i) -= from_weight * p.k(b, t, hk, i);
          grad.k(b, t, hk, i) -= from_weight * p.q(b, t, hq, i);
        }
      }
}

}  // namespace detail

/// Every gradient, by walking the recurrence back. All outputs that belong to the member must be present; they are overwritten.
inline void linear_attention_backward(const LinearAttentionProblem& p, TensorView<const double, 4> grad_o,
                                      TensorView<const double, 4> grad_final_state,
                                      const LinearAttentionGradients& grad) {
  if (p.bidirectional && p.log_decay.present()) return detail::two_way_backward(p, grad_o, grad_final_state, grad);
  const auto clear = [](auto x) {
    if (x.present()) std::fill_n(x.data, x.size(), 0.0);  // outputs are contiguous
  };
  clear(grad.q), clear(grad.k), clear(grad.v), clear(grad.initial_state), clear(grad.log_decay), clear(grad.beta);
  const Index heads = grad_o.extents[2], state_heads = std::max(p.k.extents[2], p.v.extents[2]);
  for (Index b = 0; b < grad_o.extents[0]; ++b)
    for (Index h = 0; h < heads; ++h) {
      const detail::LinearAttentionHead head(p, b, h, heads);
      const Index K = head.key_dim, V = head.value_dim, hq = head.hq, hk = head.hk, hv = head.hv, hs = head.hs;
      const bool first_of_run = h % (heads / state_heads) == 0;
      Tensor<double, 2> x(K, V);  // gradient of the state
      for (Index i = 0; i < K; ++i)
        for (Index j = 0; j < V; ++j)
          x(i, j) = first_of_run && grad_final_state.present() ? grad_final_state(b, hs, i, j) : 0;
      const auto read_back = [&](Index t) {
        for (Index i = 0; i < K; ++i)
          for (Index j = 0; j < V; ++j) {
            grad.q(b, t, hq, i) += head.scale() * head.read(t)(i, j) * grad_o(b, t, h, j);
            x(i, j) += head.scale() * p.q(b, t, hq, i) * grad_o(b, t, h, j);
          }
      };
      if (p.bidirectional)
        for (Index t = 0; t < head.tokens; ++t) read_back(t);
      for (Index t = head.tokens; t-- > 0;) {
        if (!p.bidirectional) read_back(t);
        const Tensor<double, 2> s = head.decayed(t);
        const std::vector<double> e = head.error(t, s);
        for (Index j = 0; j < V; ++j) {
          double grad_u = 0;
          for (Index i = 0; i < K; ++i) grad_u += x(i, j) * p.k(b, t, hk, i);
          const double grad_e = head.rate(t) * grad_u;
          grad.v(b, t, hv, j) += grad_e;
          if (p.beta.present()) grad.beta(b, t, hs) += grad_u * e[std::size_t(j)];
          for (Index i = 0; i < K; ++i) {
            grad.k(b, t, hk, i) += x(i, j) * head.rate(t) * e[std::size_t(j)];
            if (!p.beta.present()) continue;
            grad.k(b, t, hk, i) -= s(i, j) * grad_e;
            x(i, j) -= p.k(b, t, hk, i) * grad_e;
          }
        }
        for (Index i = 0; i < K; ++i)
          for (Index j = 0; j < V; ++j) {
            if (p.log_decay.present()) grad.log_decay(b, t, hs, i) += x(i, j) * s(i, j);
            x(i, j) *= head.keep(t, i);
          }
      }
      for (Index i = 0; i < K; ++i)
        for (Index j = 0; j < V; ++j) grad.initial_state(b, hs, i, j) += x(i, j);
    }
}

}  // namespace chela::reference
