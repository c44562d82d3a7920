#pragma once
// The forward pass. Threads of a warp are neighbours along the axis that is contiguous: each has a run of tokens of a
// few channels, or of one channel.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/short_inputs.cuh"
#include "chela/cuda/conv/short_values.cuh"
#include "chela/cuda/fixed_divisor.cuh"

namespace chela::cuda::detail {

inline constexpr int short_conv_threads = 128;

/// Blocks of channels by blocks of runs by batch entries, channels quickest.
struct ShortConvGrid {
  int across_log2 = 0;  ///< of the threads of a block along channels, or along runs where those are neighbours
  FixedDivisor channel_blocks, run_blocks;

  struct Place {
    unsigned channel_block, run_block, batch;
  };
  CHELA_HOST_DEVICE constexpr int across() const { return 1 << across_log2; }
  /// Of a thread in its block: the place across, and along the other axis.
  __device__ int column() const { return int(threadIdx.x) & (across() - 1); }
  __device__ int row() const { return int(threadIdx.x) >> across_log2; }
  __device__ Place place() const {
    const unsigned rest = channel_blocks.quotient(blockIdx.x), batch = run_blocks.quotient(rest);
    return {channel_blocks.remainder(blockIdx.x, rest), run_blocks.remainder(rest, batch), batch};
  }
};

template <class T>
struct ShortConvCall {
  ShortConvArgs<T> args;
  ShortConvGrid grid;
};

/// The part of a run that lies in one sequence.
template <class T, int Width>
struct RunPiece {
  Index first = 0, last = 0;  ///< tokens, last excluded
  SequenceInputs<T, Width> inputs;

  RunPiece() = default;
  __device__ RunPiece(const ShortConvArgs<T>& args, Index batch, Index channel, Index first, Index run_end)
      : first(first) {
    const SequenceTokens tokens = sequence_with(sequences_of(args), batch, first);
    last = min(run_end, tokens.end), inputs = inputs_of<Width>(args, tokens, batch, channel);
  }
};

/// Tokens of a thread.
inline constexpr int run_len = 8;

/// Channels of a thread: 16 bytes, less where wide kernels leave no registers; one where elements are moved singly.
template <class T, int Width, bool Vectors>
inline constexpr int run_channels = !Vectors         ? 1
                                    : Width > 8      ? 2
                                    : sizeof(T) == 4 ? 4
                                    : Width > 4      ? 4
                                                     : 8;

/// Inputs of a run's outputs for some taps, the oldest first. Loads are issued together.
template <int Taps, class T, int Width, int Channels>
__device__ void load_window(const RunPiece<T, Width>& piece, Index run_begin, int newest_tap,
                            Packet<T, Channels> (&window)[run_len + Taps - 1]) {
  const Index oldest = run_begin - newest_tap - (Taps - 1);
  if (oldest >= piece.inputs.begin && piece.last == run_begin + run_len) {
    const T* const from = piece.inputs.x + oldest * piece.inputs.stride;
#pragma unroll
    for (int i = 0; i < run_len + Taps - 1; ++i)
      window[i] = Packet<T, Channels>::load_streamed(from + i * piece.inputs.stride);
  } else {
#pragma unroll
    for (int i = 0; i < run_len + Taps - 1; ++i) {
      const T* const from = oldest + i < piece.last ? piece.inputs[oldest + i] : nullptr;
      window[i] = from ? Packet<T, Channels>::load_streamed(from) : Packet<T, Channels>{};
    }
  }
}

/// Neighbouring threads have neighbouring channels.
template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads, Width <= 8 ? 4 : 0) void short_conv_over_channels(
    const __grid_constant__ ShortConvCall<T> call) {
  constexpr int channels = run_channels<T, Width, Vectors>, oldest = oldest_taps<Width>;
  auto* const shared_taps = arch::dynamic_shared<float>();
  const ShortConvArgs<T>& args = call.args;
  const auto place = call.grid.place();
  const int column = call.grid.column(), block_channels = channels << call.grid.across_log2;
  const SharedTaps<Width> all_taps{shared_taps, block_channels};
  const Index block_channel = Index(place.channel_block) * block_channels, channel = block_channel + column * channels;
  const Index run = Index(place.run_block) * (short_conv_threads >> call.grid.across_log2) + call.grid.row();
  const Index run_begin = run * run_len, run_end = min(run_begin + run_len, args.x.extents[1]);
  const bool active = channel < args.x.extents[2] && run_begin < run_end;

  // Loads are under way while the taps are staged.
  Packet<T, channels> window[run_len + oldest - 1];
  RunPiece<T, Width> piece;
  if (active) {
    piece = RunPiece<T, Width>(args, place.batch, channel, run_begin, run_end);
    load_window<oldest>(piece, run_begin, Width - oldest, window);
  }
  all_taps.stage(args.taps, args.bias, block_channel, threadIdx.x, short_conv_threads);
  __syncthreads();
  if (!active) return;

  while (true) {
    float sums[run_len][channels];
#pragma unroll
    for (int row = 0; row < run_len; ++row) all_taps.read_bias(column * channels, sums[row]);
    {
      float taps[oldest][channels];
      all_taps.read(Width - oldest, column * channels, taps);
      add_taps<oldest, run_len>(taps, window, sums);
    }
#pragma unroll 1
    for (int newest = Width - oldest - taps_together; newest >= 0; newest -= taps_together) {
      Packet<T, channels> next[run_len + taps_together - 1];
      float taps[taps_together][channels];
      load_window<taps_together>(piece, run_begin, newest, next);
      all_taps.read(newest, column * channels, taps);
      add_taps<taps_together, run_len>(taps, next, sums);
    }
    T* y = &args.y(place.batch, run_begin, channel);
    const int first_row = int(piece.first - run_begin), end_row = int(piece.last - run_begin);
#pragma unroll
    for (int row = 0; row < run_len; ++row) {
#pragma unroll
      for (int c = 0; c < channels; ++c) sums[row][c] = activated<A, T>(sums[row][c]);
      const auto outputs = Packet<T, channels>::rounded(sums[row]);
      if (row >= first_row && row < end_row) outputs.store_streamed(y);
      y = arch::made_anew(y + args.y.strides[1]);
    }
    if (piece.last >= run_end) return;
    piece = RunPiece<T, Width>(args, place.batch, channel, piece.last, run_end);
    load_window<oldest>(piece, run_begin, Width - oldest, window);
  }
}

/// Tokens that 16 bytes hold, and how many runs of them a thread has: of one channel, each a row of threads further.
template <class T>
inline constexpr int vector_tokens = 16 / int(sizeof(T));
template <class T, int Width>
inline constexpr int runs_together = Width <= 8 ? 32 / vector_tokens<T> : 1;

/// The outputs of a run of a channel that does not lie in one sequence, or not in vectors.
template <Activation A, class T, int Width>
__device__ void write_run_by_elements(const ShortConvArgs<T>& args, const float (&taps)[Width], float bias, Index batch,
                                      Index channel, Index begin) {
  constexpr int tokens = vector_tokens<T>, history = Width - 1;
  const Index end = min(begin + tokens, args.x.extents[1]);
  for (Index first = begin; first < end;) {
    const RunPiece<T, Width> piece(args, batch, channel, first, end);
    float inputs[history + tokens], outputs[tokens];
#pragma unroll
    for (int i = 0; i < history + tokens; ++i) {
      const T* const from = begin - history + i < piece.last ? piece.inputs[begin - history + i] : nullptr;
      inputs[i] = from ? float(*from) : 0.f;
    }
    short_conv_run<A, T>(taps, bias, inputs, outputs);
#pragma unroll
    for (int t = 0; t < tokens; ++t)
      if (begin + t >= first && begin + t < piece.last) args.y(batch, begin + t, channel) = T(outputs[t]);
    first = piece.last;
  }
}

/// Widens vectors of which the last ones are a run's own and those before them reach over its history.
template <class T, int Inputs, int Vectors>
__device__ void widen_run(const Packet<T, vector_tokens<T>> (&vectors)[Vectors], float (&inputs)[Inputs]) {
  constexpr int tokens = vector_tokens<T>;
  float wide[Vectors * tokens];
#pragma unroll
  for (int v = 0; v < Vectors; ++v) {
    float part[tokens];
    vectors[v].widen(part);
#pragma unroll
    for (int t = 0; t < tokens; ++t) wide[v * tokens + t] = part[t];
  }
#pragma unroll
  for (int i = 0; i < Inputs; ++i) inputs[i] = wide[Vectors * tokens - Inputs + i];
}

/// Where the history of a run reaches over its sequence's beginning.
template <class T, int Width, int Inputs>
__device__ void read_history(const SequenceInputs<T, Width>& source, Index token, float (&inputs)[Inputs]) {
#pragma unroll
  for (int i = 0; i < Width - 1; ++i) {
    const T* const from = source[token - (Width - 1) + i];
    inputs[i] = from ? float(*from) : 0.f;
  }
}

/// Neighbouring threads have neighbouring runs of tokens.
template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads,
                             Width > 8 ? 0
                             : sizeof(T) == 4
                                 ? 4
                                 : 6) void short_conv_over_tokens(const __grid_constant__ ShortConvCall<T> call) {
  constexpr int runs = runs_together<T, Width>, tokens = vector_tokens<T>, history = Width - 1;
  constexpr int vectors = (history + tokens - 1) / tokens + 1;
  const ShortConvArgs<T>& args = call.args;
  const auto place = call.grid.place();
  const Index channel = Index(place.channel_block) * (short_conv_threads >> call.grid.across_log2) + call.grid.row();
  const int step = tokens << call.grid.across_log2;
  const Index begin = Index(place.run_block) * step * runs + call.grid.column() * tokens;
  if (channel >= args.x.extents[2] || begin >= args.x.extents[1]) return;
  // Tokens counted from the thread's first; beyond its last run they do not matter.
  const int tokens_left = int(min(args.x.extents[1] - begin, Index(step) * runs));

  Packet<T, tokens> windows[runs][vectors];
  unsigned whole = 0, near = 0;  // runs inside one sequence; those of them whose history reaches over its beginning
  if constexpr (Vectors) {
    const T* x = &args.x(place.batch, begin, channel);
#pragma unroll
    for (int i = 0; i < runs; ++i) {
      bool inside = i * step + tokens <= tokens_left, reaches = begin < history && i * step + int(begin) < history;
      if (args.cu_seqlens.present() && inside) {
        const SequenceTokens sequence = sequence_with(sequences_of(args), place.batch, begin + i * step);
        inside = begin + i * step + tokens <= sequence.end, reaches = begin + i * step - history < sequence.begin;
      }
      whole |= unsigned(inside) << i, near |= unsigned(reaches) << i;
#pragma unroll
      for (int v = 0; v < vectors; ++v)
        if (inside && (v == vectors - 1 || !reaches))
          windows[i][v] = Packet<T, tokens>::load_streamed(x + (v + 1 - vectors) * tokens);
      x += step;
    }
  }
  float taps[Width];
#pragma unroll
  for (int j = 0; j < Width; ++j) taps[j] = activation_scale<A, T> * args.taps(channel, j);
  const float bias = args.bias.present() ? activation_scale<A, T> * args.bias(channel) : 0.f;
  T* y = &args.y(place.batch, begin, channel);
#pragma unroll
  for (int i = 0; i < runs; ++i) {
    if (whole >> i & 1) {
      float inputs[history + tokens], outputs[tokens];
      widen_run<T>(windows[i], inputs);
      if (near >> i & 1) {
        const SequenceTokens sequence = sequence_with(sequences_of(args), place.batch, begin + i * step);
        read_history(inputs_of<Width>(args, sequence, place.batch, channel), begin + i * step, inputs);
      }
      short_conv_run<A, T>(taps, bias, inputs, outputs);
      Packet<T, tokens>::rounded(outputs).store_streamed(y);
    }
    y += step * (Vectors ? 1 : args.y.strides[1]);
  }
#pragma unroll 1
  for (int i = 0; i < runs && i * step < tokens_left; ++i)
    if (!(whole >> i & 1)) write_run_by_elements<A>(args, taps, bias, place.batch, channel, begin + i * step);
}

/// The last Width - 1 inputs of each sequence, oldest first. A thread has one channel of one sequence, and reads all
/// before it writes: the initial state's memory may be the same.
template <class T, int Width>
__global__ __launch_bounds__(short_conv_threads) void write_final_states(
    const __grid_constant__ ShortConvArgs<T> args) {
  constexpr int rows = Width - 1;
  const Index element = Index(blockIdx.x) * short_conv_threads + threadIdx.x;
  const Index sequence = element / args.x.extents[2], channel = element % args.x.extents[2];
  if (sequence >= sequences_of(args).size()) return;
  const SequenceTokens tokens = tokens_of_sequence(sequences_of(args), sequence);
  const Index batch = args.cu_seqlens.present() ? 0 : sequence;
  const auto inputs = inputs_of<Width>(args, tokens, batch, channel);
  const StateRing<T, Width> after(args.final_state, args.state_slots, sequence, channel, 0);
  T kept[rows];
#pragma unroll
  for (int s = 0; s < rows; ++s) {
    const T* const from = inputs[tokens.end - rows + s];
    kept[s] = from ? *from : T(0.f);
  }
  if (!after.present()) return;
#pragma unroll
  for (int s = 0; s < rows; ++s) *after.row(s) = kept[s];
}

}  // namespace chela::cuda::detail
