#pragma once
// Gradients of kernels up to 16 wide: a thread walks along the tokens of a few channels, and the gradient of an input
// follows Width - 1 tokens behind, when the last slope that it needs is known.
#include <algorithm>
#include <bit>

#include "chela/cuda/arch/dependent_launch.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/short_gradients.cuh"

namespace chela::cuda::detail {

inline constexpr int widest_walk = 16;
/// Tokens of a thread, which reads 3 (Width - 1) more.
template <int Width>
inline constexpr int gradient_walk_len = Width <= 4 ? 128 : 256;

/// Channels of a thread: 8 bytes, less where the taps, their sums and the windows would not stay in registers.
template <class T, int Width, bool Vectors>
inline constexpr int walk_channels = !Vectors || (Width > 8 && sizeof(T) == 4) ? 1
                                     : sizeof(T) == 4 || Width > 4             ? 2
                                                                               : 4;
/// Blocks of a multiprocessor: with one more the walk spills, and takes a fifth longer.
template <int Width>
inline constexpr int walk_blocks = Width <= 8 ? 4 : 2;

/// Inputs and gradients of outputs on their way to one thread, some tokens at a time, through shared memory that is its
/// own: no other thread waits.
template <class T, int Channels>
class WalkStages {
  static constexpr int bytes = Channels * int(sizeof(T)), row_bytes = short_conv_threads * bytes;
  using Values = Packet<T, Channels>;

 public:
  static constexpr int tokens = 4;
  static constexpr int count = 4;  // one is read, the others are under way
  static constexpr int stage_bytes = 2 * tokens * row_bytes, block_bytes = count * stage_bytes;

  __device__ explicit WalkStages(const void* shared)
      : first_(arch::shared_address(shared) + threadIdx.x * bytes), place_(first_) {}

  /// Of `left` tokens. Nothing beyond them is touched, and what is read there has no meaning.
  __device__ void start(const T* inputs, Index input_stride, const T* grads, Index grad_stride, int left) {
    arch::wait_copies<0>();
    inputs_ = inputs, grads_ = grads, left_ = left;
#pragma unroll
    for (int s = 0; s < count - 1; ++s) load(first_ + s * stage_bytes, input_stride, grad_stride);
    place_ = first_ + (count - 1) * stage_bytes;
  }
  /// Goes on to the next tokens, and has those loaded that take the place of the last ones.
  __device__ void next(Index input_stride, Index grad_stride) {
    const std::uint32_t free = place_;
    place_ = free == first_ + (count - 1) * stage_bytes ? first_ : free + stage_bytes;
    arch::wait_copies<count - 2>();
    load(free, input_stride, grad_stride);
  }
  __device__ void input(int token, float (&values)[Channels]) const { read(place_ + token * row_bytes, values); }
  __device__ void grad(int token, float (&values)[Channels]) const {
    read(place_ + (tokens + token) * row_bytes, values);
  }
  /// After this, shared memory is free.
  __device__ void finish() const { arch::wait_copies<0>(); }

 private:
  __device__ void load(std::uint32_t to, Index input_stride, Index grad_stride) {
    if (left_ >= tokens)
      load_of<true>(to, input_stride, grad_stride);
    else if (left_ > 0)
      load_of<false>(to, input_stride, grad_stride);
    arch::commit_copies();
    left_ -= tokens;
  }
  template <bool Whole>
  __device__ void load_of(std::uint32_t to, Index input_stride, Index grad_stride) {
    if constexpr (bytes >= 4) {
#pragma unroll
      for (int r = 0; r < tokens; ++r) {
        if (Whole || r < left_) {
          copy(to + r * row_bytes, inputs_), copy(to + (tokens + r) * row_bytes, grads_);
          inputs_ = arch::made_anew(inputs_ + input_stride), grads_ = arch::made_anew(grads_ + grad_stride);
        }
      }
    } else {  // too few for the hardware's copies
      T values[2 * tokens];
#pragma unroll
      for (int r = 0; r < tokens; ++r) {
        if (Whole || r < left_) {
          values[r] = *inputs_, values[tokens + r] = *grads_;
          inputs_ += input_stride, grads_ += grad_stride;
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * tokens; ++r)
        arch::store_shared_half_word(to + r * row_bytes, reinterpret_cast<const unsigned short&>(values[r]));
    }
  }
  __device__ static void copy(std::uint32_t to, const T* from) {
    if constexpr (bytes == 8)
      arch::copy_async_8(to, from, true);
    else
      arch::copy_async_4(to, from, true);
  }
  __device__ static void read(std::uint32_t from, float (&values)[Channels]) {
    typename Values::Words words;
    if constexpr (bytes == 8)
      words = arch::load_shared_words(from);
    else if constexpr (bytes == 4)
      words = arch::load_shared_word(from);
    else
      words = arch::load_shared_half_word(from);
    Values{words}.widen(values);
  }

  std::uint32_t first_, place_;
  const T *inputs_ = nullptr, *grads_ = nullptr;
  int left_ = 0;
};

/// One thread's walk: what it carries from token to token, and from piece to piece. Inputs and slopes are rings in
/// registers, as long as a power of two so that a step of the walk finds every token where it was one step before.
template <class T, int Width, Activation A, int Channels>
class ShortConvGradientWalk {
 public:
  using Stages = WalkStages<T, Channels>;

 private:
  static constexpr int history = Width - 1, step = std::max(Stages::tokens, int(std::bit_ceil(unsigned(Width))));

 public:
  __device__ ShortConvGradientWalk(const SharedTaps<Width>& taps, int channel, const void* stages) : stages_(stages) {
    taps.read(0, channel, taps_), taps.read_bias(channel, bias_);
  }

  /// The tokens of [first, last), all of one sequence.
  __device__ void piece(const ShortConvBackwardArgs<T>& args, const SequenceTokens& tokens, Index batch, Index channel,
                        Index first, Index last) {
    const InputGradients<T, Width, Channels> gradients(args, tokens, batch, channel, first);
    const auto inputs = inputs_of<Width>(args, tokens, batch, channel);
    const int count = int(last - first), known = int(min(tokens.end, last + history) - first);
    stages_.start(inputs.x + first * inputs.stride, args.x.strides[1], &args.grad_y(batch, first, channel),
                  args.grad_y.strides[1], known);
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const T* const from = i < step - history ? nullptr : inputs[first - step + i];
      (from ? Packet<T, Channels>::load(from) : Packet<T, Channels>{}).widen(inputs_[i]);
#pragma unroll
      for (int c = 0; c < Channels; ++c) slopes_[i][c] = 0;
    }
    for (int t = 0; t < count + history; t += step) {
      if (t + step <= count && (t > 0 || !gradients.wants_initial_state()))
        advance<true>(args, gradients, first, t, count, known);
      else
        advance<false>(args, gradients, first, t, count, known);
    }
  }

  /// After this, shared memory is free.
  __device__ void finish() const { stages_.finish(); }
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
  /// The tokens from t on, counted from the piece's first: `Whole` if they all are of the piece, and so are the inputs
  /// whose gradients become known, or nobody has asked for those that are not.
  template <bool Whole>
  __device__ void advance(const ShortConvBackwardArgs<T>& args, const InputGradients<T, Width, Channels>& gradients,
                          Index first, int t, int count, int known) {
    T* grad_x = Whole ? gradients.place(first + t - history) : nullptr;
#pragma unroll
    for (int r = 0; r < step; ++r) {
      if (!Whole && t + r >= count + history) return;
      if (r % Stages::tokens == 0) stages_.next(args.x.strides[1], args.grad_y.strides[1]);
      float slope[Channels], sum[Channels];
      stages_.input(r % Stages::tokens, inputs_[r]), stages_.grad(r % Stages::tokens, slope);
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        if constexpr (A != Activation::none) {
          float a = bias_[c];
#pragma unroll
          for (int j = history; j >= 0; --j) a = fmaf(taps_[j][c], inputs_[(r - j) & (step - 1)][c], a);
          slope[c] *= activation_slope<A, T>(a);
        }
        if (!Whole && t + r >= known) slope[c] = 0;
        slopes_[r][c] = slope[c];
      }
      if (Whole || t + r < count) {
#pragma unroll
        for (int c = 0; c < Channels; ++c) {
          bias_sum_[c] += slope[c];
#pragma unroll
          for (int j = 0; j < Width; ++j)
            tap_sums_[j][c] = fmaf(slope[c], inputs_[(r - j) & (step - 1)][c], tap_sums_[j][c]);
        }
      }
#pragma unroll
      for (int c = 0; c < Channels; ++c) {
        sum[c] = taps_[0][c] * slopes_[(r - history) & (step - 1)][c];
#pragma unroll
        for (int j = 1; j < Width; ++j) sum[c] = fmaf(taps_[j][c], slopes_[(r - history + j) & (step - 1)][c], sum[c]);
      }
      if (Whole) {
        if (gradients.wanted() && (r >= history || t > 0)) Packet<T, Channels>::rounded(sum).store_streamed(grad_x);
        grad_x = arch::made_anew(grad_x + gradients.stride());
      } else {
        gradients.write(first + t + r - history, sum);
      }
    }
  }

  float taps_[Width][Channels], bias_[Channels];
  float tap_sums_[Width][Channels] = {}, bias_sum_[Channels] = {};
  float inputs_[step][Channels], slopes_[step][Channels];  // of tokens by their place in the step
  Stages stages_;
};

static_assert(short_conv_threads / 32 * gradient_walk_len<1> >= part_tokens);

template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads, walk_blocks<Width>) void short_conv_gradient_walk(
    const __grid_constant__ ShortConvGradientCall<T> call) {
  constexpr int channels = walk_channels<T, Width, Vectors>;
  auto* const shared_values = arch::dynamic_shared<float>();
  const ShortConvBackwardArgs<T>& args = call.args;
  const auto place = call.grid.place();
  const int column = call.grid.column(), walker = call.grid.row(),
            walkers = short_conv_threads >> call.grid.across_log2;
  const int block_channels = channels << call.grid.across_log2;
  using Walk = ShortConvGradientWalk<T, Width, A, channels>;
  const SharedTaps<Width> all_taps{shared_values + Walk::Stages::block_bytes / sizeof(float), block_channels};
  const Index block_channel = Index(place.channel_block) * block_channels, channel = block_channel + column * channels;
  Index first = (Index(place.run_block) * walkers + walker) * gradient_walk_len<Width>;
  const Index end = channel < args.x.extents[2] ? min(first + gradient_walk_len<Width>, args.x.extents[1]) : 0;

  arch::wait_for_last_kernel();
  arch::let_next_kernel_start();
  all_taps.stage(args.taps, args.bias, block_channel, threadIdx.x, short_conv_threads);
  __syncthreads();
  Walk walk(all_taps, column * channels, shared_values);
  while (first < end) {
    const SequenceTokens tokens = sequence_with(sequences_of(args), place.batch, first);
    const Index last = min(end, tokens.end);
    walk.piece(args, tokens, place.batch, channel, first, last);
    first = last;
  }
  walk.finish();
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

/// Shared memory: what is loaded and the taps, then the sums of every thread.
template <class T, int Width, bool Vectors>
constexpr int walk_shared_bytes(int across) {
  constexpr int channels = walk_channels<T, Width, Vectors>, sums = short_conv_threads * channels * (Width + 1) * 4;
  return std::max(WalkStages<T, channels>::block_bytes + SharedTaps<Width>::bytes(across * channels), sums);
}

}  // namespace chela::cuda::detail
