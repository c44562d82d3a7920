#pragma once
// What calls of linear attention leave behind, and whether two of them left the same bits.
#include <cstring>
#include <limits>

#include "support/attention.hpp"

namespace chela::test {

template <class A, class B, int Rank>
bool same_bits(TensorView<A, Rank> a, TensorView<B, Rank> b) {
  bool same = same_extents(a, b);
  for_each_index(a, [&](auto... i) { same = same && std::memcmp(&a(i...), &b(i...), sizeof(A)) == 0; });
  return same;
}
template <class T, int Rank>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return same_bits(a.view(), b.view());
}

/// The gradients of a call, NaN at first.
template <class T, DecayKind D, RuleKind R>
struct Gradients {
  using A = Accumulator<T>;
  static constexpr float unwritten = std::numeric_limits<float>::quiet_NaN();
  Tensor<T, 4> q, k, v;
  Tensor<A, 4> state;
  Tensor<A, log_decay_rank(D)> log_decay;
  Tensor<A, 3> beta;

  explicit Gradients(const Problem<T, D, R>& p)
      : q(p.q.extents(), T(unwritten)),
        k(p.k.extents(), T(unwritten)),
        v(p.v.extents(), T(unwritten)),
        state(p.initial_state.extents(), A(unwritten)),
        log_decay(p.log_decay.extents(), A(unwritten)),
        beta(p.beta.extents(), A(unwritten)) {}

  LinearAttentionBackwardArgs<T, D, R> args(const Problem<T, D, R>& p) {
    LinearAttentionBackwardArgs<T, D, R> a{.q = p.q,
                                           .k = p.k,
                                           .v = p.v,
                                           .grad_o = p.grad_o,
                                           .grad_q = q,
                                           .grad_k = k,
                                           .grad_v = v,
                                           .initial_state = p.initial_state,
                                           .grad_final_state = p.grad_final_state,
                                           .grad_initial_state = state,
                                           .span = p.span};
    if (p.decays) a.log_decay = p.log_decay, a.grad_log_decay = log_decay;
    if (p.delta) a.beta = p.beta, a.grad_beta = beta;
    return a;
  }

  friend bool same_bits(const Gradients& a, const Gradients& b) {
    return test::same_bits(a.q, b.q) && test::same_bits(a.k, b.k) && test::same_bits(a.v, b.v) &&
           test::same_bits(a.state, b.state) && test::same_bits(a.log_decay, b.log_decay) &&
           test::same_bits(a.beta, b.beta);
  }
};

/// One token of a problem as a step on `state`, into its place in `o`.
template <class T, DecayKind D, RuleKind R>
LinearAttentionStepArgs<T, D, R> step_args(const Problem<T, D, R>& p, Index token, Tensor<T, 4>& o,
                                           Tensor<Accumulator<T>, 4>& state) {
  const auto at = [&](auto x) { return slice_axis<1>(x, token); };
  LinearAttentionStepArgs<T, D, R> step{
      .q = at(p.q.view()), .k = at(p.k.view()), .v = at(p.v.view()), .o = at(o.view()), .state = state};
  if constexpr (D == DecayKind::per_head) step.log_decay = p.log_decay;
  if constexpr (D == DecayKind::per_token || D == DecayKind::per_key) step.log_decay = at(p.log_decay.view());
  if constexpr (R == RuleKind::delta) step.beta = at(p.beta.view());
  return step;
}

}  // namespace chela::test
