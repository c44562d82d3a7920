#pragma once
// One walk of linear attention over a sequence, forward or as part of a backward pass: the gradients of linear attention are
// linear attention again, with the roles of q, k, v exchanged and time reversed (cpu/attention/linear.hpp). Tensors of fewer
// heads than the output are shared by runs of neighbouring output heads.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "chela/chunk/step.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/attention/recurrence.hpp"
#include "chela/cpu/tile/eigen_tile_ops.hpp"
#include "chela/cpu/tile/fetch_ahead.hpp"
#include "chela/cpu/tile/packing.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// o_t = (query_factor q_t)^T S_t, S_t = S_{t-1} + (key_factor k_t) v_t^T; with `everything`, all outputs read the last state.
template <class T, class O>
struct LinearPass {
  using A = Accumulator<T>;
  TensorView<const T, 4> q, k, v;        ///< [batch, token, heads / any divisor, key_dim or value_dim]
  TensorView<O, 4> o;                    ///< [batch, token, head, value_dim]
  TensorView<const A, 4> initial_state;  ///< [batch, heads / any divisor, key_dim, value_dim], or absent for zero
  TensorView<A, 4> final_state;          ///< the same; shared ones are written by the first head of their run
  A query_factor = 1, key_factor = 1;
  bool everything = false;

  Index batch() const { return o.extents[0]; }
  Index tokens() const { return o.extents[1]; }
  Index heads() const { return o.extents[2]; }
  Index key_dim() const { return q.extents[3]; }
  Index value_dim() const { return o.extents[3]; }
};

/// [batch, token, head, dim] -> [token, dim] of one batch entry and of the head that output head `head` of `heads` reads.
template <class T>
TensorView<T, 2> head_matrix(TensorView<T, 4> x, Index batch, Index head, Index heads) {
  return slice_axis<1>(slice(x, batch), head / (heads / x.extents[2]));
}

/// [batch, head, row, column] -> [row, column], likewise.
template <class T>
TensorView<T, 2> state_matrix(TensorView<T, 4> state, Index batch, Index head, Index heads) {
  return slice(slice(state, batch), head / (heads / state.extents[1]));
}

/// Whether output head `head` is the one that stores a final state shared by a run of heads.
template <class T>
bool stores_state(TensorView<T, 4> state, Index head, Index heads) {
  return state.present() && head % (heads / state.extents[1]) == 0;
}

/// How heads and value columns are shared out. Heads share nothing, and columns of one head share only what they read, so any
/// cut gives the same bits.
struct PassTasks {
  Index head_run;    ///< neighbouring heads per task, walked together so that memory is read in order
  Index head_tasks;  ///< tasks along the heads
  Index column_run;  ///< value columns per task
  Index column_tasks;

  /// `shared` heads may share a state and stay in one task; `columns` is the grain of a column cut.
  PassTasks(Index batch, Index heads, Index shared, Index value_dim, Index value_tile, Index columns, int workers) {
    const Index wanted = workers > 1 ? Index(2) * workers : 1;
    const Index tasks_per_entry = std::clamp<Index>(ceil_div(wanted, std::max<Index>(batch, 1)), 1, heads / shared);
    head_run = round_up(heads / tasks_per_entry, shared);
    head_tasks = ceil_div(heads, head_run);
    const bool cut_columns = batch * head_tasks < workers;
    column_run = cut_columns ? std::min(round_up(value_tile, columns), round_up(value_dim, columns))
                             : round_up(value_dim, columns);
    column_tasks = ceil_div(value_dim, column_run);
  }
  Index count(Index batch) const { return batch * head_tasks * column_tasks; }
};

/// Token recurrence over packed tiles, causal.
template <ChunkPolicy P, class T, class O, Executor E>
void recurrent_pass(const LinearPass<T, O>& pass, const E& executor) {
  using A = Accumulator<T>;
  using Block = RegisterBlock<A>;
  const Index heads = pass.heads(), tokens = pass.tokens(), key_dim = pass.key_dim(), value_dim = pass.value_dim();
  const Index shared = pass.final_state.present() ? heads / pass.final_state.extents[1] : 1;
  const PassTasks tasks(pass.batch(), heads, shared, value_dim, P.value_tile, Block::columns, executor.workers());
  const Index keys = round_up(key_dim, Block::rows), columns = tasks.column_run;
  const Index tile = P.chunk_len, state_size = keys * columns;

  // Each worker: the states of its heads, then one packed tile of q, k, v and o.
  Tensor<A, 2> scratch(executor.workers(), tasks.head_run * state_size + 2 * tile * (keys + columns));

  executor.for_each(tasks.count(pass.batch()), [&](Index task, int worker) {
    const Index column = task % tasks.column_tasks * columns;
    const Index width = std::min(columns, value_dim - column), padded = round_up(width, Block::columns);
    const Index head_task = task / tasks.column_tasks % tasks.head_tasks;
    const Index batch = task / tasks.column_tasks / tasks.head_tasks;
    const Index first = head_task * tasks.head_run, last = std::min(heads, first + tasks.head_run);

    A* states = &scratch(worker, 0);
    A* q = states + tasks.head_run * state_size;
    A* k = q + tile * keys;
    A* v = k + tile * keys;
    A* o = v + tile * columns;

    for (Index head = first; head < last; ++head) {
      A* state = states + (head - first) * state_size;
      std::fill_n(state, keys * padded, A(0));
      if (pass.initial_state.present())
        pack_rows(run(state_matrix(pass.initial_state, batch, head, heads), 1, column, width), A(1), state, padded);
    }
    // Tiles in the order in which memory holds them: a run of heads, then the next tokens.
    struct TileRows {
      TensorView<const T, 2> q, k, v;
      TensorView<O, 2> o;
    };
    const Index run_heads = last - first, tile_count = ceil_div(tokens, tile) * run_heads;
    const auto rows_of_tile = [&](Index i) {
      const Index head = first + i % run_heads, begin = i / run_heads * tile, count = std::min(tile, tokens - begin);
      const auto rows_of = [&](auto x) { return run(head_matrix(x, batch, head, heads), 0, begin, count); };
      return TileRows{rows_of(pass.q), rows_of(pass.k), run(rows_of(pass.v), 1, column, width),
                      run(rows_of(pass.o), 1, column, width)};
    };
    for (Index i = 0; i < tile_count; ++i) {
      const TileRows rows = rows_of_tile(i);
      pack_rows(rows.q, pass.query_factor, q, keys);
      pack_rows(rows.k, pass.key_factor, k, keys);
      pack_rows(rows.v, A(1), v, padded);
      FetchAhead fetch_ahead;
      if (i + 1 < tile_count) {
        const TileRows next = rows_of_tile(i + 1);
        fetch_ahead.add(next.q), fetch_ahead.add(next.k), fetch_ahead.add(next.v), fetch_ahead.add(next.o);
      }
      recur_over_tile(q, k, v, o, rows.o.extents[0], keys, padded, states + i % run_heads * state_size, padded,
                      fetch_ahead);
      unpack_rows(o, padded, rows.o);
    }
    for (Index head = first; head < last; ++head)
      if (stores_state(pass.final_state, head, heads))
        unpack_rows(states + (head - first) * state_size, padded,
                    run(state_matrix(pass.final_state, batch, head, heads), 1, column, width));
  });
}

/// Dense products inside each chunk, a carried state between chunks; causal, or two sweeps where every token sees all.
template <ChunkPolicy P, class T, class O, Executor E>
void chunked_pass(const LinearPass<T, O>& pass, const E& executor) {
  using A = Accumulator<T>;
  using Ops = EigenTileOps<A>;
  using Tile = typename Ops::Tile;
  const Index heads = pass.heads(), tokens = pass.tokens(), key_dim = pass.key_dim(), value_dim = pass.value_dim();
  const Index shared = pass.final_state.present() ? heads / pass.final_state.extents[1] : 1;
  const Index chunk_len = P.chunk_len;

  // Each worker: the transposed states of the heads that share one, then the tiles of a chunk.
  Tensor<A, 2> scratch(executor.workers(),
                       shared * value_dim * key_dim + chunk_len * (2 * key_dim + 2 * value_dim + chunk_len));

  executor.for_each(pass.batch() * (heads / shared), [&](Index task, int worker) {
    const Index batch = task / (heads / shared), first = task % (heads / shared) * shared;
    Ops ops;
    A* states = &scratch(worker, 0);
    A* tiles = states + shared * value_dim * key_dim;

    const auto state_of = [&](Index head) {
      return Tile(states + (head - first) * value_dim * key_dim, value_dim, key_dim);
    };
    const auto rows_of = [&](auto x, Index head, Index begin, Index count) {
      return run(head_matrix(x, batch, head, heads), 0, begin, count);
    };
    const auto for_each_chunk = [&](Index head, auto&& step) {
      for (Index begin = 0; begin < tokens; begin += chunk_len) {
        const Index count = std::min(chunk_len, tokens - begin);
        A* memory = tiles;
        const auto next_tile = [&](Index rows, Index columns) {
          memory += rows * columns;
          return Tile(memory - rows * columns, rows, columns);
        };
        ChunkTiles<Ops> chunk{next_tile(count, key_dim), next_tile(count, key_dim), next_tile(count, value_dim),
                              next_tile(count, count), next_tile(value_dim, count)};
        ops.load_scaled(chunk.queries, rows_of(pass.q, head, begin, count), pass.query_factor);
        ops.load_scaled(chunk.keys, rows_of(pass.k, head, begin, count), pass.key_factor);
        ops.load(chunk.values, rows_of(pass.v, head, begin, count));
        step(chunk, rows_of(pass.o, head, begin, count));
      }
    };

    for (Index head = first; head < first + shared; ++head) {
      Tile state_t = state_of(head);
      ops.zero(state_t);
      if (pass.initial_state.present())
        ops.load(state_t, transposed(state_matrix(pass.initial_state, batch, head, heads), 0, 1));
    }
    for (Index head = first; head < first + shared; ++head) {
      Tile state_t = state_of(head);
      if (pass.everything) {
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto) { write_state(ops, chunk, state_t); });
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto o) {
          read_state(ops, chunk, state_t);
          ops.store_transposed(chunk.output_t, o);
        });
      } else {
        for_each_chunk(head, [&](ChunkTiles<Ops>& chunk, auto o) {
          chunk_step(ops, chunk, state_t, NoDecay{}, AdditiveRule{});
          ops.store_transposed(chunk.output_t, o);
        });
      }
    }
    for (Index head = first; head < first + shared; ++head)
      if (stores_state(pass.final_state, head, heads))
        ops.store_transposed(state_of(head), state_matrix(pass.final_state, batch, head, heads));
  });
}

/// The policy's evaluation, or the measured default: the recurrence for causal passes (on a CPU it runs at the multiply-add
/// rate and the chunked form at less than half of it). Where every token sees all there is no recurrence, only two products.
template <ChunkPolicy P, class T, class O, Executor E>
void run_pass(const LinearPass<T, O>& pass, const E& executor) {
  if (pass.everything || P.evaluation == Evaluation::chunked)
    chunked_pass<PolicyConstant<P>::value>(pass, executor);
  else
    recurrent_pass<PolicyConstant<P>::value>(pass, executor);
}

}  // namespace chela::cpu::detail
