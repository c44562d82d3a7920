#pragma once
// One additive walk of linear attention over a sequence, forward or as part of a backward pass: the gradients of linear
// attention are linear attention again, with the roles of q, k, v exchanged and time reversed (cpu/attention/linear.hpp).
#include <utility>

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

/// Token recurrence over packed tiles, causal. Tiles take turns in two sets of scratch: while one is computed on, the next is
/// packed into the other.
template <ChunkPolicy P, bool Decays, ReadOrder R, class Q, class K, class V, class O, class S>
class RecurrentTiles {
 public:
  using Pass = LinearPass<Q, K, V, O, S>;
  using A = Accumulator<O>;

  RecurrentTiles(const Pass& pass, Index keys, Index columns, A* scratch) : pass_(pass), heads_(pass.heads()) {
    const auto take = [&](Index size) { return std::exchange(scratch, scratch + size); };
    const Index factors = Decays ? std::max(keys, columns) : 0;
    for (Packed& p : packed_)
      p = {take(tile_len * keys), take(tile_len * keys), take(tile_len * columns), take(tile_len * factors),
           take(factors)};
    partial_ = take(tile_len * columns), write_ = take(tile_len * factors);
  }
  static Index scratch_size(Index keys, Index columns) {
    return tile_len * (4 * keys + 3 * columns) + (Decays ? (3 * tile_len + 2) * std::max(keys, columns) : 0);
  }

  void operator()(const TileInTurn<A>& in_turn) {
    const TileAt<A>& at = in_turn.tile;
    const Packed& packed = packed_[in_turn.turn % 2];
    PackAhead<A> ahead;
    if (in_turn.turn == 0) pack(at, in_turn.next, packed_[0], ahead), ahead.finish();
    if (in_turn.next) pack(*in_turn.next, in_turn.later, packed_[(in_turn.turn + 1) % 2], ahead);
    if constexpr (!Decays)
      run<TileDecay::none>(at, packed, ahead);
    else if (on_values(at))
      packed.folded ? run<TileDecay::columns_at_end>(at, packed, ahead) : run<TileDecay::columns>(at, packed, ahead);
    else
      packed.folded ? run<TileDecay::rows_at_end>(at, packed, ahead) : run<TileDecay::rows>(at, packed, ahead);
    ahead.finish();
  }

 private:
  static constexpr Index tile_len = P.chunk_len;

  /// One tile's q, k and v; with decay also what q or o is multiplied by, and what the tile keeps of the state. Where that is
  /// too little to be folded into them, `read` holds the decays themselves.
  struct Packed {
    A *q, *k, *v, *read, *at_end;
    bool folded = true;
  };

  TileLogDecays<A> log_decays(const TileAt<A>& at) const { return pass_.decay.tile(at, heads_); }
  /// Whether value columns decay, each by itself; if all of a token's state decays alike, that is left to the keys.
  bool on_values(const TileAt<A>& at) const {
    return pass_.decay.side == DecaySide::values && !log_decays(at).uniform();
  }

  static RowFactors<A> constant(const A& factor) { return factor == A(1) ? RowFactors<A>{} : RowFactors<A>{&factor}; }

  /// Packs a tile, or queues it. `later` is the tile after it, or null.
  void pack(const TileAt<A>& at, const TileAt<A>* later, Packed& packed, PackAhead<A>& ahead) {
    RowFactors<A> q = constant(pass_.query_factor), k = constant(pass_.key_factor), v;
    if constexpr (Decays) {
      const TileLogDecays<A> g = log_decays(at);
      const bool values = on_values(at);
      const Index padded = values ? at.padded : at.keys;
      const RunningDecay<A> running{packed.read, write_, packed.at_end, pass_.query_factor,
                                    values ? A(1) : pass_.key_factor};
      packed.folded = running_decay(g, running, padded);
      if (later && !g.uniform()) ahead.fetch(log_decays(*later).rows);
      const auto factors = [&](const A* rows) { return RowFactors<A>{rows, g.uniform() ? 1 : padded, !g.uniform()}; };
      if (!packed.folded)
        single_decays(g, packed.read, padded);
      else if (values)
        q = {}, v = factors(write_);
      else
        q = factors(packed.read), k = factors(write_);
    }
    const auto rows = [&](auto x, RowFactors<A> factors, A* to) {
      ahead.pack(at.rows(x, heads_), later ? later->rows(x, heads_) : decltype(at.rows(x, heads_)){}, factors, to,
                 at.keys);
    };
    rows(pass_.q, q, packed.q), rows(pass_.k, k, packed.k);
    ahead.pack(at.columns(pass_.v, heads_), later ? later->columns(pass_.v, heads_) : TensorView<const V, 2>{}, v,
               packed.v, at.padded);
    ahead.fetch(at.columns(pass_.o, heads_));
  }

  template <TileDecay D>
  void run(const TileAt<A>& at, const Packed& packed, PackAhead<A>& ahead) const {
    const TensorView<O, 2> o = at.columns(pass_.o, heads_);
    PackedTile<A> tile{.q = packed.q,
                       .k = packed.k,
                       .v = packed.v,
                       .partial = partial_,
                       .tokens = at.count,
                       .keys = at.keys,
                       .values = at.padded,
                       .state = at.state,
                       .state_stride = at.padded,
                       .out = partial_,
                       .out_stride = at.padded,
                       .decay = packed.folded ? packed.at_end : packed.read,
                       .out_factor = packed.read};
    bool direct = false;
    if constexpr (std::is_same_v<O, A>) {
      direct = o.strides[1] == 1 && at.width == at.padded;
      if (direct) tile.out = o.data, tile.out_stride = o.strides[0];
    }
    recur_over_tile<D, R>(tile, ahead);
    if (!direct) unpack_rows(partial_, at.padded, o);
  }

  const Pass& pass_;
  Index heads_;
  Packed packed_[2];
  A *partial_, *write_;
};

template <ChunkPolicy P, bool Decays, ReadOrder R, class Q, class K, class V, class O, class S, Executor E>
void recurrent_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor) {
  using Tiles = RecurrentTiles<P, Decays, R, Q, K, V, O, S>;
  const auto begin = [&](Index keys, Index columns, auto* scratch) { return Tiles(pass, keys, columns, scratch); };
  walk_states(pass.template walk<P>(), &Tiles::scratch_size, begin, executor);
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
