#pragma once
// Gradients of kernels wider than 16, or than 8 where the neighbours in memory are tokens: a block has tiles of 64
// tokens by 32 channels, with the tokens around them, in shared memory. Threads have one channel and 8 tokens, and then
// 8 taps.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/short_gradients.cuh"

namespace chela::cuda::detail {

inline constexpr int gradient_tile_threads = 256, gradient_tile_tokens = 64, gradient_tile_channels = 32,
                     tiles_together = 8;
static_assert(gradient_tile_tokens * tiles_together >= part_tokens);

template <int Width>
struct GradientTile {
  static constexpr int history = Width - 1, pitch = gradient_tile_channels + 1;
  static constexpr int slope_rows = (gradient_tile_tokens + history + 7) / 8 * 8;  // of the tile and behind it
  static constexpr int rows = history + slope_rows;                                // and before it
  static constexpr int bytes = 2 * rows * pitch * int(sizeof(float)) + SharedTaps<Width>::bytes(gradient_tile_channels);
};

template <class T, int Width, Activation A>
class GradientTiles {
  using Tile = GradientTile<Width>;
  static constexpr int history = Tile::history, pitch = Tile::pitch,
                       groups = (Width + taps_together - 1) / taps_together;
  static constexpr int warps = gradient_tile_threads / 32;
  static_assert(groups <= warps);

 public:
  __device__ GradientTiles(const ShortConvGradientCall<T>& call, Index batch, Index block_channel, float* shared_values)
      : args_(call.args),
        by_tokens_(call.tokens_are_neighbours),
        batch_(batch),
        block_channel_(block_channel),
        lane_(int(threadIdx.x) % 32),
        warp_(int(threadIdx.x) / 32),
        taps_{shared_values + 2 * Tile::rows * pitch, gradient_tile_channels},
        inputs_(shared_values),
        slopes_(shared_values + Tile::rows * pitch) {
    taps_.stage(args_.taps, args_.bias, block_channel, threadIdx.x, gradient_tile_threads);
  }

  /// The tokens of [first, last), at most a tile's, all of one sequence. Called by all threads.
  __device__ void piece(const SequenceTokens& tokens, Index first, Index last) {
    __syncthreads();
    load(tokens, first, last);
    __syncthreads();
    if constexpr (A != Activation::none) find_slopes();
    __syncthreads();
    if (block_channel_ + lane_ < args_.x.extents[2]) write_input_gradients(tokens, first, last);
    if (warp_ < groups) add_tap_gradients(int(last - first));
  }

  __device__ void write_sums(float* part) const {
    const Index channels = args_.x.extents[2], channel = block_channel_ + lane_;
    if (channel >= channels || warp_ >= groups) return;
#pragma unroll
    for (int j = 0; j < taps_together; ++j)
      if (warp_ * taps_together + j < Width) part[(warp_ * taps_together + j) * channels + channel] = tap_sums_[j];
    if (warp_ == 0) part[Width * channels + channel] = bias_sum_;
  }

 private:
  /// Row i is token first - history + i. Inputs before the sequence are its state's, slopes before the piece are not
  /// asked for, and beyond what the piece needs both are zero.
  __device__ void load(const SequenceTokens& tokens, Index first, Index last) {
    const Index known = min(tokens.end, last + history);
    for (int i = threadIdx.x; i < Tile::rows * gradient_tile_channels; i += gradient_tile_threads) {
      const int row = by_tokens_ ? i % Tile::rows : i / gradient_tile_channels;
      const int column = by_tokens_ ? i / Tile::rows : i % gradient_tile_channels;
      const Index token = first - history + row, channel = block_channel_ + column;
      float input = 0, grad = 0;
      if (channel < args_.x.extents[2] && token < known) {
        const T* const from = inputs_of<Width>(args_, tokens, batch_, channel)[token];
        input = from ? float(*from) : 0.f;
        if (row >= history) grad = float(args_.grad_y(batch_, token, channel));
      }
      inputs_[row * pitch + column] = input, slopes_[row * pitch + column] = grad;
    }
  }

  /// From grad_y to slopes, in place: each thread reads what it writes.
  __device__ void find_slopes() const {
    constexpr int oldest = oldest_taps<Width>;
    for (int row = warp_ * 8; row < Tile::slope_rows; row += warps * 8) {
      float sums[8][1];
#pragma unroll
      for (int r = 0; r < 8; ++r) taps_.read_bias(lane_, sums[r]);
      add_inputs<oldest>(row, Width - oldest, sums);
#pragma unroll 1
      for (int newest = Width - oldest - taps_together; newest >= 0; newest -= taps_together)
        add_inputs<taps_together>(row, newest, sums);
#pragma unroll
      for (int r = 0; r < 8; ++r) slopes_[(history + row + r) * pitch + lane_] *= activation_slope<A, T>(sums[r][0]);
    }
  }
  template <int Taps>
  __device__ void add_inputs(int row, int newest, float (&sums)[8][1]) const {
    float taps[Taps][1];
    taps_.read(newest, lane_, taps);
#pragma unroll
    for (int place = 0; place < 8 + Taps - 1; ++place) {
      const float input[1] = {inputs_[(history + row - newest - (Taps - 1) + place) * pitch + lane_]};
      add_taps(taps, input, place, sums);
    }
  }

  __device__ void write_input_gradients(const SequenceTokens& tokens, Index first, Index last) const {
    constexpr int oldest = oldest_taps<Width>;
    const InputGradients<T, Width, 1> gradients(args_, tokens, batch_, block_channel_ + lane_, first);
    const int begin = gradients.wants_initial_state() ? -history : 0, end = int(last - first);
    for (int token = begin + warp_ * 8; token < end; token += warps * 8) {
      float sums[8][1] = {};
#pragma unroll 1
      for (int newest = 0; newest < Width - oldest; newest += taps_together)
        add_slopes_of<taps_together>(token, newest, sums);
      add_slopes_of<oldest>(token, Width - oldest, sums);
#pragma unroll
      for (int r = 0; r < 8; ++r)
        if (token + r < end) gradients.write(first + token + r, sums[r]);
    }
  }
  template <int Taps>
  __device__ void add_slopes_of(int token, int newest, float (&sums)[8][1]) const {
    float taps[Taps][1];
    taps_.read(newest, lane_, taps);
#pragma unroll
    for (int place = 0; place < 8 + Taps - 1; ++place) {
      const int row = history + token + newest + place;
      const float slope[1] = {row < Tile::rows ? slopes_[row * pitch + lane_] : 0.f};
      add_slopes(taps, slope, place, sums);
    }
  }

  /// Of the warp's taps.
  __device__ void add_tap_gradients(int count) {
    const int newest = warp_ * taps_together;
    for (int token = 0; token < count; token += 8) {
      float slopes[8], inputs[8 + taps_together - 1];
#pragma unroll
      for (int t = 0; t < 8; ++t) slopes[t] = token + t < count ? slopes_[(history + token + t) * pitch + lane_] : 0.f;
#pragma unroll
      for (int i = 0; i < 8 + taps_together - 1; ++i) {
        const int row = history + token - newest - (taps_together - 1) + i;
        inputs[i] = row >= 0 ? inputs_[row * pitch + lane_] : 0.f;  // before the oldest tap's: of no tap
      }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        bias_sum_ += slopes[t];
#pragma unroll
        for (int j = 0; j < taps_together; ++j)
          tap_sums_[j] = fmaf(slopes[t], inputs[t + taps_together - 1 - j], tap_sums_[j]);
      }
    }
  }

  const ShortConvBackwardArgs<T>& args_;
  bool by_tokens_;
  Index batch_, block_channel_;
  int lane_, warp_;
  SharedTaps<Width> taps_;
  float *inputs_, *slopes_;  // [row][channel]
  float tap_sums_[taps_together] = {}, bias_sum_ = 0;
};

/// A block has 32 channels of a run of tiles.
template <class T, int Width, Activation A>
__global__ __launch_bounds__(gradient_tile_threads) void short_conv_gradient_tiles(
    const __grid_constant__ ShortConvGradientCall<T> call) {
  auto* const shared_values = arch::dynamic_shared<float>();
  arch::wait_for_last_kernel();
  arch::let_next_kernel_start();
  const auto place = call.grid.place();
  GradientTiles<T, Width, A> tiles(call, place.batch, Index(place.channel_block) * gradient_tile_channels,
                                   shared_values);
  Index first = Index(place.run_block) * gradient_tile_tokens * tiles_together;
  const Index end = min(first + gradient_tile_tokens * tiles_together, call.args.x.extents[1]);
  while (first < end) {
    const SequenceTokens tokens = sequence_with(sequences_of(call.args), place.batch, first);
    const Index last = min(min(end, tokens.end), first + gradient_tile_tokens);
    tiles.piece(tokens, first, last);
    first = last;
  }
  if (call.parts) tiles.write_sums(part_of<Width>(call, place));
}

}  // namespace chela::cuda::detail
