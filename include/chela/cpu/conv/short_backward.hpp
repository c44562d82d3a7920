#pragma once
// Gradients of the short convolution. With the slopes da = grad_y activation'(a), the sums a recomputed:
//
//   grad_x[t] = sum_j taps[j] da[t+j]        grad_taps[j] = sum_{b,t} da[t] x[t-j]        grad_bias = sum_{b,t} da[t]
//
// Tokens are walked in order; the gradient of an input follows width - 1 tokens behind, when the last slope it needs is
// known. Inputs before the first token are the initial state's. Sums over batch and tokens are taken per segment, a cut
// that depends on the shape alone, and then over segments in order.
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/short_channels_backward.hpp"
#include "chela/cpu/conv/short_tokens_backward.hpp"

namespace chela::cpu {

namespace detail {

/// Runs of tokens gathered into at most 64 segments.
struct ShortConvSegments {
  static constexpr Index run_len = 512, most = 64;
  TokenRuns runs;
  Index runs_per_segment, size;

  explicit ShortConvSegments(const SequenceBatch& sequences)
      : runs(sequences, run_len),
        runs_per_segment(std::max<Index>(1, ceil_div(runs.size(), most))),
        size(ceil_div(runs.size(), runs_per_segment)) {}

  template <class F>
  void for_each_piece(Index segment, F&& f) const {
    const Index end = std::min(runs.size(), (segment + 1) * runs_per_segment);
    for (Index r = segment * runs_per_segment; r < end; ++r) runs.for_each_piece(r, f);
  }
};

template <int Width, Activation A, class T>
class ShortConvBackward {
  using S = Accumulator<T>;

 public:
  explicit ShortConvBackward(const ShortConvBackwardArgs<T>& args)
      : args_(args),
        segments_(sequences_of(args)),
        channels_(args.x.extents[2]),
        zeros_(args.initial_state.present() ? 0 : channels_),
        sums_(segments_.size, Width + 1, channels_ + row_padding) {}

  void run(const Executor auto& executor) {
    if (args_.x.size() > 0) {
      if (has_adjacent_channels(args_.x) && has_adjacent_channels(args_.grad_y) &&
          has_adjacent_channels(args_.initial_state) && has_adjacent_channels(args_.grad_final_state) &&
          has_adjacent_channels(args_.grad_x) && has_adjacent_channels(args_.grad_initial_state))
        walk_channels(executor);
      else
        walk_tokens(executor);
    }
    sum_segments(executor);
    pass_through_empty_sequences();
  }

 private:
  void walk_channels(const Executor auto& executor) {
    using Gradients = ChannelGradients<Width, A, T>;
    const Index block_len = std::min(channels_, short_conv_block<Width>), blocks = ceil_div(channels_, block_len);
    const HeldTaps<S> taps(args_.taps, args_.bias, short_conv_copies_rows<Width>);
    Tensor<S, 2> scratch(executor.workers(), Gradients::scratch_size(block_len));
    Tensor<T, 2> unread(executor.workers(), block_len + row_padding);
    const bool streamed = args_.grad_x.present() && worth_streaming(args_.grad_x);
    executor.for_each(segments_.size * blocks, [&](Index task, int worker) {
      const Index segment = task / blocks, first = task % blocks * block_len;
      segments_.for_each_piece(segment, Gradients(args_, taps.rows(), zeros_.data(), &unread(worker, 0),
                                                  &scratch(worker, 0), &sums_(segment, 0, 0), sums_.view().strides[1],
                                                  first, std::min(block_len, channels_ - first), streamed));
      if (streamed) finish_streams();
    });
  }

  void walk_tokens(const Executor auto& executor) {
    using Gradients = TokenGradients<Width, A, T>;
    const Index groups = ceil_div(channels_, span_channels);
    Tensor<S, 2> scratch(executor.workers(), Gradients::scratch_size);
    const bool streamed = args_.grad_x.present() && worth_streaming(transposed(args_.grad_x, 1, 2));
    executor.for_each(segments_.size * groups, [&](Index task, int worker) {
      const Index segment = task / groups, first = task % groups * span_channels;
      segments_.for_each_piece(segment, [&](const SequencePiece& piece) {
        Gradients gradients(args_, piece, zeros_.data(), streamed, &scratch(worker, 0));
        for (Index d = first; d < std::min(channels_, first + span_channels); ++d)
          gradients(d, &sums_(segment, 0, d), sums_.view().strides[1]);
      });
      if (streamed) finish_streams();
    });
  }

  void sum_segments(const Executor auto& executor) {
    if (!args_.grad_taps.present() && !args_.grad_bias.present()) return;
    constexpr Index block_len = 1024;
    executor.for_each(ceil_div(channels_, block_len), [&](Index block, int) {
      for (Index j = 0; j <= Width; ++j)
        for (Index d = block * block_len; d < std::min(channels_, (block + 1) * block_len); ++d) {
          S sum = 0;
          for (Index segment = 0; segment < segments_.size; ++segment) sum += sums_(segment, j, d);
          if (j < Width && args_.grad_taps.present()) args_.grad_taps(d, j) = sum;
          if (j == Width && args_.grad_bias.present()) args_.grad_bias(d) = sum;
        }
    });
  }

  /// Without tokens the final state is the initial one.
  void pass_through_empty_sequences() {
    if (!args_.grad_initial_state.present()) return;
    const SequenceBatch sequences = sequences_of(args_);
    for (Index i = 0; i < sequences.size(); ++i)
      for (Index s = 0; s < Width - 1 && sequences[i].count == 0; ++s)
        for (Index d = 0; d < channels_; ++d)
          args_.grad_initial_state(i, s, d) = args_.grad_final_state.present() ? args_.grad_final_state(i, s, d) : T(0);
  }

  const ShortConvBackwardArgs<T>& args_;
  ShortConvSegments segments_;
  Index channels_;
  Tensor<T, 1> zeros_;
  Tensor<S, 3> sums_;  // [segment, width + 1, channel], rows padded to whole packets
};

}  // namespace detail

/// Gradients of `short_conv`, see chela/conv/short.hpp. Scratch: up to 64 copies of the taps, and the slopes of a few
/// tokens per worker.
template <int Width, Activation A = Activation::none, Element T, Executor E = DefaultExecutor>
Status short_conv_backward(const ShortConvBackwardArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_indices(args); !s.ok()) return s;
  detail::ShortConvBackward<Width, A, T>(args).run(executor);
  return {};
}

}  // namespace chela::cpu
