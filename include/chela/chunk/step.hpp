#pragma once
// Divide and conquer, one chunk at a time (CHELA, arXiv 2406.08128, section 3.2; arXiv 2312.06635, section 3). Within a chunk
// tokens meet in one dense product of scores; everything before the chunk is met through the state alone:
//
//   P^T  = K Q^T                        scores, kept where the key is not after the query       [tokens, tokens]
//   O^T  = S^T Q^T + V^T P^T            what the state knows, and what the chunk adds          [value_dim, tokens]
//   S^T += V^T K                        the chunk enters the state                          [value_dim, key_dim]
//
// State and output are kept transposed so that two kinds of product, A B^T and A^T B, suffice.
#include "chela/chunk/decay.hpp"
#include "chela/chunk/rule.hpp"
#include "chela/tile/tile_ops.hpp"

namespace chela {

/// The tiles of one chunk: loaded before the step, except for the last two, which it overwrites.
template <TileOps Ops>
struct ChunkTiles {
  typename Ops::Tile queries;   ///< [tokens, key_dim]
  typename Ops::Tile keys;      ///< [tokens, key_dim]
  typename Ops::Tile values;    ///< [tokens, value_dim]
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
template <TileOps Ops, Decay<Ops> D, UpdateRule<Ops> R>
void chunk_step(Ops& ops, ChunkTiles<Ops>& chunk, typename Ops::Tile& state_t, const D& decay, const R& rule) {
  rule.written_values(ops, chunk.keys, chunk.values, state_t);

  ops.set_product_abt(chunk.scores_t, chunk.keys, chunk.queries);
  ops.keep_upper(chunk.scores_t);  // row: key, column: query
  decay.weigh_scores(ops, chunk.scores_t);

  decay.enter_queries(ops, chunk.queries);
  read_state(ops, chunk, state_t);
  ops.add_product_atb(chunk.output_t, chunk.values, chunk.scores_t);

  decay.leave_keys(ops, chunk.keys);
  decay.age_state(ops, state_t);
  write_state(ops, chunk, state_t);
}

}  // namespace chela
