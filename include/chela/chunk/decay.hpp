#pragma once
// Decay policies of the chunk step: how the weight of a token falls between being written into the state and being read. With
// a_i in [0, 1] the decay before token i (one per key, or one number for all keys) and b_i = log a_0 + ... + log a_i counted
// from the chunk's first token, G that of its last, a policy gives
//
//   score   p_ij  = sum over keys of q_i k_j exp(b_i - b_j)   what a query sees of a token inside the chunk, j <= i
//           q_i  *= exp(b_i)                                  what it still sees of the state before the chunk
//           k_j  *= exp(G - b_j)                              what is left of a token at the end of the chunk
//   age     S    *= exp(G)                                    what is left of the earlier state
//
// Each exponential is formed as the product of the decays between its two tokens. Products of numbers in [0, 1] neither
// overflow nor cancel, and a reset (log-decay -infinity, decay 0) is no special case: whatever lies before it weighs 0.
#include <algorithm>

#include "chela/tile/tile_ops.hpp"

namespace chela {

template <class D, class Ops>
concept Decay = requires(const D decay, Ops& ops, typename Ops::Tile tile) {
  decay.score(ops, tile, tile,
              tile);     // scores_t [tokens, tokens] (row: key, column: query), queries, keys [tokens, key_dim]
  decay.age(ops, tile);  // state_t [value_dim, key_dim]
};

/// Decay of exactly 1: CHELA, linear transformer, DeltaNet.
struct NoDecay {
  template <TileOps Ops>
  void score(Ops& ops, typename Ops::Tile& scores_t, const typename Ops::Tile& queries,
             const typename Ops::Tile& keys) const {
    ops.set_product_abt(scores_t, keys, queries);
    ops.keep_upper(scores_t);
  }
  template <TileOps Ops>
  void age(Ops&, typename Ops::Tile&) const {}
};

/// One decay for all keys of a token: RetNet, Mamba-2, Gated DeltaNet.
template <TileOps Ops>
struct ScalarDecay {
  using Tile = typename Ops::Tile;
  Tile decays;   ///< [tokens, 1]: loaded with the log-decays, then prepared
  Tile entered;  ///< [tokens, 1]: exp(b_i)
  Tile spans;    ///< [tokens, tokens]: exp(b_i - b_j) in row j, column i

  void prepare(Ops& ops) {
    ops.exp(decays);
    ops.set_running_product(entered, decays);
    ops.set_spans(spans, decays);
  }
  void score(Ops& ops, Tile& scores_t, Tile& queries, Tile& keys) const {
    ops.set_product_abt(scores_t, keys, queries);
    ops.keep_upper(scores_t);
    ops.multiply(scores_t, spans);
    ops.multiply(queries, entered);
    ops.multiply(keys, ops.part(spans, 0, last(ops), last(ops) + 1, 1));
  }
  void age(Ops& ops, Tile& state_t) const { ops.multiply(state_t, ops.part(entered, last(ops), 0, 1, 1)); }

 private:
  Index last(Ops& ops) const { return ops.rows(decays) - 1; }
};

/// A decay for each key: GLA, HGRN-2, KDA. The weight of a score then depends on the key as well, and no longer factors out
/// of its product. Queries therefore come in blocks. A query meets earlier blocks in a product, through the place between
/// them: it is decayed from there, and their keys have been decayed up to there. Within its own block it meets keys in turn.
template <TileOps Ops>
struct KeyDecay {
  using Tile = typename Ops::Tile;
  static constexpr Index block_rows = 16;
  static constexpr Index blocks(Index tokens) { return ceil_div(tokens, block_rows); }

  Tile decays;   ///< [tokens, key_dim]: loaded with the log-decays, then prepared
  Tile entered;  ///< [tokens, key_dim]: products of the decays from the beginning of the token's block
  Tile through;  ///< [blocks, key_dim]: exp(b) at the end of each block

  void prepare(Ops& ops) {
    ops.exp(decays);
    for_each_block(ops, [&](Index block, Index begin, Index count) {
      Tile within = part_rows(ops, entered, begin, count), end = part_rows(ops, through, block, 1);
      ops.set_running_product(within, part_rows(ops, decays, begin, count));
      ops.copy(end, part_rows(ops, within, count - 1, 1));
    });
    ops.set_running_product(through, through);
  }
  void score(Ops& ops, Tile& scores_t, Tile& queries, Tile& keys) const {
    ops.zero(scores_t);
    for_each_block(ops, [&](Index block, Index begin, Index count) {
      Tile q = part_rows(ops, queries, begin, count), k = part_rows(ops, keys, begin, count);
      Tile own = ops.part(scores_t, begin, begin, count, count);
      ops.meet_in_turn(own, k, q, part_rows(ops, decays, begin, count));
      const Tile within = part_rows(ops, entered, begin, count);
      ops.multiply(q, within);
      if (block == 0) return;
      Tile earlier_keys = part_rows(ops, keys, 0, begin), earlier = ops.part(scores_t, 0, begin, begin, count);
      ops.set_product_abt(earlier, earlier_keys, q);
      ops.multiply(earlier_keys, part_rows(ops, within, count - 1, 1));
      ops.multiply(q, part_rows(ops, through, block - 1, 1));
    });
  }
  void age(Ops& ops, Tile& state_t) const { ops.multiply(state_t, part_rows(ops, through, ops.rows(through) - 1, 1)); }

 private:
  static Tile part_rows(Ops& ops, const Tile& tile, Index begin, Index count) {
    return ops.part(tile, begin, 0, count, ops.columns(tile));
  }
  template <class F>
  void for_each_block(Ops& ops, const F& f) const {
    const Index tokens = ops.rows(decays);
    for (Index begin = 0; begin < tokens; begin += block_rows)
      f(begin / block_rows, begin, std::min(block_rows, tokens - begin));
  }
};

}  // namespace chela
