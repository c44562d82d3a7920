// Short convolution on a GPU: how close to a copy of the same bytes. Launches rotate among sets of buffers that
// together are far larger than the second-level cache.
#include "chela/cuda/conv/short.cuh"

#include <memory>
#include <string>

#include "chela/reference/short.hpp"
#include "support/device_arrays.cuh"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;

namespace {

enum class Pass { forward, backward, step };

/// Which axis is contiguous: [batch, token, channel] or [batch, channel, token] memory.
enum class Layout { channels_last, tokens_last };

template <class T>
using Values = Array<T, Index, Index, Index>;

template <class T, int Width>
struct Buffers {
  Layout layout;
  Index batch, tokens, channels;
  Values<T> x, y, grad_y, grad_x, state;
  Array<float, Index, Index> taps, grad_taps;
  Array<float, Index> bias, grad_bias;
  DeviceMemory workspace;

  /// Without `gradients` their arrays are empty.
  Buffers(std::uint32_t seed, Layout memory, Index b, Index t, Index d, bool gradients)
      : layout(memory),
        batch(b),
        tokens(t),
        channels(d),
        x(seed, -1, 1, b, rows(), columns()),
        y(seed + 1, 0, 0, gradients ? 0 : b, rows(), columns()),
        grad_y(seed + 2, -1, 1, gradients ? b : 0, rows(), columns()),
        grad_x(seed + 3, 0, 0, gradients ? b : 0, rows(), columns()),
        state(seed + 4, -1, 1, b, Index(Width - 1), d),
        taps(seed + 5, -1, 1, d, Index(Width)),
        grad_taps(seed + 6, 0, 0, d, Index(Width)),
        bias(seed + 7, -1, 1, d),
        grad_bias(seed + 8, 0, 0, d),
        workspace(gradients ? cuda::workspace_bytes(backward_args()) : 0) {
    for (const auto* memory : {&y.memory, &grad_x.memory, &grad_taps.memory, &grad_bias.memory})
      require_cuda(cudaMemset(memory->data(), 0xff, memory->bytes()));
  }

  TensorView<T, 3> view(const Values<T>& values) const { return logical(values.view); }
  /// A copy of [batch, token, some channels] in double on the host.
  Tensor<double, 3> on_host(const Values<T>& values, Index first, Index count) const {
    auto copy = values.on_host();
    auto of_host = values.view;
    of_host.data = copy.data();
    return test::converted<double>(run(logical(of_host), 2, first, count));
  }
  ShortConvArgs<T> args() const { return {.x = view(x), .taps = taps.view, .bias = bias.view, .y = view(y)}; }
  ShortConvBackwardArgs<T> backward_args() const {
    return {.x = view(x),
            .taps = taps.view,
            .bias = bias.view,
            .grad_y = view(grad_y),
            .grad_x = view(grad_x),
            .grad_taps = grad_taps.view,
            .grad_bias = grad_bias.view};
  }
  ShortConvStepArgs<T> step_args() const {
    return {.x = slice_axis<1>(view(x), 0),
            .taps = taps.view,
            .bias = bias.view,
            .y = slice_axis<1>(view(y), 0),
            .state = state.view};
  }
  template <Pass pass, Activation A>
  Status launch(const Stream& stream) const {
    if constexpr (pass == Pass::forward) return cuda::short_conv<Width, A>(args(), stream);
    if constexpr (pass == Pass::step) return cuda::short_conv_step<Width, A>(step_args(), stream);
    return cuda::short_conv_backward<Width, A>(backward_args(), {workspace.data(), workspace.bytes()}, stream);
  }

 private:
  Index rows() const { return layout == Layout::channels_last ? tokens : channels; }
  Index columns() const { return layout == Layout::channels_last ? channels : tokens; }
  TensorView<T, 3> logical(TensorView<T, 3> memory) const {
    return layout == Layout::channels_last ? memory : transposed(memory, 1, 2);
  }
};

template <class T, class... I>
auto some_channels(const Array<T, I...>& array, Index first, Index count) {
  auto copy = array.on_host();
  auto view = array.view;
  view.data = copy.data();
  return test::converted<double>(run(view, 0, first, count));
}

/// Launches once, and judges the results on a few channels with all their tokens.
template <Pass pass, class T, int Width, Activation A>
Status judge(const Buffers<T, Width>& b, const Stream& stream) {
  constexpr bool silu = A == Activation::silu;
  constexpr Index count = 3;
  const Index middle = b.channels / 2 - 1;
  const Tensor<double, 3> state = [&] {
    auto copy = b.state.on_host();
    auto view = b.state.view;
    view.data = copy.data();
    return test::converted<double>(run(view, 2, middle, count));
  }();
  if (Status s = b.template launch<pass, A>(stream); !s.ok()) return s;
  stream.wait();
  const auto x = b.on_host(b.x, middle, count);
  const auto taps = some_channels(b.taps, middle, count);
  const auto bias = some_channels(b.bias, middle, count);
  Tensor<double, 3> want(x.extents());
  bool right = false;
  if constexpr (pass == Pass::backward) {
    Tensor<double, 2> want_taps(taps.extents());
    Tensor<double, 1> want_bias(bias.extents());
    reference::short_conv_backward(x, taps, bias, {}, silu, b.on_host(b.grad_y, middle, count), {}, want, want_taps,
                                   want_bias, {});
    const double bound = test::tolerance<float>(b.batch * b.tokens);
    right = test::relative_error(b.on_host(b.grad_x, middle, count), want) < test::tolerance<T>(2 * Width) &&
            test::relative_error(some_channels(b.grad_taps, middle, count), want_taps) < bound &&
            test::relative_error(some_channels(b.grad_bias, middle, count), want_bias) < bound;
  } else {
    TensorView<const double, 3> before;
    if (pass == Pass::step) before = state.view();
    reference::short_conv(x, taps, bias, before, silu, want, {});
    right = test::relative_error(b.on_host(b.y, middle, count), want) < test::tolerance<T>(Width + 1);
  }
  return require(right, Code::bad_value, "wrong answer");
}

template <Pass pass, class T, int Width, Activation A, Layout layout>
void short_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  // x and y; x, grad_y and grad_x; x, y, the state and one row of it back.
  const double values = double(batch * channels) * (pass == Pass::forward    ? 2.0 * double(tokens)
                                                    : pass == Pass::backward ? 3.0 * double(tokens)
                                                                             : 2.0 + Width);
  using Set = Buffers<T, Width>;
  const Stream stream;
  measure_share_of_copy(
      state, stream, values * sizeof(T),
      [&](int i) { return std::make_unique<Set>(10 * i + 1, layout, batch, tokens, channels, pass == Pass::backward); },
      [&](const Set& set) { return set.template launch<pass, A>(stream); },
      [&](const Set& set) { return judge<pass, T, Width, A>(set, stream); });
}

template <Pass pass, class T, int Width, Activation A, Layout layout>
void add(const std::string& variant) {
  const char* const name = pass == Pass::forward ? "forward" : pass == Pass::backward ? "backward" : "step";
  auto* b = benchmark::RegisterBenchmark(("short_conv/" + variant + "/" + name).c_str(),
                                         short_conv<pass, T, Width, A, layout>);
  b->ArgNames({"B", "T", "D"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(15);
  if (pass == Pass::step)
    b->Args({256, 1, 4096});
  else
    b->Args({8, 8192, 1024})->Args({64, 1024, 768})->Args({8, 2048, 1024});
}

template <class T, int Width, Activation A, Layout layout = Layout::channels_last>
void add_passes(const std::string& variant) {
  add<Pass::forward, T, Width, A, layout>(variant);
  add<Pass::backward, T, Width, A, layout>(variant);
  if (layout == Layout::channels_last) add<Pass::step, T, Width, A, layout>(variant);
}

}  // namespace

int main(int argc, char** argv) {
  add_passes<__nv_bfloat16, 4, Activation::silu>("bf16_width4_silu");
  add_passes<__nv_bfloat16, 4, Activation::silu, Layout::tokens_last>("bf16_width4_silu_tokens_last");
  add_passes<float, 4, Activation::silu>("float_width4_silu");
  add_passes<float, 4, Activation::silu, Layout::tokens_last>("float_width4_silu_tokens_last");
  add_passes<__nv_bfloat16, 8, Activation::silu>("bf16_width8_silu");
  add_passes<__nv_bfloat16, 16, Activation::silu>("bf16_width16_silu");
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
