#pragma once
// The delta rule over a packed tile of tokens. A token must know what the whole state answers for its key before it can write,
// so the state cannot stay in registers; but the state's columns are independent, and one sweep over a block of columns does
// it all at once: decay, write this token, read its query, and read the next token's key.
#include <Eigen/Core>

#include "chela/cpu/attention/recurrence.hpp"

namespace chela::cpu {

/// One packed tile of the forward walk, with `reads` [tokens, keys] the keys by which each token reads the state before its
/// own decay is applied: Diag(a_t) k_t, so that the sweep of token t - 1 can read for token t. `decay` is [tokens, keys], or
/// null for none.
template <class S>
struct DeltaTile {
  const S *q, *k, *reads, *v;
  const S* beta;  ///< [tokens]
  S* o;           ///< [tokens, values]
  S* errors;      ///< [tokens, values]: v_t - (Diag(a_t) S_{t-1})^T k_t
  Index tokens, keys, values;
  S* state;
  Index state_stride;
  const S* decay = nullptr;
};

namespace detail {

/// sum_r coefficients[r] * state[r, column...].
template <class S, int Vectors>
CHELA_ALWAYS_INLINE void read_columns(const S* coefficients, Index keys, const S* state, Index stride,
                                      typename RegisterBlock<S>::Packet (&sum)[Vectors]) {
  using namespace Eigen::internal;
  using Packet = typename RegisterBlock<S>::Packet;
  constexpr int lanes = RegisterBlock<S>::lanes;
  CHELA_UNROLL
  for (int n = 0; n < Vectors; ++n) sum[n] = pset1<Packet>(S(0));
  for (Index r = 0; r < keys; ++r) {
    const Packet c = pset1<Packet>(coefficients[r]);
    CHELA_UNROLL
    for (int n = 0; n < Vectors; ++n) sum[n] = pmadd(c, ploadu<Packet>(state + r * stride + n * lanes), sum[n]);
  }
}

}  // namespace detail

/// u_t = beta_t e_t, S_t = Diag(a_t) S_{t-1} + k_t u_t^T, o_t = S_t^T q_t.
template <bool Decays, class S, class Ahead>
void delta_over_tile(const DeltaTile<S>& tile, Ahead&& ahead) {
  using namespace Eigen::internal;
  using Block = RegisterBlock<S>;
  using Packet = typename Block::Packet;
  constexpr int lanes = Block::lanes;
  const Index keys = tile.keys, values = tile.values;

  for_each_strip<S>(values, [&](auto strip, Index column) {
    constexpr int vectors = decltype(strip)::value;
    S* const state = tile.state + column;
    Packet known[vectors];  // what the state answers for the next token's key
    detail::read_columns(tile.reads, keys, state, tile.state_stride, known);
    for (Index t = 0; t < tile.tokens; ++t) {
      const bool last = t + 1 == tile.tokens;
      const S *k = tile.k + t * keys, *q = tile.q + t * keys, *next = tile.reads + (last ? t : t + 1) * keys;
      const S* a = Decays ? tile.decay + t * keys : nullptr;
      const Index at = t * values + column;
      Packet written[vectors], sum[vectors];
      CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) {
        const Packet error = psub(ploadu<Packet>(tile.v + at + n * lanes), known[n]);
        pstoreu(tile.errors + at + n * lanes, error);
        written[n] = pmul(error, pset1<Packet>(tile.beta[t]));
        sum[n] = known[n] = pset1<Packet>(S(0));
      }
      for (Index r = 0; r < keys; ++r) {
        S* row = state + r * tile.state_stride;
        const Packet key = pset1<Packet>(k[r]), query = pset1<Packet>(q[r]), next_key = pset1<Packet>(next[r]);
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) {
          Packet s = ploadu<Packet>(row + n * lanes);
          if constexpr (Decays) s = pmul(s, pset1<Packet>(a[r]));
          s = pmadd(key, written[n], s);
          pstoreu(row + n * lanes, s);
          sum[n] = pmadd(query, s, sum[n]);
          known[n] = pmadd(next_key, s, known[n]);
        }
      }
      CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) pstoreu(tile.o + at + n * lanes, sum[n]);
      ahead();
    }
  });
}

/// One packed tile of the walk back in time, over the gradient X of the state. Tokens are in walking order.
template <class S>
struct DeltaAdjointTile {
  const S *q, *k;   ///< [tokens, keys], q times the scale
  const S* reads;   ///< [tokens, keys]: Diag(a) k with the decay met before the token
  const S* qk;      ///< [tokens]: q_t . k_t
  const S* grad_o;  ///< [tokens, values]
  const S* beta;    ///< [tokens]
  S* grad_u;        ///< [tokens, values]
  Index tokens, keys, values;
  S* state;
  Index state_stride;
  const S* decay = nullptr;  ///< [tokens, keys], or null for none
};

/// X = Diag(a) X + q_t dO_t^T, dU_t = X^T k_t, then X -= beta_t k_t dU_t^T.
template <bool Decays, class S, class Ahead>
void delta_adjoint_over_tile(const DeltaAdjointTile<S>& tile, Ahead&& ahead) {
  using namespace Eigen::internal;
  using Block = RegisterBlock<S>;
  using Packet = typename Block::Packet;
  constexpr int lanes = Block::lanes;
  const Index keys = tile.keys, values = tile.values;

  for_each_strip<S>(values, [&](auto strip, Index column) {
    constexpr int vectors = decltype(strip)::value;
    S* const state = tile.state + column;
    Packet known[vectors];
    detail::read_columns(tile.reads, keys, state, tile.state_stride, known);
    for (Index t = 0; t < tile.tokens; ++t) {
      const bool last = t + 1 == tile.tokens;
      const S *k = tile.k + t * keys, *q = tile.q + t * keys, *next = tile.reads + (last ? t : t + 1) * keys;
      const S* a = Decays ? tile.decay + t * keys : nullptr;
      const Index at = t * values + column;
      Packet entering[vectors], leaving[vectors];
      CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) {
        entering[n] = ploadu<Packet>(tile.grad_o + at + n * lanes);
        const Packet grad_u = pmadd(pset1<Packet>(tile.qk[t]), entering[n], known[n]);
        pstoreu(tile.grad_u + at + n * lanes, grad_u);
        leaving[n] = pmul(grad_u, pset1<Packet>(-tile.beta[t]));
        known[n] = pset1<Packet>(S(0));
      }
      for (Index r = 0; r < keys; ++r) {
        S* row = state + r * tile.state_stride;
        const Packet key = pset1<Packet>(k[r]), query = pset1<Packet>(q[r]), next_key = pset1<Packet>(next[r]);
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) {
          Packet x = ploadu<Packet>(row + n * lanes);
          if constexpr (Decays) x = pmul(x, pset1<Packet>(a[r]));
          x = pmadd(query, entering[n], x);
          x = pmadd(key, leaving[n], x);
          pstoreu(row + n * lanes, x);
          known[n] = pmadd(next_key, x, known[n]);
        }
      }
      ahead();
    }
  });
}

}  // namespace chela::cpu
