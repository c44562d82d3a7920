#pragma once
// How a CPU pass walks sequences: states held by the worker, tiles of tokens in the order in which memory holds them, heads
// and value columns shared out over tasks. Heads share nothing, and columns of one head share only what they read, so any cut
// gives the same bits. Tensors of fewer heads than the walk are shared by runs of neighbouring heads.
#include <algorithm>
#include <cmath>
#include <utility>

#include "chela/chunk/ragged.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/attention/recurrence.hpp"
#include "chela/cpu/attention/tile_decay.hpp"
#include "chela/cpu/tile/pack_ahead.hpp"
#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu::detail {

/// Which of `fewer` heads head `head` of `heads` reads. Mostly there are as many, and tiles are too short for divisions.
inline Index shared_head(Index head, Index heads, Index fewer) {
  return heads == fewer ? head : head / (heads / fewer);
}

/// [batch, token, head, dim] -> [token, dim] of one batch entry and of the head that head `head` of `heads` reads.
template <class T>
TensorView<T, 2> head_matrix(TensorView<T, 4> x, Index batch, Index head, Index heads) {
  return slice_axis<1>(slice(x, batch), shared_head(head, heads, x.extents[2]));
}

/// [batch, head, row, column] -> [row, column], likewise.
template <class T>
TensorView<T, 2> state_matrix(TensorView<T, 4> state, Index batch, Index head, Index heads) {
  return slice(slice(state, batch), shared_head(head, heads, state.extents[1]));
}

/// Whether head `head` is the one that stores a final state shared by a run of heads.
template <class T>
bool stores_state(TensorView<T, 4> state, Index head, Index heads) {
  return state.present() && head % (heads / state.extents[1]) == 0;
}

/// The states of a walk, [.., key_dim, value_dim] whatever their layout, with heads or any divisor of them; absent ones begin
/// as zero or are not wanted. Shared ones are written by the first head of their run.
template <class S>
struct WalkStates {
  TensorView<const S, 4> initial = {};  ///< [entry, head, key_dim, value_dim]
  TensorView<S, 4> final = {};          ///< likewise
  IndexView slots = {};                 ///< the entry of each sequence, or absent for their order
  TensorView<S, 5> boundary = {};       ///< [sequence, boundary, head, key_dim, value_dim]
  Index boundary_every = 0;             ///< a multiple of the tile's length
  TensorView<S, 5> last = {};           ///< [sequence, count, head, key_dim, value_dim]

  Index entry(Index sequence) const { return slots.present() ? slots[sequence] : sequence; }
  Index last_count() const { return last.present() ? last.extents[1] : 0; }
  bool stored() const { return final.present() || boundary.present() || last.present(); }
  Index stored_heads() const {
    return final.present() ? final.extents[1] : boundary.present() ? boundary.extents[2] : last.extents[2];
  }
};

/// Where a tile lies, and the state that has walked up to it.
template <class A>
struct TileAt {
  Index sequence, batch, head, begin, count;
  bool first;                   ///< of its sequence
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

/// A tile of a walk, and the two that follow it in the walk, or null.
template <class A>
struct TileInTurn {
  Index turn;  ///< 0 for the first tile of a walk
  const TileAt<A>&tile, *next, *later;
};

/// The decay of a walk: [batch, token, heads / any divisor, key_dim or value_dim], broadcast where it depends on less.
template <class A>
struct WalkDecay {
  TensorView<const A, 4> log_decay = {};
  DecaySide side = DecaySide::none;
  /// Whether the state decays after a token instead of before it, as it does when a walk goes back in time.
  bool after_token = false;

  /// Log-decays on the way to each token of a tile.
  TileLogDecays<A> tile(const TileAt<A>& at, Index heads) const {
    const Index absent = after_token && at.first ? 1 : 0;
    const auto rows = run(head_matrix(log_decay, at.batch, at.head, heads), 0,
                          at.begin - (after_token ? 1 - absent : 0), at.count - absent);
    if (side != DecaySide::values) return {rows, absent};
    return {run(rows, 1, at.column, at.width), absent, rows};
  }
};

/// What to walk over, and how.
template <class A, class S = A>
struct StateWalk {
  SequenceBatch sequences;
  Index heads, key_dim, value_dim;
  WalkStates<S> states = {};
  WalkDecay<A> decay = {};
  Index tile_len = 32;    ///< tokens per tile
  Index value_tile = 64;  ///< value columns per task when heads are too few for the workers
  Index column_grain =
      RegisterBlock<A>::columns;  ///< where columns may be cut, whole registers; value_dim or more keeps a state whole
  Index heads_together = 1;       ///< neighbouring heads that one task must walk, beside those that share a state
};

/// The tiles of one sequence. The tokens whose states are wanted one by one, at its end, are tiles of their own.
struct SequenceTiles {
  Index tile_len, together, singles;

  SequenceTiles(Index tokens, Index tile_length, Index last_states)
      : tile_len(tile_length), singles(std::clamp<Index>(last_states - 1, 0, tokens)) {
    together = tokens - singles;
  }
  Index size() const { return ceil_div(together, tile_len) + singles; }
  Index begin(Index tile) const {
    const Index long_tiles = ceil_div(together, tile_len);
    return tile < long_tiles ? tile * tile_len : together + tile - long_tiles;
  }
  Index end(Index tile) const {
    return begin(tile) < together ? std::min(begin(tile) + tile_len, together) : begin(tile) + 1;
  }
};

/// How heads and value columns are shared out.
struct WalkTasks {
  Index head_run;    ///< neighbouring heads per task, walked together so that memory is read in order
  Index head_tasks;  ///< tasks along the heads
  Index column_run;  ///< value columns per task, whole register blocks
  Index column_tasks;

  /// `shared` heads may share a state and stay in one task; `grain` is that of a column cut.
  WalkTasks(Index sequences, Index heads, Index shared, Index value_dim, Index value_tile, Index grain, int workers) {
    const Index wanted = workers > 1 ? Index(2) * workers : 1;
    const Index tasks_per_entry = std::clamp<Index>(ceil_div(wanted, std::max<Index>(sequences, 1)), 1, heads / shared);
    head_run = round_up(heads / tasks_per_entry, shared);
    head_tasks = ceil_div(heads, head_run);
    const Index runs = std::max<Index>(sequences * head_tasks, 1), cuts = std::max<Index>(ceil_div(workers, runs), 1);
    column_run = round_up(cuts > 1 ? std::min(value_tile, ceil_div(value_dim, cuts)) : value_dim, grain);
    column_tasks = ceil_div(value_dim, column_run);
  }
};

/// The state times the decays of one token.
template <class A>
void decay_state(A* state, Index padded, Index keys, Index width, DecaySide side, TensorView<const A, 2> log_decay,
                 Index column) {
  for (Index r = 0; r < keys; ++r)
    for (Index c = 0; c < width; ++c)
      state[r * padded + c] *= std::exp(log_decay(0, side == DecaySide::keys ? r : column + c));
}

/// Each task is begun by begin(keys, columns, scratch of `scratch_size(keys, columns)` elements), both padded; what that gives
/// is called with every tile in turn, in order within each head and column run, and advances the tile's state.
template <class A, class S, class ScratchSize, class Begin, Executor E>
void walk_states(const StateWalk<A, S>& walk, const ScratchSize& scratch_size, const Begin& begin, const E& executor) {
  using Block = RegisterBlock<A>;
  const WalkStates<S>& kept = walk.states;
  const Index heads = walk.heads;
  const Index shared = std::max(kept.stored() ? heads / kept.stored_heads() : 1, walk.heads_together);
  const WalkTasks tasks(walk.sequences.size(), heads, shared, walk.value_dim, walk.value_tile, walk.column_grain,
                        executor.workers());
  const Index keys = round_up(walk.key_dim, Block::rows), state_size = keys * tasks.column_run;
  Tensor<A, 2> scratch(executor.workers(), tasks.head_run * state_size + scratch_size(keys, tasks.column_run));

  executor.for_each(walk.sequences.size() * tasks.head_tasks * tasks.column_tasks, [&](Index task, int worker) {
    const Index column = task % tasks.column_tasks * tasks.column_run;
    const Index width = std::min(tasks.column_run, walk.value_dim - column), padded = round_up(width, Block::lanes);
    const Index first = task / tasks.column_tasks % tasks.head_tasks * tasks.head_run;
    const Index run_heads = std::min(tasks.head_run, heads - first);
    const Index index = task / tasks.column_tasks / tasks.head_tasks, entry = kept.entry(index);
    const Sequence sequence = walk.sequences[index];
    A* const states = &scratch(worker, 0);
    auto advance = begin(keys, padded, states + tasks.head_run * state_size);

    const auto load = [&](Index head, A* state) {
      std::fill_n(state, keys * padded, A(0));
      if (kept.initial.present())
        pack_rows(run(state_matrix(kept.initial, entry, head, heads), 1, column, width), A(1), state, padded);
    };
    const auto store = [&](Index head, const A* state, TensorView<S, 4> to, Index at) {
      if (stores_state(to, head, heads))
        unpack_rows(state, padded, run(state_matrix(to, at, head, heads), 1, column, width));
    };
    const Index last_count = kept.last_count();
    const auto store_last = [&](Index head, const A* state,
                                Index tokens_done) {  // where a sequence is short, several times
      for (Index i = 0; i < last_count; ++i)
        if (std::max<Index>(sequence.count - (last_count - 1 - i), 0) == tokens_done)
          store(head, state, slice(kept.last, index), i);
    };

    const SequenceTiles cut(sequence.count, walk.tile_len, last_count);
    const auto tile_at = [&](Index i) {
      const Index tile = i / run_heads, h = i % run_heads, begin = cut.begin(tile);
      return TileAt<A>{
          index, sequence.batch, first + h, sequence.begin + begin, cut.end(tile) - begin, tile == 0, column,
          width, padded,         keys,      states + h * state_size};
    };
    for (Index h = 0; h < run_heads; ++h) {
      load(first + h, states + h * state_size);
      store_last(first + h, states + h * state_size, 0);
    }
    const Index tiles = cut.size() * run_heads;
    TileAt<A> next = tile_at(0), later = tile_at(std::min<Index>(1, tiles - 1));
    for (Index i = 0; i < tiles; ++i) {
      const TileAt<A> tile = std::exchange(next, later);
      later = tile_at(std::min(i + 2, tiles - 1));
      advance(TileInTurn<A>{i, tile, i + 1 < tiles ? &next : nullptr, i + 2 < tiles ? &later : nullptr});
      const Index done = tile.begin + tile.count - sequence.begin;
      if (kept.boundary.present() && done % kept.boundary_every == 0)
        store(tile.head, tile.state, slice(kept.boundary, index), done / kept.boundary_every - 1);
      store_last(tile.head, tile.state, done);
    }
    for (Index h = 0; h < run_heads && kept.final.present(); ++h) {
      A* state = states + h * state_size;
      if (walk.decay.side != DecaySide::none && walk.decay.after_token && sequence.count > 0)
        decay_state(state, padded, walk.key_dim, width, walk.decay.side,
                    run(head_matrix(walk.decay.log_decay, sequence.batch, first + h, heads), 0,
                        sequence.begin + sequence.count - 1, 1),
                    column);
      store(first + h, state, kept.final, entry);
    }
  });
}

}  // namespace chela::cpu::detail
