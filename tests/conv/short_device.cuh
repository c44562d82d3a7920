#pragma once
// Problems of the short convolution on the device, in any layout, and their answers judged against the reference.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "chela/cuda/conv/short.cuh"
#include "chela/reference/short.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {

/// How [batch, token, channel] lies in memory: the last axis contiguous, or rows further apart than they are long so
/// that nothing is aligned.
enum class Layout { channels_last, tokens_last, loose_channels, loose_tokens };
constexpr Layout every_layout[] = {Layout::channels_last, Layout::tokens_last, Layout::loose_channels,
                                   Layout::loose_tokens};

inline void require_ok(Status s) {
  CAPTURE(std::string(s.why));
  REQUIRE(s.ok());
}

/// A tensor on the device in some layout.
template <class T>
class Arranged {
 public:
  Arranged(const Tensor<T, 3>& logical, Layout layout)
      : layout_(layout), extents_(logical.extents()), memory_([&] {
          Tensor<T, 3> memory(memory_extents());
          for (T& x : memory) x = T(7.f);
          const auto to = of(memory.view());
          for_each_index(logical.view(), [&](auto... i) { to(i...) = logical(i...); });
          return memory;
        }()) {}

  TensorView<T, 3> view() const { return of(memory_.view()); }
  Tensor<T, 3> host() const {
    const auto memory = memory_.host();
    Tensor<T, 3> logical(extents_);
    const auto from = of(memory.view());
    for_each_index(logical.view(), [&](auto... i) { logical(i...) = from(i...); });
    return logical;
  }
  /// Neither the guard zones nor what lies between rows.
  bool guards_intact() const {
    auto memory = memory_.host();
    Tensor<T, 3> blank(memory.extents());
    for (T& x : blank) x = T(7.f);
    const auto from = of(memory.view()), to = of(blank.view());
    for_each_index(from, [&](auto... i) { to(i...) = from(i...); });
    return memory_.guards_intact() && same_bits(memory, blank);
  }

 private:
  bool by_tokens() const { return layout_ == Layout::tokens_last || layout_ == Layout::loose_tokens; }
  std::array<Index, 3> memory_extents() const {
    const Index extra = layout_ == Layout::loose_channels || layout_ == Layout::loose_tokens ? 3 : 0;
    if (by_tokens()) return {extents_[0], extents_[2], extents_[1] + extra};
    return {extents_[0], extents_[1], extents_[2] + extra};
  }
  template <class U>
  TensorView<U, 3> of(TensorView<U, 3> memory) const {
    if (by_tokens()) memory = transposed(memory, 1, 2);
    for (int a = 0; a < 3; ++a) memory.extents[a] = extents_[std::size_t(a)];
    return memory;
  }

  Layout layout_;
  std::array<Index, 3> extents_;
  DeviceTensor<T, 3> memory_;
};

struct Shape {
  Index batch, tokens, channels;
};

/// Random inputs of one pass with its gradients' inputs, on the host.
template <class T, int Width>
struct Problem {
  Shape shape;
  std::vector<Index> offsets;  // of packed sequences, or empty
  Tensor<T, 3> x, initial_state, grad_y, grad_final_state;
  Tensor<float, 2> taps;
  Tensor<float, 1> bias;

  explicit Problem(Shape s, const std::vector<Index>& lengths = {})
      : shape(s),
        offsets(lengths.empty() ? 0 : 1),
        x(random_tensor<T>(1, s.batch, s.tokens, s.channels)),
        grad_y(random_tensor<T>(3, s.batch, s.tokens, s.channels)),
        taps(random_tensor<float>(5, s.channels, Width)),
        bias(random_tensor<float>(6, s.channels)) {
    for (Index length : lengths) offsets.push_back(offsets.back() + length);
    initial_state = random_tensor<T>(2, sequences(), Width - 1, s.channels);
    grad_final_state = random_tensor<T>(4, sequences(), Width - 1, s.channels);
  }
  Index sequences() const { return offsets.empty() ? shape.batch : Index(offsets.size()) - 1; }
};

template <class T>
Tensor<T, 1> tensor_of(const std::vector<Index>& values) {
  Tensor<T, 1> tensor{Index(values.size())};
  for (Index i = 0; i < tensor.size(); ++i) tensor(i) = T(values[std::size_t(i)]);
  return tensor;
}

/// A problem on the device; outputs start as NaN.
template <class T, int Width>
struct DeviceProblem {
  Problem<T, Width> p;
  Arranged<T> x, y, grad_y, grad_x;
  DeviceTensor<T, 3> initial_state, final_state, grad_final_state, grad_initial_state;
  DeviceTensor<float, 2> taps, grad_taps;
  DeviceTensor<float, 1> bias, grad_bias;
  DeviceTensor<std::int64_t, 1> offsets;
  Stream stream;

  explicit DeviceProblem(const Problem<T, Width>& problem, Layout layout = Layout::channels_last)
      : p(problem),
        x(p.x, layout),
        y(blank(p.x), layout),
        grad_y(p.grad_y, layout),
        grad_x(blank(p.x), layout),
        initial_state(p.initial_state),
        final_state(blank(p.initial_state)),
        grad_final_state(p.grad_final_state),
        grad_initial_state(blank(p.initial_state)),
        taps(p.taps),
        grad_taps(blank(p.taps)),
        bias(p.bias),
        grad_bias(blank(p.bias)),
        offsets(tensor_of<std::int64_t>(p.offsets)) {}

  ShortConvArgs<T> args() const {
    ShortConvArgs<T> a{.x = x.view(),
                       .taps = taps,
                       .bias = bias,
                       .y = y.view(),
                       .initial_state = initial_state,
                       .final_state = final_state};
    if (!p.offsets.empty()) a.cu_seqlens = IndexView(offsets.view());
    return a;
  }
  ShortConvBackwardArgs<T> backward_args() const {
    ShortConvBackwardArgs<T> a{.x = x.view(),
                               .taps = taps,
                               .bias = bias,
                               .initial_state = initial_state,
                               .grad_y = grad_y.view(),
                               .grad_final_state = grad_final_state,
                               .grad_x = grad_x.view(),
                               .grad_taps = grad_taps,
                               .grad_bias = grad_bias,
                               .grad_initial_state = grad_initial_state};
    if (!p.offsets.empty()) a.cu_seqlens = IndexView(offsets.view());
    return a;
  }
  template <Activation A>
  void forward(const ShortConvArgs<T>& args) const {
    require_ok(cuda::short_conv<Width, A>(args, stream));
    stream.wait();
  }
  template <Activation A>
  void backward(const ShortConvBackwardArgs<T>& args) const {
    DeviceTensor<char, 1> scratch(Tensor<char, 1>(std::array<Index, 1>{Index(cuda::workspace_bytes(args))}, char(-1)));
    require_ok(
        cuda::short_conv_backward<Width, A>(args, {scratch.view().data, std::size_t(scratch.view().size())}, stream));
    stream.wait();
    CHECK(scratch.guards_intact());
  }
  bool guards_intact() const {
    return y.guards_intact() && grad_x.guards_intact() && final_state.guards_intact() &&
           grad_initial_state.guards_intact() && grad_taps.guards_intact() && grad_bias.guards_intact();
  }

  template <class U, int Rank>
  static Tensor<U, Rank> blank(const Tensor<U, Rank>& like) {
    return Tensor<U, Rank>(like.extents(), U(std::numeric_limits<float>::quiet_NaN()));
  }
};

/// What the reference says of a problem; bias and states may be left out.
struct Answer {
  Tensor<double, 3> y, final_state, grad_x, grad_initial_state;
  Tensor<double, 2> grad_taps;
  Tensor<double, 1> grad_bias;
};

template <class T, int Width>
Answer answer(const Problem<T, Width>& p, bool silu, bool with_bias = true, bool with_states = true) {
  const auto x = converted<double>(p.x.view()), grad_y = converted<double>(p.grad_y.view());
  const auto taps = converted<double>(p.taps.view());
  const auto bias = converted<double>(p.bias.view());
  const auto before = converted<double>(p.initial_state.view()), after = converted<double>(p.grad_final_state.view());
  Answer a{Tensor<double, 3>(x.extents()),      Tensor<double, 3>(before.extents()), Tensor<double, 3>(x.extents()),
           Tensor<double, 3>(before.extents()), Tensor<double, 2>(taps.extents()),   Tensor<double, 1>(bias.extents())};
  Tensor<double, 2> some_taps(taps.extents());
  Tensor<double, 1> some_bias(bias.extents());
  TensorView<const double, 1> used_bias;
  if (with_bias) used_bias = bias.view();
  for (Index i = 0; i < p.sequences(); ++i) {
    const bool packed = !p.offsets.empty();
    const Index begin = packed ? p.offsets[std::size_t(i)] : 0;
    const Index count = packed ? p.offsets[std::size_t(i) + 1] - begin : p.shape.tokens;
    const auto own = [&](auto& tensor) { return run(run(tensor.view(), 0, packed ? 0 : i, 1), 1, begin, count); };
    const auto state = [&](auto& tensor) { return run(tensor.view(), 0, i, 1); };
    TensorView<const double, 3> used_before, used_after;
    if (with_states) used_before = state(before), used_after = state(after);
    reference::short_conv(own(x), taps, used_bias, used_before, silu, own(a.y), state(a.final_state));
    reference::short_conv_backward(own(x), taps, used_bias, used_before, silu, own(grad_y), used_after, own(a.grad_x),
                                   some_taps, some_bias, state(a.grad_initial_state));
    for_each_index(taps.view(), [&](auto... j) { a.grad_taps(j...) += some_taps(j...); });
    for_each_index(bias.view(), [&](auto d) { a.grad_bias(d) += some_bias(d); });
  }
  return a;
}

template <class T, int Width>
void check_forward(const DeviceProblem<T, Width>& d, const Answer& want) {
  CHECK(relative_error(d.y.host(), want.y) < tolerance<T>(Width + 1));
  CHECK(relative_error(d.final_state.host(), want.final_state) == 0);
}

template <class T, int Width>
void check_backward(const DeviceProblem<T, Width>& d, const Answer& want) {
  const Index summed = d.p.shape.batch * d.p.shape.tokens;
  CHECK(relative_error(d.grad_x.host(), want.grad_x) < tolerance<T>(2 * Width));
  CHECK(relative_error(d.grad_taps.host(), want.grad_taps) < tolerance<float>(Width + summed));
  CHECK(relative_error(d.grad_bias.host(), want.grad_bias) < tolerance<float>(Width + summed));
  CHECK(relative_error(d.grad_initial_state.host(), want.grad_initial_state) < tolerance<T>(2 * Width));
}

/// Both passes against the reference in a layout.
template <class T, int Width, Activation A>
void check_layout(const Problem<T, Width>& p, const Answer& want, Layout layout) {
  CAPTURE(Width);
  CAPTURE(p.shape.batch);
  CAPTURE(p.shape.tokens);
  CAPTURE(p.shape.channels);
  CAPTURE(int(layout));
  const DeviceProblem<T, Width> d(p, layout);
  d.template forward<A>(d.args());
  check_forward(d, want);
  d.template backward<A>(d.backward_args());
  check_backward(d, want);
  CHECK(d.guards_intact());
}

template <class T, int Width, Activation A>
void check_layouts(Shape s, const std::vector<Index>& lengths = {}) {
  const Problem<T, Width> p(s, lengths);
  const Answer want = answer(p, A == Activation::silu);
  for (Layout layout : every_layout) check_layout<T, Width, A>(p, want, layout);
}

}  // namespace chela::test
