#pragma once
// Runs of tokens that thread blocks take, numbered in a row without reading the offsets of ragged batches on the host.
#include <algorithm>

#include "chela/chunk/ragged.hpp"

namespace chela::cuda::detail {

CHELA_HOST_DEVICE constexpr Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

/// Sequence i, kept inside of the tensors whatever the offsets say.
__device__ inline Sequence sequence_inside(const SequenceBatch& sequences, Index i) {
  if (!sequences.cu_seqlens.present()) return sequences[i];
  const Index begin = max(Index(0), min(sequences.cu_seqlens[i], sequences.tokens));
  const Index end = max(begin, min(sequences.cu_seqlens[i + 1], sequences.tokens));
  return {0, begin, end - begin};
}

/// Tokens [first, first + tile) of a sequence, as far as it has them; before the first token come the state's.
struct SequenceTile {
  Index sequence;
  Sequence rows;
  Index first;
};

/// Every sequence in tiles, `before` of them for the state. Of ragged batches, sequence i has the numbers from
/// begin / tile + i (before + 1) on: some of them are tiles without tokens.
struct SequenceTiles {
  SequenceBatch sequences = {};
  Index tile = 1, before = 0;

  CHELA_HOST_DEVICE constexpr Index size() const {
    return sequences.cu_seqlens.present() ? sequences.tokens / tile + sequences.size() * (before + 1)
                                          : sequences.size() * (ceil_div(sequences.tokens, tile) + before);
  }

  __device__ SequenceTile operator[](Index number) const {
    if (!sequences.cu_seqlens.present()) {
      const Index each = ceil_div(sequences.tokens, tile) + before, i = number / each;
      return {i, sequences[i], (number - i * each - before) * tile};
    }
    Index low = 0, high = sequences.size();  // the last sequence that begins at or before this number
    while (high - low > 1) {
      const Index middle = (low + high) / 2;
      const bool begins = first_number(sequence_inside(sequences, middle), middle) <= number;
      low = begins ? middle : low, high = begins ? high : middle;
    }
    const Sequence rows = sequence_inside(sequences, low);
    return {low, rows, (max(Index(0), number - first_number(rows, low)) - before) * tile};
  }

 private:
  __device__ Index first_number(const Sequence& rows, Index i) const { return rows.begin / tile + i * (before + 1); }
};

}  // namespace chela::cuda::detail
