#pragma once
// The bidirectional span with decay: a causal pass, plus a pass back in time whose outputs do not see their own tokens, so
// that each token counts once. The states of the call belong to the causal direction.
#include "chela/cpu/attention/decayed_backward.hpp"
#include "chela/cpu/attention/linear_pass.hpp"

namespace chela::cpu::detail {

/// to = a + b, element by element. The gradient of log-decays per head among them, hence any rank.
template <class A, class T, int Rank>
void store_sum(TensorView<const A, Rank> a, TensorView<const A, Rank> b, TensorView<T, Rank> to) {
  if constexpr (Rank == 1) {
    for (Index i = 0; i < to.extents[0]; ++i) to(i) = static_cast<T>(a(i) + b(i));
  } else {
    for (Index i = 0; i < to.extents[0]; ++i) store_sum(slice(a, i), slice(b, i), slice(to, i));
  }
}

/// Log-decays whose token axis, if they have one, runs backwards.
template <class A, int Rank>
TensorView<A, Rank> reversed_in_time(TensorView<A, Rank> log_decay) {
  if constexpr (Rank == 1)
    return log_decay;
  else
    return reversed(log_decay, 1);
}

template <ChunkPolicy P, class T, DecayKind D, AttentionForm F, Executor E>
void two_way_pass(const LinearAttentionArgs<T, D, RuleKind::additive, F>& args, const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const TensorView<const A, 4> g = spread_log_decay(args.log_decay, shape);
  const SequenceBatch sequences = sequences_of(args);
  const auto back = [](auto x) { return reversed(x, 1); };
  Tensor<A, 4> past(shape.batch, shape.tokens, shape.output_heads(), shape.value_dim), future = past;
  LinearPass<T, T, T, A, S> pass{.sequences = sequences,
                                 .q = args.q,
                                 .k = args.k,
                                 .v = args.v,
                                 .o = past,
                                 .states = {.initial = key_major<F>(args.initial_state),
                                            .final = key_major<F>(args.final_state),
                                            .slots = args.state_slots},
                                 .query_factor = attention_scale(args.scale, shape),
                                 .decay = {g, DecaySide::keys, false}};
  run_pass<P, true>(pass, executor);
  pass.sequences = back_in_time(sequences);
  pass.q = back(args.q), pass.k = back(args.k), pass.v = back(args.v), pass.o = back(future.view());
  pass.states = {}, pass.decay.log_decay = back(g);
  run_pass<P, true, ReadOrder::before_write>(pass, executor);
  executor.for_each(shape.batch, [&](Index b, int) {
    store_sum<A>(slice(std::as_const(past).view(), b), slice(std::as_const(future).view(), b), slice(args.o, b));
  });
}

/// Memory for a gradient in another element type, or none if it is not wanted.
template <class A, class T, int Rank>
Tensor<A, Rank> room_like(TensorView<T, Rank> grad) {
  return grad.present() ? tensor_like<A>(grad) : Tensor<A, Rank>{};
}

template <ChunkPolicy P, class T, DecayKind D, AttentionForm F, Executor E>
void two_way_backward(const LinearAttentionBackwardArgs<T, D, RuleKind::additive, F>& args, const E& executor) {
  using A = Accumulator<T>;
  const SequenceBatch sequences = sequences_of(args);
  // Both directions in the accumulator type, side by side.
  Tensor<A, 4> q[2] = {room_like<A>(args.grad_q), room_like<A>(args.grad_q)},
               k[2] = {room_like<A>(args.grad_k), room_like<A>(args.grad_k)},
               v[2] = {room_like<A>(args.grad_v), room_like<A>(args.grad_v)};
  Tensor<A, log_decay_rank(D)> g[2] = {room_like<A>(args.grad_log_decay), room_like<A>(args.grad_log_decay)};
  const auto targets = [&](int direction) {
    return GradientTargets<A, A, D>{q[direction], k[direction], v[direction], {}, g[direction], {}};
  };
  GradientTargets<A, A, D> past = targets(0), future = targets(1);
  past.initial_state = key_major<F>(args.grad_initial_state);
  decayed_backward<P>(args, sequences, past, executor);

  LinearAttentionBackwardArgs<T, D, RuleKind::additive, F> back = args;
  const auto turn = [](auto& x) {
    if (x.present()) x = reversed(x, 1);
  };
  turn(back.q), turn(back.k), turn(back.v), turn(back.grad_o);
  turn(future.q), turn(future.k), turn(future.v);
  back.log_decay = reversed_in_time(args.log_decay);
  if (future.log_decay.present()) future.log_decay = reversed_in_time(future.log_decay);
  back.initial_state = {}, back.grad_final_state = {};
  decayed_backward<P, ReadOrder::before_write>(back, back_in_time(sequences), future, executor);

  const auto add = [](const auto(&directions)[2], auto to) {
    if (to.present()) store_sum<A>(directions[0].view(), directions[1].view(), to);
  };
  add(q, args.grad_q), add(k, args.grad_k), add(v, args.grad_v), add(g, args.grad_log_decay);
}

}  // namespace chela::cpu::detail
