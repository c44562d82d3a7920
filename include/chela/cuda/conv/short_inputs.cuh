#pragma once
// Where the inputs of a short convolution are: tokens of a sequence, and before its first one the rows of its state.
// Offsets and slots are device memory that nobody has checked: whatever they hold, no access leaves the tensors.
#include "chela/conv/short.hpp"

namespace chela::cuda::detail {

/// A sequence's tokens of its batch entry.
struct SequenceTokens {
  Index sequence, begin, end;
};

__device__ inline Index clamped(Index x, Index low, Index high) { return max(low, min(x, high)); }

/// Of the sequence that has this token.
__device__ inline SequenceTokens sequence_with(const SequenceBatch& sequences, Index batch, Index token) {
  if (!sequences.cu_seqlens.present()) return {batch, 0, sequences.tokens};
  Index low = 0, high = sequences.size();  // the first offset above token is in (low, high]
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    (sequences.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return {low, clamped(sequences.cu_seqlens[low], 0, token),
          clamped(sequences.cu_seqlens[low + 1], token + 1, sequences.tokens)};
}

__device__ inline SequenceTokens tokens_of_sequence(const SequenceBatch& sequences, Index sequence) {
  if (!sequences.cu_seqlens.present()) return {sequence, 0, sequences.tokens};
  const Index begin = clamped(sequences.cu_seqlens[sequence], 0, sequences.tokens);
  return {sequence, begin, clamped(sequences.cu_seqlens[sequence + 1], begin, sequences.tokens)};
}

/// One row of a state after the other, from the oldest on. Absent (zero, and not to be written) where the tensor is, or
/// where the sequence's slot lies outside of it.
template <class T, int Width>
class StateRing {
 public:
  static constexpr int rows = Width - 1;
  StateRing() = default;
  __device__ StateRing(TensorView<T, 3> states, IndexView slots, Index sequence, Index channel, Index steps) {
    if constexpr (rows > 0) {
      const Index entry = slots.present() ? slots[sequence] : sequence;
      if (!states.present() || entry < 0 || entry >= states.extents[0]) return;
      first_ = states.data + entry * states.strides[0] + channel * states.strides[2];
      stride_ = states.strides[1], oldest_ = int(max(steps, Index(0)) % rows);
    }
  }
  __device__ bool present() const { return first_ != nullptr; }
  __device__ T* row(int i) const {
    const int turned = i + oldest_;
    return first_ + (turned < rows ? turned : turned - rows) * stride_;
  }

 private:
  T* first_ = nullptr;
  Index stride_ = 0;
  int oldest_ = 0;
};

/// A sequence's inputs of one channel, or of some from one on.
template <class T, int Width>
struct SequenceInputs {
  const T* x = nullptr;  // the batch entry's token 0
  Index stride = 0, begin = 0;
  StateRing<const T, Width> before;

  /// Null where the input is zero.
  __device__ const T* operator[](Index token) const {
    if (token >= begin) return x + token * stride;
    const Index row = token - begin + (Width - 1);
    return row >= 0 && before.present() ? before.row(int(row)) : nullptr;
  }
};

__device__ inline Index steps_of(IndexView positions, Index position, Index sequence) {
  return positions.present() ? positions[sequence] : position;
}

template <int Width, class T>
__device__ SequenceInputs<T, Width> inputs_of(const ShortConvArgs<T>& args, const SequenceTokens& tokens, Index batch,
                                              Index channel) {
  SequenceInputs<T, Width> inputs{&args.x(batch, 0, channel), args.x.strides[1], tokens.begin, {}};
  if (args.initial_state.present())
    inputs.before = {args.initial_state, args.state_slots, tokens.sequence, channel,
                     steps_of(args.positions, args.position, tokens.sequence)};
  return inputs;
}
template <int Width, class T>
__device__ SequenceInputs<T, Width> inputs_of(const ShortConvBackwardArgs<T>& args, const SequenceTokens& tokens,
                                              Index batch, Index channel) {
  return {&args.x(batch, 0, channel),
          args.x.strides[1],
          tokens.begin,
          {args.initial_state, {}, tokens.sequence, channel, 0}};
}

}  // namespace chela::cuda::detail
