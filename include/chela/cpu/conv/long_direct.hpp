#pragma once
// The sums of the long convolution themselves, one packet of channels at a time: least work for short kernels and short
// sequences, and the same answer as the transforms. Lag q of a kernel with M taps ahead is lag q - M of the
// convolution.
#include <algorithm>

#include "chela/cpu/conv/channel_group.hpp"

namespace chela::cpu::detail {

/// Outputs, or taps in a gradient, whose sums are held in registers together: as many chains as the multipliers need.
inline constexpr Index direct_rows = 8;

/// Tokens that are brought near together.
inline constexpr Index direct_chunk = 512;

/// Rows of zeros on both sides of what sums run over, so that no sum asks where it ends.
inline constexpr Index direct_margin = direct_rows - 1;

/// The lags of a kernel, from -back to taps - 1, and what the sums take in memory.
struct KernelLags {
  Index taps = 0, back = 0;

  constexpr Index lags() const { return taps + back; }
  /// Of the same kernel run backwards.
  constexpr KernelLags reversed() const { return {back + 1, taps - 1}; }
  /// Packets it takes in memory.
  constexpr Index rows() const { return lags() + 2 * direct_margin; }
  /// Packets of inputs that a chunk of outputs meets.
  constexpr Index chunk_rows() const { return direct_chunk + lags() + 2 * direct_margin; }
};

template <class A>
void stage_direct_kernel(KernelLags k, TensorView<const A, 2> taps, TensorView<const A, 2> back_taps,
                         ChannelGroup group, A* to) {
  constexpr int lanes = lanes_of<A>;
  std::fill_n(to, k.rows() * lanes, A(0));
  to += direct_margin * lanes;
  if (k.back > 0) gather_group<A>(chela::reversed(run(transposed(back_taps, 0, 1), 0, 0, k.back), 0), group, to, lanes);
  gather_group<A>(run(transposed(taps, 0, 1), 0, 0, k.taps), group, to + k.back * lanes, lanes);
}

/// Packets of the rows from `begin` on, `count` of them; row t < 0 is in `history`, whose last row is -1, and rows that
/// are nowhere are zero.
template <class A, class T>
void stage_rows(TensorView<const T, 2> rows, TensorView<const T, 2> history, ChannelGroup group, Index begin,
                Index count, A* to) {
  constexpr int lanes = lanes_of<A>;
  const Index known = history.extents[0], end = begin + count;
  const auto part = [&](TensorView<const T, 2> from, Index first, Index from_row, Index to_row) {
    const Index low = std::max(begin, from_row), high = std::min(end, to_row);
    if (low < high) gather_group<A>(run(from, 0, low - first, high - low), group, to + (low - begin) * lanes, lanes);
  };
  const Index low = std::clamp(-known, begin, end), high = std::clamp(rows.extents[0], begin, end);
  std::fill_n(to, (low - begin) * lanes, A(0));
  std::fill_n(to + (high - begin) * lanes, (end - high) * lanes, A(0));
  part(history, -known, -known, 0);
  part(rows, 0, 0, rows.extents[0]);
}

/// What input row s adds to the outputs from `first` to `last`.
template <class A>
CHELA_ALWAYS_INLINE void meet_outputs(const A* inputs, const A* kernel, Index s, Index first, Index last,
                                      LanePacket<A>* sums) {
  using namespace Eigen::internal;
  constexpr int lanes = lanes_of<A>;
  const LanePacket<A> x = ploadu<LanePacket<A>>(inputs + s * lanes);
  CHELA_UNROLL
  for (Index i = 0; i < direct_rows; ++i)
    if (i >= first && i < last) sums[i] = pmadd(x, ploadu<LanePacket<A>>(kernel + (i - s) * lanes), sums[i]);
}

/// The sums at `direct_rows` outputs over the inputs from row `begin` to `end`: row 0 of `inputs` is what the first
/// output meets at the kernel's last lag, and `kernel` the packet of that lag. Each input meets the outputs at
/// neighbouring lags; the first and the last few only those that the kernel reaches, as a zero instead would spread a
/// NaN to outputs before it.
template <class A>
CHELA_ALWAYS_INLINE void direct_sums(const A* inputs, const A* kernel, Index lags, Index begin, Index end,
                                     LanePacket<A>* sums) {
  if (lags < direct_rows) {
    for (Index s = begin; s < end; ++s) meet_outputs(inputs, kernel, s, s - lags + 1, s + 1, sums);
    return;
  }
  CHELA_UNROLL
  for (Index s = 0; s < direct_margin; ++s)
    if (s >= begin && s < end) meet_outputs(inputs, kernel, s, 0, s + 1, sums);
  for (Index s = std::max(begin, direct_margin); s < std::min(end, lags); ++s)
    meet_outputs(inputs, kernel, s, 0, direct_rows, sums);
  CHELA_UNROLL
  for (Index r = 0; r < direct_margin; ++r)
    if (lags + r >= begin && lags + r < end) meet_outputs(inputs, kernel, lags + r, r + 1, direct_rows, sums);
}

/// Rows of inputs, from `begin` to `end`.
struct InputRows {
  Index begin = 0, end = 0;
};

/// Calls `put(begin, packets, count)` with outputs `begin` to `end`, chunk by chunk, of a sequence with these inputs,
/// which `stage(begin, count, to)` brings, zeros where there are none; `kernel` is in the lags' order. `buffer`:
/// chunk_rows() + direct_chunk packets.
template <class A, class Stage, class Put>
void direct_convolve(KernelLags k, const A* kernel, const LanePacket<A>& skip, InputRows inputs, Index begin, Index end,
                     const Stage& stage, const Put& put, A* buffer) {
  using namespace Eigen::internal;
  constexpr int lanes = lanes_of<A>;
  A* const out = buffer + k.chunk_rows() * lanes;
  const A* const last_lag = kernel + (direct_margin + k.lags() - 1) * lanes;
  for (Index t0 = begin; t0 < end; t0 += direct_chunk) {
    const Index count = std::min(direct_chunk, end - t0), before = k.taps - 1;
    stage(t0 - before, before + count + k.back + direct_margin, buffer);
    for (Index t = 0; t < count; t += direct_rows) {
      LanePacket<A> sums[direct_rows];
      CHELA_UNROLL
      for (Index i = 0; i < direct_rows; ++i)
        sums[i] = pmul(skip, ploadu<LanePacket<A>>(buffer + (before + t + i) * lanes));
      const Index first = t0 + t - before;  // the row that meets the first output at the last lag
      direct_sums<A>(buffer + t * lanes, last_lag, k.lags(), std::max<Index>(inputs.begin - first, 0),
                     std::min(inputs.end - first, k.lags() + direct_margin), sums);
      CHELA_UNROLL
      for (Index i = 0; i < direct_rows; ++i) pstoreu(out + (t + i) * lanes, sums[i]);
    }
    put(t0, out, count);
  }
}

/// sums[q] += sum_t g[t] x[t - lag q] over a chunk of `count` outputs; `inputs` begin taps - 1 + direct_margin rows
/// before the first output's. `sums` has room for direct_margin packets more than there are lags.
template <class A>
void direct_correlate(KernelLags k, const A* inputs, const A* grads, Index count, A* sums) {
  using namespace Eigen::internal;
  constexpr int lanes = lanes_of<A>;
  for (Index q = 0; q < k.lags(); q += direct_rows) {
    LanePacket<A> sum[direct_rows];
    CHELA_UNROLL
    for (Index i = 0; i < direct_rows; ++i) sum[i] = ploadu<LanePacket<A>>(sums + (q + i) * lanes);
    const A* at = inputs + (direct_margin + k.lags() - 1 - q) * lanes;
    for (Index t = 0; t < count; ++t) {
      const LanePacket<A> g = ploadu<LanePacket<A>>(grads + t * lanes);
      CHELA_UNROLL
      for (Index i = 0; i < direct_rows; ++i) sum[i] = pmadd(g, ploadu<LanePacket<A>>(at + (t - i) * lanes), sum[i]);
    }
    CHELA_UNROLL
    for (Index i = 0; i < direct_rows; ++i) pstoreu(sums + (q + i) * lanes, sum[i]);
  }
}

}  // namespace chela::cpu::detail
