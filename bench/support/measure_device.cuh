#pragma once
// The yardstick and the clock of GPU benchmarks: a copy measured in the same process, and graphs of launches timed by
// events.
#include <benchmark/benchmark.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chela/core/status.hpp"
#include "support/device.cuh"

namespace chela::bench {

using test::DeviceMemory;
using test::Graph;
using test::require_cuda;
using test::Stream;

/// Times what is queued on a stream.
class Clock {
 public:
  explicit Clock(const Stream& stream) : stream_(stream) {
    require_cuda(cudaEventCreate(&begin_)), require_cuda(cudaEventCreate(&end_));
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;
  ~Clock() { cudaEventDestroy(begin_), cudaEventDestroy(end_); }

  template <class F>
  double seconds(F queue) const {
    require_cuda(cudaEventRecord(begin_, stream_));
    queue();
    require_cuda(cudaEventRecord(end_, stream_));
    require_cuda(cudaEventSynchronize(end_));
    float milliseconds = 0;
    require_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return double(milliseconds) * 1e-3;
  }

 private:
  const Stream& stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// `launches` calls of f(i) as one graph, whose replays are timed.
class TimedGraph {
 public:
  template <class F>
  TimedGraph(const Stream& stream, int launches, F f)
      : clock_(stream), launches_(launches), graph_(stream, run_before(stream, [&f, launches] {
                                                      for (int i = 0; i < launches; ++i) f(i);
                                                    })) {
    for (int i = 0; i < 3; ++i) seconds();
  }

  /// Of one launch, as the share of one replay.
  double seconds() const {
    return clock_.seconds([&] { graph_.launch(); }) / launches_;
  }

 private:
  /// A kernel's first launch loads it, which no graph may do.
  template <class F>
  static F run_before(const Stream& stream, F queue) {
    queue();
    stream.wait();
    return queue;
  }

  Clock clock_;
  int launches_;
  Graph graph_;
};

inline double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + std::ptrdiff_t(x.size() / 2), x.end());
  return x[x.size() / 2];
}

/// Bytes read plus bytes written per second by a copy far larger than the caches.
inline double device_copy_rate() {
  static const double rate = [] {
    constexpr std::size_t bytes = std::size_t(1) << 30;
    const DeviceMemory from(bytes), to(bytes);
    require_cuda(cudaMemset(from.data(), 1, bytes));
    const Stream stream;
    const Clock clock(stream);
    std::vector<double> seconds;
    for (int i = 0; i < 18; ++i)
      seconds.push_back(clock.seconds(
          [&] { require_cuda(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream)); }));
    return 2.0 * double(bytes) / median(seconds);
  }();
  return rate;
}

/// Runs the benchmark loop and returns the median time of one launch, from which shares are computed.
inline double time_launches(benchmark::State& state, const TimedGraph& graph) {
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(graph.seconds());
    state.SetIterationTime(seconds.back());
  }
  return median(seconds);
}

/// Times calls that rotate among sets of buffers which together are far larger than the second-level cache, and reports what
/// share of a copy's rate `traffic` bytes a call make. make(i) gives a pointer to the ith set; queue(set) puts one call
/// on `stream`; judge(set), asked once, makes one call and tells what is wrong with it. Returns the seconds of a call, or 0
/// if there is anything wrong.
template <class Make, class Queue, class Judge>
double measure_share_of_copy(benchmark::State& state, const Stream& stream, double traffic, Make make, Queue queue,
                             Judge judge) {
  const int sets = int(std::clamp(6e8 / traffic, 2.0, 256.0)), calls = std::max(8, sets);
  std::vector<decltype(make(0))> buffers;
  for (int i = 0; i < sets; ++i) buffers.push_back(make(i));
  require_cuda(cudaDeviceSynchronize());
  Status status = judge(*buffers[0]);
  if (!status.ok()) return state.SkipWithError(status.why), 0.0;

  const double copy = device_copy_rate();
  const TimedGraph graph(stream, calls, [&](int i) {
    if (const Status s = queue(*buffers[std::size_t(i % sets)]); !s.ok()) status = s;
  });
  if (!status.ok()) return state.SkipWithError(status.why), 0.0;
  const double seconds = time_launches(state, graph);
  state.counters["share_of_copy"] = traffic / seconds / copy;
  state.counters["copy_GB_per_s"] = copy * 1e-9;
  return seconds;
}

/// Fills device memory with numbers uniform in [low, high), the same on every run.
template <class T>
__global__ void fill_uniform(T* data, Index size, std::uint32_t seed, float low, float high) {
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += Index(gridDim.x) * blockDim.x) {
    std::uint64_t x = (std::uint64_t(i) + 1) * 0x9e3779b97f4a7c15u + seed * std::uint64_t(0xd1b54a32d192ed03u);
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
    data[i] = T(low + (high - low) * float(x >> 40) * 0x1p-24f);
  }
}

}  // namespace chela::bench
