#pragma once
// A case of a depthwise convolution drawn from a fuzzer's bytes: sizes, sequences and inputs, sound for the most part.
#include "chela/core/tensor.hpp"
#include "fuzz/case.hpp"

namespace chela::test {

struct ConvCase : DrawnCase {
  Index batch = 0, tokens = 0, channels = 0;
  Placed<float, 3> x;

  /// For a step, of one token and without offsets. `ragged_calls`: the operator takes offsets.
  ConvCase(Bytes& b, bool step, bool ragged_calls) : DrawnCase(b) {
    const bool ragged = !step && ragged_calls && bytes.once_in(3);
    batch = bytes.once_in(20) ? 0 : 1 + bytes.upto(bytes.once_in(8) ? 11 : 2);
    tokens = step ? 1 : bytes.once_in(12) ? 0 : length(bytes.once_in(5) ? 180 : 20);
    channels = bytes.once_in(40) ? 0 : 1 + bytes.upto(bytes.once_in(3) ? 39 : 5);
    if (bytes.once_in(4)) channels = 16;
    if (ragged && !bytes.once_in(20)) batch = 1;
    sequences = batch;
    if (ragged) draw_offsets(batch, tokens);
    x = input(rows());
  }

  /// From 1 to `most`.
  Index length(Index most) { return 1 + bytes.upto(most - 1); }
  /// Sums are of so many products from here on.
  void sums_of(Index products) { terms = products, magnitude = std::sqrt(double(products)); }

  std::array<Index, 3> rows() const { return {batch, tokens, channels}; }
  /// Half of the time.
  template <std::size_t Rank>
  Placed<float, int(Rank)> maybe_input(const std::array<Index, Rank>& of) {
    return bytes.upto(1) ? input(extents(of)) : Placed<float, int(Rank)>();
  }
  /// Mostly.
  template <std::size_t Rank>
  Placed<float, int(Rank)> maybe_output(const std::array<Index, Rank>& of) {
    return bytes.once_in(4) ? Placed<float, int(Rank)>() : output(extents(of));
  }
  /// [channel, taps]; operators read the number of taps here, so that only the other extent can be wrong.
  Placed<float, 2> kernel(Index taps) {
    const bool wrong = bytes.once_in(very_rarely);
    sound = sound && !wrong;
    return input(std::array<Index, 2>{channels + wrong, taps});
  }

  Sequence sequence(Index i) const { return sequence_of(batch, tokens, i); }
  /// The tokens of one sequence.
  template <class T>
  TensorView<T, 3> tokens_of(TensorView<T, 3> all, Index i) const {
    const Sequence s = sequence(i);
    return run(run(all, 0, s.batch, 1), 1, s.begin, s.count);
  }
  /// The same in double; none of what is absent.
  template <class T>
  Tensor<double, 3> doubles_of(TensorView<T, 3> all, Index i) const {
    return all.present() ? converted<double>(tokens_of(all, i)) : Tensor<double, 3>();
  }
};

template <class T, int Rank>
Tensor<double, Rank> in_double(TensorView<T, Rank> view) {
  return view.present() ? converted<double>(view) : Tensor<double, Rank>();
}

/// The state of one sequence in double; none of what is absent.
template <class T>
Tensor<double, 3> state_in_double(TensorView<T, 3> states, Index entry) {
  return states.present() ? converted<double>(run(states, 0, entry, 1)) : Tensor<double, 3>();
}

}  // namespace chela::test
