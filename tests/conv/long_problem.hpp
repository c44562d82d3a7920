#pragma once
// Problems of the long convolution: random inputs in the operator's types, outputs that start as NaN, and the same in
// double for the reference; and the policies that force each way of evaluating.
#include <algorithm>
#include <ostream>

#include "chela/conv/long.hpp"
#include "support/tensors.hpp"

namespace chela::test {

/// Each way of evaluating, with the shortest blocks.
inline constexpr LongConvPolicy direct{.method = LongConvMethod::direct};
inline constexpr LongConvPolicy whole{.method = LongConvMethod::transform};
inline constexpr LongConvPolicy blocks{.method = LongConvMethod::blocks, .least_block = 32};

struct LongShape {
  Index batch, tokens, channels, taps, back_taps;
  bool state, skip;
};

inline std::ostream& operator<<(std::ostream& out, const LongShape& s) {
  return out << "B" << s.batch << " T" << s.tokens << " D" << s.channels << " L" << s.taps << " M" << s.back_taps
             << (s.state ? " state" : "") << (s.skip ? " skip" : "");
}

template <class T>
struct LongProblem {
  using A = Accumulator<T>;
  explicit LongProblem(const LongShape& s)
      : shape(s),
        x(random_tensor<T>(1, s.batch, s.tokens, s.channels)),
        taps(random_tensor<A>(2, s.channels, s.taps)),
        back_taps(random_tensor<A>(3, s.channels, s.back_taps)),
        skip(random_tensor<A>(4, s.channels)),
        state(random_tensor<T>(5, s.batch, s.taps - 1, s.channels)),
        grad_y(random_tensor<T>(6, s.batch, s.tokens, s.channels)) {}

  LongConvArgs<T> args() const {
    return {.x = x,
            .taps = taps,
            .back_taps = shape.back_taps > 0 ? back_taps.view() : TensorView<const A, 2>{},
            .skip = shape.skip ? skip.view() : TensorView<const A, 1>{},
            .initial_state = shape.state ? state.view() : TensorView<const T, 3>{}};
  }
  LongConvBackwardArgs<T> backward_args() const {
    const LongConvArgs<T> a = args();
    return {.x = a.x,
            .taps = a.taps,
            .back_taps = a.back_taps,
            .skip = a.skip,
            .initial_state = a.initial_state,
            .grad_y = grad_y};
  }
  LongProblem<double> in_double() const {
    LongProblem<double> p({0, 0, 0, 1, 0, shape.state, shape.skip});
    p.shape = shape;
    p.x = converted<double>(x.view()), p.taps = converted<double>(taps.view());
    p.back_taps = converted<double>(back_taps.view()), p.skip = converted<double>(skip.view());
    p.state = converted<double>(state.view()), p.grad_y = converted<double>(grad_y.view());
    return p;
  }
  Index terms() const { return std::min(shape.taps + shape.back_taps, 2 * shape.tokens + shape.taps) + 1; }

  LongShape shape;
  Tensor<T, 3> x;
  Tensor<A, 2> taps, back_taps;
  Tensor<A, 1> skip;
  Tensor<T, 3> state, grad_y;
};

template <class T>
struct LongForward {
  explicit LongForward(const LongShape& s)
      : y(nan_tensor<T>(s.batch, s.tokens, s.channels)), final_state(nan_tensor<T>(s.batch, s.taps - 1, s.channels)) {}
  LongConvArgs<T> into(LongConvArgs<T> a) {
    a.y = y, a.final_state = final_state;
    return a;
  }
  Tensor<T, 3> y, final_state;
};

template <class T>
struct LongGradients {
  using A = Accumulator<T>;
  explicit LongGradients(const LongShape& s)
      : x(nan_tensor<T>(s.batch, s.tokens, s.channels)),
        taps(nan_tensor<A>(s.channels, s.taps)),
        back_taps(nan_tensor<A>(s.channels, s.back_taps)),
        skip(nan_tensor<A>(s.channels)),
        state(nan_tensor<T>(s.batch, s.taps - 1, s.channels)),
        shape(s) {}
  LongConvBackwardArgs<T> into(LongConvBackwardArgs<T> a) {
    a.grad_x = x, a.grad_taps = taps, a.grad_skip = skip;
    if (shape.back_taps > 0) a.grad_back_taps = back_taps;
    if (shape.state) a.grad_initial_state = state;
    return a;
  }
  Tensor<T, 3> x;
  Tensor<A, 2> taps, back_taps;
  Tensor<A, 1> skip;
  Tensor<T, 3> state;
  LongShape shape;
};

}  // namespace chela::test
