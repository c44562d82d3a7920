#pragma once
// Gradients of the members with decay or the delta rule: the walks of cpu/attention/linear_backward.hpp, kept per output head
// in the accumulator type until the log-decay's gradient has been summed from them.
#include "chela/cpu/attention/linear_backward.hpp"

namespace chela::cpu::detail {

/// to[b, t, h, :] = beta[b, t, h] * from[b, t, h, :]. `beta` may have fewer heads.
template <class A, Executor E>
void scale_by_beta(TensorView<const A, 4> from, TensorView<const A, 3> beta, TensorView<A, 4> to, const E& executor) {
  const Index tokens = to.extents[1], heads = to.extents[2];
  executor.for_each(to.extents[0] * heads, [&](Index task, int) {
    const Index b = task / heads, h = task % heads;
    for (Index t = 0; t < tokens; ++t) {
      const A factor = beta(b, t, h / (heads / beta.extents[2]));
      for (Index i = 0; i < to.extents[3]; ++i) to(b, t, h, i) = factor * from(b, t, h, i);
    }
  });
}

/// to += factor * from, element by element.
template <class A, Executor E>
void add_scaled(TensorView<A, 4> to, A factor, TensorView<const A, 4> from, const E& executor) {
  executor.for_each(to.extents[0] * to.extents[1], [&](Index task, int) {
    const auto rows = slice(slice(to, task / to.extents[1]), task % to.extents[1]);
    const auto added = slice(slice(from, task / to.extents[1]), task % to.extents[1]);
    for (Index h = 0; h < rows.extents[0]; ++h)
      for (Index i = 0; i < rows.extents[1]; ++i) rows(h, i) += factor * added(h, i);
  });
}

/// grad_beta[b, t, h] = sum over values, and over the output heads of state head h, of dU * e.
template <class A, Executor E>
void beta_gradient(TensorView<const A, 4> grad_u, TensorView<const A, 4> errors, TensorView<A, 3> grad_beta,
                   const E& executor) {
  const Index state_heads = grad_beta.extents[2], run_length = grad_u.extents[2] / state_heads;
  executor.for_each(grad_beta.extents[0] * grad_beta.extents[1], [&](Index task, int) {
    const Index b = task / grad_beta.extents[1], t = task % grad_beta.extents[1];
    for (Index hs = 0; hs < state_heads; ++hs) {
      A sum = 0;
      for (Index h = hs * run_length; h < (hs + 1) * run_length; ++h)
        for (Index j = 0; j < errors.extents[3]; ++j) sum += grad_u(b, t, h, j) * errors(b, t, hs, j);
      grad_beta(b, t, hs) = sum;
    }
  });
}

/// Log-decay gradients into the shape of the log-decay: summed over the axes it does not have.
template <DecayKind D, class T, class S, class A, Executor E>
void store_decay_gradient(const DecayGradientTerms<T, S>& terms, TensorView<A, log_decay_rank(D)> grad,
                          const E& executor) {
  if constexpr (D == DecayKind::per_key) {
    const auto add = [&](Index b, Index t, Index h, Index i, double g) { grad(b, t, h, i) = A(g); };
    sum_decay_gradient<false>(terms, add, executor);
  } else {
    const auto& [batch, tokens, heads, key_dim] = terms.log_decay.extents;
    Tensor<double, 3> per_token(batch, tokens, heads);
    const auto add = [&](Index b, Index t, Index h, Index, double g) { per_token(b, t, h) = g; };
    sum_decay_gradient<true>(terms, add, executor);
    if constexpr (D == DecayKind::per_token) {
      for (Index b = 0; b < batch; ++b)
        for (Index t = 0; t < tokens; ++t)
          for (Index h = 0; h < heads; ++h) grad(b, t, h) = A(per_token(b, t, h));
    } else {
      for (Index h = 0; h < heads; ++h) {
        double sum = 0;
        for (Index b = 0; b < batch; ++b)
          for (Index t = 0; t < tokens; ++t) sum += per_token(b, t, h);
        grad(h) = A(sum);
      }
    }
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

/// Gradients of a causal pass into `to` (those among the arguments are not looked at); or, with Order before_write, of a pass
/// whose outputs do not see their own tokens.
template <ChunkPolicy P, ReadOrder Order = ReadOrder::after_write, class T, DecayKind D, RuleKind R, AttentionForm F,
          class G, Executor E>
void gated_backward(const LinearAttentionBackwardArgs<T, D, R, F>& args, const SequenceBatch& sequences,
                    const GradientTargets<G, Accumulator<T>, D>& to, const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  static_assert(R == RuleKind::additive || Order == ReadOrder::after_write);
  constexpr bool decays = D != DecayKind::none, delta = R == RuleKind::delta;
  constexpr ReadOrder own_term_apart = ReadOrder::before_write;
  const LinearAttentionShape s = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, s);
  const Index heads = s.output_heads();
  const auto back = [](auto x) { return reversed(x, 1); };
  const SequenceBatch sequences_back = back_in_time(sequences);
  const auto walked = [&](DecaySide side, bool after_token) {
    if constexpr (!decays) return WalkDecay<A>{};
    const TensorView<const A, 4> g = spread_log_decay(args.log_decay, s);
    return WalkDecay<A>{after_token ? back(g) : g, side, after_token};
  };
  const auto per_head = [&](Index dim) { return Tensor<A, 4>(s.batch, s.tokens, heads, dim); };

  const bool wants_decay = to.log_decay.present();
  const bool wants_q = to.q.present() || wants_decay, wants_k = to.k.present() || wants_decay;
  const bool wants_initial = to.initial_state.present() || (wants_decay && args.initial_state.present());
  const bool wants_u = to.v.present() || to.beta.present() || wants_initial || (delta && wants_k);
  Tensor<A, 4> own_initial;  // the log-decay's gradient needs that of the initial state, wanted or not
  TensorView<A, 4> grad_initial = to.initial_state;
  if (wants_initial && !grad_initial.present()) {
    own_initial = Tensor<A, 4>(sequences.size(), s.state_heads(), s.key_dim, s.value_dim);
    grad_initial = own_initial;
  }
  const EnteringGradient<A> entering(key_major<F>(args.grad_final_state), s);
  const TensorView<const S, 4> initial = key_major<F>(args.initial_state);

  Tensor<A, 4> errors, written;  // e and u = beta e of the delta rule
  if constexpr (delta) {
    errors = Tensor<A, 4>(s.batch, s.tokens, s.state_heads(), s.value_dim), written = errors;
    delta_pass<P, decays>(DeltaPass<T, A, S>{.sequences = sequences,
                                             .q = args.k,
                                             .k = args.k,
                                             .v = args.v,
                                             .beta = args.beta,
                                             .errors = errors,
                                             .states = {.initial = initial},
                                             .decay = walked(DecaySide::keys, false),
                                             .heads = s.state_heads()},
                          executor);
    scale_by_beta<A>(errors.view(), args.beta, written.view(), executor);
  }
  const auto u = [&] {
    if constexpr (delta)
      return std::as_const(written).view();
    else
      return args.v;
  }();
  using U = std::remove_const_t<typename decltype(u)::Value>;

  GradientParts<A> grad_u;  // of v itself, if additive
  Tensor<A, 4> beta_grad_u;
  if (wants_u) {
    grad_u.allocate(delta ? TensorView<G, 4>{} : to.v, s, s.value_dim);
    LeavingGradient<A> leaving(grad_initial, s);
    if constexpr (delta) {
      delta_adjoint_pass<P, decays>(DeltaAdjointPass<T>{.sequences = sequences_back,
                                                        .q = back(args.q),
                                                        .k = back(args.k),
                                                        .beta = back(args.beta),
                                                        .grad_o = back(args.grad_o),
                                                        .grad_u = back(grad_u.view()),
                                                        .states = {.initial = entering.view(), .final = leaving.view()},
                                                        .query_factor = scale,
                                                        .decay = walked(DecaySide::keys, true)},
                                    executor);
      beta_grad_u = per_head(s.value_dim);
      scale_by_beta<A>(grad_u.read(), args.beta, beta_grad_u.view(), executor);
    } else {
      recurrent_pass<PolicyConstant<P>::value, decays, Order>(
          LinearPass<T, T, T, A>{.sequences = sequences_back,
                                 .q = back(args.k),
                                 .k = back(args.q),
                                 .v = back(args.grad_o),
                                 .o = back(grad_u.view()),
                                 .states = {.initial = entering.view(), .final = leaving.view()},
                                 .key_factor = scale,
                                 .decay = walked(DecaySide::keys, true)},
          executor);
    }
    leaving.finish(executor);
  }

  GradientParts<A> grad_q, write;
  Tensor<A, 4> read;
  if (wants_q) {
    grad_q.allocate(to.q, s, s.key_dim);
    run_pass<P, decays, own_term_apart>(LinearPass<T, U, T, A, S>{.sequences = sequences,
                                                                  .q = args.grad_o,
                                                                  .k = u,
                                                                  .v = args.k,
                                                                  .o = grad_q.view(),
                                                                  .states = {.initial = transposed(initial, 2, 3)},
                                                                  .query_factor = scale,
                                                                  .decay = walked(DecaySide::values, false)},
                                        executor);
  }
  if (wants_k) {
    write.allocate(to.k, s, s.key_dim);
    run_pass<P, decays, own_term_apart>(LinearPass<U, T, T, A>{.sequences = sequences_back,
                                                               .q = back(u),
                                                               .k = back(args.grad_o),
                                                               .v = back(args.q),
                                                               .o = back(write.view()),
                                                               .states = {.initial = transposed(entering.view(), 2, 3)},
                                                               .key_factor = scale,
                                                               .decay = walked(DecaySide::values, true)},
                                        executor);
    if constexpr (delta) {
      const TensorView<const A, 4> leaving_u = std::as_const(beta_grad_u).view();
      read = per_head(s.key_dim);
      run_pass<P, decays, own_term_apart>(LinearPass<A, A, T, A>{.sequences = sequences_back,
                                                                 .q = back(u),
                                                                 .k = back(leaving_u),
                                                                 .v = back(args.k),
                                                                 .o = back(read.view()),
                                                                 .decay = walked(DecaySide::values, true)},
                                          executor);
      add_scaled(write.view(), A(-1), std::as_const(read).view(), executor);
      run_pass<P, decays, own_term_apart>(LinearPass<A, A, T, A, S>{.sequences = sequences,
                                                                    .q = leaving_u,
                                                                    .k = u,
                                                                    .v = args.k,
                                                                    .o = read,
                                                                    .states = {.initial = transposed(initial, 2, 3)},
                                                                    .query_factor = A(-1),
                                                                    .decay = walked(DecaySide::values, false)},
                                          executor);
    }
  }

  if constexpr (decays) {
    if (wants_decay)
      store_decay_gradient<D>(
          DecayGradientTerms<T, S>{sequences, args.q, args.k, grad_q.read(), std::as_const(read).view(), write.read(),
                                   initial, grad_initial, spread_log_decay(args.log_decay, s)},
          to.log_decay, executor);
  }
  if (to.q.present()) {
    if constexpr (Order == ReadOrder::after_write)
      add_own_term<A>(args.grad_o, u, scale, args.k, grad_q.view(), executor);
    grad_q.finish(to.q, executor);
  }
  if (to.k.present()) {
    if constexpr (Order == ReadOrder::after_write)
      add_own_term<A>(args.grad_o, u, scale, args.q, write.view(), executor);
    if constexpr (delta) add_scaled(write.view(), A(1), std::as_const(read).view(), executor);
    write.finish(to.k, executor);
  }
  if (to.beta.present()) beta_gradient<A>(grad_u.read(), errors.view(), to.beta, executor);
  if (to.v.present()) {
    if constexpr (delta)
      sum_head_runs<A>(beta_grad_u.view(), to.v, executor);
    else
      grad_u.finish(to.v, executor);
  }
}

}  // namespace chela::cpu::detail
