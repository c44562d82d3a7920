#pragma once
// Gradients of kernels up to 8 wide where the neighbours in memory are tokens: a warp walks back along the tokens of
// one channel, 8 of each lane at a time. Slopes of the tokens behind come from the next lane, or are what the walk held
// back.
#include "chela/cuda/conv/short_gradients.cuh"

namespace chela::cuda::detail {

inline constexpr int lane_tokens = 8, row_step = 32 * lane_tokens;
/// Steps whose elements are on their way to a warp, about 2048 bytes.
template <class T>
inline constexpr int row_steps_loaded = sizeof(T) < sizeof(float) ? 2 : 1;
/// Tokens of a warp: a multiple of its step.
template <class T>
inline constexpr int gradient_row_len = row_step * 8 * row_steps_loaded<T>;
static_assert(gradient_row_len<float> >= part_tokens);
/// Blocks of a multiprocessor, as many as registers allow.
template <int Width>
inline constexpr int gradient_row_blocks = Width <= 4 ? 5 : 4;

/// One warp's walk: what it carries from step to step, and from piece to piece.
template <class T, int Width, Activation A, bool Vectors>
class GradientRow {
  static constexpr int history = Width - 1, vector = vector_tokens<T>, own = lane_tokens / vector;
  static constexpr int vectors = (history + vector - 1) / vector + own;
  using Vector = Packet<T, vector>;

 public:
  __device__ GradientRow(const ShortConvBackwardArgs<T>& args, Index batch, Index channel)
      : args_(args),
        batch_(batch),
        channel_(channel),
        lane_(int(threadIdx.x) % 32),
        x_(&args.x(batch, 0, channel)),
        grad_y_(&args.grad_y(batch, 0, channel)),
        grad_x_(args.grad_x.present() ? &args.grad_x(batch, 0, channel) : nullptr),
        bias_(args.bias.present() ? args.bias(channel) : 0.f) {
#pragma unroll
    for (int j = 0; j < Width; ++j) taps_[j] = args.taps(channel, j);
  }

  /// The tokens of [first, last), all of one sequence and of the row that begins at `row_begin`.
  __device__ void piece(const SequenceTokens& tokens, Index row_begin, Index first, Index last) {
    const auto inputs = inputs_of<Width>(args_, tokens, batch_, channel_);
    // Where a sequence goes on behind the row, its next slopes are found one by one.
    const float behind = lane_ < history && last + lane_ < tokens.end ? slope_at(inputs, last + lane_) : 0.f;
#pragma unroll
    for (int i = 0; i < history; ++i) held_[i] = __shfl_sync(~0u, behind, i);

    constexpr int last_loaded = row_steps_loaded<T> - 1;
    Index step = row_begin + (last - 1 - row_begin) / row_step * row_step;
    Step loaded[row_steps_loaded<T>];
#pragma unroll
    for (int i = 0; i <= last_loaded; ++i) loaded[i] = load(tokens, step - i * row_step, first, last);
    const auto walk = [&](Step& next) {
      advance(next, inputs, tokens, step, first, last);
      step -= row_step;
      return step + row_step > first;
    };
    while (walk(loaded[0]) && (last_loaded == 0 || walk(loaded[last_loaded]))) {
    }
    if (first == tokens.begin && args_.grad_initial_state.present()) write_initial_state(inputs, tokens);
  }

  /// Sums over the warp.
  __device__ void write_sums(float* part) {
#pragma unroll
    for (int j = 0; j < Width; ++j) write_sum(part, j, tap_sums_[j]);
    write_sum(part, Width, bias_sum_);
  }

 private:
  struct Step {
    Vector inputs[vectors], grads[own];
    bool whole;  // all of the piece
    bool near;   // and the history reaches over its beginning
  };

  __device__ Step load(const SequenceTokens& tokens, Index step, Index first, Index last) const {
    Step loaded;
    const Index token = step + lane_ * lane_tokens;
    loaded.whole = Vectors && token >= first && token + lane_tokens <= last;
    loaded.near = token - history < tokens.begin;
    if (loaded.whole) {
#pragma unroll
      for (int v = 0; v < vectors; ++v)
        if (v >= vectors - own || !loaded.near)
          loaded.inputs[v] = Vector::load_streamed(x_ + token + (v - vectors + own) * vector);
#pragma unroll
      for (int v = 0; v < own; ++v) loaded.grads[v] = Vector::load_streamed(grad_y_ + token + v * vector);
    }
    return loaded;
  }

  /// The lane's tokens of a step. Where its registers become free, a later one is loaded into them.
  __device__ void advance(Step& loaded, const SequenceInputs<T, Width>& inputs, const SequenceTokens& tokens,
                          Index step, Index first, Index last) {
    const Index token = step + lane_ * lane_tokens;
    float window[history + lane_tokens], slopes[lane_tokens + history];
    int begin = 0, end = lane_tokens;  // the lane's tokens that are of the piece
    if (loaded.whole) {
      float grads[lane_tokens];
      widen_run<T>(loaded.inputs, window), widen_run<T>(loaded.grads, grads);
#pragma unroll
      for (int t = 0; t < lane_tokens; ++t) slopes[t] = grads[t];
      if (loaded.near) read_history(inputs, token, window);
    } else {
      begin = int(clamped(first - token, 0, lane_tokens)), end = int(clamped(last - token, 0, lane_tokens));
      gather(inputs, token, begin, end, window, slopes);
    }
    const bool whole = loaded.whole;
    loaded = load(tokens, step - row_steps_loaded<T> * row_step, first, last);
    if (whole)
      find_slopes<true>(window, slopes, begin, end);
    else
      find_slopes<false>(window, slopes, begin, end);
#pragma unroll
    for (int i = 0; i < history; ++i) {
      const float behind = __shfl_sync(~0u, slopes[i], (lane_ + 1) % 32);
      slopes[lane_tokens + i] = lane_ == 31 ? held_[i] : behind;
      held_[i] = behind;
    }
    if (grad_x_) write_gradients(slopes, tokens, token, first, begin, end);
  }
  /// From gradients of outputs to slopes, and what they add to the sums.
  template <bool Whole>
  __device__ void find_slopes(const float (&window)[history + lane_tokens], float (&slopes)[lane_tokens + history],
                              int begin, int end) {
#pragma unroll
    for (int t = 0; t < lane_tokens; ++t) {
      if (!Whole && (t < begin || t >= end)) {
        slopes[t] = 0;
        continue;
      }
      if constexpr (A != Activation::none) {
        float a = bias_;
#pragma unroll
        for (int j = history; j >= 0; --j) a = fmaf(taps_[j], window[t + history - j], a);
        slopes[t] *= activation_slope<A, T>(a);
      }
      bias_sum_ += slopes[t];
#pragma unroll
      for (int j = 0; j < Width; ++j) tap_sums_[j] = fmaf(slopes[t], window[t + history - j], tap_sums_[j]);
    }
  }

  __device__ void gather(const SequenceInputs<T, Width>& inputs, Index token, int begin, int end,
                         float (&window)[history + lane_tokens], float (&grads)[lane_tokens + history]) const {
#pragma unroll
    for (int i = 0; i < history + lane_tokens; ++i) {
      const T* const from = i - history < end && i >= begin ? inputs[token - history + i] : nullptr;
      window[i] = from ? float(*from) : 0.f;
    }
#pragma unroll
    for (int t = 0; t < lane_tokens; ++t)
      grads[t] = t >= begin && t < end ? float(args_.grad_y(batch_, token + t, channel_)) : 0.f;
  }

  __device__ void write_gradients(const float (&slopes)[lane_tokens + history], const SequenceTokens& tokens,
                                  Index token, Index first, int begin, int end) const {
    float sums[lane_tokens];
#pragma unroll
    for (int t = 0; t < lane_tokens; ++t) {
      sums[t] = taps_[0] * slopes[t];
#pragma unroll
      for (int j = 1; j < Width; ++j) sums[t] = fmaf(taps_[j], slopes[t + j], sums[t]);
    }
    const bool final = history > 0 && args_.grad_final_state.present() && token + lane_tokens > tokens.end - history;
    if (Vectors && end - begin == lane_tokens && !final) {
      T* const to = grad_x_ + token;
#pragma unroll
      for (int v = 0; v < own; ++v) {
        float part[vector];
#pragma unroll
        for (int i = 0; i < vector; ++i) part[i] = sums[v * vector + i];
        Vector::rounded(part).store_streamed(to + v * vector);
      }
    } else if (begin < end) {
      const InputGradients<T, Width, 1> gradients(args_, tokens, batch_, channel_, first);
#pragma unroll
      for (int t = 0; t < lane_tokens; ++t) {
        float sum[1] = {sums[t]};
        if (t >= begin && t < end) gradients.write(token + t, sum);
      }
    }
  }

  /// Gradients of the inputs before the sequence, a lane one of them.
  __device__ void write_initial_state(const SequenceInputs<T, Width>& inputs, const SequenceTokens& tokens) const {
    if (lane_ >= history) return;
    const InputGradients<T, Width, 1> gradients(args_, tokens, batch_, channel_, tokens.begin);
    const Index token = tokens.begin - history + lane_;
    float sum[1] = {};
    for (int j = history - lane_; j < Width && token + j < tokens.end; ++j)
      sum[0] = fmaf(args_.taps(channel_, j), slope_at(inputs, token + j), sum[0]);
    gradients.write(token, sum);
  }

  __device__ float slope_at(const SequenceInputs<T, Width>& inputs, Index token) const {
    const float grad = float(args_.grad_y(batch_, token, channel_));
    if constexpr (A == Activation::none) return grad;
    float a = bias_;
#pragma unroll
    for (int j = history; j >= 0; --j) {
      const T* const from = inputs[token - j];
      a = fmaf(taps_[j], from ? float(*from) : 0.f, a);
    }
    return grad * activation_slope<A, T>(a);
  }

  __device__ void write_sum(float* part, int row, float sum) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane_ == 0) part[row * args_.x.extents[2] + channel_] = sum;
  }

  const ShortConvBackwardArgs<T>& args_;
  Index batch_, channel_;
  int lane_;
  const T *x_, *grad_y_;
  T* grad_x_;
  float taps_[Width], bias_;
  float tap_sums_[Width] = {}, bias_sum_ = 0;
  float held_[Width] = {};  // slopes of the tokens behind the step; of the last lane
};

/// A block has a channel for each of its warps.
template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads, gradient_row_blocks<Width>) void short_conv_gradient_rows(
    const __grid_constant__ ShortConvGradientCall<T> call) {
  const ShortConvBackwardArgs<T>& args = call.args;
  arch::wait_for_last_kernel();
  arch::let_next_kernel_start();
  const auto place = call.grid.place();
  const Index channel = Index(place.channel_block) * (short_conv_threads / 32) + threadIdx.x / 32;
  if (channel >= args.x.extents[2]) return;
  GradientRow<T, Width, A, Vectors> row(args, place.batch, channel);
  const Index begin = Index(place.run_block) * gradient_row_len<T>,
              end = min(begin + gradient_row_len<T>, args.x.extents[1]);
  for (Index first = begin; first < end;) {
    const SequenceTokens tokens = sequence_with(sequences_of(args), place.batch, first);
    const Index last = min(end, tokens.end);
    row.piece(tokens, begin, first, last);
    first = last;
  }
  if (call.parts) row.write_sums(part_of<Width>(call, place));
}

}  // namespace chela::cuda::detail
