#pragma once
// One token of linear attention: the state is swept once, and by the delta rule read once before, in place where its strides
// allow.
#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/state_sweep.hpp"
#include "chela/cpu/attention/state_walk.hpp"

namespace chela::cpu::detail {

template <class T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
void step_states(const LinearAttentionArgs<T, D, R, F>& args, const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  constexpr bool decays = D != DecayKind::none;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, shape);
  const Index heads = shape.output_heads(), state_heads = shape.state_heads(), per_state = heads / state_heads;
  const Index keys = shape.key_dim, columns = round_up(shape.value_dim, RegisterBlock<A>::lanes);
  const TensorView<S, 4> states = key_major<F>(args.final_state);
  const bool in_place = std::is_same_v<S, A> && columns == shape.value_dim && states.strides[3] == 1;
  TensorView<const A, 4> log_decay;
  if constexpr (decays) log_decay = spread_log_decay(args.log_decay, shape);

  Tensor<A, 2> scratch(executor.workers(), 3 * keys + 2 * columns + (in_place ? 0 : keys * columns));
  executor.for_each(shape.batch * state_heads, [&](Index task, int worker) {
    const Index b = task / state_heads, state_head = task % state_heads;
    A *q = &scratch(worker, 0), *k = q + keys, *decay = k + keys, *v = decay + keys, *o = v + columns;
    const TensorView<S, 2> kept =
        slice(slice(states, args.state_slots.present() ? args.state_slots[b] : b), state_head);
    A* state = o + columns;
    if constexpr (std::is_same_v<S, A>)
      if (in_place) state = kept.data;
    const Index state_stride = in_place ? kept.strides[0] : columns;
    if (!in_place) {
      std::fill_n(state, keys * columns, A(0));
      pack_rows<S>(kept, A(1), state, columns);
    }
    pack_rows(head_matrix(args.k, b, state_head, state_heads), A(1), k, keys);
    pack_rows(head_matrix(args.v, b, state_head, state_heads), A(1), v, columns);
    if constexpr (decays)
      single_decays(TileLogDecays<A>{head_matrix(log_decay, b, state_head, state_heads)}, decay, keys);

    const StateSweep<A> sweep{q, k, v, o, keys, columns, state, state_stride, decay};
    if constexpr (R == RuleKind::delta) {
      StateSweep<A> known = sweep;
      known.q = k;
      sweep_state<decays, false>(known);
      for (Index j = 0; j < columns; ++j) v[j] = args.beta(b, 0, state_head) * (v[j] - o[j]);
    }
    for (Index head = state_head * per_state; head < (state_head + 1) * per_state; ++head) {
      pack_rows(head_matrix(args.q, b, head, heads), scale, q, keys);
      if (head == state_head * per_state)
        sweep_state<decays, true>(sweep);
      else  // the token is in the state: further queries of the run only read it
        sweep_state<false, false>(sweep);
      unpack_rows(o, columns, head_matrix(args.o, b, head, heads));
    }
    if (!in_place) unpack_rows(state, columns, kept);
  });
}

}  // namespace chela::cpu::detail
