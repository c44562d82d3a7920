#pragma once
// Problems of the short convolution, and their answers judged against the reference.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "chela/cpu/conv/short.hpp"
#include "chela/reference/short.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

namespace chela::test {

struct Shape {
  Index batch, tokens, channels;
};

/// Random inputs of one pass with its gradients' inputs; outputs are NaN.
template <class T, int Width>
struct Problem {
  using S = Accumulator<T>;
  Tensor<T, 3> x, initial_state, y, final_state, grad_y, grad_final_state, grad_x, grad_initial_state;
  Tensor<S, 2> taps, grad_taps;
  Tensor<S, 1> bias, grad_bias;

  explicit Problem(Shape s) : Problem(s, s.batch) {}

  /// With as many sequences as there are packed into the batch.
  Problem(Shape s, Index sequences)
      : x(random_tensor<T>(1, s.batch, s.tokens, s.channels)),
        initial_state(random_tensor<T>(2, sequences, Width - 1, s.channels)),
        y(nan_tensor<T>(s.batch, s.tokens, s.channels)),
        final_state(nan_tensor<T>(sequences, Width - 1, s.channels)),
        grad_y(random_tensor<T>(3, s.batch, s.tokens, s.channels)),
        grad_final_state(random_tensor<T>(4, sequences, Width - 1, s.channels)),
        grad_x(nan_tensor<T>(s.batch, s.tokens, s.channels)),
        grad_initial_state(nan_tensor<T>(sequences, Width - 1, s.channels)),
        taps(random_tensor<S>(5, s.channels, Width)),
        grad_taps(nan_tensor<S>(s.channels, Width)),
        bias(random_tensor<S>(6, s.channels)),
        grad_bias(nan_tensor<S>(s.channels)) {}

  ShortConvArgs<T> args() {
    return {.x = x, .taps = taps, .bias = bias, .y = y, .initial_state = initial_state, .final_state = final_state};
  }
  ShortConvBackwardArgs<T> backward_args() {
    return {.x = x,
            .taps = taps,
            .bias = bias,
            .initial_state = initial_state,
            .grad_y = grad_y,
            .grad_final_state = grad_final_state,
            .grad_x = grad_x,
            .grad_taps = grad_taps,
            .grad_bias = grad_bias,
            .grad_initial_state = grad_initial_state};
  }
};

template <class T, int Rank>
Tensor<double, Rank> as_double(TensorView<const T, Rank> view) {
  return view.present() ? converted<double>(view) : Tensor<double, Rank>();
}

/// Checks y and the final state of a pass that has been run.
template <class T>
void check_forward(const ShortConvArgs<T>& a, bool silu) {
  const Index width = a.taps.extents[1];
  auto y = converted<double>(a.y);
  Tensor<double, 3> state(a.x.extents[0], width - 1, a.x.extents[2]);
  reference::short_conv(as_double(a.x), as_double(a.taps), as_double(a.bias), as_double(a.initial_state), silu, y,
                        state);
  CHECK(relative_error(a.y, y.view()) < tolerance<T>(width + 1));
  if (a.final_state.present()) CHECK(relative_error(a.final_state, state.view()) == 0);
}

template <class T>
void check_backward(const ShortConvBackwardArgs<T>& a, bool silu) {
  const Index width = a.taps.extents[1], summed = a.x.extents[0] * a.x.extents[1];
  auto x = converted<double>(a.x), state = converted<double>(a.grad_initial_state);
  auto taps = converted<double>(a.grad_taps);
  auto bias = converted<double>(a.grad_bias);
  reference::short_conv_backward(as_double(a.x), as_double(a.taps), as_double(a.bias), as_double(a.initial_state), silu,
                                 as_double(a.grad_y), as_double(a.grad_final_state), x, taps, bias, state);
  using S = Accumulator<T>;
  CHECK(relative_error(a.grad_x, x.view()) < tolerance<T>(2 * width));
  CHECK(relative_error(a.grad_taps, taps.view()) < tolerance<S>(width + summed));
  CHECK(relative_error(a.grad_bias, bias.view()) < tolerance<S>(width + summed));
  CHECK(relative_error(a.grad_initial_state, state.view()) < tolerance<T>(2 * width));
}

/// A view of the same extents over memory with gaps, axes stored in another order; filled with a copy of `from`.
template <class T>
struct Strided {
  Tensor<T, 1> memory;
  TensorView<T, 3> view;

  explicit Strided(TensorView<const T, 3> from)
      : memory(from.extents[0] * (from.extents[1] + 1) * (2 * from.extents[2] + 1)), view{memory.data()} {
    std::copy_n(from.extents, 3, view.extents);
    view.strides[1] = 1,
    view.strides[2] = 2 * (from.extents[1] + 1) - 1;  // tokens contiguous, as in [batch, channel, token]
    view.strides[0] = (from.extents[1] + 1) * (2 * from.extents[2] + 1);
    for_each_index(from, [&](auto... i) { view(i...) = from(i...); });
  }
};

/// A copy in memory [batch, channel, token].
template <class T>
class ByChannel {
 public:
  explicit ByChannel(TensorView<const T, 3> from) : memory_(from.extents[0], from.extents[2], from.extents[1]) {
    for_each_index(from, [&](auto... i) { view()(i...) = from(i...); });
  }
  TensorView<T, 3> view() { return transposed(memory_.view(), 1, 2); }

 private:
  Tensor<T, 3> memory_;
};

template <int Rank, class T>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(T) * std::size_t(a.size())) == 0;
}

/// Whether a refusal names the argument at fault.
inline bool names(Status s, const char* argument) {
  return !s.ok() && std::string(s.why).find(argument) != std::string::npos;
}

}  // namespace chela::test
