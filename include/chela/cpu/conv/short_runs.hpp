#pragma once
// How the short convolution cuts its work: the token axis into runs, whatever sequences they hold, and each run into pieces
// of one sequence.
#include <algorithm>

#include "chela/chunk/ragged.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/conv/lanes.hpp"

namespace chela::cpu::detail {

/// Elements in the widest packet of accumulators of T.
template <class T>
inline constexpr int packet_lanes = Eigen::internal::packet_traits<Accumulator<T>>::size;

/// Tokens [begin, end) of sequence `index`, counted from its own first token.
struct SequencePiece {
  Index index;
  Sequence sequence;
  Index begin, end;
};

/// Runs of at most `run_len` tokens of one batch entry.
class TokenRuns {
 public:
  TokenRuns(const SequenceBatch& sequences, Index run_len)
      : sequences_(sequences), run_len_(run_len), per_entry_(ceil_div(sequences.tokens, run_len)) {}

  Index size() const { return sequences_.batch * per_entry_; }

  /// Calls f(piece) for the pieces of a run, in order; none is empty.
  template <class F>
  void for_each_piece(Index run, F&& f) const {
    const Index entry = run / per_entry_, begin = run % per_entry_ * run_len_;
    const Index end = std::min(sequences_.tokens, begin + run_len_);
    if (!sequences_.cu_seqlens.present()) return f(SequencePiece{entry, sequences_[entry], begin, end});
    for (Index i = sequence_of(begin); i < sequences_.size() && sequences_[i].begin < end; ++i) {
      const Sequence s = sequences_[i];
      const Index from = std::max(begin - s.begin, Index(0)), to = std::min(end - s.begin, s.count);
      if (from < to) f(SequencePiece{i, s, from, to});
    }
  }

 private:
  /// The last sequence that begins at or before a packed token.
  Index sequence_of(Index token) const {
    Index low = 0, high = sequences_.size();
    while (high - low > 1) {
      const Index middle = low + (high - low) / 2;
      (sequences_[middle].begin <= token ? low : high) = middle;
    }
    return low;
  }

  SequenceBatch sequences_;
  Index run_len_, per_entry_;
};

/// The channels of one token.
template <class T>
struct ChannelRow {
  T* data = nullptr;
  Index stride = 1;
};

template <class T>
ChannelRow<T> channel_row(TensorView<T, 2> rows, Index row) {
  return {rows.data + row * rows.strides[0], rows.strides[1]};
}

/// [token, channel] of one sequence.
template <class T>
TensorView<T, 2> tokens_of(TensorView<T, 3> x, const Sequence& s) {
  return run(slice(x, s.batch), 0, s.begin, s.count);
}

/// One entry of the states, or absent.
template <class T>
TensorView<T, 2> state_of(TensorView<T, 3> states, Index entry) {
  return states.present() ? slice(states, entry) : TensorView<T, 2>{};
}

/// One sequence's inputs with its state in front: token -1 is the newest of the state. Zeros where the state is absent.
template <class T>
struct HistoryRows {
  TensorView<const T, 2> x;      ///< [token, channel]
  TensorView<const T, 2> state;  ///< [width - 1, channel], or absent
  Index oldest;                  ///< row of the state
  const T* zeros;                ///< [channel]

  ChannelRow<const T> operator()(Index t) const {
    if (t >= 0) return channel_row(x, t);
    if (!state.present()) return {zeros, 1};
    const Index row = state.extents[0] + t + oldest;
    return channel_row(state, row < state.extents[0] ? row : row - state.extents[0]);
  }
};

/// The row of a state that a count of steps has made the oldest.
constexpr Index oldest_row(Index steps, Index rows) { return rows > 0 ? steps % rows : 0; }

/// Whether channels are neighbours in memory, or there is nothing to look at.
template <class T, int Rank>
bool has_adjacent_channels(TensorView<T, Rank> view) {
  return !view.present() || view.size() == 0 || unit_last_stride(view);
}

}  // namespace chela::cpu::detail
