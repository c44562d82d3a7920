#pragma once
// Ragged batches: sequences of different lengths packed one after the other into one batch entry [1, total, ...], with
// cu_seqlens [sequences + 1] saying where each begins and, at the end, the total. Sequences may be empty. Without cu_seqlens
// every batch entry is one sequence.
#include "chela/core/index_view.hpp"
#include "chela/core/status.hpp"

namespace chela {

/// One sequence: a run of tokens of one batch entry.
struct Sequence {
  Index batch, begin, count;
};

/// The sequences of tensors [batch, token, ...].
struct SequenceBatch {
  Index batch = 0, tokens = 0;
  IndexView cu_seqlens = {};
  bool reversed = false;  ///< counted along reversed views: the same sequences, their tokens from the other end

  CHELA_HOST_DEVICE constexpr Index size() const { return cu_seqlens.present() ? cu_seqlens.size() - 1 : batch; }
  CHELA_HOST_DEVICE constexpr Sequence operator[](Index i) const {
    if (!cu_seqlens.present()) return {i, 0, tokens};
    const Index begin = cu_seqlens[i], end = cu_seqlens[i + 1];
    return {0, reversed ? tokens - end : begin, end - begin};
  }
};

/// Refuses what can be seen without reading the offsets, as `check` functions do.
constexpr Status check_ragged(const SequenceBatch& s) {
  if (!s.cu_seqlens.present()) return {};
  return first_failure(
      require(s.batch == 1, Code::bad_shape,
              "with cu_seqlens the sequences are packed along the token axis: the batch extent must be 1"),
      require(s.cu_seqlens.size() >= 1, Code::bad_shape, "cu_seqlens must be [sequences + 1]"));
}

/// Reads the offsets, which must be in host memory, and refuses those that would lead outside of the tensors.
constexpr Status check_offsets(const SequenceBatch& s) {
  if (!s.cu_seqlens.present()) return {};
  if (s.cu_seqlens[0] != 0) return {Code::bad_value, "cu_seqlens must begin with 0"};
  for (Index i = 0; i < s.size(); ++i)
    if (s.cu_seqlens[i] > s.cu_seqlens[i + 1]) return {Code::bad_value, "cu_seqlens must not decrease"};
  return require(s.cu_seqlens[s.size()] == s.tokens, Code::bad_value,
                 "cu_seqlens must end with the token extent of the packed tensors");
}

}  // namespace chela
