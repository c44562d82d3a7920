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

template <class T, int Width>
struct Problem {
  Tensor<T, 3> x, y, state, grad_y, grad_x;
  Tensor<float, 2> taps, grad_taps;
  Tensor<float, 1> bias, grad_bias;

  Problem(Index batch, Index tokens, Index channels)
      : x(random_tensor<T>(1, batch, tokens, channels)),
        y(x.extents()),
        state(batch, Width - 1, channels),
        grad_y(random_tensor<T>(2, batch, tokens, channels)),
        grad_x(x.extents()),
        taps(random_tensor<float>(3, channels, Width)),
        grad_taps(taps.extents()),
        bias(random_tensor<float>(4, channels)),
        grad_bias(bias.extents()) {}

  ShortConvArgs<T> args() { return {.x = x, .taps = taps, .bias = bias, .y = y}; }
  ShortConvBackwardArgs<T> backward_args() {
    return {.x = x,
            .taps = taps,
            .bias = bias,
            .grad_y = grad_y,
            .grad_x = grad_x,
            .grad_taps = grad_taps,
            .grad_bias = grad_bias};
  }
  ShortConvStepArgs<T> step_args() {
    return {
        .x = slice_axis<1>(x.view(), 0), .taps = taps, .bias = bias, .y = slice_axis<1>(y.view(), 0), .state = state};
  }
};

/// Whether both passes are right, judged on one sequence and a few channels that the operator treats like the rest.
template <class T, int Width, Activation A>
bool right(const BenchExecutor& executor) {
  Problem<T, Width> p(1, 700, 37);
  if (!cpu::short_conv<Width, A>(p.args(), executor).ok()) return false;
  if (!cpu::short_conv_backward<Width, A>(p.backward_args(), executor).ok()) return false;
  using test::converted;
  const bool silu = A == Activation::silu;
  const auto x = converted<double>(p.x.view()), grad_y = converted<double>(p.grad_y.view());
  const auto taps = converted<double>(p.taps.view());
  const auto bias = converted<double>(p.bias.view());
  Tensor<double, 3> y(x.extents()), grad_x(x.extents());
  Tensor<double, 2> grad_taps(taps.extents());
  Tensor<double, 1> grad_bias(bias.extents());
  reference::short_conv(x, taps, bias, {}, silu, y, {});
  reference::short_conv_backward(x, taps, bias, {}, silu, grad_y, {}, grad_x, grad_taps, grad_bias, {});
  return test::relative_error(p.y, y) < test::tolerance<T>(Width + 1) &&
         test::relative_error(p.grad_x, grad_x) < test::tolerance<T>(2 * Width) &&
         test::relative_error(p.grad_taps, grad_taps) < test::tolerance<float>(700 + Width);
}

template <Pass pass, class T, int Width, Activation A>
void short_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const int threads = int(state.range(3));
  const BenchExecutor executor = executor_of(threads);
  if (!right<T, Width, A>(executor)) return state.SkipWithError("wrong answer");
  Problem<T, Width> p(batch, tokens, channels);
  const double copy = copy_rate(threads);

  const double seconds = time_iterations(state, [&] {
    Status status;
    if constexpr (pass == Pass::forward) status = cpu::short_conv<Width, A>(p.args(), executor);
    if constexpr (pass == Pass::backward) status = cpu::short_conv_backward<Width, A>(p.backward_args(), executor);
    if constexpr (pass == Pass::step) status = cpu::short_conv_step<Width, A>(p.step_args(), executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });

  // x and y; x, grad_y and grad_x; x, y and the state both ways.
  const double values = double(batch * channels) * (pass == Pass::forward    ? 2.0 * double(tokens)
                                                    : pass == Pass::backward ? 3.0 * double(tokens)
                                                                             : 2.0 + 2.0 * (Width - 1));
  state.counters["share_of_copy"] = values * sizeof(T) / seconds / copy;
  const double passes = pass == Pass::backward ? 3 : 1;
  state.counters["gflops"] = 2e-9 * passes * Width * double(batch * tokens * channels) / seconds;
}

template <Pass pass, class T, int Width, Activation A>
void add(const std::string& variant) {
  const char* const name = pass == Pass::forward ? "forward" : pass == Pass::backward ? "backward" : "step";
  auto* b = benchmark::RegisterBenchmark(("short_conv/" + variant + "/" + name).c_str(), short_conv<pass, T, Width, A>);
  b->ArgNames({"B", "T", "D", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) {
    if (pass == Pass::step)
      b->Args({64, 1, 1024, threads});
    else
      b->Args({8, 4096, 1024, threads});
  }
}

template <class T, int Width, Activation A>
void add_passes(const std::string& variant) {
  add<Pass::forward, T, Width, A>(variant);
  add<Pass::backward, T, Width, A>(variant);
  add<Pass::step, T, Width, A>(variant);
}

}  // namespace

int main(int argc, char** argv) {
  add_passes<float, 4, Activation::silu>("float_width4_silu");
  add_passes<float, 4, Activation::none>("float_width4");
  add_passes<Eigen::bfloat16, 4, Activation::silu>("bf16_width4_silu");
  add_passes<float, 64, Activation::none>("float_width64");
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
