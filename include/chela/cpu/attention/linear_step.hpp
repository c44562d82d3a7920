#pragma once
// One token of linear attention: the state is swept once, in place where its strides allow.
#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/delta_pass.hpp"

namespace chela::cpu::detail {

template <class T, DecayKind D, RuleKind R, AttentionForm F, Executor E>
void step_states(const LinearAttentionArgs<T, D, R, F>& args, const E& executor) {
  using A = Accumulator<T>;
  using S = StateOf<T, F>;
  using Block = RegisterBlock<A>;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, shape);
  const Index heads = shape.output_heads(), state_heads = shape.state_heads(), per_state = heads / state_heads;
  const Index keys = round_up(shape.key_dim, Block::rows), columns = round_up(shape.value_dim, Block::columns);
  const TensorView<S, 4> states = key_major<F>(args.final_state);
  const bool in_place =
      std::is_same_v<S, A> && keys == shape.key_dim && columns == shape.value_dim && states.strides[3] == 1;
  TensorView<const A, 4> log_decay;
  if constexpr (D != DecayKind::none) log_decay = spread_log_decay(args.log_decay, shape);

  Tensor<A, 2> scratch(executor.workers(), 4 * keys + 3 * columns + (in_place ? 0 : keys * columns));
  executor.for_each(shape.batch * state_heads, [&](Index task, int worker) {
    const Index b = task / state_heads, state_head = task % state_heads;
    A *q = &scratch(worker, 0), *k = q + keys, *decay = k + keys, *reads = decay + keys, *v = reads + keys;
    A *o = v + columns, *errors = o + columns;
    const TensorView<S, 2> kept =
        slice(slice(states, args.state_slots.present() ? args.state_slots[b] : b), state_head);
    A* state = errors + columns;
    if constexpr (std::is_same_v<S, A>)
      if (in_place) state = kept.data;
    const Index state_stride = in_place ? kept.strides[0] : columns;
    if (!in_place) {
      std::fill_n(state, keys * columns, A(0));
      pack_rows<S>(kept, A(1), state, columns);
    }
    pack_rows(head_matrix(args.k, b, state_head, state_heads), A(1), k, keys);
    pack_rows(head_matrix(args.v, b, state_head, state_heads), A(1), v, columns);
    if constexpr (D != DecayKind::none)
      single_decays(TileLogDecays<A>{head_matrix(log_decay, b, state_head, state_heads)}, decay, keys);

    for (Index head = state_head * per_state; head < (state_head + 1) * per_state; ++head) {
      pack_rows(head_matrix(args.q, b, head, heads), scale, q, keys);
      const PackedTile<A> tile{q, k, v, o, 1, keys, columns, state, state_stride, o, columns, decay};
      if (head > state_head * per_state) {  // the token is in the state: further queries of the run only read it
        std::fill_n(k, keys, A(0));
        recur_over_tile<TileDecay::none>(tile, PackNothing{});
      } else if constexpr (R == RuleKind::additive) {
        recur_over_tile<D == DecayKind::none ? TileDecay::none : TileDecay::rows>(tile, PackNothing{});
      } else {
        constexpr bool decays = D != DecayKind::none;
        const A beta = args.beta(b, 0, state_head);
        std::copy_n(k, keys, reads);
        if (decays) scale_rows(reads, Index(1), keys, decay, false);
        delta_over_tile<decays>(
            DeltaTile<A>{q, k, reads, v, &beta, o, errors, 1, keys, columns, state, state_stride, decay},
            PackNothing{});
      }
      unpack_rows(o, columns, head_matrix(args.o, b, head, heads));
    }
    if (!in_place) unpack_rows(state, columns, kept);
  });
}

}  // namespace chela::cpu::detail
