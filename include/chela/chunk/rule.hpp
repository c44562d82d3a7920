#pragma once
// Update rules of the chunk step: which value a token writes into the state. The additive rule writes v; a delta rule writes
// what v adds to what the state already answers for k.

namespace chela {

template <class R, class Ops>
concept UpdateRule = requires(const R rule, Ops& ops, const typename Ops::Tile keys, typename Ops::Tile values,
                              const typename Ops::Tile state_t) {
  rule.written_values(ops, keys, values, state_t);  // values [tokens, value_dim] become what is written
};

/// S_t = S_{t-1} + k_t v_t^T.
struct AdditiveRule {
  template <class Ops>
  void written_values(Ops&, const typename Ops::Tile&, typename Ops::Tile&, const typename Ops::Tile&) const {}
};

}  // namespace chela
