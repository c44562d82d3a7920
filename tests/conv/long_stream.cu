// Streams of the long convolution on a GPU: token by token what sums in double give over the whole, from any beginning, for
// kernels on both sides of every way in which lags are taken.
#include "chela/cuda/conv/long_stream.cuh"

#include "conv/long_cuda.cuh"

namespace chela::test {

template <class T>
double stream_tolerance(Index taps) {
  return tolerance<T>(taps + 1);
}

/// A kernel and streams in device memory, [batch, channel] of inputs and outputs at a time.
template <class T>
class DeviceStream {
 public:
  DeviceStream(const Tensor<float, 2>& taps, Index batch)
      : taps_(taps),
        kernel_memory_(blank(cuda::long_conv_stream_kernel_bytes(taps.extents()[0], taps.extents()[1]))),
        state_memory_(blank(cuda::long_conv_stream_bytes<T>(batch, taps.extents()[0], taps.extents()[1]))) {
    kernel.channels = state.channels = taps.extents()[0], kernel.taps = state.taps = taps.extents()[1];
    kernel.data = kernel_memory_.view().data, kernel.bytes = std::size_t(kernel_memory_.view().size());
    state.data = state_memory_.view().data, state.bytes = std::size_t(state_memory_.view().size());
    state.batch = batch;
    require_ok(cuda::prepare_long_conv_stream_kernel(taps_.view(), kernel, stream));
  }
  void prefill(TensorView<const T, 3> inputs) const {
    require_ok(cuda::long_conv_stream_prefill(inputs, kernel, state, stream));
  }
  bool guards_intact() const { return kernel_memory_.guards_intact() && state_memory_.guards_intact(); }

  cuda::LongConvStreamKernel kernel;
  cuda::LongConvStream<T> state;
  Stream stream;

 private:
  static Tensor<char, 1> blank(std::size_t bytes) { return Tensor<char, 1>({Index(bytes)}, char(0xff)); }
  DeviceTensor<float, 2> taps_;
  DeviceTensor<char, 1> kernel_memory_, state_memory_;
};

struct StreamCase {
  Index batch = 1, tokens = 1, channels = 1, taps = 1, begin = 0;
  bool skip = true;
  Layout layout = Layout::channels_last;
};

inline std::ostream& operator<<(std::ostream& out, const StreamCase& c) {
  return out << "B" << c.batch << " T" << c.tokens << " D" << c.channels << " L" << c.taps << " from " << c.begin;
}

/// y of the tokens from `begin` on, after a prefill with those before it.
template <class T>
Tensor<T, 3> streamed(const StreamCase& c, const LongProblem<T>& p) {
  const DeviceRows<T> x(p.x, c.layout), y(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout);
  const DeviceTensor<float, 1> skip(p.skip);
  const DeviceStream<T> d(p.taps, c.batch);
  d.prefill(run(TensorView<const T, 3>(x.view()), 1, 0, c.begin));
  for (Index t = c.begin; t < c.tokens; ++t) {
    LongConvStreamArgs<T> a;
    a.x = slice_axis<1>(x.view(), t), a.y = slice_axis<1>(y.view(), t);
    if (c.skip) a.skip = skip.view();
    const Status status = cuda::long_conv_stream_step(a, d.kernel, d.state, d.stream);
    if (!status.ok()) require_ok(status);
  }
  d.stream.wait();
  CHECK(d.guards_intact());
  CHECK(y.guards_intact());
  CHECK(same_bits(x.host(), p.x));
  return y.host();
}

template <class T>
void check_stream(const StreamCase& c) {
  CAPTURE(c);
  const LongProblem<T> p({c.batch, c.tokens, c.channels, c.taps, 0, false, c.skip});
  const Tensor<T, 3> got = streamed(c, p), again = streamed(c, p);
  const LongProblem<double> wide = p.in_double();
  const LongConvArgs<double> a = wide.args();
  const Index count = c.tokens - c.begin;
  Tensor<double, 3> y(c.batch, count, c.channels);
  for_each_index(y.view(), [&](Index b, Index t, Index d) {
    y(b, t, d) = reference::long_conv_at(a.x, a.taps, {}, a.skip, {}, b, c.begin + t, d);
  });
  CHECK(relative_error(run(TensorView<const T, 3>(got.view()), 1, c.begin, count),
                       TensorView<const double, 3>(y.view())) < stream_tolerance<T>(c.taps));
  CHECK(same_bits(got, again));
}

TEST_CASE_TEMPLATE("a stream gives what the whole gives", T, float, __nv_bfloat16, __half) {
  for (Index taps : {1, 5, 17, 18, 31, 32, 33, 100, 255, 256, 257, 300})
    check_stream<T>({.batch = 3, .tokens = 400, .channels = 5, .taps = taps, .skip = taps % 2 == 0});
  check_stream<T>({.batch = 5, .tokens = 1400, .channels = 7, .taps = 1400});
}

TEST_CASE("kernels on both sides of every tier") {
  for (Index taps : {1023, 1024, 1025, 1200})
    check_stream<float>({.batch = 2, .tokens = 1500, .channels = 3, .taps = taps, .layout = Layout::tokens_last});
  for (Index taps : {4096, 4097, 5000})
    check_stream<float>({.batch = 1, .tokens = 6000, .channels = 2, .taps = taps, .begin = 3000});
}

TEST_CASE("rows that fill no block, and more than one") {
  check_stream<float>({.batch = 1, .tokens = 700, .channels = 1, .taps = 600});
  check_stream<float>({.batch = 7, .tokens = 500, .channels = 90, .taps = 420});
}

TEST_CASE("kernels of several transforms in the last tier") {
  check_stream<float>({.batch = 1, .tokens = 34000, .channels = 1, .taps = 30000, .begin = 31000});
}

TEST_CASE("a stream goes on from any beginning") {
  for (Index taps : {3, 40, 257, 600})
    for (Index begin : {1, 15, 16, 17, 100, 128, 255, 256, 300, 511, 640})
      check_stream<float>({.batch = 2, .tokens = 800, .channels = 9, .taps = taps, .begin = begin});
}

TEST_CASE("a stream begins from a final state, and its copy goes another way") {
  const LongProblem<float> p({2, 400, 20, 300, 0, true, true});
  const DeviceTensor<float, 3> x(p.x), state(p.state), y(nan_tensor<float>(2, 400, 20)),
      again(nan_tensor<float>(2, 400, 20));
  const DeviceTensor<float, 1> skip(p.skip);
  const DeviceStream<float> d(p.taps, 2);
  const DeviceMemory kept(d.state.bytes);
  d.prefill(TensorView<const float, 3>(state.view()));
  const auto step = [&](const DeviceTensor<float, 3>& to, Index t) {
    LongConvStreamArgs<float> a;
    a.x = slice_axis<1>(x.view(), t), a.y = slice_axis<1>(to.view(), t), a.skip = skip.view();
    require_ok(cuda::long_conv_stream_step(a, d.kernel, d.state, d.stream));
  };
  const auto copy = [&](void* to, const void* from) {
    require_cuda(cudaMemcpyAsync(to, from, d.state.bytes, cudaMemcpyDeviceToDevice, d.stream));
  };
  for (Index t = 0; t < 400; ++t) {
    if (t == 150) copy(kept.data(), d.state.data);
    step(y, t);
  }
  copy(d.state.data, kept.data());
  for (Index t = 150; t < 400; ++t) step(again, t);
  d.stream.wait();
  const LongProblem<double> wide = p.in_double();
  Tensor<double, 3> want(2, 400, 20), none;
  reference::long_conv(wide.x, wide.taps, {}, wide.skip, wide.state, want, {});
  const Tensor<float, 3> got = y.host(), other = again.host();
  CHECK(relative_error(got, want) < stream_tolerance<float>(300));
  CHECK(relative_error(run(other.view(), 1, 150, 250), run(got.view(), 1, 150, 250)) == 0);
}

TEST_CASE("one graph for every token, whose outputs take the inputs' memory") {
  const StreamCase c{.batch = 2, .tokens = 700, .channels = 6, .taps = 500};
  const LongProblem<float> p({c.batch, c.tokens, c.channels, c.taps, 0, false, true});
  const DeviceTensor<float, 2> token(nan_tensor<float>(c.batch, c.channels));
  const DeviceTensor<float, 3> x(p.x), y(nan_tensor<float>(c.batch, c.tokens, c.channels));
  const DeviceTensor<float, 1> skip(p.skip);
  const DeviceStream<float> d(p.taps, c.batch);
  d.prefill(run(TensorView<const float, 3>(x.view()), 1, 0, 0));
  LongConvStreamArgs<float> a;
  a.x = token.view(), a.y = token.view(), a.skip = skip.view();
  const Graph graph(d.stream, [&] { require_ok(cuda::long_conv_stream_step(a, d.kernel, d.state, d.stream)); });
  const std::size_t width = sizeof(float) * std::size_t(c.channels), pitch = width * std::size_t(c.tokens);
  const auto move = [&](float* to, std::size_t to_pitch, const float* from, std::size_t from_pitch) {
    require_cuda(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, std::size_t(c.batch),
                                   cudaMemcpyDeviceToDevice, d.stream));
  };
  for (Index t = 0; t < c.tokens; ++t) {
    move(token.view().data, width, &x.view()(0, t, 0), pitch);
    graph.launch();
    move(&y.view()(0, t, 0), pitch, token.view().data, width);
  }
  d.stream.wait();
  CHECK(token.guards_intact());
  CHECK(same_bits(y.host(), streamed(c, p)));
}

TEST_CASE("a later token reaches no earlier output, not even in its bits") {
  const StreamCase c{.batch = 2, .tokens = 600, .channels = 3, .taps = 600};
  LongProblem<float> p({c.batch, c.tokens, c.channels, c.taps, 0, false, true});
  const Tensor<float, 3> before = streamed(c, p);
  p.x(0, 350, 1) = std::numeric_limits<float>::infinity();
  const Tensor<float, 3> after = streamed(c, p);
  for_each_index(before.view(), [&](Index b, Index t, Index d) {
    if (t < 350 || b != 0 || d != 1) CHECK(before(b, t, d) == after(b, t, d));
  });
}

TEST_CASE("streams and kernels that do not fit are refused") {
  const LongProblem<float> p({2, 4, 3, 70, 0, false, false});
  const DeviceTensor<float, 3> x(p.x);
  const DeviceTensor<float, 2> y(nan_tensor<float>(2, 3)), taps(p.taps);
  const DeviceStream<float> d(p.taps, 2);
  d.prefill(run(TensorView<const float, 3>(x.view()), 1, 0, 0));
  LongConvStreamArgs<float> a;
  a.x = slice_axis<1>(x.view(), 0), a.y = y.view();
  const auto step = [&](const auto& args, const auto& kernel, const auto& state) {
    return cuda::long_conv_stream_step(args, kernel, state, d.stream).code;
  };
  CHECK(step(a, d.kernel, d.state) == Code::ok);
  auto kernel = d.kernel;
  kernel.taps = 69;
  CHECK(step(a, kernel, d.state) == Code::bad_shape);
  CHECK(step(a, cuda::LongConvStreamKernel{}, d.state) == Code::bad_shape);
  auto state = d.state;
  state.batch = 1;
  CHECK(step(a, d.kernel, state) == Code::bad_shape);
  state = d.state, --state.bytes;
  CHECK(step(a, d.kernel, state) == Code::bad_shape);
  CHECK(step(a, d.kernel, cuda::LongConvStream<float>{}) == Code::bad_shape);
  auto wrong = a;
  wrong.y.strides[0] = 0;
  CHECK(step(wrong, d.kernel, d.state) == Code::bad_shape);
  CHECK(cuda::long_conv_stream_prefill(run(x.view(), 2, 0, 2), d.kernel, d.state, d.stream).code == Code::bad_shape);
  kernel = d.kernel, --kernel.bytes;
  CHECK(cuda::prepare_long_conv_stream_kernel(taps.view(), kernel, d.stream).code == Code::bad_shape);
  d.stream.wait();
}

}  // namespace chela::test
