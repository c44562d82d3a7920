#pragma once
// One additive walk of linear attention over a sequence, forward or as part of a backward pass: the gradients of linear
// attention are linear attention again, with the roles of q, k, v exchanged and time reversed (cpu/attention/linear.hpp).
#include "chela/chunk/step.hpp"
#include "chela/cpu/attention/state_walk.hpp"
#include "chela/cpu/tile/eigen_tile_ops.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// Whether all outputs read the last state, and which side is then divided by the sequence's token count.
enum class Everything { no, over_queries, over_keys };

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

/// Dense products inside each chunk, a carried state between chunks; causal, or two sweeps where every token sees all.
template <ChunkPolicy P, class Q, class K, class V, class O, class S, Executor E>
void chunked_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor) {
  using A = Accumulator<O>;
  using Ops = EigenTileOps<A>;
  using Tile = typename Ops::Tile;
  const Index heads = pass.heads(), key_dim = pass.q.extents[3], value_dim = pass.o.extents[3];
  const Index shared = pass.states.stored() ? heads / pass.states.stored_heads() : 1;
  const Index chunk_len = P.chunk_len;

  // Each worker: the transposed states of the heads that share one, then the tiles of a chunk.
  Tensor<A, 2> scratch(executor.workers(),
                       shared * value_dim * key_dim + chunk_len * (2 * key_dim + 2 * value_dim + chunk_len));

  executor.for_each(pass.sequences.size() * (heads / shared), [&](Index task, int worker) {
    const Index index = task / (heads / shared), first = task % (heads / shared) * shared;
    const Sequence sequence = pass.sequences[index];
    const Index tokens = sequence.count, entry = pass.states.entry(index);
    const A average = pass.everything == Everything::no ? A(1) : A(1) / A(std::max<Index>(tokens, 1));
    const A query_factor = pass.query_factor * (pass.everything == Everything::over_queries ? average : A(1));
    const A key_factor = pass.key_factor * (pass.everything == Everything::over_keys ? average : A(1));
    Ops ops;
    A* states = &scratch(worker, 0);
    A* tiles = states + shared * value_dim * key_dim;

    const auto state_of = [&](Index head) {
      return Tile(states + (head - first) * value_dim * key_dim, value_dim, key_dim);
    };
    const auto rows_of = [&](auto x, Index head, Index begin, Index count) {
      return run(head_matrix(x, sequence.batch, head, heads), 0, sequence.begin + begin, count);
    };
    const auto for_each_chunk = [&](Index head, auto&& step) {
      for (Index begin = 0; begin < tokens; begin += chunk_len) {
        const Index count = std::min(chunk_len, tokens - begin);
        A* memory = tiles;
        const auto next_tile = [&](Index rows, Index columns) {
          memory += rows * columns;
          return Tile(memory - rows * columns, rows, columns);
        };
        ChunkTiles<Ops> chunk{next_tile(count, key_dim), next_tile(count, key_dim), next_tile(count, value_dim),
                              next_tile(count, count), next_tile(value_dim, count)};
        ops.load_scaled(chunk.queries, rows_of(pass.q, head, begin, count), query_factor);
        ops.load_scaled(chunk.keys, rows_of(pass.k, head, begin, count), key_factor);
        ops.load(chunk.values, rows_of(pass.v, head, begin, count));
        step(chunk, rows_of(pass.o, head, begin, count));
      }
    };

    for (Index head = first; head < first + shared; ++head) {
      Tile state_t = state_of(head);
      ops.zero(state_t);
      if (pass.states.initial.present())
        ops.load(state_t, transposed(state_matrix(pass.states.initial, entry, head, heads), 0, 1));
    }
    for (Index head = first; head < first + shared; ++head) {
      Tile state_t = state_of(head);
      if (pass.everything != Everything::no) {
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto) { write_state(ops, chunk, state_t); });
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto o) {
          read_state(ops, chunk, state_t);
          ops.store_transposed(chunk.output_t, o);
        });
      } else {
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto o) {
          chunk_step(ops, chunk, state_t, NoDecay{}, AdditiveRule{});
          ops.store_transposed(chunk.output_t, o);
        });
      }
    }
    for (Index head = first; head < first + shared; ++head)
      if (stores_state(pass.states.final, head, heads))
        ops.store_transposed(state_of(head), state_matrix(pass.states.final, entry, head, heads));
  });
}

/// The policy's evaluation, or the measured default: the recurrence for causal passes (on a CPU it runs at the multiply-add
/// rate and the chunked form at less than half of it). Where every token sees all there is no recurrence, only two products.
template <ChunkPolicy P, bool Decays, ReadOrder R = ReadOrder::after_write, class Q, class K, class V, class O, class S,
          Executor E>
void run_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor) {
  if constexpr (!Decays && R == ReadOrder::after_write) {
    if (pass.everything != Everything::no || P.evaluation == Evaluation::chunked)
      return chunked_pass<PolicyConstant<P>::value>(pass, executor);
  }
  recurrent_pass<PolicyConstant<P>::value, Decays, R>(pass, executor);
}

}  // namespace chela::cpu::detail
