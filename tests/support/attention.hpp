#pragma once
// Problems of linear attention, any member: random inputs in the operator's types, and the same in double for the reference.
#include <cmath>
#include <limits>
#include <ostream>
#include <random>

#include "chela/attention/linear.hpp"
#include "chela/reference/linear.hpp"
#include "support/tensors.hpp"

namespace chela::test {

struct Shape {
  Index batch = 1, tokens = 1, query_heads = 1, key_heads = 1, value_heads = 1, key_dim = 8, value_dim = 8;

  LinearAttentionShape sizes() const {
    return {batch, tokens, query_heads, key_heads, value_heads, key_dim, value_dim};
  }
};

inline std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << "B" << s.batch << " T" << s.tokens << " Hq" << s.query_heads << " Hk" << s.key_heads << " Hv"
             << s.value_heads << " K" << s.key_dim << " V" << s.value_dim;
}

template <DecayKind D, RuleKind R>
struct Member {
  static constexpr DecayKind decay = D;
  static constexpr RuleKind rule = R;
};

/// How strong the random decays are.
enum class Gates { mild, strong, mixed_with_resets };

template <class T, DecayKind D, RuleKind R>
struct Problem {
  using A = Accumulator<T>;
  using Args = LinearAttentionArgs<T, D, R>;
  static constexpr bool delta = R == RuleKind::delta, decays = D != DecayKind::none;
  Shape shape;
  LinearAttentionShape s;
  Span span = Span::causal;
  Tensor<T, 4> q, k, v, grad_o;
  Tensor<A, 4> initial_state, grad_final_state;
  Tensor<A, log_decay_rank(D)> log_decay;
  Tensor<A, 3> beta;

  explicit Problem(Shape sh, Gates gates = Gates::mild)
      : shape(sh),
        s(sh.sizes()),
        q(random_tensor<T>(1, s.batch, s.tokens, s.query_heads, s.key_dim)),
        k(random_tensor<T>(2, s.batch, s.tokens, s.key_heads, s.key_dim)),
        v(random_tensor<T>(3, s.batch, s.tokens, s.value_heads, s.value_dim)),
        grad_o(random_tensor<T>(4, s.batch, s.tokens, s.output_heads(), s.value_dim)),
        initial_state(random_tensor<A>(5, s.batch, s.state_heads(), s.key_dim, s.value_dim)),
        grad_final_state(random_tensor<A>(6, s.batch, s.state_heads(), s.key_dim, s.value_dim)) {
    if constexpr (D == DecayKind::per_head) log_decay = Tensor<A, 1>(s.state_heads());
    if constexpr (D == DecayKind::per_token) log_decay = Tensor<A, 3>(s.batch, s.tokens, s.state_heads());
    if constexpr (D == DecayKind::per_key) log_decay = Tensor<A, 4>(s.batch, s.tokens, s.state_heads(), s.key_dim);
    std::mt19937 random(7);
    for (A& g : log_decay) {
      const double u = std::uniform_real_distribution<double>(0, 1)(random);
      g = A(gates == Gates::mild     ? -0.3 * u
            : gates == Gates::strong ? -20 * u
            : u < 0.3                ? 0
            : u < 0.6                ? -50 * u
                                     : -0.1);
      if (gates == Gates::mixed_with_resets && u > 0.9) g = -std::numeric_limits<A>::infinity();
    }
    if (delta) {
      beta = random_tensor<A>(8, s.batch, s.tokens, s.state_heads());
      for (A& b : beta)
        b = A(0.9) * std::abs(b);          // at 1 a token forgets its key's direction, and little but rounding is left
      for (Index b = 0; b < s.batch; ++b)  // keys of unit length
        for (Index t = 0; t < s.tokens; ++t)
          for (Index h = 0; h < s.key_heads; ++h) {
            double norm = 1e-6;
            for (Index i = 0; i < s.key_dim; ++i) norm += double(k(b, t, h, i)) * double(k(b, t, h, i));
            for (Index i = 0; i < s.key_dim; ++i) k(b, t, h, i) = T(float(double(k(b, t, h, i)) / std::sqrt(norm)));
          }
    }
  }

  Tensor<T, 4> output() const { return nan_tensor<T>(s.batch, s.tokens, s.output_heads(), s.value_dim); }
  Tensor<A, 4> state() const { return nan_tensor<A>(s.batch, s.state_heads(), s.key_dim, s.value_dim); }
  Args args(Tensor<T, 4>& o, Tensor<A, 4>& final_state) const {
    Args a{.q = q, .k = k, .v = v, .o = o, .initial_state = initial_state, .final_state = final_state, .span = span};
    if (decays) a.log_decay = log_decay;
    if (delta) a.beta = beta;
    return a;
  }
};

/// The same problem in double for the reference.
struct DoubleProblem {
  Tensor<double, 4> q, k, v, grad_o, initial_state, grad_final_state, log_decay;
  Tensor<double, 3> beta;
  reference::LinearAttentionProblem problem;

  template <class T, DecayKind D, RuleKind R>
  explicit DoubleProblem(const Problem<T, D, R>& p)
      : q(converted<double>(p.q.view())),
        k(converted<double>(p.k.view())),
        v(converted<double>(p.v.view())),
        grad_o(converted<double>(p.grad_o.view())),
        initial_state(converted<double>(p.initial_state.view())),
        grad_final_state(converted<double>(p.grad_final_state.view())) {
    problem = {q, k, v, initial_state, 1 / std::sqrt(double(p.s.key_dim)), p.span == Span::bidirectional};
    if constexpr (D != DecayKind::none) {
      log_decay = converted<double>(spread_log_decay(p.log_decay.view(), p.s));
      problem.log_decay = log_decay;
    }
    if constexpr (R == RuleKind::delta) {
      beta = converted<double>(p.beta.view());
      problem.beta = beta;
    }
  }
};

/// Terms summed in an output or a gradient: over keys, tokens and the state's own history.
inline Index terms(const Shape& s) { return s.key_dim * (s.tokens + 1); }

}  // namespace chela::test
