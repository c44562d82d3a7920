#pragma once
// Gradients of the additive members with decay. The walks of dk and dq leave out what a token does to itself, from which the
// log-decay's gradient must be free (cpu/attention/linear_backward.hpp); while a tile of theirs is still in the cache, that is
// added, and the log-decay's gradient summed: dk goes back in time and keeps k * dk, dq goes forward and sums it.
#include "chela/cpu/attention/linear_backward.hpp"

namespace chela::cpu::detail {

/// The part of a tile in a tensor of log-decays, of their gradients or of the terms of those: one for each token and key, or
/// with OverKeys one for all keys.
template <bool OverKeys, class A, class G>
TensorView<G, 2> decay_terms(const TileAt<A>& at, Index heads, TensorView<G, 4> terms) {
  return OverKeys ? at.rows(terms, heads) : at.columns(terms, heads);
}

/// Ends a tile of dk, in walking order: terms = k * dk without own terms, then dk with them.
template <class T, bool OverKeys>
struct EndKeys {
  using A = Accumulator<T>;
  TensorView<const T, 4> q, k;  ///< [batch, token, heads / any divisor, key_dim]
  TensorView<A, 4> terms = {};  ///< [batch, token, head, key_dim, or 1 if over keys]
  bool sees_itself = true;      ///< whether a token's output reads what it writes

  static constexpr Index copies = 3;  ///< of rows that are not whole registers
  static constexpr bool takes_all_columns = OverKeys;
  Index heads_together() const { return 1; }
  void fetch(const TileAt<A>& at, Index heads, PackAhead<A>& ahead) const {
    ahead.fetch(at.columns(k, heads)), ahead.fetch(decay_terms<OverKeys>(at, heads, terms));
  }
  void operator()(const EndedTile<A>& tile) const {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<A>::type;
    const TileAt<A>& at = tile.at;
    const auto qs = tile.read(at.columns(q, tile.heads), 0), ks = tile.read(at.columns(k, tile.heads), 1);
    const auto to = decay_terms<OverKeys>(at, tile.heads, terms);
    const RegisterRows<A> out = tile.outputs();
    RegisterRows<A> products;
    if constexpr (!OverKeys) products = tile.write(to, 2);
    for (Index t = 0; t < at.count; ++t) {
      const Packet own = pset1<Packet>(sees_itself ? tile.own[t] : A(0));
      Packet sum = pset1<Packet>(A(0));
      for (Index c = 0; c < tile.padded; c += packet_traits<A>::size) {
        const Packet row = ploadu<Packet>(tile.rows + t * tile.padded + c), key = ploadu<Packet>(ks.row(t) + c);
        if constexpr (OverKeys)
          sum = pmadd(key, row, sum);
        else
          pstoreu(products.row(t) + c, pmul(key, row));
        pstoreu(out.row(t) + c, sees_itself ? pmadd(own, ploadu<Packet>(qs.row(t) + c), row) : row);
      }
      if constexpr (OverKeys) to(t, 0) = predux(sum);
    }
    if constexpr (!OverKeys) tile.finish(products, to);
    tile.finish(out, tile.out);
  }
};

/// Ends a tile of dq: the log-decay's gradient from the sums so far, the sums with this tile, and own terms into dq. With
/// OverKeys a token has one log-decay, and one sum.
template <class T, class G, bool OverKeys>
struct EndQueries {
  using A = Accumulator<T>;
  TensorView<const T, 4> q, k;   ///< [batch, token, heads / any divisor, key_dim]
  TensorView<const A, 4> terms;  ///< [batch, token, head, key_dim, or 1 if over keys]; may lie where the gradient goes
  TensorView<const A, 4> log_decay;  ///< [batch, token, state_head, key_dim]
  TensorView<G, 4> grad_log_decay;   ///< [batch, token, state_head, key_dim, or 1 if over keys]
  TensorView<double, 3> sums;        ///< [sequence, head, key_dim or 1]; double: terms of long sequences nearly cancel
  bool sees_itself = true;           ///< whether a token's output reads what it writes

  static constexpr Index copies = 4;  ///< of rows that are not whole registers
  static constexpr bool takes_all_columns = OverKeys;
  Index heads_together() const { return sums.extents[1] / log_decay.extents[2]; }
  void fetch(const TileAt<A>& at, Index heads, PackAhead<A>& ahead) const {
    ahead.fetch(at.columns(q, heads)), ahead.fetch(decay_terms<OverKeys>(at, heads, terms));
  }
  void operator()(const EndedTile<A>& tile) const {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<A>::type;
    constexpr Index lanes = packet_traits<A>::size;
    const TileAt<A>& at = tile.at;
    const auto qs = tile.read(at.columns(q, tile.heads), 0), ks = tile.read(at.columns(k, tile.heads), 1);
    const auto of_keys = decay_terms<OverKeys>(at, tile.heads, terms);
    const auto g = decay_terms<OverKeys>(at, tile.heads, log_decay);
    const auto grad = decay_terms<OverKeys>(at, tile.heads, grad_log_decay);
    const RegisterRows<A> out = tile.outputs();
    const bool first = at.head % heads_together() == 0;
    double* const sum = &sums(at.sequence, at.head, OverKeys ? 0 : at.column);
    RegisterRows<const A> terms_of_keys;
    RegisterRows<A> grads;
    if constexpr (!OverKeys) {
      terms_of_keys = tile.read(of_keys, 2), grads = tile.write(grad, 3, !first);
    }
    for (Index t = 0; t < at.count; ++t) {
      if (tile.may_reset) begin_anew_at_resets<Eigen::InnerStride<>>(g, t, sum, OverKeys ? 1 : at.width);
      const Packet own = pset1<Packet>(sees_itself ? tile.own[t] : A(0));
      Packet dot = pset1<Packet>(A(0));
      for (Index c = 0; c < tile.padded; c += lanes) {
        const Packet row = ploadu<Packet>(tile.rows + t * tile.padded + c), query = ploadu<Packet>(qs.row(t) + c);
        if constexpr (OverKeys) {
          dot = pmadd(query, row, dot);
        } else {
          A term[lanes];
          pstoreu(term, psub(ploadu<Packet>(terms_of_keys.row(t) + c), pmul(query, row)));
          A* const to = grads.row(t) + c;
          const auto add = [&](auto count) {
            for (Index i = 0; i < count; ++i) {
              to[i] = first ? A(sum[c + i]) : to[i] + A(sum[c + i]);
              sum[c + i] += double(term[i]);
            }
          };
          if (c + lanes <= at.width)
            add(std::integral_constant<Index, lanes>{});
          else
            add(at.width - c);
        }
        pstoreu(out.row(t) + c, sees_itself ? pmadd(own, ploadu<Packet>(ks.row(t) + c), row) : row);
      }
      if constexpr (OverKeys) {
        grad(t, 0) = first ? G(sum[0]) : grad(t, 0) + G(sum[0]);
        sum[0] += double(of_keys(t, 0)) - double(predux(dot));
      }
    }
    if constexpr (!OverKeys) tile.finish(grads, grad);
    tile.finish(out, tile.out);
  }
};

/// Gradients of a causal pass into `to` (those among the arguments are not looked at); or, with Order before_write, of a pass
/// whose outputs do not see their own tokens.
template <ChunkPolicy P, ReadOrder Order = ReadOrder::after_write, class T, DecayKind D, AttentionForm F, class G,
          Executor E>
void decayed_backward(const LinearAttentionBackwardArgs<T, D, RuleKind::additive, F>& args,
                      const SequenceBatch& sequences, const GradientTargets<G, Accumulator<T>, D>& to,
                      const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  constexpr bool over_keys = D != DecayKind::per_key, sees_itself = Order == ReadOrder::after_write;
  const LinearAttentionShape s = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, s);
  const auto back = [](auto x) { return reversed(x, 1); };
  const SequenceBatch sequences_back = back_in_time(sequences);
  const TensorView<const A, 4> g = spread_log_decay(args.log_decay, s);
  const EnteringGradient<A> entering(key_major<F>(args.grad_final_state), s);
  const TensorView<const S, 4> initial = key_major<F>(args.initial_state);
  const bool wants_decay = to.log_decay.present();

  Tensor<A, 4> own_initial;
  const TensorView<A, 4> grad_initial =
      initial_gradient_target(to.initial_state, wants_decay && initial.present(), own_initial, sequences.size(), s);
  if (to.v.present() || grad_initial.present()) {
    GradientParts<A> grad_v;
    grad_v.allocate(to.v, s, s.value_dim);
    LeavingGradient<A> leaving(grad_initial, s);
    recurrent_pass<P, true, Order>(
        LinearPass<T, T, T, A>{.sequences = sequences_back,
                               .q = back(args.k),
                               .k = back(args.q),
                               .v = back(args.grad_o),
                               .o = back(grad_v.view()),
                               .states = {.initial = entering.view(), .final = leaving.view()},
                               .key_factor = scale,
                               .decay = {back(g), DecaySide::keys, true}},
        executor);
    leaving.finish(executor);
    if (to.v.present()) grad_v.finish(to.v, executor);
  }

  // One gradient for each term lies where its term did.
  Tensor<A, 4> own_terms;
  TensorView<A, 4> terms;
  if constexpr (!over_keys)
    if (wants_decay && s.state_heads() == s.output_heads()) terms = to.log_decay;
  if (wants_decay && !terms.present()) {
    own_terms = Tensor<A, 4>(s.batch, s.tokens, s.output_heads(), over_keys ? 1 : s.key_dim);
    terms = own_terms;
  }
  if (to.k.present() || wants_decay) {
    GradientParts<A> grad_k;
    grad_k.allocate(to.k, s, s.key_dim);
    const LinearPass<T, T, T, A> pass{.sequences = sequences_back,
                                      .q = back(args.v),
                                      .k = back(args.grad_o),
                                      .v = back(args.q),
                                      .o = back(grad_k.view()),
                                      .states = {.initial = transposed(entering.view(), 2, 3)},
                                      .key_factor = scale,
                                      .decay = {back(g), DecaySide::values, true}};
    if (wants_decay)
      recurrent_pass<P, true, ReadOrder::before_write>(
          pass, executor, EndKeys<T, over_keys>{back(args.q), back(args.k), back(terms), sees_itself});
    else
      recurrent_pass<P, true, Order>(pass, executor);
    if (to.k.present()) grad_k.finish(to.k, executor);
  }
  if (!to.q.present() && !wants_decay) return;

  GradientParts<A> grad_q;
  grad_q.allocate(to.q, s, s.key_dim);
  const LinearPass<T, T, T, A, S> pass{.sequences = sequences,
                                       .q = args.grad_o,
                                       .k = args.v,
                                       .v = args.k,
                                       .o = grad_q.view(),
                                       .states = {.initial = transposed(initial, 2, 3)},
                                       .query_factor = scale,
                                       .decay = {g, DecaySide::values, false}};
  if (!wants_decay) {
    recurrent_pass<P, true, Order>(pass, executor);
  } else {
    Tensor<double, 3> sums = first_decay_sums<over_keys, A>(initial, grad_initial, sequences.size(), s);
    const auto run_into = [&](auto grad) {
      recurrent_pass<P, true, ReadOrder::before_write>(
          pass, executor,
          EndQueries<T, typename decltype(grad)::Value, over_keys>{args.q, args.k, terms, g, grad, sums, sees_itself});
    };
    if constexpr (D == DecayKind::per_key) {
      run_into(to.log_decay);
    } else {
      Tensor<double, 3> per_token(s.batch, s.tokens, s.state_heads());
      run_into(TensorView<double, 4>{per_token.data(),
                                     {s.batch, s.tokens, s.state_heads(), 1},
                                     {s.tokens * s.state_heads(), s.state_heads(), 1, 1}});
      store_token_decay_gradient<D>(std::as_const(per_token).view(), to.log_decay);
    }
  }
  if (to.q.present()) grad_q.finish(to.q, executor);
}

}  // namespace chela::cpu::detail
