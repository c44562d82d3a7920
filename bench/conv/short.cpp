// Short convolution on the CPU: how close to a copy of the same bytes.
#include "chela/cpu/conv/short.hpp"

#include <string>

#include "chela/reference/short.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using test::random_tensor;

namespace {

enum class Pass { forward, backward, step };

/// Which axis is contiguous: [batch, token, channel] or [batch, channel, token] memory.
enum class Layout { channels_last, tokens_last };

template <class T, int Width>
struct Problem {
  Layout layout;
  Tensor<T, 3> x, y, state, grad_y, grad_x;
  Tensor<float, 2> taps, grad_taps;
  Tensor<float, 1> bias, grad_bias;
  Index position = 0;

  Problem(Index batch, Index tokens, Index channels, Layout memory)
      : layout(memory),
        x(memory == Layout::channels_last ? random_tensor<T>(1, batch, tokens, channels)
                                          : random_tensor<T>(1, batch, channels, tokens)),
        y(x.extents()),
        state(batch, Width - 1, channels),
        grad_y(x),
        grad_x(x.extents()),
        taps(random_tensor<float>(3, channels, Width)),
        grad_taps(taps.extents()),
        bias(random_tensor<float>(4, channels)),
        grad_bias(bias.extents()) {}

  TensorView<T, 3> view(Tensor<T, 3>& memory) const {
    return layout == Layout::channels_last ? memory.view() : transposed(memory.view(), 1, 2);
  }
  ShortConvArgs<T> args() { return {.x = view(x), .taps = taps, .bias = bias, .y = view(y)}; }
  ShortConvBackwardArgs<T> backward_args() {
    return {.x = view(x),
            .taps = taps,
            .bias = bias,
            .grad_y = view(grad_y),
            .grad_x = view(grad_x),
            .grad_taps = grad_taps,
            .grad_bias = grad_bias};
  }
  ShortConvStepArgs<T> step_args(Index token) {
    return {.x = slice_axis<1>(view(x), token),
            .taps = taps,
            .bias = bias,
            .y = slice_axis<1>(view(y), token),
            .state = state,
            .position = position++};
  }
};

/// Whether the passes and steps are right, judged on one sequence and a few channels that the operator treats like the rest.
template <class T, int Width, Activation A>
bool right(const BenchExecutor& executor, Layout layout) {
  Problem<T, Width> p(1, 700, 37, layout);
  using test::converted;
  const bool silu = A == Activation::silu;
  const auto x = converted<double>(p.view(p.x)), grad_y = converted<double>(p.view(p.grad_y));
  const auto taps = converted<double>(p.taps.view());
  const auto bias = converted<double>(p.bias.view());
  Tensor<double, 3> y(x.extents()), grad_x(x.extents());
  Tensor<double, 2> grad_taps(taps.extents());
  Tensor<double, 1> grad_bias(bias.extents());
  reference::short_conv(x, taps, bias, {}, silu, y, {});
  reference::short_conv_backward(x, taps, bias, {}, silu, grad_y, {}, grad_x, grad_taps, grad_bias, {});
  const auto y_is_right = [&] { return test::relative_error(p.view(p.y), y.view()) < test::tolerance<T>(Width + 1); };
  for (Index t = 0; t < 700; ++t)
    if (!cpu::short_conv_step<Width, A>(p.step_args(t), executor).ok()) return false;
  if (!y_is_right()) return false;
  p.y.fill(T(0));
  return cpu::short_conv<Width, A>(p.args(), executor).ok() && y_is_right() &&
         cpu::short_conv_backward<Width, A>(p.backward_args(), executor).ok() &&
         test::relative_error(p.view(p.grad_x), grad_x.view()) < test::tolerance<T>(2 * Width) &&
         test::relative_error(p.grad_taps, grad_taps) < test::tolerance<float>(700 + Width);
}

template <Pass pass, class T, int Width, Activation A, Layout layout>
void short_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const int threads = int(state.range(3));
  const BenchExecutor executor = executor_of(threads);
  if (!right<T, Width, A>(executor, layout)) return state.SkipWithError("wrong answer");
  Problem<T, Width> p(batch, tokens, channels, layout);
  const double copy = copy_rate(threads);

  const double seconds = time_iterations(state, [&] {
    Status status;
    if constexpr (pass == Pass::forward) status = cpu::short_conv<Width, A>(p.args(), executor);
    if constexpr (pass == Pass::backward) status = cpu::short_conv_backward<Width, A>(p.backward_args(), executor);
    if constexpr (pass == Pass::step) status = cpu::short_conv_step<Width, A>(p.step_args(0), executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });

  // x and y; x, grad_y and grad_x; x, y, the state and one row of it back.
  const double values = double(batch * channels) * (pass == Pass::forward    ? 2.0 * double(tokens)
                                                    : pass == Pass::backward ? 3.0 * double(tokens)
                                                                             : 2.0 + Width);
  state.counters["share_of_copy"] = values * sizeof(T) / seconds / copy;
  const double passes = pass == Pass::backward ? 3 : 1;
  state.counters["gflops"] = 2e-9 * passes * Width * double(batch * tokens * channels) / seconds;
}

template <Pass pass, class T, int Width, Activation A, Layout layout>
void add(const std::string& variant) {
  const char* const name = pass == Pass::forward ? "forward" : pass == Pass::backward ? "backward" : "step";
  auto* b = benchmark::RegisterBenchmark(("short_conv/" + variant + "/" + name).c_str(),
                                         short_conv<pass, T, Width, A, layout>);
  b->ArgNames({"B", "T", "D", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) {
    if (pass == Pass::step)
      b->Args({256, 1, 4096, threads});
    else
      b->Args({8, 4096, 1024, threads});
  }
}

template <class T, int Width, Activation A, Layout layout = Layout::channels_last>
void add_passes(const std::string& variant) {
  add<Pass::forward, T, Width, A, layout>(variant);
  add<Pass::backward, T, Width, A, layout>(variant);
  if (layout == Layout::channels_last) add<Pass::step, T, Width, A, layout>(variant);
}

}  // namespace

int main(int argc, char** argv) {
  add_passes<float, 4, Activation::silu>("float_width4_silu");
  add_passes<float, 4, Activation::none>("float_width4");
  add_passes<Eigen::bfloat16, 4, Activation::silu>("bf16_width4_silu");
  add_passes<float, 16, Activation::silu>("float_width16_silu");
  add_passes<Eigen::bfloat16, 16, Activation::silu>("bf16_width16_silu");
  add_passes<float, 64, Activation::none>("float_width64");
  add_passes<float, 4, Activation::silu, Layout::tokens_last>("float_width4_silu_tokens_last");
  add_passes<Eigen::bfloat16, 4, Activation::silu, Layout::tokens_last>("bf16_width4_silu_tokens_last");
  add_passes<float, 16, Activation::silu, Layout::tokens_last>("float_width16_silu_tokens_last");
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
