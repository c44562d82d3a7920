#pragma once
// Gradients of the delta rule: the walks of cpu/attention/linear_backward.hpp, kept per output head in the accumulator type
// until the log-decay's gradient has been summed from them.
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
    with_row_stride(xs.strides[1] == 1 && ys.strides[1] == 1 && zs.strides[1] == 1, [&](auto stride) {
      using Stride = decltype(stride);
      for (Index t = 0; t < tokens; ++t) {
        const A dot = factor * (row_as<A, Stride>(xs, t) * row_as<A, Stride>(ys, t)).sum();
        const auto z_row = row_as<A, Stride>(zs, t);
        for (Index i = 0; i < out.extents[1]; ++i) out(t, i) += dot * z_row.coeff(i);
      }
    });
  });
}

/// What the log-decay's gradient is summed from, all per output head.
template <class T>
struct DecayGradientTerms {
  using A = Accumulator<T>;
  SequenceBatch sequences;
  TensorView<const T, 4> q, k;
  TensorView<const A, 4> grad_q, read, write;  ///< [batch, token, head, key_dim], own terms left out
  TensorView<const A, 4> log_decay;            ///< spread over [batch, token, state_head, key_dim]
  TensorView<double, 3> sums;                  ///< of first_decay_sums
};

/// Hands add(batch, token, state_head, key, gradient) every element of the log-decay's gradient, token by token; where it is
/// wanted summed over keys, under key 0.
template <bool OverKeys, class T, class Add, Executor E>
void sum_decay_gradient(const DecayGradientTerms<T>& terms, const Add& add, const E& executor) {
  const Index heads = terms.grad_q.extents[2], width = terms.sums.extents[2];
  const Index state_heads = terms.log_decay.extents[2], run_length = heads / state_heads;
  executor.for_each(terms.sequences.size() * state_heads, [&](Index task, int) {
    const Index index = task / state_heads, hs = task % state_heads;
    const Sequence sequence = terms.sequences[index];
    const Index b = sequence.batch;
    const auto g = head_matrix(terms.log_decay, b, hs, state_heads);
    Eigen::Map<Eigen::ArrayXd> sum(&terms.sums(index, hs * run_length, 0), width);
    const auto add_terms = [&](const auto& each) {
      if constexpr (OverKeys)
        sum[0] += each.sum();
      else
        sum += each;
    };
    for (Index t = sequence.begin; t < sequence.begin + sequence.count; ++t) {
      begin_anew_at_resets<Eigen::InnerStride<>>(g, t, sum.data(), width);
      for (Index i = 0; i < width; ++i) add(b, t, hs, i, sum[i]);
      for (Index h = hs * run_length; h < (hs + 1) * run_length; ++h) {
        const auto q = head_matrix(terms.q, b, h, heads), k = head_matrix(terms.k, b, h, heads);
        const auto grad_q = head_matrix(terms.grad_q, b, h, heads), write = head_matrix(terms.write, b, h, heads);
        const bool contiguous =
            q.strides[1] == 1 && k.strides[1] == 1 && grad_q.strides[1] == 1 && write.strides[1] == 1;
        with_row_stride(contiguous, [&](auto stride) {
          const auto row = [&](auto x) { return row_as<double, decltype(stride)>(x, t); };
          add_terms(row(k) * row(write) - row(q) * row(grad_q));
          add_terms(-row(k) * row(head_matrix(terms.read, b, h, heads)));
        });
      }
    }
  });
}

/// Log-decay gradients into the shape of the log-decay: summed over the axes it does not have.
template <DecayKind D, class T, class A, Executor E>
void store_decay_gradient(const DecayGradientTerms<T>& terms, TensorView<A, log_decay_rank(D)> grad,
                          const E& executor) {
  if constexpr (D == DecayKind::per_key) {
    const auto add = [&](Index b, Index t, Index h, Index i, double g) { grad(b, t, h, i) = A(g); };
    sum_decay_gradient<false>(terms, add, executor);
  } else {
    const auto& [batch, tokens, heads, key_dim] = terms.log_decay.extents;
    Tensor<double, 3> per_token(batch, tokens, heads);
    const auto add = [&](Index b, Index t, Index h, Index, double g) { per_token(b, t, h) = g; };
    sum_decay_gradient<true>(terms, add, executor);
    store_token_decay_gradient<D>(std::as_const(per_token).view(), grad);
  }
}

/// Gradients of a causal pass into `to` (those among the arguments are not looked at).
template <ChunkPolicy P, class T, DecayKind D, AttentionForm F, Executor E>
void delta_backward(const LinearAttentionBackwardArgs<T, D, RuleKind::delta, F>& args,
                    const GradientTargets<T, Accumulator<T>, D>& to, const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  constexpr bool decays = D != DecayKind::none;
  constexpr ReadOrder own_term_apart = ReadOrder::before_write;
  const LinearAttentionShape s = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, s);
  const auto back = [](auto x) { return reversed(x, 1); };
  const SequenceBatch sequences = sequences_of(args), sequences_back = back_in_time(sequences);
  const auto walked = [&](DecaySide side, bool after_token) {
    if constexpr (!decays) return WalkDecay<A>{};
    const TensorView<const A, 4> g = spread_log_decay(args.log_decay, s);
    return WalkDecay<A>{after_token ? back(g) : g, side, after_token};
  };
  const auto per_head = [&](Index dim) { return Tensor<A, 4>(s.batch, s.tokens, s.output_heads(), dim); };

  const bool wants_decay = to.log_decay.present();
  const bool wants_q = to.q.present() || wants_decay, wants_k = to.k.present() || wants_decay;
  Tensor<A, 4> own_initial;
  const TensorView<A, 4> grad_initial = initial_gradient_target(
      to.initial_state, wants_decay && args.initial_state.present(), own_initial, sequences.size(), s);
  const bool wants_u = to.v.present() || to.beta.present() || grad_initial.present() || wants_k;
  const EnteringGradient<A> entering(key_major<F>(args.grad_final_state), s);
  const TensorView<const S, 4> initial = key_major<F>(args.initial_state);

  Tensor<A, 4> errors(s.batch, s.tokens, s.state_heads(), s.value_dim), written = errors;  // e and u = beta e
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
  const TensorView<const A, 4> u = std::as_const(written).view();

  Tensor<A, 4> grad_u, beta_grad_u;
  if (wants_u) {
    grad_u = per_head(s.value_dim), beta_grad_u = per_head(s.value_dim);
    LeavingGradient<A> leaving(grad_initial, s);
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
    leaving.finish(executor);
    scale_by_beta<A>(std::as_const(grad_u).view(), args.beta, beta_grad_u.view(), executor);
  }

  GradientParts<A> grad_q, write;
  Tensor<A, 4> read;
  if (wants_q) {
    grad_q.allocate(to.q, s, s.key_dim);
    recurrent_pass<P, decays, own_term_apart>(
        LinearPass<T, A, T, A, S>{.sequences = sequences,
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
    recurrent_pass<P, decays, own_term_apart>(
        LinearPass<A, T, T, A>{.sequences = sequences_back,
                               .q = back(u),
                               .k = back(args.grad_o),
                               .v = back(args.q),
                               .o = back(write.view()),
                               .states = {.initial = transposed(entering.view(), 2, 3)},
                               .key_factor = scale,
                               .decay = walked(DecaySide::values, true)},
        executor);
    const TensorView<const A, 4> leaving_u = std::as_const(beta_grad_u).view();
    read = per_head(s.key_dim);
    recurrent_pass<P, decays, own_term_apart>(LinearPass<A, A, T, A>{.sequences = sequences_back,
                                                                     .q = back(u),
                                                                     .k = back(leaving_u),
                                                                     .v = back(args.k),
                                                                     .o = back(read.view()),
                                                                     .decay = walked(DecaySide::values, true)},
                                              executor);
    add_scaled(write.view(), A(-1), std::as_const(read).view(), executor);
    recurrent_pass<P, decays, own_term_apart>(
        LinearPass<A, A, T, A, S>{.sequences = sequences,
                                  .q = leaving_u,
                                  .k = u,
                                  .v = args.k,
                                  .o = read,
                                  .states = {.initial = transposed(initial, 2, 3)},
                                  .query_factor = A(-1),
                                  .decay = walked(DecaySide::values, false)},
        executor);
  }

  if constexpr (decays) {
    if (wants_decay) {
      constexpr bool over_keys = D != DecayKind::per_key;
      Tensor<double, 3> sums = first_decay_sums<over_keys, A>(initial, grad_initial, sequences.size(), s);
      store_decay_gradient<D>(
          DecayGradientTerms<T>{sequences, args.q, args.k, grad_q.read(), std::as_const(read).view(), write.read(),
                                spread_log_decay(args.log_decay, s), sums},
          to.log_decay, executor);
    }
  }
  if (to.q.present()) {
    add_own_term<A>(args.grad_o, u, scale, args.k, grad_q.view(), executor);
    grad_q.finish(to.q, executor);
  }
  if (to.k.present()) {
    add_own_term<A>(args.grad_o, u, scale, args.q, write.view(), executor);
    add_scaled(write.view(), A(1), std::as_const(read).view(), executor);
    write.finish(to.k, executor);
  }
  if (to.beta.present()) beta_gradient<A>(std::as_const(grad_u).view(), errors.view(), to.beta, executor);
  if (to.v.present()) sum_head_runs<A>(beta_grad_u.view(), to.v, executor);
}

}  // namespace chela::cpu::detail
