// The short-long convolution on the CPU: how close to a copy of its input and output, and what it costs over the long
// stage.
#include "chela/cpu/conv/short_long.hpp"

#include "chela/reference/short_long.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using test::random_tensor;

namespace {

constexpr int width = 4;

enum class Pass { forward, forward_spectrum, backward };

struct Problem {
  Tensor<float, 3> x, inner, z, grad_z, grad_x;
  Tensor<float, 2> short_taps, taps, grad_short_taps, grad_taps;
  Tensor<float, 1> short_bias, skip, grad_short_bias, grad_skip;

  Problem(Index batch, Index tokens, Index channels)
      : x(random_tensor<float>(1, batch, tokens, channels)),
        inner(x.extents()),
        z(x.extents()),
        grad_z(random_tensor<float>(2, batch, tokens, channels)),
        grad_x(x.extents()),
        short_taps(random_tensor<float>(3, channels, width)),
        taps(random_tensor<float>(4, channels, tokens)),
        grad_short_taps(short_taps.extents()),
        grad_taps(taps.extents()),
        short_bias(random_tensor<float>(5, channels)),
        skip(random_tensor<float>(6, channels)),
        grad_short_bias(short_bias.extents()),
        grad_skip(skip.extents()) {}

  ShortLongConvArgs<float> args() {
    return {
        .x = x, .short_taps = short_taps, .short_bias = short_bias, .taps = taps, .skip = skip, .z = z, .inner = inner};
  }
  ShortLongConvBackwardArgs<float> backward_args() {
    return {.x = x,
            .short_taps = short_taps,
            .short_bias = short_bias,
            .taps = taps,
            .skip = skip,
            .grad_z = grad_z,
            .grad_x = grad_x,
            .grad_short_taps = grad_short_taps,
            .grad_short_bias = grad_short_bias,
            .grad_taps = grad_taps,
            .grad_skip = grad_skip};
  }
};

/// Whether the forward and backward passes are right on a small problem with a tail in every axis.
bool right(const BenchExecutor& executor) {
  constexpr Index tokens = 150, channels = 21;
  Problem p(2, tokens, channels);
  if (!cpu::short_long_conv<width>(p.args(), executor).ok()) return false;
  if (!cpu::short_long_conv_backward<width>(p.backward_args(), executor).ok()) return false;
  using test::converted;
  const auto x = converted<double>(p.x.view()), grad_z = converted<double>(p.grad_z.view());
  const auto short_taps = converted<double>(p.short_taps.view()), taps = converted<double>(p.taps.view());
  const auto short_bias = converted<double>(p.short_bias.view()), skip = converted<double>(p.skip.view());
  const reference::ShortLongConvInputs in{
      .x = x, .short_taps = short_taps, .short_bias = short_bias, .taps = taps, .skip = skip};
  auto inner = x, z = x, grad_x = x;
  auto grad_short_taps = short_taps, grad_taps = taps;
  auto grad_short_bias = short_bias, grad_skip = skip;
  reference::short_long_conv(in, inner, z, {}, {});
  reference::short_long_conv_backward(in, grad_z,
                                      {.x = grad_x,
                                       .short_taps = grad_short_taps,
                                       .short_bias = grad_short_bias,
                                       .taps = grad_taps,
                                       .skip = grad_skip});
  return test::relative_error(p.z, z) < test::tolerance<float>(tokens + 1) &&
         test::relative_error(p.grad_x, grad_x) < test::tolerance<float>(tokens + width) &&
         test::relative_error(p.grad_taps, grad_taps) < test::tolerance<float>(2 * tokens);
}

template <Pass pass>
void short_long_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const int threads = int(state.range(3));
  const BenchExecutor executor = executor_of(threads);
  if (!right(executor)) return state.SkipWithError("wrong answer");
  Problem p(batch, tokens, channels);
  const double copy = copy_rate(threads);
  const auto spectrum = cpu::kernel_spectrum(p.taps.view(), {}, tokens, executor);

  const double seconds = time_iterations(state, [&] {
    Status status;
    if constexpr (pass == Pass::forward) status = cpu::short_long_conv<width>(p.args(), executor);
    if constexpr (pass == Pass::forward_spectrum) status = cpu::short_long_conv<width>(p.args(), spectrum, executor);
    if constexpr (pass == Pass::backward) status = cpu::short_long_conv_backward<width>(p.backward_args(), executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });

  const double elements = double(batch * tokens * channels);
  state.counters["share_of_copy"] = (pass == Pass::backward ? 3 : 2) * elements * sizeof(float) / seconds / copy;
  state.counters["elements_per_second"] = elements / seconds;
  if (pass == Pass::forward_spectrum) {
    const auto long_stage_args = long_stage(p.args(), TensorView<const float, 3>(p.inner.view()));
    state.counters["times_long_stage"] =
        seconds /
        least_seconds(5, [&] { benchmark::DoNotOptimize(cpu::long_conv(long_stage_args, spectrum, executor)); });
  }
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "D", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2)
    for (Index tokens : {1024, 4096}) b->Args({4, tokens, 512, threads});
}

BENCHMARK(short_long_conv<Pass::forward>)->Name("short_long_conv/float_width4/forward")->Apply(shapes);
BENCHMARK(short_long_conv<Pass::forward_spectrum>)
    ->Name("short_long_conv/float_width4_spectrum/forward")
    ->Apply(shapes);
BENCHMARK(short_long_conv<Pass::backward>)->Name("short_long_conv/float_width4/backward")->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
