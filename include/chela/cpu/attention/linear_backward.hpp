#pragma once
// Gradients of linear attention. Each is another walk over the sequence, with the roles of q, k and v exchanged, the state
// transposed or time reversed. With u_t what token t writes (v_t, or beta_t e_t for the delta rule), dO the gradient of o, and
// X_t the gradient of the state, which runs back in time from that of the final state:
//
//   dq_t = scale S_t dO_t                               attention of (dO, u, k) from S_0^T
//   dk_t = X_t u_t   - [ beta_t S'_t dU_t ]             attention of (u, dO, q), back in time, from X_T^T
//   dU_t = X_t^T k_t                                    attention of (k, q, dO), back in time, from X_T; dv = dU, or beta dU
//   X_t  = Diag(a_{t+1}) (X_{t+1} [ - beta_{t+1} k_{t+1} dU_{t+1}^T ]) + scale q_t dO_t^T
//   S'_t = Diag(a_t) S_{t-1}
//   dg_t = sum over values of S_0 * X_0 + sum_{s < t} (k_s * dk_s^write - k_s * dk_s^read - q_s * dq_s)
//
// Brackets: delta rule only, whose key also reads. The sum for the log-decay g leaves out what a token does to itself, which
// would cancel: what remains is as small as the decays make it. It begins anew at a reset. So nothing of the forward pass
// needs keeping, and no exponent is above zero.
#include <array>
#include <utility>
#include <vector>

#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/delta_pass.hpp"
#include "chela/cpu/attention/linear_pass.hpp"

namespace chela::cpu::detail {

/// Sums runs of neighbouring heads: `sum` [batch, token, heads / run, dim] = sum over each run of `parts` [.., heads, ..].
template <class A, class T, Executor E>
void sum_head_runs(TensorView<const A, 4> parts, TensorView<T, 4> sum, const E& executor) {
  const Index run_length = parts.extents[2] / std::max<Index>(sum.extents[2], 1);
  executor.for_each(sum.extents[0] * sum.extents[1], [&](Index task, int) {
    const auto from = slice(slice(parts, task / sum.extents[1]), task % sum.extents[1]);
    const auto to = slice(slice(sum, task / sum.extents[1]), task % sum.extents[1]);
    for (Index head = 0; head < to.extents[0]; ++head)
      for (Index i = 0; i < to.extents[1]; ++i) {
        A total = 0;
        for (Index part = 0; part < run_length; ++part) total += from(head * run_length + part, i);
        to(head, i) = static_cast<T>(total);
      }
  });
}

/// The gradient of the final state as it enters the walks of all output heads: a state shared by a run of heads has one
/// gradient, which must enter only one walk of the run.
template <class A>
class EnteringGradient {
 public:
  EnteringGradient(TensorView<const A, 4> grad_final_state, const LinearAttentionShape& s) : view_(grad_final_state) {
    const Index heads = s.output_heads(), per_state = heads / s.state_heads();
    if (!view_.present() || per_state == 1) return;
    spread_ = Tensor<A, 4>(view_.extents[0], heads, s.key_dim, s.value_dim);
    for (Index i = 0; i < view_.extents[0]; ++i)
      for (Index head = 0; head < s.state_heads(); ++head)
        pack_rows(slice(slice(view_, i), head), A(1), &spread_(i, head * per_state, 0, 0), s.value_dim);
    view_ = spread_;
  }
  TensorView<const A, 4> view() const { return view_; }

 private:
  Tensor<A, 4> spread_;
  TensorView<const A, 4> view_;
};

/// Where the walks of all output heads leave the gradient of the initial state, and its sum over runs that share a state.
template <class A>
class LeavingGradient {
 public:
  LeavingGradient(TensorView<A, 4> grad_initial_state, const LinearAttentionShape& s) : wanted_(grad_initial_state) {
    if (wanted_.present() && s.output_heads() > s.state_heads())
      parts_ = Tensor<A, 4>(wanted_.extents[0], s.output_heads(), s.key_dim, s.value_dim);
  }
  TensorView<A, 4> view() { return parts_.data() ? parts_.view() : wanted_; }
  template <Executor E>
  void finish(const E& executor) const {
    if (parts_.data())  // [batch, head, key, value] as [batch, key, head, value], the layout of the sum
      sum_head_runs<A>(transposed(parts_.view(), 1, 2), transposed(wanted_, 1, 2), executor);
  }

 private:
  TensorView<A, 4> wanted_;
  Tensor<A, 4> parts_;
};

/// The same sequences along views whose token axis is reversed.
constexpr SequenceBatch back_in_time(SequenceBatch sequences) {
  sequences.reversed = !sequences.reversed;
  return sequences;
}

/// A gradient pass of every output head into `grad`, which may have fewer heads: then their parts are summed in order.
template <ChunkPolicy P, class T, class S, Executor E>
void run_gradient_pass(LinearPass<T, T, T, T, S> pass, TensorView<T, 4> grad, Index heads, const E& executor) {
  using A = Accumulator<T>;
  pass.o = grad;
  if (grad.extents[2] == heads) return run_pass<P, false>(pass, executor);
  Tensor<A, 4> parts(grad.extents[0], grad.extents[1], heads, grad.extents[3]);
  run_pass<P, false>(LinearPass<T, T, T, A, S>{pass.sequences, pass.q, pass.k, pass.v, parts.view(), pass.states,
                                               pass.query_factor, pass.key_factor, pass.everything},
                     executor);
  sum_head_runs<A>(parts.view(), grad, executor);
}

/// Without decay, additive: three walks straight into the gradients.
template <ChunkPolicy P, class T, AttentionForm F, Executor E>
void plain_backward(const LinearAttentionBackwardArgs<T, DecayKind::none, RuleKind::additive, F>& args,
                    const E& executor) {
  using A = Accumulator<T>;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, shape);
  const bool everything = args.span == Span::bidirectional;
  const auto over = [&](Everything side) { return everything ? side : Everything::no; };
  const Index heads = shape.output_heads();
  const auto back = [](auto x) { return reversed(x, 1); };
  const SequenceBatch sequences = sequences_of(args), sequences_back = back_in_time(sequences);

  if (args.grad_q.present())
    run_gradient_pass<P>(
        LinearPass<T, T, T, T, StateOf<T, F>>{.sequences = sequences,
                                              .q = args.grad_o,
                                              .k = args.v,
                                              .v = args.k,
                                              .o = {},
                                              .states = {.initial = transposed(key_major<F>(args.initial_state), 2, 3)},
                                              .query_factor = scale,
                                              .everything = over(Everything::over_queries)},
        args.grad_q, heads, executor);
  const EnteringGradient<A> entering(key_major<F>(args.grad_final_state), shape);
  if (args.grad_k.present())
    run_gradient_pass<P>(LinearPass<T, T, T, T>{.sequences = sequences_back,
                                                .q = back(args.v),
                                                .k = back(args.grad_o),
                                                .v = back(args.q),
                                                .o = {},
                                                .states = {.initial = transposed(entering.view(), 2, 3)},
                                                .key_factor = scale,
                                                .everything = over(Everything::over_keys)},
                         back(args.grad_k), heads, executor);
  if (args.grad_v.present() || args.grad_initial_state.present()) {
    Tensor<T, 4> unwanted;
    if (!args.grad_v.present()) unwanted = Tensor<T, 4>(shape.batch, shape.tokens, shape.value_heads, shape.value_dim);
    LeavingGradient<A> leaving(key_major<F>(args.grad_initial_state), shape);
    run_gradient_pass<P>(LinearPass<T, T, T, T>{.sequences = sequences_back,
                                                .q = back(args.k),
                                                .k = back(args.q),
                                                .v = back(args.grad_o),
                                                .o = {},
                                                .states = {.initial = entering.view(), .final = leaving.view()},
                                                .key_factor = scale,
                                                .everything = over(Everything::over_keys)},
                         back(args.grad_v.present() ? args.grad_v : unwanted.view()), heads, executor);
    leaving.finish(executor);
  }
}

/// to[b, t, h, :] += sum over values of (x * y)[b, t, h, :] times factor times z[b, t, h, :]: what a token does to itself.
template <class A, class X, class Y, class Z, Executor E>
void add_own_term(TensorView<const X, 4> x, TensorView<const Y, 4> y, A factor, TensorView<const Z, 4> z,
                  TensorView<A, 4> to, const E& executor) {
  const Index tokens = to.extents[1], heads = to.extents[2];
  executor.for_each(to.extents[0] * heads, [&](Index task, int) {
    const Index b = task / heads, h = task % heads;
    const auto xs = head_matrix(x, b, h, heads);
    const auto ys = head_matrix(y, b, h, heads);
    const auto zs = head_matrix(z, b, h, heads);
    const auto out = head_matrix(to, b, h, heads);
    for (Index t = 0; t < tokens; ++t) {
      A dot = 0;
      for (Index i = 0; i < xs.extents[1]; ++i) dot += static_cast<A>(xs(t, i)) * static_cast<A>(ys(t, i));
      dot *= factor;
      for (Index i = 0; i < out.extents[1]; ++i) out(t, i) += dot * static_cast<A>(zs(t, i));
    }
  });
}

/// What the log-decay's gradient is summed from, all per output head; `read` is absent for the additive rule.
template <class T, class S>
struct DecayGradientTerms {
  using A = Accumulator<T>;
  SequenceBatch sequences;
  TensorView<const T, 4> q, k;
  TensorView<const A, 4> grad_q, read, write;  ///< [batch, token, head, key_dim], own terms left out
  TensorView<const S, 4> initial_state;        ///< S_0 [sequence, state_head, key_dim, value_dim], or absent
  TensorView<const A, 4> grad_initial_state;   ///< X_0, the same
  TensorView<const A, 4> log_decay;            ///< spread over [batch, token, state_head, key_dim]
};

/// Hands add(batch, token, state_head, key, gradient) every element of the log-decay's gradient, token by token.
template <class T, class S, class Add, Executor E>
void sum_decay_gradient(const DecayGradientTerms<T, S>& terms, const Add& add, const E& executor) {
  using A = Accumulator<T>;
  const Index key_dim = terms.q.extents[3], heads = terms.grad_q.extents[2];
  const Index state_heads = terms.log_decay.extents[2], run_length = heads / state_heads;
  executor.for_each(terms.sequences.size() * state_heads, [&](Index task, int) {
    const Index index = task / state_heads, hs = task % state_heads;
    const auto [b, begin, count] = terms.sequences[index];
    const auto g = head_matrix(terms.log_decay, b, hs, state_heads);
    std::vector<double> sum(std::size_t(key_dim), 0.0);  // double: the terms of long sequences nearly cancel
    if (terms.initial_state.present())
      for (Index i = 0; i < key_dim; ++i)
        for (Index j = 0; j < terms.initial_state.extents[3]; ++j)
          sum[std::size_t(i)] += double(static_cast<A>(terms.initial_state(index, hs, i, j))) *
                                 double(terms.grad_initial_state(index, hs, i, j));
    for (Index t = begin; t < begin + count; ++t) {
      for (Index i = 0; i < key_dim; ++i) {
        if (std::exp(g(t, i)) == 0) sum[std::size_t(i)] = 0;  // nothing before a reset depends on how hard it was
        add(b, t, hs, i, sum[std::size_t(i)]);
      }
      for (Index h = hs * run_length; h < (hs + 1) * run_length; ++h) {
        const auto q = head_matrix(terms.q, b, h, heads), k = head_matrix(terms.k, b, h, heads);
        for (Index i = 0; i < key_dim; ++i) {
          double from_key = double(terms.write(b, t, h, i));
          if (terms.read.present()) from_key -= double(terms.read(b, t, h, i));
          sum[std::size_t(i)] += double(static_cast<A>(k(t, i))) * from_key -
                                 double(static_cast<A>(q(t, i))) * double(terms.grad_q(b, t, h, i));
        }
      }
    }
  });
}

}  // namespace chela::cpu::detail
