// The long convolution on a GPU: input read and output written over time (for gradients: x and grad_y read, grad_x
// written), as a share of a copy. Calls rotate among sets of buffers that together are far larger than the second-level
// cache. A strategy has its lines at the end, by the policy that chooses it.
#include <memory>

#include "chela/cuda/conv/long.cuh"
#include "chela/cuda/conv/long_backward.cuh"
#include "chela/reference/long.hpp"
#include "conv/compiled_once.cuh"
#include "support/device_arrays.cuh"
#include "support/tolerance.hpp"

namespace chela::bench {

enum class Layout { btd, bdt };    ///< [batch, token, channel] or [batch, channel, token] in memory
enum class Kernel { made, kept };  ///< prepared at each call, or once

using test::automatic;
constexpr LongConvPolicy direct{.method = LongConvMethod::direct};

struct LongSizes {
  Index batch, channels, tokens, taps;
  explicit LongSizes(const benchmark::State& state)
      : batch(state.range(0)), channels(state.range(1)), tokens(state.range(2)), taps(state.range(3)) {}
  double elements() const { return double(batch) * double(channels) * double(tokens); }
};

/// Rows [batch, token, channel] in either layout.
template <class T, Layout L>
struct Rows {
  Array<T, Index, Index, Index> array;
  Rows(std::uint32_t seed, float size, const LongSizes& s)
      : array(seed, -size, size, s.batch, L == Layout::btd ? s.tokens : s.channels,
              L == Layout::btd ? s.channels : s.tokens) {
    if (size == 0) require_cuda(cudaMemset(array.memory.data(), 0xff, array.memory.bytes()));
  }
  TensorView<T, 3> view() const { return L == Layout::btd ? array.view : transposed(array.view, 1, 2); }
  /// One channel as [batch, token, 1] in double.
  Tensor<double, 3> channel(Index d) const {
    auto all = array.on_host();
    TensorView<T, 3> on_host = view();
    on_host.data = all.data();
    return test::converted<double>(run(on_host, 2, d, 1));
  }
};

template <class T, Layout L>
struct LongBuffers {
  Rows<T, L> x, y, grad_y, grad_x;
  Array<float, Index, Index> taps, grad_taps;

  LongBuffers(std::uint32_t seed, const LongSizes& s)
      : x(seed, 1, s),
        y(seed, 0, s),
        grad_y(seed + 1, 1, s),
        grad_x(seed, 0, s),
        taps(seed + 2, -1, 1, s.channels, s.taps),
        grad_taps(seed, 0, 0, s.channels, s.taps) {}
  LongConvArgs<T> forward() const { return {.x = x.view(), .taps = taps.view, .y = y.view()}; }
  LongConvBackwardArgs<T> backward() const {
    LongConvBackwardArgs<T> a{.x = x.view(), .taps = taps.view, .grad_y = grad_y.view()};
    a.grad_x = grad_x.view(), a.grad_taps = grad_taps.view;
    return a;
  }
  Tensor<double, 2> taps_of(const Array<float, Index, Index>& all, Index d) const {
    const auto copy = all.on_host();
    return test::converted<double>(
        run(TensorView<const float, 2>(contiguous(copy.data(), all.view.extents[0], all.view.extents[1])), 0, d, 1));
  }
};

/// A call, with the memory that it needs.
template <LongConvPolicy P, Kernel K, class Args>
class Call {
 public:
  Call(const Args& args, const Stream& stream)
      : args_(args),
        kernel_(K == Kernel::kept ? cuda::prepared_kernel_bytes<P>(args) : 0),
        scratch_(K == Kernel::kept ? cuda::workspace_bytes_with_kernel<P>(args) : cuda::workspace_bytes<P>(args)) {
    if constexpr (K == Kernel::kept) status_ = cuda::prepare_kernel<P>(args, kernel(), stream);
  }
  Status operator()(const Stream& stream) const {
    if (!status_.ok()) return status_;
    const cuda::Workspace workspace{scratch_.data(), scratch_.bytes()};
    constexpr bool forward = requires { &Args::y; };
    if constexpr (K == Kernel::kept && forward) return cuda::long_conv<P>(args_, kernel(), workspace, stream);
    if constexpr (K == Kernel::kept && !forward) return cuda::long_conv_backward<P>(args_, kernel(), workspace, stream);
    if constexpr (K == Kernel::made && forward) return cuda::long_conv<P>(args_, workspace, stream);
    if constexpr (K == Kernel::made && !forward) return cuda::long_conv_backward<P>(args_, workspace, stream);
  }

 private:
  cuda::PreparedKernel kernel() const { return {kernel_.data(), kernel_.bytes()}; }
  Args args_;
  DeviceMemory kernel_, scratch_;
  Status status_;
};

/// Squares of what differs and of what is wanted.
struct Difference {
  double wrong = 0, all = 0;
  void add(double got, double want) { wrong += (got - want) * (got - want), all += want * want; }
  bool below(double bound) const { return std::sqrt(wrong / all) < bound; }
};

/// Whether outputs are right at some tokens of the first, a middle and the last channel.
template <class T, Layout L>
bool right_outputs(const LongBuffers<T, L>& b, const LongSizes& s) {
  Difference difference;
  for (Index d : {Index(0), s.channels / 2, s.channels - 1}) {
    const Tensor<double, 3> x = b.x.channel(d), y = b.y.channel(d);
    const Tensor<double, 2> taps = b.taps_of(b.taps, d);
    const Index step = std::max<Index>(s.tokens / 40, 1);
    for (Index t = s.tokens - 1; t >= 0; t -= step)
      difference.add(y(s.batch - 1, t, 0), reference::long_conv_at(x, taps, {}, {}, {}, s.batch - 1, t, 0));
  }
  return difference.below(test::long_conv_tolerance<T>());
}

template <class T, Layout L>
bool right_gradients(const LongBuffers<T, L>& b, const LongSizes& s) {
  Difference inputs, taps_difference;
  for (Index d : {Index(0), s.channels - 1}) {
    const Tensor<double, 3> x = b.x.channel(d), grad_y = b.grad_y.channel(d), grad_x = b.grad_x.channel(d);
    const Tensor<double, 2> taps = b.taps_of(b.taps, d), grad_taps = b.taps_of(b.grad_taps, d);
    for (Index t = s.tokens - 1; t >= 0; t -= std::max<Index>(s.tokens / 40, 1)) {
      double want = 0;
      for (Index j = 0; j < std::min(s.taps, s.tokens - t); ++j) want += taps(0, j) * grad_y(s.batch - 1, t + j, 0);
      inputs.add(grad_x(s.batch - 1, t, 0), want);
    }
    for (Index j = 0; j < s.taps; j += std::max<Index>(s.taps / 20, 1)) {
      double want = 0;
      for (Index i = 0; i < s.batch; ++i)
        for (Index t = j; t < s.tokens; ++t) want += x(i, t - j, 0) * grad_y(i, t, 0);
      taps_difference.add(grad_taps(0, j), want);
    }
  }
  const double bound = test::long_conv_tolerance<T>();
  return inputs.below(bound) && taps_difference.below(bound);
}

template <class T, Layout L, LongConvPolicy P, Kernel K, bool Backward>
void long_conv(benchmark::State& state) {
  const LongSizes s(state);
  const Stream stream;
  using Args = std::conditional_t<Backward, LongConvBackwardArgs<T>, LongConvArgs<T>>;
  struct Set {
    LongBuffers<T, L> buffers;
    Call<P, K, Args> call;

    Set(std::uint32_t seed, const LongSizes& s, const Stream& stream) : buffers(seed, s), call(args(buffers), stream) {}
    static Args args(const LongBuffers<T, L>& b) {
      require_cuda(cudaDeviceSynchronize());
      if constexpr (Backward) return b.backward();
      if constexpr (!Backward) return b.forward();
    }
  };
  const double seconds = measure_share_of_copy(
      state, stream, (Backward ? 3 : 2) * sizeof(T) * s.elements(),
      [&](int i) { return std::make_unique<Set>(std::uint32_t(10 * i + 1), s, stream); },
      [&](const Set& set) { return set.call(stream); },
      [&](const Set& set) {
        const Status status = set.call(stream);
        stream.wait();
        const bool right = Backward ? right_gradients(set.buffers, s) : right_outputs(set.buffers, s);
        return status.ok() ? require(right, Code::bad_value, "wrong answer") : status;
      });
  state.counters["ps_per_element"] = seconds * 1e12 / s.elements();
}

inline void options(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D", "T", "L"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(7);
}

/// Kernels as long as the sequence.
inline void whole_sequences(benchmark::internal::Benchmark* b) {
  options(b);
  b->Args({64, 768, 1024, 1024})->Args({8, 1024, 2048, 2048})->Args({8, 1024, 4096, 4096});
  b->Args({8, 1024, 8192, 8192})->Args({4, 1024, 16384, 16384})->Args({1, 1024, 131072, 131072});
}

/// Where the ways of evaluation cross: short sequences, and short kernels over long ones.
inline void crossover(benchmark::internal::Benchmark* b) {
  options(b);
  for (Index tokens : {64, 128, 256, 512, 1024, 2048}) b->Args({64 * 1024 / tokens, 768, tokens, tokens});
  for (Index taps : {16, 64, 256, 512, 1024}) b->Args({4, 1024, 16384, taps});
}

#define CHELA_BENCH(element, layout, policy, kernel, shapes)                                        \
  BENCHMARK(long_conv<element, Layout::layout, policy, Kernel::kernel, false>)                      \
      ->Name("long_conv/" #element "_" #layout "_" #policy "_kernel_" #kernel "/forward/" #shapes)  \
      ->Apply(shapes);                                                                              \
  BENCHMARK(long_conv<element, Layout::layout, policy, Kernel::kernel, true>)                       \
      ->Name("long_conv/" #element "_" #layout "_" #policy "_kernel_" #kernel "/backward/" #shapes) \
      ->Apply(shapes)

using bf16 = __nv_bfloat16;

CHELA_BENCH(bf16, bdt, automatic, kept, whole_sequences);
CHELA_BENCH(bf16, bdt, automatic, made, whole_sequences);
CHELA_BENCH(bf16, btd, automatic, made, whole_sequences);
CHELA_BENCH(float, bdt, automatic, made, whole_sequences);
CHELA_BENCH(bf16, bdt, direct, kept, whole_sequences);
CHELA_BENCH(bf16, bdt, direct, made, crossover);
CHELA_BENCH(bf16, btd, direct, made, crossover);
CHELA_BENCH(float, bdt, direct, made, crossover);

}  // namespace chela::bench

BENCHMARK_MAIN();
