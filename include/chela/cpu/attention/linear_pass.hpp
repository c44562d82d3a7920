#pragma once
// One additive walk of linear attention over a sequence by token recurrence, forward or as part of a backward pass: the
// gradients of linear attention are linear attention again, with the roles of q, k, v exchanged and time reversed
// (cpu/attention/linear_backward.hpp).
#include <utility>

#include "chela/cpu/attention/chunked_pass.hpp"
#include "chela/cpu/attention/ended_tile.hpp"
#include "chela/cpu/attention/pass.hpp"
#include "chela/cpu/tile/pack_ahead.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// What a pass may do to its outputs tile by tile while they are in the cache: nothing.
///
/// Another one has heads_together() and fetch(tile, heads, ahead), and is called with an EndedTile: it stores the outputs itself.
/// It says how many `copies` that needs room for, and whether it `takes_all_columns` of a head together.
struct StoreOutputs {
  static constexpr Index copies = 0;
};

/// x . y of a row of two tiles that are packed alike, in panels of whole registers.
template <class S>
S packed_dot(const S* x, const S* y, Panels panels, Index row, Index columns) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr Index lanes = packet_traits<S>::size;
  Packet sums = pset1<Packet>(S(0));
  Index at = panels.at(row, 0);
  for (Index c = 0; c < columns; c += panels.width, at += panels.rows * panels.width)
    for (Index i = 0; i < panels.width; i += lanes)
      sums = pmadd(ploadu<Packet>(x + at + i), ploadu<Packet>(y + at + i), sums);
  return predux(sums);
}

/// Token recurrence over packed tiles, causal. Tiles take turns in two sets of scratch: while one is computed on, the next is
/// packed into the other.
template <ChunkPolicy P, bool Decays, ReadOrder R, class Finish, class Q, class K, class V, class O, class S>
class RecurrentTiles {
 public:
  using Pass = LinearPass<Q, K, V, O, S>;
  using A = Accumulator<O>;
  using Block = RegisterBlock<A>;

  RecurrentTiles(const Pass& pass, const Finish& finish, Index keys, Index columns, A* scratch)
      : pass_(pass), finish_(finish), heads_(pass.heads()) {
    const auto take = [&](Index size) { return std::exchange(scratch, scratch + size); };
    const Index factors = Decays ? round_up(std::max(keys, columns), Block::lanes) : 0;
    const Index key_rows = Block::key_panels(tile_len).size(keys),
                value_rows = Block::value_panels(tile_len).size(columns);
    for (Packed& p : packed_)
      p = {take(key_rows), take(key_rows), take(value_rows), take(tile_len * factors), take(factors)};
    partial_ = take(value_rows), out_ = take(tile_len * columns), write_ = take(tile_len * factors);
    copies_ = take(Finish::copies * tile_len * columns);
  }
  static Index scratch_size(Index keys, Index columns) {
    return 4 * Block::key_panels(tile_len).size(keys) + 3 * Block::value_panels(tile_len).size(columns) +
           (1 + Finish::copies) * tile_len * columns +
           (Decays ? (3 * tile_len + 2) * round_up(std::max(keys, columns), Block::lanes) : 0);
  }

  void operator()(const TileInTurn<A>& in_turn) {
    const TileAt<A>& at = in_turn.tile;
    const Packed& packed = packed_[in_turn.turn % 2];
    PackAhead<A> ahead;
    if (in_turn.turn == 0) pack(at, in_turn.next, packed_[0], ahead), ahead.finish();
    if (in_turn.next) pack(*in_turn.next, in_turn.later, packed_[(in_turn.turn + 1) % 2], ahead);
    ahead.spread_over(at.keys / Block::rows * ceil_div(at.padded, Block::columns));
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
  static constexpr bool finishes = !std::is_same_v<Finish, StoreOutputs>;

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
    RowFactors<A> q = constant(pass_.query_factor), k = constant(pass_.key_factor);
    bool keys_done = false, values_done = false;
    if constexpr (Decays) {
      const TileLogDecays<A> g = log_decays(at);
      const bool values = on_values(at);
      if (g.uniform()) {
        const RunningDecay<A> running{packed.read, write_, packed.at_end, pass_.query_factor, pass_.key_factor};
        packed.folded = running_decay(g, running, at.keys);
        if (packed.folded) q = {packed.read, 1}, k = {write_, 1};
      } else {
        // After a tile that could not be folded it is asked first whether this one can be.
        packed.folded = (packed_[0].folded || packed_[1].folded || columns_keep_enough(g.rows)) &&
                        (values ? fold_values(at, g, packed) : fold_keys(at, g, packed));
        keys_done = packed.folded && !values, values_done = packed.folded && values;
        if (values_done) q = {};
        if (later) ahead.fetch(log_decays(*later).rows);
      }
      if (!packed.folded) single_decays(g, packed.read, values ? at.padded : at.keys);
    }
    const auto rows = [&](auto x, RowFactors<A> factors, A* to) {
      ahead.pack(at.rows(x, heads_), later ? later->rows(x, heads_) : decltype(at.rows(x, heads_)){}, factors,
                 keys_done ? nullptr : to, Block::key_panels(at.count), at.keys);
    };
    rows(pass_.q, q, packed.q), rows(pass_.k, k, packed.k);
    ahead.pack(at.columns(pass_.v, heads_), later ? later->columns(pass_.v, heads_) : TensorView<const V, 2>{}, {},
               values_done ? nullptr : packed.v, Block::value_panels(at.count), at.padded);
    ahead.fetch(at.columns(pass_.o, heads_));
    if constexpr (finishes) finish_.fetch(at, heads_, ahead);
  }

  /// Packs q and k times what their own columns decay by.
  bool fold_keys(const TileAt<A>& at, const TileLogDecays<A>& g, Packed& packed) const {
    using namespace Eigen::internal;
    const Panels panels = Block::key_panels(at.count);
    const RegisterColumns<A> q = pack_or_view(at.rows(pass_.q, heads_), packed.q, panels, at.keys),
                             k = pack_or_view(at.rows(pass_.k, heads_), packed.k, panels, at.keys);
    return fold_columns(g, pass_.query_factor, pass_.key_factor, packed.at_end, at.keys, [&](Index column) {
      const Index to = panels.at(0, column);
      return [q = q.begin(column), k = k.begin(column), to_q = packed.q + to, to_k = packed.k + to, next = panels.width,
              q_next = q.row_stride, k_next = k.row_stride](const auto& read, const auto& write) mutable {
        using Packet = typename Block::Packet;
        pstoreu(to_q, pmul(ploadu<Packet>(q), read));
        pstoreu(to_k, pmul(ploadu<Packet>(k), write));
        q += q_next, k += k_next, to_q += next, to_k += next;
      };
    });
  }
  /// Packs v likewise, and leaves what the outputs are multiplied by.
  bool fold_values(const TileAt<A>& at, const TileLogDecays<A>& g, Packed& packed) const {
    using namespace Eigen::internal;
    const Panels panels = Block::value_panels(at.count);
    const RegisterColumns<A> v = pack_or_view(at.columns(pass_.v, heads_), packed.v, panels, at.padded);
    return fold_columns(g, pass_.query_factor, A(1), packed.at_end, at.padded, [&](Index column) {
      return [v = v.begin(column), to = packed.v + panels.at(0, column), read_to = packed.read + column,
              next = panels.width, v_next = v.row_stride,
              read_next = at.padded](const auto& read, const auto& write) mutable {
        using Packet = typename Block::Packet;
        pstoreu(to, pmul(ploadu<Packet>(v), write));
        pstoreu(read_to, read);
        v += v_next, to += next, read_to += read_next;
      };
    });
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
                       .out = out_,
                       .out_stride = at.padded,
                       .decay = packed.folded ? packed.at_end : packed.read,
                       .out_factor = packed.read};
    bool direct = false;
    if constexpr (std::is_same_v<O, A> && !finishes) {
      direct = o.strides[1] == 1 && at.width == at.padded;
      if (direct) tile.out = o.data, tile.out_stride = o.strides[0];
    }
    recur_over_tile<D, R>(tile, ahead);
    if constexpr (finishes) {
      // Where the outputs are scaled instead of the queries, that factor is not in the packed ones.
      const A factor = D == TileDecay::columns_at_end ? pass_.query_factor : A(1);
      A own[tile_len];
      for (Index t = 0; t < at.count; ++t)
        own[t] = factor * packed_dot(packed.q, packed.k, Block::key_panels(at.count), t, at.keys);
      finish_(EndedTile<A>{at, heads_, o, out_, at.padded, own, !packed.folded, copies_});
    } else if (!direct) {
      unpack_rows(out_, at.padded, o);
    }
  }

  const Pass& pass_;
  const Finish& finish_;
  Index heads_;
  Packed packed_[2];
  A *partial_, *out_, *write_, *copies_;
};

template <ChunkPolicy P, bool Decays, ReadOrder R, class Q, class K, class V, class O, class S, Executor E,
          class Finish = StoreOutputs>
void recurrent_pass(const LinearPass<Q, K, V, O, S>& pass, const E& executor, const Finish& finish = {}) {
  using Tiles = RecurrentTiles<P, Decays, R, Finish, Q, K, V, O, S>;
  const auto begin = [&](Index keys, Index columns, auto* scratch) {
    return Tiles(pass, finish, keys, columns, scratch);
  };
  StateWalk<Accumulator<O>, S> walk{pass.sequences, pass.heads(), pass.key_dim(), pass.value_dim(),
                                    pass.states,    pass.decay,   P.chunk_len,    P.value_tile};
  if constexpr (!std::is_same_v<Finish, StoreOutputs>) {
    if (Finish::takes_all_columns) walk.column_grain = round_up(walk.value_dim, walk.column_grain);
    walk.heads_together = finish.heads_together();
  }
  walk_states(walk, &Tiles::scratch_size, begin, executor);
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
      return chunked_pass<Decays, RuleKind::additive>(pass, {}, P.chunk_len, executor);
  }
  if constexpr (!chunked) recurrent_pass<PolicyConstant<P>::value, Decays, R>(pass, executor);
}

}  // namespace chela::cpu::detail
