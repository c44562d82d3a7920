#pragma once
// What the kernels of the short convolution's gradients share. With slopes da = grad_y activation'(a), the sums a
// recomputed:
//
//   grad_x[t] = sum_j taps[j] da[t+j]        grad_taps[j] = sum_{b,t} da[t] x[t-j]        grad_bias = sum_{b,t} da[t]
//
// Sums over batch and tokens are taken per part, a cut that depends on the shape alone, and then over parts in order.
#include "chela/cuda/arch/dependent_launch.cuh"
#include "chela/cuda/conv/short_forward.cuh"

namespace chela::cuda::detail {

/// A part has at least so many tokens, unless its batch entry has fewer.
inline constexpr int part_tokens = 512;

template <class T>
struct ShortConvGradientCall {
  ShortConvBackwardArgs<T> args;
  ShortConvGrid grid;
  float* parts = nullptr;  ///< [batch and run block, width + 1, channel], the bias last; null where no sums are wanted
  bool tokens_are_neighbours = false;
};

/// The place of a part's first channel.
template <int Width, class T>
__device__ float* part_of(const ShortConvGradientCall<T>& call, const ShortConvGrid::Place& place) {
  return call.parts +
         (Index(place.batch) * call.grid.run_blocks.value() + place.run_block) * (Width + 1) * call.args.x.extents[2];
}

/// Where gradients of inputs go: to tokens of the piece, or to the initial state of a sequence that begins with it.
template <class T, int Width, int Channels>
class InputGradients {
  static constexpr int history = Width - 1;

 public:
  __device__ InputGradients(const ShortConvBackwardArgs<T>& args, const SequenceTokens& tokens, Index batch,
                            Index channel, Index first)
      : first_(first),
        end_(tokens.end),
        after_(args.grad_final_state, {}, tokens.sequence, channel, 0),
        stride_(args.grad_x.strides[1]) {
    if (args.grad_x.present()) x_ = &args.grad_x(batch, 0, channel);
    if (first == tokens.begin) before_ = {args.grad_initial_state, {}, tokens.sequence, channel, 0};
  }
  /// Where that of a token goes that leaves the final state alone, if tokens' are wanted.
  __device__ bool wanted() const { return x_ != nullptr; }
  __device__ T* place(Index token) const { return x_ + token * stride_; }
  __device__ Index stride() const { return stride_; }
  /// That of any token of the piece, or of an input before it.
  __device__ void write(Index token, float (&sum)[Channels]) const {
    if constexpr (history > 0) {
      if (token >= end_ - history && after_.present()) {
        float after[Channels];
        Packet<T, Channels>::load(after_.row(int(token - (end_ - history)))).widen(after);
#pragma unroll
        for (int c = 0; c < Channels; ++c) sum[c] += after[c];
      }
      if (token < first_) {
        if (before_.present()) Packet<T, Channels>::rounded(sum).store(before_.row(int(token - first_ + history)));
        return;
      }
    }
    if (wanted()) Packet<T, Channels>::rounded(sum).store_streamed(place(token));
  }
  __device__ bool wants_initial_state() const { return before_.present(); }

 private:
  Index first_, end_;
  StateRing<const T, Width> after_;
  StateRing<T, Width> before_;  // absent unless the piece begins its sequence
  T* x_ = nullptr;
  Index stride_;
};

/// Without tokens the final state is the initial one.
template <class T, int Width>
__global__ __launch_bounds__(short_conv_threads) void pass_through_empty_sequences(
    const __grid_constant__ ShortConvBackwardArgs<T> args) {
  const Index element = Index(blockIdx.x) * short_conv_threads + threadIdx.x;
  const Index sequence = element / args.x.extents[2], channel = element % args.x.extents[2];
  if (sequence >= sequences_of(args).size()) return;
  const SequenceTokens tokens = tokens_of_sequence(sequences_of(args), sequence);
  if (tokens.begin < tokens.end) return;
  for (int s = 0; s < Width - 1; ++s)
    args.grad_initial_state(sequence, s, channel) =
        args.grad_final_state.present() ? args.grad_final_state(sequence, s, channel) : T(0.f);
}

/// Sums of parts.
struct PartSums {
  const float* parts;  ///< [part, width + 1, channel]
  Index count, channels, width;
  TensorView<float, 2> taps;
  TensorView<float, 1> bias;
};
inline constexpr int part_sum_warps = 16;

/// A block has one tap, or the bias, of 32 channels: each warp every 16th part, then the warps in order.
template <class = void>
__global__ __launch_bounds__(32 * part_sum_warps) void sum_parts(const __grid_constant__ PartSums args) {
  __shared__ float sums[part_sum_warps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Index rows = args.width + 1, row = blockIdx.x % rows, channel = blockIdx.x / rows * 32 + lane;
  float sum = 0;
  arch::wait_for_last_kernel();
  if (channel < args.channels) {
    const float* from = args.parts + row * args.channels + channel;
#pragma unroll 8
    for (Index part = warp; part < args.count; part += part_sum_warps) sum += from[part * rows * args.channels];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || channel >= args.channels) return;
#pragma unroll
  for (int other = 1; other < part_sum_warps; ++other) sum += sums[other][lane];
  if (row == args.width) {
    if (args.bias.present()) args.bias(channel) = sum;
  } else if (args.taps.present()) {
    args.taps(channel, row) = sum;
  }
}

}  // namespace chela::cuda::detail
