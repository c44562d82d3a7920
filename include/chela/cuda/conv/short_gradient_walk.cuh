#pragma once
// Gradients of kernels up to 8 wide: a thread walks along the tokens of a few channels, and the gradient of an input
// follows Width - 1 tokens behind, when the last slope that it needs is known. Three blocks of a multiprocessor share
// its registers: with four the walk spills, and with two channels each instead of four it took a tenth longer.
#include <algorithm>

#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/short_gradients.cuh"

namespace chela::cuda::detail {

inline constexpr int gradient_walk_len = 128;

/// Channels of a thread: 8 bytes, less where the taps, their sums and the windows would not stay in registers.
template <class T, int Width, bool Vectors>
inline constexpr int walk_channels = !Vectors                      ? 1
                                     : sizeof(T) == 4 || Width > 4 ? 2
                                                                   : 4;

/// One thread's walk: what it carries from token to token, and from piece to piece. Inputs, gradients of outputs and
/// slopes are rings in registers, as long as a power of two so that a step of the walk finds every token where it was
/// one step before. The place that a token leaves is loaded anew at once.
template <class T, int Width, Activation A, int Channels>
class ShortConvGradientWalk {
  static constexpr int history = Width - 1, step = Width <= 4 ? 8 : 16, grads_ahead = 8,
                       kept_slopes = Width <= 4 ? 4 : 8;
  using Values = Packet<T, Channels>;

 public:
  __device__ ShortConvGradientWalk(const SharedTaps<Width>& taps, int channel) {
    taps.read(0, channel, taps_), taps.read_bias(channel, bias_);
  }

  /// The tokens of [first, last), all of one sequence.
  __device__ void piece(const ShortConvBackwardArgs<T>& args, const SequenceTokens& tokens, Index batch, Index channel,
                        Index first, Index last) {
    const InputGradients<T, Width, Channels> gradients(args, tokens, batch, channel, first);
    const int count = int(last - first), known = int(min(tokens.end, last + history) - first);
    start(args, inputs_of<Width>(args, tokens, batch, channel), &args.grad_y(batch, 0, channel), first, known);
    for (int t = 0; t < count + history; t += step) {
      if (t + step <= count && (t > 0 || !gradients.wants_initial_state()))
        advance<true>(args, gradients, first, t, count, known);
      else
        advance<false>(args, gradients, first, t, count, known);
    }
  }

  /// The sums of taps and of the bias as [row][channel].
  __device__ void write_sums(float* to, int row_len) const {
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
#pragma unroll
      for (int j = 0; j < Width; ++j) to[j * row_len + c] = tap_sums_[j][c];
      to[Width * row_len + c] = bias_sum_[c];
    }
  }

 private:
  /// Loads that run ahead stop at the last token that is known.
  __device__ void start(const ShortConvBackwardArgs<T>& args, const SequenceInputs<T, Width>& inputs, const T* grad_y,
                        Index first, int known) {
    next_input_ = inputs.x + first * inputs.stride, next_grad_ = grad_y + first * args.grad_y.strides[1];
    inputs_left_ = grads_left_ = known - 1;
#pragma unroll
    for (int i = 0; i < step - history; ++i) load_input(args, inputs_[i]);
#pragma unroll
    for (int i = 0; i < grads_ahead; ++i) load_grad(args, grads_[i]);
#pragma unroll
    for (int i = 0; i < history; ++i) {
      const T* const from = inputs[first - history + i];
      inputs_[step - history + i] = from ? Values::load(from) : Values{};
    }
#pragma unroll
    for (int i = 0; i < kept_slopes; ++i)
#pragma unroll
      for (int c = 0; c < Channels; ++c) slopes_[i][c] = 0;
  }
  __device__ void load_input(const ShortConvBackwardArgs<T>& args, Values& to) {
    to = Values::load_streamed(next_input_);
    if (--inputs_left_ >= 0) next_input_ += args.x.strides[1];
    next_input_ = arch::made_anew(next_input_);
  }
  __device__ void load_grad(const ShortConvBackwardArgs<T>& args, Values& to) {
    to = Values::load_streamed(next_grad_);
    if (--grads_left_ >= 0) next_grad_ += args.grad_y.strides[1];
    next_grad_ = arch::made_anew(next_grad_);
  }

  /// The tokens from t on, counted from the piece's first: `Whole` if they all are of the piece, and so are the inputs
  /// whose gradients become known, or nobody has asked for those that are not.
  template <bool Whole>
  __device__ void advance(const ShortConvBackwardArgs<T>& args, const InputGradients<T, Width, Channels>& gradients,
                          Index first, int t, int count, int known) {
    T* grad_x = Whole ? gradients.place(first + t - history) : nullptr;
#pragma unroll
    for (int r = 0; r < step; ++r) {
      if (!Whole && t + r >= count + history) continue;
      float window[Width][Channels], slope[Channels], sum[Channels];
#pragma unroll
      for (int j = 0; j < Width; ++j) inputs_[(r - j) & (step - 1)].widen(window[j]);
      grads_[r % grads_ahead].widen(slope);
      load_grad(args, grads_[r % grads_ahead]);
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        if constexpr (A != Activation::none) {
          float a = bias_[c];
#pragma unroll
          for (int j = history; j >= 0; --j) a = fmaf(taps_[j][c], window[j][c], a);
          slope[c] *= activation_slope<A, T>(a);
        }
        if (!Whole && t + r >= known) slope[c] = 0;
        slopes_[r % kept_slopes][c] = slope[c];
      }
      if (Whole || t + r < count) {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          bias_sum_[c] += slope[c];
#pragma unroll
          for (int j = 0; j < Width; ++j) tap_sums_[j][c] = fmaf(slope[c], window[j][c], tap_sums_[j][c]);
        }
      }
      load_input(args, inputs_[(r - history) & (step - 1)]);
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        sum[c] = taps_[0][c] * slopes_[(r - history) & (kept_slopes - 1)][c];
#pragma unroll
        for (int j = 1; j < Width; ++j)
          sum[c] = fmaf(taps_[j][c], slopes_[(r - history + j) & (kept_slopes - 1)][c], sum[c]);
      }
      if (Whole) {
        if (gradients.wanted() && (r >= history || t > 0)) Values::rounded(sum).store_streamed(grad_x);
        grad_x = arch::made_anew(grad_x + gradients.stride());
      } else {
        gradients.write(first + t + r - history, sum);
      }
    }
  }

  float taps_[Width][Channels], bias_[Channels];
  float tap_sums_[Width][Channels] = {}, bias_sum_[Channels] = {};
  Values inputs_[step], grads_[grads_ahead];  // of tokens by their place in the step
  float slopes_[kept_slopes][Channels];
  const T *next_input_ = nullptr, *next_grad_ = nullptr;
  int inputs_left_ = 0, grads_left_ = 0;
};

static_assert(short_conv_threads / 32 * gradient_walk_len >= part_tokens);

template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads,
                             3) void short_conv_gradient_walk(const __grid_constant__ ShortConvGradientCall<T> call) {
  constexpr int channels = walk_channels<T, Width, Vectors>;
  auto* const shared_values = arch::dynamic_shared<float>();
  const ShortConvBackwardArgs<T>& args = call.args;
  const auto place = call.grid.place();
  const int column = call.grid.column(), walker = call.grid.row(),
            walkers = short_conv_threads >> call.grid.across_log2;
  const int block_channels = channels << call.grid.across_log2;
  const SharedTaps<Width> all_taps{shared_values, block_channels};
  const Index block_channel = Index(place.channel_block) * block_channels, channel = block_channel + column * channels;
  Index first = (Index(place.run_block) * walkers + walker) * gradient_walk_len;
  const Index end = channel < args.x.extents[2] ? min(first + gradient_walk_len, args.x.extents[1]) : 0;

  all_taps.stage(args.taps, args.bias, block_channel, threadIdx.x, short_conv_threads);
  __syncthreads();
  ShortConvGradientWalk<T, Width, A, channels> walk(all_taps, column * channels);
  while (first < end) {
    const SequenceTokens tokens = sequence_with(sequences_of(args), place.batch, first);
    const Index last = min(end, tokens.end);
    walk.piece(args, tokens, place.batch, channel, first, last);
    first = last;
  }
  if (!call.parts) return;

  __syncthreads();
  walk.write_sums(shared_values + walker * (Width + 1) * block_channels + column * channels, block_channels);
  __syncthreads();
  float* const part = part_of<Width>(call, place);
  for (int i = threadIdx.x; i < (Width + 1) * block_channels; i += short_conv_threads) {
    float sum = 0;
    for (int w = 0; w < walkers; ++w) sum += shared_values[w * (Width + 1) * block_channels + i];
    const Index to = block_channel + i % block_channels;
    if (to < args.x.extents[2]) part[i / block_channels * args.x.extents[2] + to] = sum;
  }
}

/// Shared memory: the taps, then the sums of every thread.
template <class T, int Width, bool Vectors>
constexpr int walk_shared_bytes(int across) {
  constexpr int channels = walk_channels<T, Width, Vectors>, sums = short_conv_threads * channels * (Width + 1) * 4;
  return std::max(SharedTaps<Width>::bytes(across * channels), sums);
}

}  // namespace chela::cuda::detail
