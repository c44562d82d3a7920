#pragma once
// One additive walk of linear attention over a sequence, forward or as part of a backward pass: the gradients of linear
// attention are linear attention again, with the roles of q, k, v exchanged and time reversed (cpu/attention/linear.hpp).
#include "chela/cpu/attention/chunked_pass.hpp"
#include "chela/cpu/attention/state_walk.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// o_t = (query_factor q_t)^T S_t, S_t = decayed S_{t-1} + (key_factor k_t) v_t^T; or o_t reads before the token writes; or,
/// with `everything`, all outputs read the last state.
template <class Q, class K, class V, class O, class S = Accumulator<O>>
struct LinearPass {
  using A = Accumulator<O>;
  SequenceBatch sequences;
  TensorView<const Q, 4> q;  ///< [batch, token, heads / any divisor, key_dim]
  TensorView<const K, 4> k;  ///< likewise
  TensorView<const V, 4> v;  ///< [batch, token, heads / any divisor, value_dim]
  TensorView<O, 4> o;        ///< [batch, token, head, value_dim]
  WalkStates<S> states = {};
  A query_factor = 1, key_factor = 1;
  Everything everything = Everything::no;
  WalkDecay<A> decay = {};

  Index heads() const { return o.extents[2]; }
  template <ChunkPolicy P>
  StateWalk<A, S> walk() const {
    return {sequences, heads(), q.extents[3], o.extents[3], states, decay, P.chunk_len, P.value_tile};
  }
};

/// Token recurrence over packed tiles, causal.
template <ChunkPolicy P, bool Decays, ReadOrder R, class Q, class K, class V, class O, class S, Executor E>
void recurrent_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor) {
  using A = Accumulator<O>;
  constexpr Index tile_len = P.chunk_len;
  const Index heads = pass.heads();

  // One packed tile of q, k, v and o; with decay also its factors, their reciprocals and those at its end.
  const auto scratch_size = [](Index keys, Index columns) {
    return tile_len * (2 * keys + 2 * columns) + (Decays ? (2 * tile_len + 1) * std::max(keys, columns) : 0);
  };
  const auto body = [&](const TileAt<A>& at, const TileAt<A>* next, A* scratch) {
    A* q = scratch;
    A* k = q + tile_len * at.keys;
    A* v = k + tile_len * at.keys;
    A* o = v + tile_len * at.padded;
    pack_rows(at.rows(pass.q, heads), pass.query_factor, q, at.keys);
    pack_rows(at.rows(pass.k, heads), pass.key_factor, k, at.keys);
    pack_rows(at.columns(pass.v, heads), A(1), v, at.padded);

    FetchAhead fetch_ahead;
    if (next) {
      fetch_ahead.add(next->rows(pass.q, heads)), fetch_ahead.add(next->rows(pass.k, heads));
      fetch_ahead.add(next->columns(pass.v, heads)), fetch_ahead.add(next->columns(pass.o, heads));
    }
    PackedTile<A> tile{q, k, v, o, at.count, at.keys, at.padded, at.state, at.padded};
    if constexpr (!Decays) {
      recur_over_tile<TileDecay::none, R>(tile, fetch_ahead);
    } else {
      const TileLogDecays<A> g = pass.decay.tile(at, heads);
      const bool uniform = g.uniform(), on_values = pass.decay.side == DecaySide::values && !uniform;
      const Index padded = on_values ? at.padded : at.keys;
      A* kept = o + tile_len * at.padded;
      A* inverse = kept + tile_len * std::max(at.keys, at.padded);
      A* at_end = inverse + tile_len * std::max(at.keys, at.padded);
      if (!running_decay(g, kept, inverse, padded)) {
        single_decays(g, kept, padded);
        tile.decay = kept;
        if (on_values)
          recur_over_tile<TileDecay::columns, R>(tile, fetch_ahead);
        else
          recur_over_tile<TileDecay::rows, R>(tile, fetch_ahead);
      } else {
        scale_rows(on_values ? v : k, at.count, padded, inverse, uniform);
        if (!on_values) scale_rows(q, at.count, padded, kept, uniform);
        if (uniform)
          std::fill_n(at_end, padded, kept[at.count - 1]);
        else
          std::copy_n(kept + (at.count - 1) * padded, padded, at_end);
        tile.decay = at_end;
        if (on_values) {
          recur_over_tile<TileDecay::columns_at_end, R>(tile, fetch_ahead);
          scale_rows(o, at.count, padded, kept, uniform);
        } else {
          recur_over_tile<TileDecay::rows_at_end, R>(tile, fetch_ahead);
        }
      }
    }
    unpack_rows(o, at.padded, at.columns(pass.o, heads));
  };
  walk_states(pass.template walk<P>(), scratch_size, body, executor);
}

/// The policy's evaluation, or the measured default: the recurrence for causal passes (on a CPU it runs at the multiply-add
/// rate, and chunks take about 1.5 times as long). Where every token sees all there is no recurrence, only two products. Chunks
/// decay keys on the way to each token; walks that decay otherwise call the recurrence themselves, as backward passes do.
template <ChunkPolicy P, bool Decays, ReadOrder R = ReadOrder::after_write, class Q, class K, class V, class O, class S,
          Executor E>
void run_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor) {
  constexpr bool reads_own = R == ReadOrder::after_write, chunked = reads_own && P.evaluation == Evaluation::chunked;
  if constexpr (chunked || (reads_own && !Decays)) {
    if (chunked || pass.everything != Everything::no)
      return chunked_pass<Decays, RuleKind::additive>(ChunkedPass<Q, K, V, O, S>{.sequences = pass.sequences,
                                                                                 .q = pass.q,
                                                                                 .k = pass.k,
                                                                                 .v = pass.v,
                                                                                 .o = pass.o,
                                                                                 .states = pass.states,
                                                                                 .query_factor = pass.query_factor,
                                                                                 .key_factor = pass.key_factor,
                                                                                 .everything = pass.everything,
                                                                                 .log_decay = pass.decay.log_decay},
                                                      P.chunk_len, executor);
  }
  if constexpr (!chunked) recurrent_pass<PolicyConstant<P>::value, Decays, R>(pass, executor);
}

}  // namespace chela::cpu::detail
