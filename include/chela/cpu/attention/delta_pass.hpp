#pragma once
// The two walks of the delta rule: forward, and back in time over the gradient of the state. All else in its backward pass is
// additive (cpu/attention/linear_backward.hpp).
#include <array>
#include <utility>

#include "chela/cpu/attention/chunked_pass.hpp"
#include "chela/cpu/attention/delta_recurrence.hpp"
#include "chela/cpu/attention/state_walk.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// Forward: o_t = (query_factor q_t)^T S_t and, if present, the errors e_t = v_t - (Diag(a_t) S_{t-1})^T k_t.
template <class T, class O, class S = Accumulator<T>>
struct DeltaPass {
  using A = Accumulator<T>;
  SequenceBatch sequences;
  TensorView<const T, 4> q, k, v;  ///< [batch, token, heads / any divisor, dim]
  TensorView<const A, 3> beta;     ///< [batch, token, heads / any divisor]
  TensorView<O, 4> o = {};         ///< [batch, token, head, value_dim], or absent
  TensorView<A, 4> errors = {};    ///< [batch, token, head, value_dim], or absent
  WalkStates<S> states = {};
  A query_factor = 1;
  WalkDecay<A> decay = {};  ///< on keys
  Index heads = 0;
};

/// Back in time, tensors already reversed: dU_t = X_t^T k_t with X_t = decayed (X_{t+1} - beta_{t+1} k_{t+1} dU_{t+1}^T)
/// + query_factor q_t dO_t^T.
template <class T>
struct DeltaAdjointPass {
  using A = Accumulator<T>;
  SequenceBatch sequences;
  TensorView<const T, 4> q, k;
  TensorView<const A, 3> beta;
  TensorView<const T, 4> grad_o;  ///< [batch, token, head, value_dim]
  TensorView<A, 4> grad_u;        ///< [batch, token, head, value_dim]
  WalkStates<A> states = {};
  A query_factor = 1;
  WalkDecay<A> decay = {};  ///< on keys, after_token
};

/// What both walks do to a packed tile: fold the decay into what reads and what writes, or leave it to the sweep. `read` and
/// `written` are row blocks [tokens, keys]; `decay` takes tile_len * keys elements, `spare` as many. Returns the decay that
/// the sweep itself must apply, or null, and then the state must be multiplied by `at_end` [keys] afterwards.
template <class A>
struct FoldedDecay {
  const A* in_sweep = nullptr;
  const A* at_end = nullptr;
};

/// `keys_read` become Diag(a) k. Rows in `reads` are scaled like queries, rows in `writes` like keys.
template <class A, std::size_t Reads, std::size_t Writes>
FoldedDecay<A> fold_decay(const TileLogDecays<A>& g, Index count, Index keys, A* keys_read,
                          const std::array<A*, Reads>& reads, const std::array<A*, Writes>& writes, A* kept, A* inverse,
                          A* at_end) {
  if (running_decay(g, RunningDecay<A>{kept, inverse, at_end}, keys)) {
    scale_rows(keys_read, count, keys, kept, g.uniform());
    for (A* rows : reads) scale_rows(rows, count, keys, kept, g.uniform());
    for (A* rows : writes) scale_rows(rows, count, keys, inverse, g.uniform());
    return {nullptr, at_end};
  }
  single_decays(g, kept, keys);
  scale_rows(keys_read, count, keys, kept, false);
  return {kept, nullptr};
}

template <class A>
void scale_state_rows(A* state, Index keys, Index columns, const A* factor) {
  if (!factor) return;
  for (Index r = 0; r < keys; ++r)
    Eigen::Map<Eigen::Array<A, Eigen::Dynamic, 1>>(state + r * columns, columns) *= factor[r];
}

template <class A>
void pack_column(TensorView<const A, 3> x, const TileAt<A>& at, Index heads, A* to) {
  const Index head = at.head / (heads / x.extents[2]);
  for (Index t = 0; t < at.count; ++t) to[t] = x(at.batch, at.begin + t, head);
}

template <ChunkPolicy P, bool Decays, class T, class O, class S, Executor E>
void delta_pass(const DeltaPass<T, O, S>& pass, const E& executor) {
  using A = Accumulator<T>;
  constexpr Index tile_len = P.chunk_len;
  const Index heads = pass.heads;
  const auto scratch_size = [](Index keys, Index columns) {
    return tile_len * ((Decays ? 5 : 2) * keys + 3 * columns + 1) + (Decays ? keys : 0);
  };
  const auto body = [&](const TileInTurn<A>& in_turn, A* scratch) {
    const TileAt<A>& at = in_turn.tile;
    const auto take = [&](Index size) { return std::exchange(scratch, scratch + size); };
    A *q = take(tile_len * at.keys), *k = take(tile_len * at.keys);
    A *v = take(tile_len * at.padded), *o = take(tile_len * at.padded), *errors = take(tile_len * at.padded);
    A* beta = take(tile_len);
    pack_rows(at.rows(pass.q, heads), pass.query_factor, q, at.keys);
    pack_rows(at.rows(pass.k, heads), A(1), k, at.keys);
    pack_rows(at.columns(pass.v, heads), A(1), v, at.padded);
    pack_column(pass.beta, at, heads, beta);

    PackAhead<A> ahead;
    if (const TileAt<A>* next = in_turn.next) {
      ahead.fetch(next->rows(pass.q, heads)), ahead.fetch(next->rows(pass.k, heads));
      ahead.fetch(next->columns(pass.v, heads));
      if (pass.o.present()) ahead.fetch(next->columns(pass.o, heads));
    }
    DeltaTile<A> tile{q, k, k, v, beta, o, errors, at.count, at.keys, at.padded, at.state, at.padded};
    if constexpr (Decays) {
      A *reads = take(tile_len * at.keys), *kept = take(tile_len * at.keys), *inverse = take(tile_len * at.keys);
      A* at_end = take(at.keys);
      std::copy_n(k, at.count * at.keys, reads);
      tile.reads = reads;
      const TileLogDecays<A> g = pass.decay.tile(at, heads);
      const auto folded =
          fold_decay<A>(g, at.count, at.keys, reads, std::array{q}, std::array{k}, kept, inverse, at_end);
      tile.decay = folded.in_sweep;
      if (folded.in_sweep)
        delta_over_tile<true>(tile, ahead);
      else
        delta_over_tile<false>(tile, ahead);
      scale_state_rows(at.state, at.keys, at.padded, folded.at_end);
    } else {
      delta_over_tile<false>(tile, ahead);
    }
    if (pass.o.present()) unpack_rows(o, at.padded, at.columns(pass.o, heads));
    if (pass.errors.present()) unpack_rows(errors, at.padded, at.columns(pass.errors, heads));
  };
  walk_states(
      StateWalk<A, S>{pass.sequences, heads, pass.q.extents[3], pass.v.extents[3], pass.states, pass.decay, tile_len,
                      P.value_tile},
      scratch_size,
      [&](Index, Index, A* scratch) { return [&body, scratch](const TileInTurn<A>& tile) { body(tile, scratch); }; },
      executor);
}

template <ChunkPolicy P, bool Decays, class T, Executor E>
void delta_adjoint_pass(const DeltaAdjointPass<T>& pass, const E& executor) {
  using A = Accumulator<T>;
  constexpr Index tile_len = P.chunk_len;
  const Index heads = pass.grad_o.extents[2];
  const auto scratch_size = [](Index keys, Index columns) {
    return tile_len * ((Decays ? 5 : 2) * keys + 2 * columns + 2) + (Decays ? keys : 0);
  };
  const auto body = [&](const TileInTurn<A>& in_turn, A* scratch) {
    const TileAt<A>& at = in_turn.tile;
    const auto take = [&](Index size) { return std::exchange(scratch, scratch + size); };
    A *q = take(tile_len * at.keys), *k = take(tile_len * at.keys);
    A *grad_o = take(tile_len * at.padded), *grad_u = take(tile_len * at.padded);
    A *beta = take(tile_len), *qk = take(tile_len);
    pack_rows(at.rows(pass.q, heads), pass.query_factor, q, at.keys);
    pack_rows(at.rows(pass.k, heads), A(1), k, at.keys);
    pack_rows(at.columns(pass.grad_o, heads), A(1), grad_o, at.padded);
    pack_column(pass.beta, at, heads, beta);
    for (Index t = 0; t < at.count; ++t) {
      using Vector = Eigen::Map<const Eigen::Matrix<A, Eigen::Dynamic, 1>>;
      qk[t] = Vector(q + t * at.keys, at.keys).dot(Vector(k + t * at.keys, at.keys));
    }
    PackAhead<A> ahead;
    if (const TileAt<A>* next = in_turn.next) {
      ahead.fetch(next->rows(pass.q, heads)), ahead.fetch(next->rows(pass.k, heads));
      ahead.fetch(next->columns(pass.grad_o, heads)), ahead.fetch(next->columns(pass.grad_u, heads));
    }
    DeltaAdjointTile<A> tile{q, k, k, qk, grad_o, beta, grad_u, at.count, at.keys, at.padded, at.state, at.padded};
    if constexpr (Decays) {
      A *reads = take(tile_len * at.keys), *kept = take(tile_len * at.keys), *inverse = take(tile_len * at.keys);
      A* at_end = take(at.keys);
      std::copy_n(k, at.count * at.keys, reads);
      tile.reads = reads;
      const TileLogDecays<A> g = pass.decay.tile(at, heads);
      const auto folded =
          fold_decay<A>(g, at.count, at.keys, reads, std::array<A*, 0>{}, std::array{q, k}, kept, inverse, at_end);
      tile.decay = folded.in_sweep;
      if (folded.in_sweep)
        delta_adjoint_over_tile<true>(tile, ahead);
      else
        delta_adjoint_over_tile<false>(tile, ahead);
      scale_state_rows(at.state, at.keys, at.padded, folded.at_end);
    } else {
      delta_adjoint_over_tile<false>(tile, ahead);
    }
    unpack_rows(grad_u, at.padded, at.columns(pass.grad_u, heads));
  };
  walk_states(
      StateWalk<A>{pass.sequences, heads, pass.q.extents[3], pass.grad_o.extents[3], pass.states, pass.decay, tile_len,
                   P.value_tile},
      scratch_size,
      [&](Index, Index, A* scratch) { return [&body, scratch](const TileInTurn<A>& tile) { body(tile, scratch); }; },
      executor);
}

/// A forward pass by the policy's evaluation: the recurrence, unless chunks are asked for. It has outputs and no errors.
template <ChunkPolicy P, bool Decays, class T, class O, class S, Executor E>
void run_delta_pass(const DeltaPass<T, O, S>& pass, const E& executor) {
  if constexpr (P.evaluation == Evaluation::chunked)
    chunked_pass<Decays, RuleKind::delta>(ChunkedPass<T, T, T, O, S>{.sequences = pass.sequences,
                                                                     .q = pass.q,
                                                                     .k = pass.k,
                                                                     .v = pass.v,
                                                                     .o = pass.o,
                                                                     .states = pass.states,
                                                                     .query_factor = pass.query_factor,
                                                                     .log_decay = pass.decay.log_decay,
                                                                     .beta = pass.beta},
                                          P.chunk_len, executor);
  else
    delta_pass<PolicyConstant<P>::value, Decays>(pass, executor);
}

}  // namespace chela::cpu::detail
