// Streams of the long convolution on a GPU: the time of a token for many sequences at once, as a graph of tokens. Beside it
// stands how many times as long it would take to read a kernel's length of inputs for each output at the rate of a copy,
// which is what summing directly comes to.
#include "chela/cuda/conv/long_stream.cuh"

#include "chela/reference/long.hpp"
#include "support/device_arrays.cuh"
#include "support/tolerance.hpp"

namespace chela::bench {

template <class T>
struct StreamBuffers {
  Array<T, Index, Index, Index> inputs;  ///< [batch, token, channel]
  Array<T, Index, Index> y;
  Array<float, Index, Index> taps;
  DeviceMemory kernel_memory, state_memory;
  cuda::LongConvStreamKernel kernel;
  cuda::LongConvStream<T> state;

  StreamBuffers(Index batch, Index channels, Index length, Index tokens)
      : inputs(1, -1, 1, batch, tokens, channels),
        y(2, 0, 0, batch, channels),
        taps(3, -1, 1, channels, length),
        kernel_memory(cuda::long_conv_stream_kernel_bytes(channels, length)),
        state_memory(cuda::long_conv_stream_bytes<T>(batch, channels, length)) {
    kernel.channels = state.channels = channels, kernel.taps = state.taps = length, state.batch = batch;
    kernel.data = kernel_memory.data(), kernel.bytes = kernel_memory.bytes();
    state.data = state_memory.data(), state.bytes = state_memory.bytes();
  }
  Status begin(Index seen, const Stream& stream) const {
    if (Status s = cuda::prepare_long_conv_stream_kernel(taps.view, kernel, stream); !s.ok()) return s;
    return cuda::long_conv_stream_prefill(run(TensorView<const T, 3>(inputs.view), 1, 0, seen), kernel, state, stream);
  }
  Status step(Index token, const Stream& stream) const {
    LongConvStreamArgs<T> a;
    a.x = slice_axis<1>(TensorView<const T, 3>(inputs.view), token), a.y = y.view;
    return cuda::long_conv_stream_step(a, kernel, state, stream);
  }
  /// Whether y is right for this token in some rows.
  bool right(Index token) const {
    const auto x = inputs.on_host(), out = y.on_host();
    const auto kernel_taps = taps.on_host();
    const Index batch = state.batch, channels = state.channels, tokens = inputs.view.extents[1];
    double wrong = 0, all = 0;
    for (Index b : {Index(0), batch - 1})
      for (Index d = 0; d < channels; d += std::max<Index>(channels / 20, 1)) {
        double want = 0;
        for (Index j = 0; j <= std::min(token, state.taps - 1); ++j)
          want += double(kernel_taps[std::size_t(d * state.taps + j)]) *
                  double(static_cast<float>(x[std::size_t((b * tokens + token - j) * channels + d)]));
        const double got = static_cast<float>(out[std::size_t(b * channels + d)]);
        wrong += (got - want) * (got - want), all += want * want;
      }
    return std::sqrt(wrong / all) < 2 * test::tolerance<T>(state.taps);
  }
};

template <class T>
void long_conv_stream(benchmark::State& state) {
  const Index batch = state.range(0), channels = state.range(1), length = state.range(2);
  const Stream stream;
  constexpr Index tokens_before = 40;
  const StreamBuffers<T> b(batch, channels, length, tokens_before + 8);
  require_cuda(cudaDeviceSynchronize());
  Status status = b.begin(tokens_before, stream);
  for (Index t = tokens_before; t < tokens_before + 8 && status.ok(); ++t) status = b.step(t, stream);
  stream.wait();
  if (!status.ok()) return state.SkipWithError(status.why);
  if (!b.right(tokens_before + 7)) return state.SkipWithError("wrong answer");
  const TimedGraph graph(stream, 256, [&](int i) {
    if (const Status s = b.step(i % 8, stream); !s.ok()) status = s;
  });
  if (!status.ok()) return state.SkipWithError(status.why);
  const double seconds = time_launches(state, graph), rows = double(batch) * double(channels);
  state.counters["ps_per_row"] = seconds * 1e12 / rows;
  state.counters["direct_reads_over_time"] = rows * double(length) * sizeof(T) / device_copy_rate() / seconds;
  state.counters["state_MB"] = double(b.state.bytes) * 1e-6;
}

BENCHMARK(long_conv_stream<__nv_bfloat16>)
    ->Name("long_conv_stream/bf16/step")
    ->ArgNames({"B", "D", "L"})
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond)
    ->Iterations(5)
    ->Args({1, 1024, 4096})
    ->Args({64, 1024, 256})
    ->Args({64, 1024, 1024})
    ->Args({64, 1024, 4096})
    ->Args({64, 1024, 16384})
    ->Args({8, 1024, 131072});

}  // namespace chela::bench

BENCHMARK_MAIN();
