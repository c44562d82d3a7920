#pragma once
// The yardsticks: what this machine does at best, measured in the same process and with the same threads as the operator.
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <map>

#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"

namespace chela::bench {

#if defined(_OPENMP)
using BenchExecutor = OpenMpExecutor;
inline BenchExecutor executor_of(int threads) { return BenchExecutor(threads); }
#else
using BenchExecutor = SerialExecutor;
inline BenchExecutor executor_of(int) { return {}; }
#endif

inline double seconds_of(auto&& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// The least time of `repetitions` calls, after one that is not counted. Other work on the machine only ever adds time.
inline double least_seconds(int repetitions, auto&& f) {
  f();
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repetitions; ++i) least = std::min(least, seconds_of(f));
  return least;
}

/// Bytes read plus bytes written per second by a copy far larger than the caches.
inline double copy_rate(int threads) {
  static std::map<int, double> known;
  if (!known.contains(threads)) {
    const Index bytes = Index(1) << 27, pieces = 64;
    Tensor<char, 1> from({bytes}, 1), to({bytes}, 2);
    const double seconds = least_seconds(9, [&] {
      executor_of(threads).for_each(pieces, [&](Index piece, int) {
        std::memcpy(to.data() + piece * (bytes / pieces), from.data() + piece * (bytes / pieces),
                    std::size_t(bytes / pieces));
      });
    });
    known[threads] = 2.0 * double(bytes) / seconds;
  }
  return known[threads];
}

/// FLOP/s of Eigen's 2048 x 2048 x 2048 product in float, on Eigen's own threads.
inline double gemm_rate(int threads) {
  static std::map<int, double> known;
  if (!known.contains(threads)) {
    const Eigen::Index n = 2048;
    const Eigen::MatrixXf a = Eigen::MatrixXf::Random(n, n), b = Eigen::MatrixXf::Random(n, n);
    Eigen::MatrixXf c(n, n);
    Eigen::setNbThreads(threads);
    const double seconds = least_seconds(5, [&] { c.noalias() = a * b; });
    Eigen::setNbThreads(1);  // what is measured next is threaded by its executor alone
    benchmark::DoNotOptimize(c.data());
    known[threads] = 2.0 * double(n) * double(n) * double(n) / seconds;
  }
  return known[threads];
}

/// Runs the benchmark loop under manual time and returns the least time of one iteration, from which shares are computed.
inline double time_iterations(benchmark::State& state, auto&& f) {
  f();
  double least = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    const double seconds = seconds_of(f);
    state.SetIterationTime(seconds);
    least = std::min(least, seconds);
  }
  return least;
}

}  // namespace chela::bench
