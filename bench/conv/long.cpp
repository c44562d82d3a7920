// Long convolution on the CPU against FFTW's best organisation: one channel at a time in cache, padded to twice the length, a
// measured plan made once, and the kernels' spectra given to both.
#include "chela/cpu/conv/long.hpp"

#include <string>
#include <vector>

#include "chela/reference/long.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"

#if defined(CHELA_HAVE_FFTW)
#include <fftw3.h>
#endif

using namespace chela;
using namespace chela::bench;
using test::random_tensor;

namespace {

enum class Pass { forward, backward, step };

struct Problem {
  Tensor<float, 3> x, y, grad_y, grad_x;
  Tensor<float, 2> taps, grad_taps;

  Problem(Index batch, Index tokens, Index channels)
      : x(random_tensor<float>(1, batch, tokens, channels)),
        y(x.extents()),
        grad_y(random_tensor<float>(2, batch, tokens, channels)),
        grad_x(x.extents()),
        taps(random_tensor<float>(3, channels, tokens)),
        grad_taps(taps.extents()) {}

  LongConvArgs<float> args() { return {.x = x, .taps = taps, .y = y}; }
  LongConvBackwardArgs<float> backward_args() {
    return {.x = x, .taps = taps, .grad_y = grad_y, .grad_x = grad_x, .grad_taps = grad_taps};
  }
};

/// Whether some outputs at both ends and between are the sums they should be. `at(t)` is output t of channel d of sequence 0.
template <class At>
bool right(const Problem& p, Index d, const At& at) {
  const Index tokens = p.x.extents()[1];
  double difference = 0, norm = 0;
  for (Index i = 0; i < 100; ++i) {
    const Index t = i < 20   ? std::min(i, tokens - 1)
                    : i < 40 ? std::max<Index>(tokens - 60 + i, 0)
                             : (i * 7919) % tokens;
    double want = 0;
    for (Index j = 0; j <= t; ++j) want += double(p.taps(d, j)) * double(p.x(0, t - j, d));
    difference += (at(t) - want) * (at(t) - want), norm += want * want;
  }
  return difference <= 1e-12 * norm;
}

#if defined(CHELA_HAVE_FFTW)
/// Seconds of FFTW's forward pass over [batch, channel, token], on this many threads.
double fftw_seconds(Problem& p, int threads) {
  const auto [batch, tokens, channels] = p.x.extents();
  const int n = int(2 * tokens);
  const Index bins = tokens + 1;
  struct Buffers {
    float* time;
    fftwf_complex* frequency;
  };
  std::vector<Buffers> buffers;
  for (int i = 0; i < threads; ++i)
    buffers.push_back({fftwf_alloc_real(std::size_t(n)), fftwf_alloc_complex(std::size_t(bins))});
  fftwf_plan forward = fftwf_plan_dft_r2c_1d(n, buffers[0].time, buffers[0].frequency, FFTW_MEASURE);
  fftwf_plan inverse = fftwf_plan_dft_c2r_1d(n, buffers[0].frequency, buffers[0].time, FFTW_MEASURE);
  Tensor<float, 3> kernels(channels, bins, Index(2));
  for (Index d = 0; d < channels; ++d) {
    std::fill_n(buffers[0].time, n, 0.0f);
    for (Index t = 0; t < tokens; ++t) buffers[0].time[t] = p.taps(d, t) / float(n);
    fftwf_execute_dft_r2c(forward, buffers[0].time, buffers[0].frequency);
    std::copy_n(&buffers[0].frequency[0][0], 2 * bins, &kernels(d, 0, 0));
  }
  Tensor<float, 3> x(batch, channels, tokens), y(batch, channels, tokens);
  for (Index b = 0; b < batch; ++b)
    for (Index d = 0; d < channels; ++d)
      for (Index t = 0; t < tokens; ++t) x(b, d, t) = p.x(b, t, d);
  const auto run = [&] {
    constexpr Index per_task = 8;
    executor_of(threads).for_each(ceil_div(batch * channels, per_task), [&](Index task, int worker) {
      const Buffers& w = buffers[std::size_t(worker)];
      for (Index row = task * per_task; row < std::min(batch * channels, (task + 1) * per_task); ++row) {
        std::copy_n(x.data() + row * tokens, tokens, w.time);
        std::fill_n(w.time + tokens, tokens, 0.0f);
        fftwf_execute_dft_r2c(forward, w.time, w.frequency);
        const float* k = kernels.data() + row % channels * 2 * bins;
        float* f = &w.frequency[0][0];
        for (Index i = 0; i < bins; ++i, f += 2, k += 2) {
          const float re = f[0] * k[0] - f[1] * k[1], im = f[0] * k[1] + f[1] * k[0];
          f[0] = re, f[1] = im;
        }
        fftwf_execute_dft_c2r(inverse, w.frequency, w.time);
        std::copy_n(w.time, tokens, y.data() + row * tokens);
      }
    });
  };
  double seconds = least_seconds(tokens <= 4096 ? 31 : 9, run);
  if (!right(p, channels / 3, [&](Index t) { return y(0, channels / 3, t); })) seconds = 0;
  fftwf_destroy_plan(forward), fftwf_destroy_plan(inverse);
  for (const Buffers& b : buffers) fftwf_free(b.time), fftwf_free(b.frequency);
  return seconds;
}
#endif

/// `given`: the kernels' spectra are made before the clock starts.
template <Pass pass, bool given>
void long_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const int threads = int(state.range(3));
  const BenchExecutor executor = executor_of(threads);
  Problem p(batch, tokens, channels);
  const auto spectrum = cpu::kernel_spectrum(p.taps.view(), {}, tokens, executor);
  Status status = cpu::long_conv(p.args(), spectrum, executor);
  if (!status.ok() || !right(p, channels / 3, [&](Index t) { return p.y(0, t, channels / 3); }))
    return state.SkipWithError("wrong answer");
  Tensor<float, 3> ring(batch, tokens, channels);
  const double seconds = time_iterations(state, [&] {
    if constexpr (pass == Pass::step) {
      status = cpu::long_conv_step(LongConvStepArgs<float>{.x = slice_axis<1>(p.x.view(), 0),
                                                           .taps = p.taps,
                                                           .y = slice_axis<1>(p.y.view(), 0),
                                                           .ring = ring,
                                                           .position = 2 * tokens},
                                   executor);
    } else if constexpr (pass == Pass::forward) {
      status = given ? cpu::long_conv(p.args(), spectrum, executor) : cpu::long_conv(p.args(), executor);
    } else {
      status = given ? cpu::long_conv_backward(p.backward_args(), spectrum, executor)
                     : cpu::long_conv_backward(p.backward_args(), executor);
    }
    if (!status.ok()) state.SkipWithError(status.why);
  });
  const double items = double(batch * channels) * double(pass == Pass::step ? 1 : tokens);
  state.counters["items_per_second"] = items / seconds;
#if defined(CHELA_HAVE_FFTW)
  if constexpr (pass == Pass::forward && given) {
    const double baseline = fftw_seconds(p, threads);
    if (baseline == 0) return state.SkipWithError("wrong answer of the baseline");
    state.counters["times_baseline"] = baseline / seconds;
  }
#endif
}

template <Pass pass, bool given>
void add(const std::string& variant) {
  const char* const name = pass == Pass::forward ? "forward" : pass == Pass::backward ? "backward" : "step";
  auto* b = benchmark::RegisterBenchmark(("long_conv/" + variant + "/" + name).c_str(), long_conv<pass, given>);
  b->ArgNames({"B", "T", "D", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int tokens : {1024, 4096, 16384, 65536})
    for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2)
      if (pass == Pass::forward || tokens == 4096) b->Args({1, tokens, 256, threads});
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2)
    if (pass == Pass::forward) b->Args({8, 4096, 256, threads});
}

}  // namespace

int main(int argc, char** argv) {
  add<Pass::forward, true>("spectrum_given");
  add<Pass::forward, false>("one_call");
  add<Pass::backward, true>("spectrum_given");
  add<Pass::backward, false>("one_call");
  add<Pass::step, true>("ring");
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
