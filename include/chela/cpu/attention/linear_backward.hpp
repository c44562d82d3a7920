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
#include <type_traits>
#include <utility>

#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/delta_pass.hpp"
#include "chela/cpu/attention/linear_pass.hpp"

namespace chela::cpu::detail {

/// Row t of a matrix as an Eigen array, converted.
template <class To, class Stride, class T>
auto row_as(TensorView<T, 2> x, Index t) {
  using Array = Eigen::Array<std::remove_const_t<T>, Eigen::Dynamic, 1>;
  return Eigen::Map<const Array, 0, Stride>(x.data + t * x.strides[0], x.extents[1], Stride(x.strides[1]))
      .template cast<To>();
}

/// Row t of a matrix to be written.
template <class Stride, class A>
auto target_row(TensorView<A, 2> x, Index t) {
  using Array = Eigen::Array<A, Eigen::Dynamic, 1>;
  return Eigen::Map<Array, 0, Stride>(x.data + t * x.strides[0], x.extents[1], Stride(x.strides[1]));
}
template <class A>
auto contiguous_row(const A* data, Index size) {
  return Eigen::Map<const Eigen::Array<A, Eigen::Dynamic, 1>>(data, size);
}

/// Calls f(a stride for row_as): where rows are contiguous one that says so, and loops over them vectorise.
template <class F>
void with_row_stride(bool contiguous, F&& f) {
  if (contiguous)
    f(Eigen::InnerStride<1>{});
  else
    f(Eigen::InnerStride<>{1});
}

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

/// Where the walks of all output heads leave a gradient: in its own place if that has a row for each of them, in the
/// accumulator type; else in parts, summed at the end.
template <class A>
class GradientParts {
 public:
  template <class T>
  void allocate(TensorView<T, 4> wanted, const LinearAttentionShape& s, Index dim) {
    if constexpr (std::is_same_v<T, A>)
      if (wanted.present() && wanted.extents[2] == s.output_heads()) {
        view_ = wanted;
        return;
      }
    parts_ = Tensor<A, 4>(s.batch, s.tokens, s.output_heads(), dim);
    view_ = parts_;
  }
  TensorView<A, 4> view() const { return view_; }
  TensorView<const A, 4> read() const { return view_; }
  template <class T, Executor E>
  void finish(TensorView<T, 4> wanted, const E& executor) const {
    if (parts_.data()) sum_head_runs<A>(parts_.view(), wanted, executor);
  }

 private:
  Tensor<A, 4> parts_;
  TensorView<A, 4> view_;
};

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

/// Where the gradients of a pass go: those that are absent are not computed.
template <class G, class A, DecayKind D>
struct GradientTargets {
  TensorView<G, 4> q, k, v;
  TensorView<A, 4> initial_state;  ///< key major
  TensorView<A, log_decay_rank(D)> log_decay;
  TensorView<A, 3> beta;
};

/// Nothing before a reset depends on how hard it was.
template <class Stride, class A>
void begin_anew_at_resets(TensorView<const A, 2> log_decay, Index token, double* sum, Index width) {
  constexpr A surely_kept = A(-80);
  if (row_as<A, Stride>(log_decay, token).head(width).minCoeff() > surely_kept) return;
  for (Index i = 0; i < width; ++i)
    if (std::exp(log_decay(token, i)) == 0) sum[i] = 0;
}

/// Where the initial state's gradient goes: into `wanted`, or if the log-decay's gradient needs it all the same, `own`.
template <class A>
TensorView<A, 4> initial_gradient_target(TensorView<A, 4> wanted, bool needed, Tensor<A, 4>& own, Index sequences,
                                         const LinearAttentionShape& s) {
  if (wanted.present() || !needed) return wanted;
  own = Tensor<A, 4>(sequences, s.state_heads(), s.key_dim, s.value_dim);
  return own;
}

/// Where the sums of the log-decay's gradient begin: S_0 * X_0, which the first head of a run that shares a state counts.
template <bool OverKeys, class A, class S>
Tensor<double, 3> first_decay_sums(TensorView<const S, 4> initial_state, TensorView<const A, 4> grad_initial_state,
                                   Index sequences, const LinearAttentionShape& s) {
  Tensor<double, 3> sums(sequences, s.output_heads(), OverKeys ? 1 : s.key_dim);
  const Index run_length = s.output_heads() / s.state_heads();
  for (Index n = 0; n < sequences && initial_state.present(); ++n)
    for (Index h = 0; h < s.state_heads(); ++h)
      for (Index i = 0; i < s.key_dim; ++i)
        for (Index j = 0; j < s.value_dim; ++j)
          sums(n, h * run_length, OverKeys ? 0 : i) +=
              double(static_cast<A>(initial_state(n, h, i, j))) * double(grad_initial_state(n, h, i, j));
  return sums;
}

/// A log-decay's gradient per token, double [batch, token, state_head], into that of a log-decay per token or per head.
template <DecayKind D, class A>
void store_token_decay_gradient(TensorView<const double, 3> per_token, TensorView<A, log_decay_rank(D)> grad) {
  const auto& [batch, tokens, heads] = per_token.extents;
  for (Index h = 0; h < heads; ++h) {
    double sum = 0;
    for (Index b = 0; b < batch; ++b)
      for (Index t = 0; t < tokens; ++t) {
        if constexpr (D == DecayKind::per_token)
          grad(b, t, h) = A(per_token(b, t, h));
        else
          sum += per_token(b, t, h);
      }
    if constexpr (D == DecayKind::per_head) grad(h) = A(sum);
  }
}

}  // namespace chela::cpu::detail
