#pragma once
// The two walks of the delta rule: forward, and back in time over the gradient of the state. All else in its backward pass is
// additive (cpu/attention/linear_backward.hpp).
#include <array>
#include <type_traits>
#include <utility>

#include "chela/cpu/attention/chunked_pass.hpp"
#include "chela/cpu/attention/delta_recurrence.hpp"
#include "chela/cpu/attention/pass.hpp"
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

/// Runs sweep(whether it must decay) over a packed tile. If enough is kept, its decay is folded in: rows [tokens, keys] in
/// `reads` are scaled like queries, those in `writes` like keys, and the state afterwards; else the sweep decays by
/// `tile.decay`. Either way `tile.reads` become Diag(a) k. `take` gives memory.
template <bool Decays, class A, class Tile, std::size_t Reads, std::size_t Writes, class Take, class Sweep>
void sweep_with_decay(Tile& tile, const WalkDecay<A>& decay, const TileAt<A>& at, Index heads, const Take& take,
                      const std::array<A*, Reads>& reads, const std::array<A*, Writes>& writes, const Sweep& sweep) {
  constexpr std::true_type in_sweep{};
  constexpr std::false_type folded{};
  if constexpr (!Decays) {
    sweep(folded);
  } else {
    const Index count = at.count, keys = at.keys;
    A *keys_read = take(count * keys), *kept = take(count * keys), *inverse = take(count * keys), *at_end = take(keys);
    std::copy_n(tile.reads, count * keys, keys_read);
    tile.reads = keys_read;
    const TileLogDecays<A> g = decay.tile(at, heads);
    if (!running_decay(g, RunningDecay<A>{kept, inverse, at_end}, keys)) {
      single_decays(g, kept, keys);
      scale_rows(keys_read, count, keys, kept, false);
      tile.decay = kept;
      return sweep(in_sweep);
    }
    scale_rows(keys_read, count, keys, kept, g.uniform());
    for (A* rows : reads) scale_rows(rows, count, keys, kept, g.uniform());
    for (A* rows : writes) scale_rows(rows, count, keys, inverse, g.uniform());
    sweep(folded);
    for (Index r = 0; r < keys; ++r)
      Eigen::Map<Eigen::Array<A, Eigen::Dynamic, 1>>(at.state + r * at.padded, at.padded) *= at_end[r];
  }
}

/// Elements that it takes, of a tile of `tile_len` tokens.
template <bool Decays>
constexpr Index decay_scratch(Index tile_len, Index keys) {
  return Decays ? (3 * tile_len + 1) * keys : 0;
}

/// Calls body(tile in turn, scratch of the task) for every tile.
template <class A, class S, class ScratchSize, class Body, Executor E>
void walk_with_scratch(const StateWalk<A, S>& walk, const ScratchSize& scratch_size, const Body& body,
                       const E& executor) {
  const auto begin = [&](Index, Index, A* scratch) {
    return [&body, scratch](const TileInTurn<A>& tile) { body(tile, scratch); };
  };
  walk_states(walk, scratch_size, begin, executor);
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
    return tile_len * (2 * keys + 3 * columns + 1) + decay_scratch<Decays>(tile_len, keys);
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

    FetchAhead ahead;
    if (const TileAt<A>* next = in_turn.next) {
      ahead.add(next->rows(pass.q, heads)), ahead.add(next->rows(pass.k, heads));
      ahead.add(next->columns(pass.v, heads));
      if (pass.o.present()) ahead.add(next->columns(pass.o, heads));
    }
    DeltaTile<A> tile{q, k, k, v, beta, o, errors, at.count, at.keys, at.padded, at.state, at.padded};
    sweep_with_decay<Decays>(tile, pass.decay, at, heads, take, std::array{q}, std::array{k},
                             [&](auto in_sweep) { delta_over_tile<decltype(in_sweep)::value>(tile, ahead); });
    if (pass.o.present()) unpack_rows(o, at.padded, at.columns(pass.o, heads));
    if (pass.errors.present()) unpack_rows(errors, at.padded, at.columns(pass.errors, heads));
  };
  walk_with_scratch(StateWalk<A, S>{pass.sequences, heads, pass.q.extents[3], pass.v.extents[3], pass.states,
                                    pass.decay, tile_len, P.value_tile},
                    scratch_size, body, executor);
}

template <ChunkPolicy P, bool Decays, class T, Executor E>
void delta_adjoint_pass(const DeltaAdjointPass<T>& pass, const E& executor) {
  using A = Accumulator<T>;
  constexpr Index tile_len = P.chunk_len;
  const Index heads = pass.grad_o.extents[2];
  const auto scratch_size = [](Index keys, Index columns) {
    return tile_len * (2 * keys + 2 * columns + 2) + decay_scratch<Decays>(tile_len, keys);
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
    FetchAhead ahead;
    if (const TileAt<A>* next = in_turn.next) {
      ahead.add(next->rows(pass.q, heads)), ahead.add(next->rows(pass.k, heads));
      ahead.add(next->columns(pass.grad_o, heads)), ahead.add(next->columns(pass.grad_u, heads));
    }
    DeltaAdjointTile<A> tile{q, k, k, qk, grad_o, beta, grad_u, at.count, at.keys, at.padded, at.state, at.padded};
    sweep_with_decay<Decays>(tile, pass.decay, at, heads, take, std::array<A*, 0>{}, std::array{q, k},
                             [&](auto in_sweep) { delta_adjoint_over_tile<decltype(in_sweep)::value>(tile, ahead); });
    unpack_rows(grad_u, at.padded, at.columns(pass.grad_u, heads));
  };
  walk_with_scratch(StateWalk<A>{pass.sequences, heads, pass.q.extents[3], pass.grad_o.extents[3], pass.states,
                                 pass.decay, tile_len, P.value_tile},
                    scratch_size, body, executor);
}

/// Whether chunks are the measured default: the recurrence sweeps a strip of the state's columns for every token, and pays when
/// that no longer fits the first-level cache. On a Zen 4 with AVX-512, one thread, 1024 tokens of 4 heads in float, chunks of 32
/// ran at 0.90, 0.98 and 1.83 times the recurrence's rate with 128, 256 and 512 keys and values.
template <class A>
constexpr bool prefers_chunks(Index key_dim) {
  constexpr Index first_level_bytes = 32 * 1024;
  return key_dim * RegisterBlock<A>::columns * Index(sizeof(A)) > first_level_bytes;
}

/// A forward pass by the policy's evaluation. It has outputs and no errors.
template <ChunkPolicy P, bool Decays, class T, class O, class S, Executor E>
void run_delta_pass(const DeltaPass<T, O, S>& pass, const E& executor) {
  const auto chunked = [&] {
    chunked_pass<Decays, RuleKind::delta>(LinearPass<T, T, T, O, S>{.sequences = pass.sequences,
                                                                    .q = pass.q,
                                                                    .k = pass.k,
                                                                    .v = pass.v,
                                                                    .o = pass.o,
                                                                    .states = pass.states,
                                                                    .query_factor = pass.query_factor,
                                                                    .decay = pass.decay},
                                          pass.beta, P.chunk_len, executor);
  };
  if constexpr (P.evaluation == Evaluation::chunked) return chunked();
  if constexpr (P.evaluation == Evaluation::automatic)
    if (prefers_chunks<Accumulator<T>>(pass.q.extents[3])) return chunked();
  if constexpr (P.evaluation != Evaluation::chunked) delta_pass<PolicyConstant<P>::value, Decays>(pass, executor);
}

}  // namespace chela::cpu::detail
