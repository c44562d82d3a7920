#pragma once
// The host's side of the short convolution: how the work is cut, and whether elements can move in vectors.
#include <concepts>

#include "chela/cuda/conv/short_gradient_rows.cuh"
#include "chela/cuda/conv/short_gradient_tiles.cuh"
#include "chela/cuda/conv/short_gradient_walk.cuh"
#include "chela/cuda/conv/short_step_kernel.cuh"
#include "chela/cuda/device.cuh"

namespace chela::cuda::detail {

template <class T>
concept ShortConvElement = std::same_as<T, float> || HalfElement<T>;

/// Whether `together` neighbours along an axis always are one aligned vector, or the view is absent. Along `whole` axes
/// their number is a multiple, too.
template <class T, int Rank>
bool moves_in_vectors(TensorView<T, Rank> view, int axis, int together, bool whole = true) {
  bool fits = view.strides[axis] == 1 && (!whole || view.extents[axis] % together == 0) &&
              reinterpret_cast<std::uintptr_t>(view.data) % (together * sizeof(T)) == 0;
  for (int other = 0; other < Rank; ++other)
    if (other != axis && view.extents[other] > 1) fits = fits && view.strides[other] % together == 0;
  return fits || !view.present() || view.size() == 0;
}

/// Whether the neighbours in memory are tokens.
template <class T>
bool tokens_are_neighbours(TensorView<T, 3> x) {
  const auto distance = [&](int axis) { return x.strides[axis] < 0 ? -x.strides[axis] : x.strides[axis]; };
  return x.extents[1] > 1 && (x.extents[2] == 1 || distance(1) < distance(2));
}

/// The logarithm of the smallest power of two that is at least `count`, and at most `most`.
constexpr int log2_across(Index count, int most) {
  int log2 = 0;
  while (1 << log2 < most && 1 << log2 < count) ++log2;
  return log2;
}

constexpr Status check_short_conv_blocks(Index blocks) {
  return require(blocks < Index(1) << 31, Code::unsupported,
                 "x has more elements than one launch of the short convolution can take; call in pieces");
}

/// Cuts channels by runs by batch entries, in blocks of so many.
inline Status cut_in_blocks(Index channels, Index block_channels, Index runs, Index block_runs, Index batch,
                            ShortConvGrid& grid, unsigned& blocks) {
  const Index channel_blocks = ceil_div(channels, block_channels), run_blocks = ceil_div(runs, block_runs);
  if (Status s = check_short_conv_blocks(channel_blocks * run_blocks * batch); !s.ok()) return s;
  grid.channel_blocks = FixedDivisor(unsigned(channel_blocks)), grid.run_blocks = FixedDivisor(unsigned(run_blocks));
  blocks = unsigned(channel_blocks * run_blocks * batch);
  return {};
}
/// With up to a warp across channels, in units of a thread's, and the other threads along runs.
inline Status cut_by_channels(Index channel_units, Index runs, Index batch, ShortConvGrid& grid, unsigned& blocks) {
  grid.across_log2 = log2_across(channel_units, 32);
  return cut_in_blocks(channel_units, grid.across(), runs, short_conv_threads / grid.across(), batch, grid, blocks);
}
/// With up to all threads across runs, in units of a thread's, and the others along channels.
inline Status cut_by_runs(Index run_units, Index channels, Index batch, ShortConvGrid& grid, unsigned& blocks) {
  grid.across_log2 = log2_across(run_units, short_conv_threads);
  return cut_in_blocks(channels, short_conv_threads / grid.across(), run_units, grid.across(), batch, grid, blocks);
}

template <int Width, Activation A, class T>
Status launch_short_conv(const ShortConvArgs<T>& args, cudaStream_t stream) {
  ShortConvCall<T> call{args, {}};
  const Index batch = args.x.extents[0], tokens = args.x.extents[1], channels = args.x.extents[2];
  unsigned blocks = 0;
  if (tokens_are_neighbours(args.x)) {
    constexpr int unit = vector_tokens<T>;
    const bool vectors = moves_in_vectors(args.x, 1, unit, false) && moves_in_vectors(args.y, 1, unit, false);
    if (Status s = cut_by_runs(ceil_div(tokens, unit * runs_together<T, Width>), channels, batch, call.grid, blocks);
        !s.ok())
      return s;
    return launch(vectors ? short_conv_over_tokens<T, Width, A, true> : short_conv_over_tokens<T, Width, A, false>,
                  dim3(blocks), short_conv_threads, 0, stream, call);
  }
  const auto by_channels = [&]<bool Vectors>(std::bool_constant<Vectors>) {
    constexpr int unit = run_channels<T, Width, Vectors>;
    if (Status s = cut_by_channels(ceil_div(channels, unit), ceil_div(tokens, run_len), batch, call.grid, blocks);
        !s.ok())
      return s;
    return launch(short_conv_over_channels<T, Width, A, Vectors>, dim3(blocks), short_conv_threads,
                  SharedTaps<Width>::bytes(call.grid.across() * unit), stream, call);
  };
  constexpr int unit = run_channels<T, Width, true>;
  const bool vectors = moves_in_vectors(args.x, 2, unit) && moves_in_vectors(args.y, 2, unit) &&
                       moves_in_vectors(args.initial_state, 2, unit);
  return vectors ? by_channels(std::true_type{}) : by_channels(std::false_type{});
}

template <int Width, class T>
Status launch_final_states(const ShortConvArgs<T>& args, cudaStream_t stream) {
  const Index blocks = ceil_div(sequences_of(args).size() * args.x.extents[2], short_conv_threads);
  if (Status s = check_short_conv_blocks(blocks); !s.ok() || blocks == 0) return s;
  return launch(write_final_states<T, Width>, dim3(unsigned(blocks)), short_conv_threads, 0, stream, args);
}

template <int Width, Activation A, class T>
Status launch_short_conv_step(const ShortConvStepArgs<T>& args, cudaStream_t stream) {
  ShortConvStepCall<T> call{args, {}};
  const auto run = [&]<bool Vectors>(std::bool_constant<Vectors>) {
    constexpr int unit = run_channels<T, Width, Vectors>;
    unsigned blocks = 0;
    if (Status s = cut_by_channels(ceil_div(args.x.extents[1], unit), ceil_div(args.x.extents[0], sequences_together),
                                   1, call.grid, blocks);
        !s.ok())
      return s;
    return launch_early(short_conv_step_kernel<T, Width, A, Vectors>, dim3(blocks), short_conv_threads,
                        SharedTaps<Width>::bytes(call.grid.across() * unit), stream, call);
  };
  constexpr int unit = run_channels<T, Width, true>;
  const bool vectors =
      moves_in_vectors(args.x, 1, unit) && moves_in_vectors(args.y, 1, unit) && moves_in_vectors(args.state, 2, unit);
  return vectors ? run(std::true_type{}) : run(std::false_type{});
}

/// Parts are at most so many.
template <class T>
Index most_parts(const ShortConvBackwardArgs<T>& args) {
  if (!args.grad_taps.present() && !args.grad_bias.present()) return 0;
  return args.x.extents[0] * ceil_div(args.x.extents[1], part_tokens);
}
template <class T>
std::size_t part_bytes(const ShortConvBackwardArgs<T>& args) {
  return std::size_t(most_parts(args) * (args.taps.extents[1] + 1) * args.x.extents[2]) * sizeof(float);
}

/// The kernel that walks over tokens; `parts` is how many it leaves.
template <int Width, Activation A, class T>
Status launch_gradient_walk(ShortConvGradientCall<T>& call, Index& parts, cudaStream_t stream) {
  const ShortConvBackwardArgs<T>& args = call.args;
  const Index batch = args.x.extents[0], tokens = args.x.extents[1], channels = args.x.extents[2];
  unsigned blocks = 0;
  call.tokens_are_neighbours = tokens_are_neighbours(args.x);
  const auto launch_cut = [&](auto kernel, int threads, int shared_bytes) {
    parts = batch * call.grid.run_blocks.value();
    return launch_early(kernel, dim3(blocks), threads, shared_bytes, stream, call);
  };
  if constexpr (Width <= taps_together) {
    if (call.tokens_are_neighbours) {
      constexpr int unit = vector_tokens<T>;
      const bool vectors = moves_in_vectors(args.x, 1, unit, false) && moves_in_vectors(args.grad_y, 1, unit, false) &&
                           moves_in_vectors(args.grad_x, 1, unit, false);
      if (Status s = cut_in_blocks(channels, short_conv_threads / 32, ceil_div(tokens, gradient_row_len<T>), 1, batch,
                                   call.grid, blocks);
          !s.ok())
        return s;
      return launch_cut(
          vectors ? short_conv_gradient_rows<T, Width, A, true> : short_conv_gradient_rows<T, Width, A, false>,
          short_conv_threads, 0);
    }
  }
  const auto walk = [&]<bool Vectors>(std::bool_constant<Vectors>) {
    constexpr int unit = walk_channels<T, Width, Vectors>;
    if (Status s = cut_by_channels(ceil_div(channels, unit), ceil_div(tokens, gradient_walk_len<Width>), batch,
                                   call.grid, blocks);
        !s.ok())
      return s;
    return launch_cut(short_conv_gradient_walk<T, Width, A, Vectors>, short_conv_threads,
                      walk_shared_bytes<T, Width, Vectors>(call.grid.across()));
  };
  if constexpr (Width <= widest_walk) {
    constexpr int unit = walk_channels<T, Width, true>;
    const bool vectors = moves_in_vectors(args.x, 2, unit) && moves_in_vectors(args.grad_y, 2, unit) &&
                         moves_in_vectors(args.grad_x, 2, unit) && moves_in_vectors(args.initial_state, 2, unit) &&
                         moves_in_vectors(args.grad_final_state, 2, unit) &&
                         moves_in_vectors(args.grad_initial_state, 2, unit);
    if (!call.tokens_are_neighbours) return vectors ? walk(std::true_type{}) : walk(std::false_type{});
  }
  if constexpr (Width > taps_together) {
    if (Status s = cut_in_blocks(channels, gradient_tile_channels, tokens, gradient_tile_tokens * tiles_together, batch,
                                 call.grid, blocks);
        !s.ok())
      return s;
    return launch_cut(short_conv_gradient_tiles<T, Width, A>, gradient_tile_threads, GradientTile<Width>::bytes);
  }
  return {};
}

template <int Width, Activation A, class T>
Status launch_short_conv_gradients(const ShortConvBackwardArgs<T>& args, float* workspace, cudaStream_t stream) {
  const bool sums = args.grad_taps.present() || args.grad_bias.present();
  const Index channels = args.x.extents[2], sequences = sequences_of(args).size();
  if (channels == 0) return {};
  ShortConvGradientCall<T> call{args, {}, sums ? workspace : nullptr};
  Index parts = 0;
  if (args.x.size() > 0 && sequences > 0)
    if (Status s = launch_gradient_walk<Width, A>(call, parts, stream); !s.ok()) return s;
  if (sums) {
    const PartSums all{call.parts, parts, channels, Width, args.grad_taps, args.grad_bias};
    const Index blocks = (Width + 1) * ceil_div(channels, 32);
    if (Status s = check_short_conv_blocks(blocks); !s.ok()) return s;
    if (Status s = launch_early(sum_parts<>, dim3(unsigned(blocks)), 32 * part_sum_warps, 0, stream, all); !s.ok())
      return s;
  }
  if constexpr (Width > 1) {
    const Index blocks = ceil_div(sequences * channels, short_conv_threads);
    if (Status s = check_short_conv_blocks(blocks); !s.ok()) return s;
    if (args.grad_initial_state.present() && blocks > 0 && (args.cu_seqlens.present() || args.x.extents[1] == 0))
      return launch(pass_through_empty_sequences<T, Width>, dim3(unsigned(blocks)), short_conv_threads, 0, stream,
                    args);
  }
  return {};
}

}  // namespace chela::cuda::detail
