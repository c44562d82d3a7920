#pragma once
// Divide and conquer, one chunk at a time (CHELA, arXiv 2406.08128, section 3.2; arXiv 2312.06635, section 3). Within a chunk
// tokens meet in one dense product of scores; everything before the chunk is met through the state alone:
//
//   U    = what the rule writes: V, or for a delta rule V less what is already known          [tokens, value_dim]
//   P^T  = K Q^T, decayed from key to query, kept where the key is not after the query        [tokens, tokens]
//   O^T  = S^T Q^T + U^T P^T            what the state knows, and what the chunk adds         [value_dim, tokens]
//   S^T  = S^T, aged, + U^T K           the chunk enters the state                            [value_dim, key_dim]
//
// with Q decayed from the chunk's beginning, and K to its end, where they meet the state. State and output are kept transposed
// so that two kinds of product, A B^T and A^T B, suffice.
#include "chela/chunk/decay.hpp"
#include "chela/chunk/rule.hpp"
#include "chela/tile/tile_ops.hpp"

namespace chela {

/// The tiles of one chunk: loaded before the step, except for the last two, which it overwrites.
template <TileOps Ops>
struct ChunkTiles {
  typename Ops::Tile queries;   ///< [tokens, key_dim]; the step decays them in place
  typename Ops::Tile keys;      ///< [tokens, key_dim]; likewise
  typename Ops::Tile values;    ///< [tokens, value_dim]; become what is written
  typename Ops::Tile scores_t;  ///< [tokens, tokens]
  typename Ops::Tile output_t;  ///< [value_dim, tokens]
};

/// What the chunk's queries read from the state before it: O^T = S^T Q^T.
template <TileOps Ops>
void read_state(Ops& ops, ChunkTiles<Ops>& chunk, const typename Ops::Tile& state_t) {
  ops.set_product_abt(chunk.output_t, state_t, chunk.queries);
}

/// The chunk enters the state: S^T += V^T K.
template <TileOps Ops>
void write_state(Ops& ops, const ChunkTiles<Ops>& chunk, typename Ops::Tile& state_t) {
  ops.add_product_atb(state_t, chunk.values, chunk.keys);
}

/// One causal chunk: outputs of its tokens, and the state after it.
template <TileOps Ops, Decay<Ops> D, UpdateRule<Ops, D> R>
void chunk_step(Ops& ops, ChunkTiles<Ops>& chunk, typename Ops::Tile& state_t, const D& decay, const R& rule) {
  rule.written_values(ops, decay, chunk.keys, chunk.values, state_t, chunk.scores_t);
  decay.score(ops, chunk.scores_t, chunk.queries, chunk.keys);
  read_state(ops, chunk, state_t);
  ops.add_product_atb(chunk.output_t, chunk.values, chunk.scores_t);
  decay.age(ops, state_t);
  write_state(ops, chunk, state_t);
}

}  // namespace chela
