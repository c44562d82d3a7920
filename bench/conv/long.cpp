// Long convolution on the CPU, in each of its ways, against FFTW's best organisation: one channel at a time in cache,
// padded to twice the length or a little more, a measured plan made once, and the kernels' spectra given to both. The
// names of what is measured:
//
//   long_conv/spectrum_given, one_call    the policy's own choice, with the kernel made ready before or within the call
//   long_conv/direct, transform           one way for kernels as long as the sequence: where the lines cross
//   long_conv/taps_256, taps_1024         kernels shorter than the sequence, in blocks
//   long_conv/eighths_2, eighths_4        frequency-sparse kernels: an approximation
//   long_conv/stream, ring                one token, in O(log^2 L) and in O(L)
//   long_conv/fftw                        the baseline
//
// bench/plot_long_conv.py draws the output of --benchmark_out=<file> --benchmark_out_format=json.
#include "chela/cpu/conv/long.hpp"

#include <cmath>
#include <memory>
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

enum class Pass { forward, backward };

struct Problem {
  Tensor<float, 3> x, y, grad_y, grad_x;
  Tensor<float, 2> taps, grad_taps;

  Problem(Index batch, Index tokens, Index channels, Index kernel_taps)
      : x(random_tensor<float>(1, batch, tokens, channels)),
        y(x.extents()),
        grad_y(random_tensor<float>(2, batch, tokens, channels)),
        grad_x(x.extents()),
        taps(random_tensor<float>(3, channels, kernel_taps)),
        grad_taps(taps.extents()) {}

  LongConvArgs<float> args() { return {.x = x, .taps = taps, .y = y}; }
  LongConvBackwardArgs<float> backward_args() {
    return {.x = x, .taps = taps, .grad_y = grad_y, .grad_x = grad_x, .grad_taps = grad_taps};
  }
};

/// Whether some outputs at both ends and between are the sums they should be. `at(t)` is output t of channel d of
/// sequence 0.
template <class At>
bool right(const Problem& p, Index d, const At& at) {
  const Index tokens = p.x.extents()[1], taps = p.taps.extents()[1];
  double difference = 0, norm = 0;
  for (Index i = 0; i < 100; ++i) {
    const Index t = i < 20   ? std::min(i, tokens - 1)
                    : i < 40 ? std::max<Index>(tokens - 60 + i, 0)
                             : (i * 7919) % tokens;
    double want = 0;
    for (Index j = 0; j <= std::min(t, taps - 1); ++j) want += double(p.taps(d, j)) * double(p.x(0, t - j, d));
    difference += (at(t) - want) * (at(t) - want), norm += want * want;
  }
  return difference <= 1e-12 * norm;
}

/// Multiplications of packets per second, the most a core can do: chains enough to keep its multipliers busy.
double multiplication_rate() {
  using Packet = cpu::detail::LanePacket<float>;
  static const double rate = [] {
    using namespace Eigen::internal;
    constexpr int chains = 12, rounds = 20000;
    const Packet factor = pset1<Packet>(0.999f), term = pset1<Packet>(0.001f);
    Packet x[chains];
    for (Packet& p : x) p = term;
    const double seconds = least_seconds(20, [&] {
      Packet y[chains];
      CHELA_UNROLL
      for (int i = 0; i < chains; ++i) y[i] = x[i];
      for (int r = 0; r < rounds; ++r) {
        CHELA_UNROLL
        for (int i = 0; i < chains; ++i) y[i] = cpu::detail::in_register(pmadd(y[i], factor, term));
      }
      CHELA_UNROLL
      for (int i = 0; i < chains; ++i) x[i] = y[i];
    });
    benchmark::DoNotOptimize(x[0]);
    return chains * double(rounds) / seconds;
  }();
  return rate;
}

/// Multiplications of packets that a forward pass of 2^n points needs per point: two per level either way, one at the
/// first level, which is real, next to none in the innermost three levels of the inverse, four for the product, two at
/// the output.
double multiplications_per_point(Index points) { return 4 * std::log2(double(points)) - 1 - 6 + 0.5 + 4 + 2; }

#if defined(CHELA_HAVE_FFTW)
/// The forward pass over [batch, channel, token] on some threads.
class Fftw {
 public:
  Fftw(const Problem& p, int threads)
      : tokens_(p.x.extents()[1]),
        points_(good_length(2 * tokens_)),
        channels_(p.x.extents()[2]),
        rows_(p.x.extents()[0] * channels_),
        threads_(threads) {
    for (int i = 0; i < threads; ++i)
      buffers_.push_back({fftwf_alloc_real(std::size_t(points_)), fftwf_alloc_complex(std::size_t(bins()))});
    const Buffers& b = buffers_[0];
    forward_ = fftwf_plan_dft_r2c_1d(int(points_), b.time, b.frequency, FFTW_MEASURE);
    inverse_ = fftwf_plan_dft_c2r_1d(int(points_), b.frequency, b.time, FFTW_MEASURE);
    kernels_ = Tensor<float, 3>(channels_, bins(), Index(2));
    for (Index d = 0; d < channels_; ++d) {
      std::fill_n(b.time, points_, 0.0f);
      for (Index t = 0; t < std::min(tokens_, p.taps.extents()[1]); ++t) b.time[t] = p.taps(d, t) / float(points_);
      fftwf_execute_dft_r2c(forward_, b.time, b.frequency);
      std::copy_n(&b.frequency[0][0], 2 * bins(), &kernels_(d, 0, 0));
    }
    x_ = y_ = Tensor<float, 2>(rows_, tokens_);
    for (Index r = 0; r < rows_; ++r)
      for (Index t = 0; t < tokens_; ++t) x_(r, t) = p.x(r / channels_, t, r % channels_);
  }
  Fftw(const Fftw&) = delete;
  ~Fftw() {
    fftwf_destroy_plan(forward_), fftwf_destroy_plan(inverse_);
    for (const Buffers& b : buffers_) fftwf_free(b.time), fftwf_free(b.frequency);
  }

  void operator()() {
    constexpr Index per_task = 8;
    executor_of(threads_).for_each(ceil_div(rows_, per_task), [&](Index task, int worker) {
      const Buffers& w = buffers_[std::size_t(worker)];
      for (Index row = task * per_task; row < std::min(rows_, (task + 1) * per_task); ++row) {
        std::copy_n(x_.data() + row * tokens_, tokens_, w.time);
        std::fill_n(w.time + tokens_, points_ - tokens_, 0.0f);
        fftwf_execute_dft_r2c(forward_, w.time, w.frequency);
        const float* k = kernels_.data() + row % channels_ * 2 * bins();
        float* f = &w.frequency[0][0];
        for (Index i = 0; i < bins(); ++i, f += 2, k += 2) {
          const float re = f[0] * k[0] - f[1] * k[1], im = f[0] * k[1] + f[1] * k[0];
          f[0] = re, f[1] = im;
        }
        fftwf_execute_dft_c2r(inverse_, w.frequency, w.time);
        std::copy_n(w.time, tokens_, y_.data() + row * tokens_);
      }
    });
  }

  bool is_right(const Problem& p) const {
    return right(p, channels_ / 3, [&](Index t) { return y_(channels_ / 3, t); });
  }

 private:
  struct Buffers {
    float* time;
    fftwf_complex* frequency;
  };
  Index bins() const { return points_ / 2 + 1; }

  /// The least length from n on that has no other factors than those FFTW has code for.
  static Index good_length(Index n) {
    for (;; ++n) {
      Index rest = n;
      for (Index factor : {2, 3, 5, 7})
        while (rest % factor == 0) rest /= factor;
      if (rest == 1) return n;
    }
  }

  Index tokens_, points_, channels_, rows_;
  int threads_;
  std::vector<Buffers> buffers_;
  fftwf_plan forward_, inverse_;
  Tensor<float, 3> kernels_;
  Tensor<float, 2> x_, y_;
};

void fftw(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const Problem p(batch, tokens, channels, tokens);
  Fftw baseline(p, int(state.range(3)));
  const double seconds = time_iterations(state, baseline);
  if (!baseline.is_right(p)) return state.SkipWithError("wrong answer of the baseline");
  state.counters["items_per_second"] = double(batch * tokens * channels) / seconds;
}
#endif

/// `given`: the kernel is made ready before the clock starts. `taps` 0: as many as tokens.
template <LongConvPolicy P, Pass pass, bool given, int taps>
void long_conv(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const int threads = int(state.range(3));
  const BenchExecutor executor = executor_of(threads);
  Problem p(batch, tokens, channels, taps > 0 ? taps : tokens);
  const auto spectrum = cpu::kernel_spectrum<P>(p.taps.view(), {}, tokens, executor);
  Status status = cpu::long_conv(p.args(), spectrum, executor);
  if (!status.ok() || (P.eighths == 8 && !right(p, channels / 3, [&](Index t) { return p.y(0, t, channels / 3); })))
    return state.SkipWithError("wrong answer");
  const double seconds = time_iterations(state, [&] {
    if constexpr (pass == Pass::forward)
      status = given ? cpu::long_conv(p.args(), spectrum, executor) : cpu::long_conv<P>(p.args(), executor);
    else
      status = given ? cpu::long_conv_backward(p.backward_args(), spectrum, executor)
                     : cpu::long_conv_backward<P>(p.backward_args(), executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });
  const double items = double(batch * channels * tokens);
  state.counters["items_per_second"] = items / seconds;
  if constexpr (pass == Pass::forward && given) {
    const Index points = spectrum.form().choice.points;
    if (taps == 0 && P.eighths == 8 && points > 0 && (points & (points - 1)) == 0) {
      const double packets = items / cpu::detail::lanes_of<float> * multiplications_per_point(points);
      state.counters["share_of_multipliers"] = packets / (multiplication_rate() * threads) / seconds;
      const double spectra = 8 * double(points * channels);  // once per call: batches share it
      state.counters["share_of_copy"] = (8 * items + spectra) / copy_rate(threads) / seconds;
    }
#if defined(CHELA_HAVE_FFTW)
    Fftw baseline(p, threads);
    const double other = least_seconds(tokens <= 4096 ? 31 : 9, baseline);
    if (!baseline.is_right(p)) return state.SkipWithError("wrong answer of the baseline");
    state.counters["times_baseline"] = other / seconds;
#endif
  }
}

/// A stream of as many tokens as the kernel has taps; also the longest of them, each at its least.
void stream_step(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const BenchExecutor executor = executor_of(int(state.range(3)));
  Problem p(batch, tokens, channels, tokens);
  const cpu::LongConvStreamKernel<float> kernel(p.taps.view(), executor);
  cpu::LongConvStream<float> stream(kernel, batch);
  std::vector<double> least(std::size_t(tokens), 1.0);
  for (auto _ : state) {
    double sum = 0;
    for (Index t = 0; t < tokens; ++t) {
      const double seconds = seconds_of([&] {
        const Status status = cpu::long_conv_stream_step(
            LongConvStreamArgs<float>{.x = slice_axis<1>(p.x.view(), t), .y = slice_axis<1>(p.y.view(), t)}, kernel,
            stream, executor);
        if (!status.ok()) state.SkipWithError(status.why);
      });
      sum += seconds, least[std::size_t(t)] = std::min(least[std::size_t(t)], seconds);
    }
    state.SetIterationTime(sum);
  }
  double sum = 0, longest = 0;
  for (double seconds : least) sum += seconds, longest = std::max(longest, seconds);
  state.counters["items_per_second"] = double(batch * channels * tokens) / sum;
  state.counters["longest_ms"] = 1e3 * longest;
}

void ring_step(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), channels = state.range(2);
  const BenchExecutor executor = executor_of(int(state.range(3)));
  Problem p(batch, Index(1), channels, tokens);
  Tensor<float, 3> ring(batch, tokens, channels);
  const double seconds = time_iterations(state, [&] {
    const Status status = cpu::long_conv_step(LongConvStepArgs<float>{.x = slice_axis<1>(p.x.view(), 0),
                                                                      .taps = p.taps,
                                                                      .y = slice_axis<1>(p.y.view(), 0),
                                                                      .ring = ring,
                                                                      .position = 2 * tokens},
                                              executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });
  state.counters["items_per_second"] = double(batch * channels) / seconds;
}

template <class F>
void add(const std::string& name, F function, const std::vector<Index>& batches, const std::vector<Index>& tokens) {
  auto* b = benchmark::RegisterBenchmark(("long_conv/" + name).c_str(), function);
  b->ArgNames({"B", "T", "D", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (Index batch : batches)
    for (Index t : tokens)
      for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) b->Args({batch, t, 256, threads});
}

}  // namespace

int main(int argc, char** argv) {
  constexpr LongConvPolicy direct{.method = LongConvMethod::direct}, whole{.method = LongConvMethod::transform};
  const std::vector<Index> far{1024, 4096, 16384, 65536}, near{16, 32, 48, 64, 80, 96, 128, 192, 256, 512};
  std::vector<Index> all = near;
  all.insert(all.end(), {1000, 1024, 1536, 2048, 3000, 4096, 8192, 10007, 16384, 32768, 65536});
  add("spectrum_given/forward", long_conv<LongConvPolicy{}, Pass::forward, true, 0>, {1}, far);
  add("spectrum_given/forward", long_conv<LongConvPolicy{}, Pass::forward, true, 0>, {8}, {4096});
  add("one_call/forward", long_conv<LongConvPolicy{}, Pass::forward, false, 0>, {1}, far);
  add("spectrum_given/backward", long_conv<LongConvPolicy{}, Pass::backward, true, 0>, {1}, far);
  add("one_call/backward", long_conv<LongConvPolicy{}, Pass::backward, false, 0>, {1}, {4096});
  add("direct/forward", long_conv<direct, Pass::forward, true, 0>, {1}, near);
  add("transform/forward", long_conv<whole, Pass::forward, true, 0>, {1}, all);
  add("taps_256/forward", long_conv<LongConvPolicy{}, Pass::forward, true, 256>, {1}, far);
  add("taps_1024/forward", long_conv<LongConvPolicy{}, Pass::forward, true, 1024>, {1}, far);
  constexpr LongConvPolicy two_eighths{.eighths = 2}, four_eighths{.eighths = 4};
  add("eighths_2/forward", long_conv<two_eighths, Pass::forward, true, 0>, {1}, far);
  add("eighths_4/forward", long_conv<four_eighths, Pass::forward, true, 0>, {1}, far);
  add("stream/step", stream_step, {1}, {1024, 4096, 16384});
  add("ring/step", ring_step, {1}, {1024, 4096, 16384});
#if defined(CHELA_HAVE_FFTW)
  add("fftw/forward", fftw, {1}, all);
#endif
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
