#pragma once
// Decay policies of the chunk step: how the weight of a token falls between being written into the state and being read. With
// b the cumulative log-decay inside a chunk and G its last row (per key, or one number for all keys), a policy applies
//
//   enter_queries   q_i   *= exp(b_i)         what a query still sees of the state before the chunk
//   weigh_scores    p_ij  *= exp(b_i - b_j)   what it sees of a token inside the chunk, j <= i
//   leave_keys      k_j   *= exp(G - b_j)     what is left of a token at the end of the chunk
//   age_state       S     *= exp(G)           what is left of the earlier state
//
// Every exponent is <= 0, so nothing can overflow.

namespace chela {

template <class D, class Ops>
concept Decay = requires(const D decay, Ops& ops, typename Ops::Tile tile) {
  decay.enter_queries(ops, tile);
  decay.weigh_scores(ops, tile);
  decay.leave_keys(ops, tile);
  decay.age_state(ops, tile);
};

/// Decay of exactly 1: CHELA and the linear transformer.
struct NoDecay {
  template <class Ops>
  void enter_queries(Ops&, typename Ops::Tile&) const {}
  template <class Ops>
  void weigh_scores(Ops&, typename Ops::Tile&) const {}
  template <class Ops>
  void leave_keys(Ops&, typename Ops::Tile&) const {}
  template <class Ops>
  void age_state(Ops&, typename Ops::Tile&) const {}
};

}  // namespace chela
