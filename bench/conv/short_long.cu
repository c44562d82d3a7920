// The short-long convolution on a GPU by transforms of 16-bit data: input read and output written over time (for
// gradients: x and grad_z read, grad_x written), as a share of a copy, and for forward passes the time over that of the
// long convolution alone, in the same process and over the same buffers. Taps are transformed once, or at each call.
#include <memory>

#include "chela/cuda/conv/short_long.cuh"
#include "chela/reference/short_long.hpp"
#include "conv/compiled_once.cuh"
#include "support/device_arrays.cuh"
#include "support/tolerance.hpp"

namespace chela::bench {

using bf16 = __nv_bfloat16;
using test::in_halves;
constexpr int width = 4;

enum class Layout { btd, bdt };    ///< [batch, token, channel] or [batch, channel, token] in memory
enum class Kernel { made, kept };  ///< prepared at each call, or once
enum class Pass { one, two, backward };

struct Sizes {
  Index batch, channels, tokens;
  explicit Sizes(const benchmark::State& state)
      : batch(state.range(0)), channels(state.range(1)), tokens(state.range(2)) {}
  double elements() const { return double(batch) * double(channels) * double(tokens); }
};

template <class T, Layout L>
struct Rows {
  Array<T, Index, Index, Index> array;
  Rows(std::uint32_t seed, float size, const Sizes& s)
      : array(seed, -size, size, s.batch, L == Layout::btd ? s.tokens : s.channels,
              L == Layout::btd ? s.channels : s.tokens) {}
  TensorView<T, 3> view() const { return L == Layout::btd ? array.view : transposed(array.view, 1, 2); }
  /// A channel of a batch entry as [1, token, 1] in double.
  Tensor<double, 3> channel(Index b, Index d) const {
    auto all = array.on_host();
    TensorView<T, 3> on_host = view();
    on_host.data = all.data();
    return test::converted<double>(run(run(on_host, 0, b, 1), 2, d, 1));
  }
};

template <class T, Layout L>
struct Buffers {
  Rows<T, L> x, z, inner, grad_z, grad_x;
  Array<float, Index, Index> short_taps, taps, grad_short_taps, grad_taps;

  Buffers(std::uint32_t seed, const Sizes& s)
      : x(seed, 1, s),
        z(seed, 0, s),
        inner(seed, 0, s),
        grad_z(seed + 1, 1, s),
        grad_x(seed, 0, s),
        short_taps(seed + 2, -1, 1, s.channels, Index(width)),
        taps(seed + 3, -1, 1, s.channels, s.tokens),
        grad_short_taps(seed, 0, 0, s.channels, Index(width)),
        grad_taps(seed, 0, 0, s.channels, s.tokens) {}
  ShortLongConvArgs<T> forward(Pass pass) const {
    ShortLongConvArgs<T> a;
    a.x = x.view(), a.short_taps = short_taps.view, a.taps = taps.view, a.z = z.view();
    if (pass == Pass::two) a.inner = inner.view();
    return a;
  }
  ShortLongConvBackwardArgs<T> backward() const {
    ShortLongConvBackwardArgs<T> a;
    a.x = x.view(), a.short_taps = short_taps.view, a.taps = taps.view, a.grad_z = grad_z.view();
    a.grad_x = grad_x.view(), a.grad_short_taps = grad_short_taps.view, a.grad_taps = grad_taps.view;
    return a;
  }
};

/// A call, with the memory that it needs.
template <Kernel K, class Args>
class Call {
 public:
  Call(const Args& args, const Stream& stream)
      : args_(args),
        kernel_(K == Kernel::kept ? cuda::prepared_kernel_bytes<in_halves>(args) : 0),
        scratch_(K == Kernel::kept ? cuda::workspace_bytes_with_kernel<in_halves>(args)
                                   : cuda::workspace_bytes<in_halves>(args)) {
    if constexpr (K == Kernel::kept) status_ = cuda::prepare_kernel<in_halves>(args, kernel(), stream);
  }
  Status operator()(const Stream& stream) const {
    if (!status_.ok()) return status_;
    const cuda::Workspace workspace{scratch_.data(), scratch_.bytes()};
    const auto queue = [&](auto... kernel) {
      if constexpr (std::same_as<Args, ShortLongConvBackwardArgs<bf16>>)
        return cuda::short_long_conv_backward<width, in_halves>(args_, kernel..., workspace, stream);
      else if constexpr (std::same_as<Args, ShortLongConvArgs<bf16>>)
        return cuda::short_long_conv<width, in_halves>(args_, kernel..., workspace, stream);
      else
        return cuda::long_conv<in_halves>(args_, kernel..., workspace, stream);
    };
    if constexpr (K == Kernel::kept)
      return queue(kernel());
    else
      return queue();
  }

 private:
  cuda::PreparedKernel kernel() const { return {kernel_.data(), kernel_.bytes()}; }
  Args args_;
  DeviceMemory kernel_, scratch_;
  Status status_;
};

/// One channel of the last batch entry in double.
struct Channel {
  Tensor<double, 3> x, inner, state;
  Tensor<double, 2> short_taps, taps;

  template <class T, Layout L>
  Channel(const Buffers<T, L>& b, const Sizes& s, Index d)
      : x(b.x.channel(s.batch - 1, d)),
        inner(x),
        state(Index(1), Index(width - 1), Index(1)),
        short_taps(row(b.short_taps, d)),
        taps(row(b.taps, d)) {
    reference::short_conv(x, short_taps, {}, {}, true, inner, state);
  }
  static Tensor<double, 2> row(const Array<float, Index, Index>& all, Index d) {
    const auto copy = all.on_host();
    return test::converted<double>(
        run(TensorView<const float, 2>(contiguous(copy.data(), all.view.extents[0], all.view.extents[1])), 0, d, 1));
  }
};

/// Squares of what differs and of what is wanted.
struct Difference {
  double wrong = 0, all = 0;
  void add(double got, double want) { wrong += (got - want) * (got - want), all += want * want; }
  bool below(double bound) const { return std::sqrt(wrong / all) < bound; }
};

/// Whether outputs, or gradients of inputs, are right at some tokens of the first, a middle and the last channel.
template <class T, Layout L>
bool right_outputs(const Buffers<T, L>& b, const Sizes& s) {
  Difference difference;
  for (Index d : {Index(0), s.channels / 2, s.channels - 1}) {
    const Channel c(b, s, d);
    const Tensor<double, 3> z = b.z.channel(s.batch - 1, d);
    for (Index t = s.tokens - 1; t >= 0; t -= std::max<Index>(s.tokens / 40, 1))
      difference.add(z(0, t, 0), reference::long_conv_at(c.inner, c.taps, {}, {}, {}, 0, t, 0));
  }
  return difference.below(test::long_conv_tolerance<T>());
}
template <class T, Layout L>
bool right_gradients(const Buffers<T, L>& b, const Sizes& s) {
  Difference difference;
  for (Index d : {Index(0), s.channels / 2, s.channels - 1}) {
    const Channel c(b, s, d);
    const Tensor<double, 3> grad_z = b.grad_z.channel(s.batch - 1, d), grad_x = b.grad_x.channel(s.batch - 1, d);
    const auto slope = [&](Index t) {  // the gradient of the sum before the activation
      double sum = 0, grad_inner = 0;
      for (Index j = 0; j < std::min<Index>(width, t + 1); ++j) sum += c.short_taps(0, j) * c.x(0, t - j, 0);
      for (Index j = 0; j < s.tokens - t; ++j) grad_inner += c.taps(0, j) * grad_z(0, t + j, 0);
      const double sigmoid = 1 / (1 + std::exp(-sum));
      return grad_inner * sigmoid * (1 + sum * (1 - sigmoid));
    };
    for (Index t = s.tokens - 1; t >= 0; t -= std::max<Index>(s.tokens / 40, 1)) {
      double want = 0;
      for (Index j = 0; j < std::min<Index>(width, s.tokens - t); ++j) want += c.short_taps(0, j) * slope(t + j);
      difference.add(grad_x(0, t, 0), want);
    }
  }
  return difference.below(test::short_long_conv_gradient_tolerance<T>());
}

template <Layout L, Kernel K, Pass P>
void short_long_conv(benchmark::State& state) {
  using T = bf16;
  const Sizes s(state);
  const Stream stream;
  using Args = std::conditional_t<P == Pass::backward, ShortLongConvBackwardArgs<T>, ShortLongConvArgs<T>>;
  struct Set {
    Buffers<T, L> buffers;
    Call<K, Args> call;
    Call<K, LongConvArgs<T>> alone;

    Set(std::uint32_t seed, const Sizes& s, const Stream& stream)
        : buffers(seed, s), call(args(buffers), stream), alone(long_stage(buffers.forward(P), x(buffers)), stream) {}
    static TensorView<const T, 3> x(const Buffers<T, L>& b) { return b.x.view(); }
    static Args args(const Buffers<T, L>& b) {
      require_cuda(cudaDeviceSynchronize());
      if constexpr (P == Pass::backward)
        return b.backward();
      else
        return b.forward(P);
    }
  };
  double alone = 0;
  const auto make = [&](int i) { return std::make_unique<Set>(std::uint32_t(10 * i + 1), s, stream); };
  {
    const std::unique_ptr<Set> sets[] = {make(0), make(1), make(2), make(3), make(4), make(5), make(6), make(7)};
    const TimedGraph graph(stream, 8, [&](int i) {
      if (const Status status = sets[i]->alone(stream); !status.ok()) state.SkipWithError(status.why);
    });
    std::vector<double> seconds;
    for (int i = 0; i < 7; ++i) seconds.push_back(graph.seconds());
    alone = median(seconds);
  }
  const double seconds = measure_share_of_copy(
      state, stream, (P == Pass::backward ? 3 : 2) * sizeof(T) * s.elements(), make,
      [&](const Set& set) { return set.call(stream); },
      [&](const Set& set) {
        const Status status = set.call(stream);
        stream.wait();
        if (!status.ok()) return status;
        const bool right = P == Pass::backward ? right_gradients(set.buffers, s) : right_outputs(set.buffers, s);
        return require(right, Code::bad_value, "wrong answer");
      });
  state.counters["times_long_alone"] = seconds / alone;
}

inline void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "D", "T"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(7);
  b->Args({64, 768, 1024})->Args({8, 1024, 2048})->Args({8, 1024, 4096})->Args({8, 1024, 8192})->Args({4, 1024, 16384});
}

#define CHELA_BENCH(layout, kernel, pass)                                  \
  BENCHMARK(short_long_conv<Layout::layout, Kernel::kernel, Pass::pass>)   \
      ->Name("short_long_conv/bf16_" #layout "_kernel_" #kernel "/" #pass) \
      ->Apply(shapes)

CHELA_BENCH(bdt, kept, one);
CHELA_BENCH(bdt, kept, two);
CHELA_BENCH(bdt, made, one);
CHELA_BENCH(btd, kept, one);
CHELA_BENCH(bdt, kept, backward);

}  // namespace chela::bench

BENCHMARK_MAIN();
