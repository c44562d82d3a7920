#pragma once
// One token over a state in memory. That is bound by moving the state, so it is walked in memory's order, row by row, as the
// hardware expects: blocks of rows, or prefetching by hand, were measured to halve the rate.
#include <Eigen/Core>
#include <algorithm>

#include "chela/cpu/attention/recurrence.hpp"

namespace chela::cpu {

/// `q`, `k` and `decay` are [keys]; `v` and `o` [values], values a multiple of RegisterBlock::lanes.
template <class S>
struct StateSweep {
  const S *q, *k, *v;
  S* o;
  Index keys, values;
  S* state;
  Index state_stride;
  const S* decay;
};

/// o = S^T q, S = Diag(decay) S + k v^T; where not Writes, there is no k and v, and the state stays as it was. Each output sums
/// its keys in ascending order.
template <bool Decays, bool Writes, class S>
void sweep_state(const StateSweep<S>& sweep) {
  using namespace Eigen::internal;
  using Packet = typename RegisterBlock<S>::Packet;
  std::fill_n(sweep.o, sweep.values, S(0));
  for (Index row = 0; row < sweep.keys; ++row) {
    S* const state = sweep.state + row * sweep.state_stride;
    const Packet query = pset1<Packet>(sweep.q[row]), key = pset1<Packet>(Writes ? sweep.k[row] : S(0));
    const Packet keep = pset1<Packet>(Decays ? sweep.decay[row] : S(1));
    for (Index column = 0; column < sweep.values; column += RegisterBlock<S>::lanes) {
      Packet s = ploadu<Packet>(state + column);
      if constexpr (Decays) s = pmul(s, keep);
      if constexpr (Writes) {
        s = pmadd(key, ploadu<Packet>(sweep.v + column), s);
        pstoreu(state + column, s);
      }
      pstoreu(sweep.o + column, pmadd(query, s, ploadu<Packet>(sweep.o + column)));
    }
  }
}

}  // namespace chela::cpu
