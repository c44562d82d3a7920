#pragma once
// Streams of the long convolution on NVIDIA GPUs: conv/long_stream.hpp's step for many sequences at once, exact as that of
// the CPU, with the state and the position in device memory. A step is one kernel launch with the same grid at every token,
// so it can be captured in a graph and replayed for each token. All arithmetic is in float, whatever the elements are.
//
// A kernel is made ready once and serves any number of streams; a stream is a piece of memory, and a copy of it (all bytes)
// is a place to come back to. cuda/conv/long_stream_plan.cuh says how the lags are cut, and what a token costs.
#include <cuda_runtime.h>

#include <type_traits>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/long_stream_kernels.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda {

/// A kernel cut for streams: the caller's device memory, 16-byte aligned, of long_conv_stream_kernel_bytes(...) bytes, which
/// prepare_long_conv_stream_kernel fills.
struct LongConvStreamKernel {
  Index channels = 0, taps = 0;
  void* data = nullptr;
  std::size_t bytes = 0;
};

/// The state of `batch` streams of kernels of one shape: the caller's device memory, 16-byte aligned, of
/// long_conv_stream_bytes<T>(...) bytes, which long_conv_stream_prefill makes a beginning of.
template <Element T>
struct LongConvStream {
  Index batch = 0, channels = 0, taps = 0;
  void* data = nullptr;
  std::size_t bytes = 0;
};

namespace detail {

template <class T>
concept StreamElement = std::same_as<T, float> || HalfElement<T>;

/// Calls f(IntConstant<tier>) on the host.
template <int Tiers, class F>
constexpr void for_tiers(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (f(IntConstant<I>{}), ...); }
  (std::make_integer_sequence<int, Tiers>{});
}

/// Calls f(IntConstant<count>) with the number of tiers.
template <class F>
Status with_stream_tiers(const StreamTiers& tiers, const F& f) {
  switch (tiers.count()) {
    case 0:
      return f(IntConstant<0>{});
    case 1:
      return f(IntConstant<1>{});
    case 2:
      return f(IntConstant<2>{});
    default:
      return f(IntConstant<3>{});
  }
}

template <int Tiers>
inline constexpr int stream_shared_bytes = [] {
  int most = stream_group_bytes;
  for_tiers<Tiers>(
      [&](auto tier) { most = StreamRows<tier>::shared_bytes > most ? StreamRows<tier>::shared_bytes : most; });
  return most;
}();
template <class T>
StreamCall<T> stream_call(const LongConvStreamKernel& kernel, const LongConvStream<T>& stream) {
  StreamCall<T> call;
  call.batch = stream.batch, call.channels = stream.channels, call.tiers = {stream.taps};
  Parts of_kernel(kernel.data), of_stream(stream.data);
  call.taps = StreamTaps(of_kernel, kernel.channels, call.tiers);
  call.state = StreamState<T>(of_stream, call.rows(), call.tiers);
  return call;
}

inline Status check_stream_blocks(Index blocks) {
  return require(blocks < Index(1) << 31, Code::unsupported,
                 "too many rows for one launch of streams; call with fewer sequences");
}

}  // namespace detail

/// Bytes of a kernel that is cut for streams: about 5.3 for each lag from 256 on, whole tiers at a time, and 4 for those
/// below.
inline std::size_t long_conv_stream_kernel_bytes(Index channels, Index taps) {
  if (channels < 0 || taps < 1) return 0;
  detail::Parts parts(nullptr);
  detail::StreamTaps(parts, channels, {taps});
  return parts.used();
}

/// Bytes of a stream's state: for each row its last L inputs, the last 256 once more, and two blocks of outputs of each
/// tier.
template <Element T>
std::size_t long_conv_stream_bytes(Index batch, Index channels, Index taps) {
  if (batch < 0 || channels < 0 || taps < 1) return 0;
  detail::Parts parts(nullptr);
  detail::StreamState<T>(parts, batch * channels, {taps});
  return parts.used();
}

/// Queues the cutting of taps [channel, L] for streams.
inline Status prepare_long_conv_stream_kernel(TensorView<const float, 2> taps, const LongConvStreamKernel& kernel,
                                              cudaStream_t stream) {
  const Index channels = taps.extents[0];
  if (Status s = first_failure(
          chela::detail::check_long_conv_taps<const float>(taps, {}, channels),
          require(kernel.channels == channels && kernel.taps == taps.extents[1], Code::bad_shape,
                  "kernel must be described by the channels and the number of these taps"),
          require(kernel.data && kernel.bytes >= long_conv_stream_kernel_bytes(channels, kernel.taps), Code::bad_shape,
                  "kernel is smaller than long_conv_stream_kernel_bytes(channels, taps) says"));
      !s.ok())
    return s;
  if (channels == 0) return {};
  using namespace detail;
  const StreamTiers tiers{kernel.taps};
  Parts parts(kernel.data);
  const StreamTaps to(parts, channels, tiers);
  StreamTapsCall call{taps, const_cast<float*>(to.lags), nullptr};
  const Index lag_blocks = ceil_div(StreamTiers::padded_lags * channels, stream_threads);
  if (Status s = check_stream_blocks(lag_blocks); !s.ok()) return s;
  if (Status s = launch(stream_lags_kernel<>, dim3(unsigned(lag_blocks)), stream_threads, 0, stream, call); !s.ok())
    return s;
  Status status;
  for_tiers<StreamTiers::most>([&](auto tier) {
    if (tier >= tiers.count() || !status.ok()) return;
    call.spectrum = const_cast<float2*>(to.spectra[tier]);
    const Index blocks = ceil_div(tiers.pieces(tier) * channels, StreamRows<tier>::rows);
    status = check_stream_blocks(blocks);
    if (status.ok())
      status = launch(stream_spectrum_kernel<tier>, dim3(unsigned(blocks)), stream_threads,
                      StreamRows<tier>::shared_bytes, stream, call);
  });
  return status;
}

namespace detail {

template <class T>
Status check_stream(const LongConvStreamKernel& kernel, const LongConvStream<T>& stream, Index batch, Index channels) {
  return first_failure(
      require(
          kernel.data && kernel.taps > 0 && kernel.bytes >= long_conv_stream_kernel_bytes(kernel.channels, kernel.taps),
          Code::bad_shape, "kernel is smaller than long_conv_stream_kernel_bytes(channels, taps) says"),
      require(stream.channels == kernel.channels && stream.taps == kernel.taps, Code::bad_shape,
              "the stream must have been made for a kernel of this shape"),
      require(stream.batch == batch && stream.channels == channels, Code::bad_shape,
              "x must be [batch, channel] with the batch and the channels of the stream"),
      require(stream.data && stream.bytes >= long_conv_stream_bytes<T>(stream.batch, stream.channels, stream.taps),
              Code::bad_shape, "the stream is smaller than long_conv_stream_bytes<T>(batch, channels, taps) says"));
}

}  // namespace detail

/// Queues what makes the stream one that has seen these inputs, [batch, token, channel] with any number of tokens, and none
/// before them: a new sequence's are none. Tokens older than L - 1 make no difference; a final state of `long_conv` serves.
template <Element T>
Status long_conv_stream_prefill(std::type_identity_t<TensorView<const T, 3>> inputs, const LongConvStreamKernel& kernel,
                                const LongConvStream<T>& stream, cudaStream_t cuda_stream) {
  static_assert(detail::StreamElement<T>, "the GPU has elements __nv_bfloat16, __half and float");
  using namespace detail;
  if (Status s = first_failure(check_stream(kernel, stream, inputs.extents[0], inputs.extents[2]),
                               require(readable(inputs), Code::bad_shape, "inputs need data"));
      !s.ok())
    return s;
  StreamBeginCall<T> call{stream_call(kernel, stream), 0};
  if (call.stream.rows() == 0) return {};
  const Index seen = std::min(inputs.extents[1], stream.taps - 1), period = call.stream.tiers.period();
  call.position = round_up(std::max<Index>(seen, 1), period);
  if (cudaError_t error = cudaMemsetAsync(
          stream.data, 0, long_conv_stream_bytes<T>(stream.batch, stream.channels, stream.taps), cuda_stream);
      error != cudaSuccess)
    return from_cuda(error);
  if (seen > 0) {
    const StreamInputsCall<T> fill{run(inputs, 1, inputs.extents[1] - seen, seen), call.stream.tiers, call.stream.state,
                                   call.position};
    const Index blocks = std::min<Index>(ceil_div(fill.inputs.size(), stream_threads), 8192);
    if (Status s = launch(stream_inputs_kernel<T>, dim3(unsigned(blocks)), stream_threads, 0, cuda_stream, fill);
        !s.ok())
      return s;
  }
  return with_stream_tiers(call.stream.tiers, [&]<int Tiers>(IntConstant<Tiers>) {
    Status status;
    for_tiers<Tiers>([&](auto tier) {
      const Index blocks = ceil_div(call.stream.rows() * call.stream.tiers.pieces(tier), StreamRows<tier>::rows);
      if (status.ok()) status = check_stream_blocks(blocks);
      if (status.ok())
        status = launch(stream_tier_kernel<T, tier>, dim3(unsigned(blocks)), stream_threads,
                        StreamRows<tier>::shared_bytes, cuda_stream, call);
    });
    if (!status.ok()) return status;
    const Index blocks = ceil_div(call.stream.pairs(), stream_group_pairs);
    if (Status s = check_stream_blocks(blocks); !s.ok()) return s;
    return launch(stream_group_kernel<T, Tiers>, dim3(unsigned(blocks)), stream_threads, stream_group_bytes,
                  cuda_stream, call);
  });
}

/// Queues y for one token per sequence, whose state the stream is. Allocates nothing, waits for nothing, and is one launch
/// that is the same at every token: captured into a graph, each replay is the next token. The same inputs give the same
/// bits on every run.
template <Element T>
Status long_conv_stream_step(const LongConvStreamArgs<T>& args, const LongConvStreamKernel& kernel,
                             const LongConvStream<T>& stream, cudaStream_t cuda_stream) {
  static_assert(detail::StreamElement<T>, "the GPU has elements __nv_bfloat16, __half and float");
  using namespace detail;
  if (Status s = first_failure(check(args), check_stream(kernel, stream, args.x.extents[0], args.x.extents[1]));
      !s.ok())
    return s;
  StreamCall<T> call = stream_call(kernel, stream);
  if (call.rows() == 0) return {};
  call.args = args;
  return with_stream_tiers(call.tiers, [&]<int Tiers>(IntConstant<Tiers>) {
    const Index direct_blocks = ceil_div(call.pairs(), stream_threads);
    Index blocks = direct_blocks;
    if (stream.taps > StreamTiers::direct_lags)
      blocks += call.group_blocks = int(ceil_div(call.pairs(), stream_group_pairs * StreamTiers::group));
    for_tiers<Tiers>([&](auto tier) {
      const Index rows = ceil_div(call.rows() * call.tiers.pieces(tier), StreamTiers::turns(tier));
      blocks += call.tier_blocks[tier] = int(ceil_div(rows, StreamRows<tier>::rows));
    });
    if (Status s = check_stream_blocks(blocks); !s.ok()) return s;
    return launch(stream_step_kernel<T, Tiers>, dim3(unsigned(blocks)), stream_threads, stream_shared_bytes<Tiers>,
                  cuda_stream, call);
  });
}

}  // namespace chela::cuda
