#pragma once
// Update rules of the chunk step: which value a token writes into the state. The additive rule writes v; a delta rule writes
// beta times what v adds to what the decayed state already answers for k.
#include "chela/chunk/decay.hpp"
#include "chela/tile/tile_ops.hpp"

namespace chela {

template <class R, class Ops, class D>
concept UpdateRule = requires(const R rule, Ops& ops, const D& decay, const typename Ops::Tile a,
                              typename Ops::Tile tile) {
  // values [tokens, value_dim] become what is written, given keys and the state before the chunk. The last argument is room
  // for scores [tokens, tokens].
  rule.written_values(ops, decay, a, tile, a, tile);
};

/// S_t = Diag(a_t) S_{t-1} + k_t v_t^T.
struct AdditiveRule {
  template <TileOps Ops, Decay<Ops> D>
  void written_values(Ops&, const D&, const typename Ops::Tile&, typename Ops::Tile&, const typename Ops::Tile&,
                      typename Ops::Tile&) const {}
};

/// S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T (arXiv 2406.06484, section 3.2; with decay 2412.06464).
/// Token i writes u_i = beta_i (v_i - what it reads with its key), and reads the state and the tokens before it just as a
/// query would. So with keys beta k as queries, scores A_ij and what they read from the state R,
///
///   u_i = beta_i v_i - R_i - sum_{j < i} A_ij u_j         or        (I + strict lower A) U = Diag(beta) V - R
template <TileOps Ops>
struct DeltaRule {
  using Tile = typename Ops::Tile;
  Tile beta;     ///< [tokens, 1]
  Tile reading;  ///< room for [tokens, key_dim]
  Tile met;      ///< room for [tokens, key_dim]

  template <Decay<Ops> D>
  void written_values(Ops& ops, const D& decay, const Tile& keys, Tile& values, const Tile& state_t,
                      Tile& scores_t) const {
    Tile queries = reading, own_keys = met;
    ops.copy(queries, keys);
    ops.copy(own_keys, keys);
    ops.multiply(queries, beta);
    ops.multiply(values, beta);
    decay.score(ops, scores_t, queries, own_keys);
    ops.subtract_product_abt(values, queries, state_t);
    ops.solve_unit_lower(values, scores_t);
  }
};

}  // namespace chela
