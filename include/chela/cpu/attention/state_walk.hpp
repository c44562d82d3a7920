#pragma once
// How a CPU pass walks sequences: states held by the worker, tiles of tokens in the order in which memory holds them, heads
// and value columns shared out over tasks. Heads share nothing, and columns of one head share only what they read, so any cut
// gives the same bits. Tensors of fewer heads than the walk are shared by runs of neighbouring heads.
#include <algorithm>
#include <cmath>

#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/attention/recurrence.hpp"
#include "chela/cpu/attention/tile_decay.hpp"
#include "chela/cpu/tile/fetch_ahead.hpp"
#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu::detail {

/// [batch, token, head, dim] -> [token, dim] of one batch entry and of the head that head `head` of `heads` reads.
template <class T>
TensorView<T, 2> head_matrix(TensorView<T, 4> x, Index batch, Index head, Index heads) {
  return slice_axis<1>(slice(x, batch), head / (heads / x.extents[2]));
}

/// [batch, head, row, column] -> [row, column], likewise.
template <class T>
TensorView<T, 2> state_matrix(TensorView<T, 4> state, Index batch, Index head, Index heads) {
  return slice(slice(state, batch), head / (heads / state.extents[1]));
}

/// Whether head `head` is the one that stores a final state shared by a run of heads.
template <class T>
bool stores_state(TensorView<T, 4> state, Index head, Index heads) {
  return state.present() && head % (heads / state.extents[1]) == 0;
}

/// The decay of a walk: [batch, token, heads / any divisor, key_dim or value_dim], broadcast where it depends on less.
template <class A>
struct WalkDecay {
  TensorView<const A, 4> log_decay = {};
  DecaySide side = DecaySide::none;
  /// Whether the state decays after a token instead of before it, as it does when a walk goes back in time.
  bool after_token = false;

  /// Log-decays on the way to each token of a tile.
  TileLogDecays<A> tile(Index batch, Index head, Index heads, Index begin, Index count, Index column,
                        Index width) const {
    const Index absent = after_token && begin == 0 ? 1 : 0;
    auto rows =
        run(head_matrix(log_decay, batch, head, heads), 0, begin - (after_token ? 1 - absent : 0), count - absent);
    if (side == DecaySide::values) rows = run(rows, 1, column, width);
    return {rows, absent};
  }
};

/// One sequence batch to walk over, and the states to begin and end with.
template <class A>
struct StateWalk {
  Index batch, tokens, heads, key_dim, value_dim;
  TensorView<const A, 4> initial_state = {};  ///< [batch, heads / any divisor, key_dim, value_dim], or absent for zero
  TensorView<A, 4> final_state = {};          ///< the same; shared ones are written by the first head of their run
  WalkDecay<A> decay = {};
  Index tile_len = 32;    ///< tokens per tile
  Index value_tile = 64;  ///< value columns per task when heads are too few for the workers
};

/// Where a tile lies, and the state that has walked up to it.
template <class A>
struct TileAt {
  Index batch, head, begin, count;
  Index column, width, padded;  ///< value columns of this task; padded to whole register blocks
  Index keys;                   ///< key_dim padded likewise
  A* state;                     ///< [keys, padded]

  /// Rows of [batch, token, head, dim] that this tile reads or writes.
  template <class T>
  TensorView<T, 2> rows(TensorView<T, 4> x, Index heads) const {
    return run(head_matrix(x, batch, head, heads), 0, begin, count);
  }
  template <class T>
  TensorView<T, 2> columns(TensorView<T, 4> x, Index heads) const {
    return run(rows(x, heads), 1, column, width);
  }
};

/// How heads and value columns are shared out.
struct WalkTasks {
  Index head_run;    ///< neighbouring heads per task, walked together so that memory is read in order
  Index head_tasks;  ///< tasks along the heads
  Index column_run;  ///< value columns per task, whole register blocks
  Index column_tasks;

  /// `shared` heads may share a state and stay in one task; `block` is the grain of a column cut.
  WalkTasks(Index batch, Index heads, Index shared, Index value_dim, Index value_tile, Index block, int workers) {
    const Index wanted = workers > 1 ? Index(2) * workers : 1;
    const Index tasks_per_entry = std::clamp<Index>(ceil_div(wanted, std::max<Index>(batch, 1)), 1, heads / shared);
    head_run = round_up(heads / tasks_per_entry, shared);
    head_tasks = ceil_div(heads, head_run);
    const bool cut_columns = batch * head_tasks < workers;
    column_run = round_up(cut_columns ? std::min(value_tile, value_dim) : value_dim, block);
    column_tasks = ceil_div(value_dim, column_run);
  }
};

/// Calls body(tile, next tile or null, scratch of `scratch_size(keys, columns)` elements) for every tile, in order within each
/// head and column run; the body advances the tile's state.
template <class A, class ScratchSize, class Body, Executor E>
void walk_states(const StateWalk<A>& walk, const ScratchSize& scratch_size, const Body& body, const E& executor) {
  using Block = RegisterBlock<A>;
  const Index heads = walk.heads, tile_len = walk.tile_len;
  const Index shared = walk.final_state.present() ? heads / walk.final_state.extents[1] : 1;
  const WalkTasks tasks(walk.batch, heads, shared, walk.value_dim, walk.value_tile, Block::columns, executor.workers());
  const Index keys = round_up(walk.key_dim, Block::rows), state_size = keys * tasks.column_run;
  Tensor<A, 2> scratch(executor.workers(), tasks.head_run * state_size + scratch_size(keys, tasks.column_run));

  executor.for_each(walk.batch * tasks.head_tasks * tasks.column_tasks, [&](Index task, int worker) {
    const Index column = task % tasks.column_tasks * tasks.column_run;
    const Index width = std::min(tasks.column_run, walk.value_dim - column), padded = round_up(width, Block::columns);
    const Index first = task / tasks.column_tasks % tasks.head_tasks * tasks.head_run;
    const Index run_heads = std::min(tasks.head_run, heads - first);
    const Index batch = task / tasks.column_tasks / tasks.head_tasks;
    A* const states = &scratch(worker, 0);
    A* const rest = states + tasks.head_run * state_size;

    for (Index h = 0; h < run_heads; ++h) {
      A* state = states + h * state_size;
      std::fill_n(state, keys * padded, A(0));
      if (walk.initial_state.present())
        pack_rows(run(state_matrix(walk.initial_state, batch, first + h, heads), 1, column, width), A(1), state,
                  padded);
    }
    const Index tiles = ceil_div(walk.tokens, tile_len) * run_heads;
    const auto tile_at = [&](Index i) {
      const Index begin = i / run_heads * tile_len, h = i % run_heads;
      return TileAt<A>{batch,
                       first + h,
                       begin,
                       std::min(tile_len, walk.tokens - begin),
                       column,
                       width,
                       padded,
                       keys,
                       states + h * state_size};
    };
    for (Index i = 0; i < tiles; ++i) {
      const TileAt<A> tile = tile_at(i), next = i + 1 < tiles ? tile_at(i + 1) : tile;
      body(tile, i + 1 < tiles ? &next : nullptr, rest);
    }
    for (Index h = 0; h < run_heads; ++h) {
      if (!stores_state(walk.final_state, first + h, heads)) continue;
      A* state = states + h * state_size;
      if (walk.decay.side != DecaySide::none && walk.decay.after_token && walk.tokens > 0) {
        const auto last = run(head_matrix(walk.decay.log_decay, batch, first + h, heads), 0, walk.tokens - 1, 1);
        for (Index r = 0; r < walk.key_dim; ++r)
          for (Index c = 0; c < width; ++c)
            state[r * padded + c] *= std::exp(last(0, walk.decay.side == DecaySide::keys ? r : column + c));
      }
      unpack_rows(state, padded, run(state_matrix(walk.final_state, batch, first + h, heads), 1, column, width));
    }
  });
}

}  // namespace chela::cpu::detail
