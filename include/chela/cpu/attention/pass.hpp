#pragma once
// What one walk of linear attention over a sequence reads, writes and carries, however it is evaluated.
#include <algorithm>

#include "chela/cpu/attention/state_walk.hpp"

namespace chela::cpu::detail {

/// Whether all outputs read the last state, and which side is then divided by the sequence's token count.
enum class Everything { no, over_queries, over_keys };

/// o_t = (query_factor q_t)^T S_t, S_t = decayed S_{t-1} + (key_factor k_t) v_t^T; or o_t reads before the token writes; or,
/// with `everything` and without decay, all outputs read the last state.
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
  Index key_dim() const { return q.extents[3]; }
  Index value_dim() const { return o.extents[3]; }
  /// The factor of one side for a sequence.
  A factor_of(Everything side, Index sequence) const {
    const A factor = side == Everything::over_queries ? query_factor : key_factor;
    return everything == side ? factor / A(std::max<Index>(sequences[sequence].count, 1)) : factor;
  }
};

}  // namespace chela::cpu::detail
