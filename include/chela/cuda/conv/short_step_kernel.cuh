#pragma once
// One token of the short convolution per sequence: a thread has some channels of two sequences. So few bytes move that
// the time between two kernels counts: a step starts while the kernel before it ends, and meanwhile has its inputs
// brought nearer.
#include "chela/cuda/arch/dependent_launch.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/short_forward.cuh"

namespace chela::cuda::detail {

/// Blocks of channels by runs of sequences.
template <class T>
struct ShortConvStepCall {
  ShortConvStepArgs<T> args;
  ShortConvGrid grid;
};

/// The inputs that meet some taps, the oldest first.
template <int Taps, class T, int Width, int Channels>
__device__ void load_step_inputs(const StateRing<T, Width>& ring, const T* x, int newest_tap,
                                 Packet<T, Channels> (&inputs)[Taps]) {
#pragma unroll
  for (int i = 0; i < Taps; ++i) {
    const int tap = newest_tap + Taps - 1 - i;
    if (tap == 0)
      inputs[i] = Packet<T, Channels>::load(x);
    else
      inputs[i] = ring.present() ? Packet<T, Channels>::load(ring.row(Width - 1 - tap)) : Packet<T, Channels>{};
  }
}

/// Sequences of a thread, which share its taps: each a column of threads further.
inline constexpr int sequences_together = 2;

template <class T, int Width, Activation A, bool Vectors>
__global__ __launch_bounds__(short_conv_threads, Width <= 4 ? 5 : 0) void short_conv_step_kernel(
    const __grid_constant__ ShortConvStepCall<T> call) {
  constexpr int channels = run_channels<T, Width, Vectors>, oldest = oldest_taps<Width>;
  auto* const shared_taps = arch::dynamic_shared<float>();
  const ShortConvStepArgs<T>& args = call.args;
  const auto place = call.grid.place();
  const int column = call.grid.column(), block_channels = channels << call.grid.across_log2;
  const SharedTaps<Width> all_taps{shared_taps, block_channels};
  const Index block_channel = Index(place.channel_block) * block_channels, channel = block_channel + column * channels;
  const int rows = short_conv_threads >> call.grid.across_log2;
  const Index first = Index(place.run_block) * rows * sequences_together + call.grid.row();

  const auto active = [&](int i) { return channel < args.x.extents[1] && first + i * rows < args.x.extents[0]; };
  if (!args.state_slots.present()) {  // which may not be read yet
#pragma unroll 1
    for (int i = 0; i < sequences_together; ++i) {
      if (!active(i)) continue;
      arch::bring_nearer(&args.x(first + i * rows, channel));
      const StateRing<T, Width> ring(args.state, {}, first + i * rows, channel, 0);
      for (int s = 0; s < Width - 1 && ring.present(); ++s) arch::bring_nearer(ring.row(s));
    }
  }
  arch::wait_for_last_kernel();
  arch::let_next_kernel_start();

  // Loads are under way while the taps are staged.
  const auto ring_of = [&](Index sequence) {
    return StateRing<T, Width>(args.state, args.state_slots, sequence, channel,
                               steps_of(args.positions, args.position, sequence));
  };
  T* oldest_input[sequences_together] = {};  // which the new one replaces
  Packet<T, channels> inputs[sequences_together][oldest];
#pragma unroll
  for (int i = 0; i < sequences_together; ++i) {
    if (!active(i)) continue;
    const Index sequence = first + i * rows;
    const auto ring = ring_of(sequence);
    load_step_inputs<oldest>(ring, &args.x(sequence, channel), Width - oldest, inputs[i]);
    if (Width > 1 && ring.present()) oldest_input[i] = ring.row(0);
  }
  all_taps.stage(args.taps, args.bias, block_channel, threadIdx.x, short_conv_threads);
  __syncthreads();

  float taps[oldest][channels], bias[channels];
  all_taps.read(Width - oldest, column * channels, taps), all_taps.read_bias(column * channels, bias);
#pragma unroll
  for (int i = 0; i < sequences_together; ++i) {
    if (!active(i)) continue;
    float sums[1][channels];
#pragma unroll
    for (int c = 0; c < channels; ++c) sums[0][c] = bias[c];
    add_taps<oldest, 1>(taps, inputs[i], sums);
    auto newest_input = inputs[i][oldest - 1];
    if constexpr (Width > oldest) {
      const auto ring = ring_of(first + i * rows);
#pragma unroll 1
      for (int newest = Width - oldest - taps_together; newest >= 0; newest -= taps_together) {
        Packet<T, channels> next[taps_together];
        float next_taps[taps_together][channels];
        load_step_inputs<taps_together>(ring, &args.x(first + i * rows, channel), newest, next);
        all_taps.read(newest, column * channels, next_taps);
        add_taps<taps_together, 1>(next_taps, next, sums);
        newest_input = next[taps_together - 1];
      }
    }
    if (oldest_input[i]) newest_input.store(oldest_input[i]);
#pragma unroll
    for (int c = 0; c < channels; ++c) sums[0][c] = activated<A, T>(sums[0][c]);
    Packet<T, channels>::rounded(sums[0]).store(&args.y(first + i * rows, channel));
  }
}

}  // namespace chela::cuda::detail
