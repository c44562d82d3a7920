#pragma once
// The short convolution and its activation on the way of a row's tokens to the registers of a transform: what a long
// convolution reads is then never in memory. It is rounded to the tokens' type as the short convolution rounds its
// outputs, so that both stages one after the other give the same bits.
#include "chela/cuda/conv/half_convolution.cuh"
#include "chela/cuda/conv/short_values.cuh"

namespace chela::cuda::detail {

/// Wider ones reach back further than the shortest aligned run.
inline constexpr int most_fused_width = 8;

/// The largest power of two that divides x, up to `most`.
CHELA_HOST_DEVICE constexpr int alignment_of(int x, int most) {
  int power = 1;
  while (power < most && x % (2 * power) == 0) power *= 2;
  return power;
}

/// A source of rows' tokens, as StoredTokens.
template <class T, int Width, Activation A>
struct ShortConvTokens {
  static_assert(Width >= 1 && Width <= most_fused_width);
  static constexpr int history = Width - 1;

  TensorView<const float, 2> taps = {};       ///< [channel, width]
  TensorView<const float, 1> bias = {};       ///< [channel], or absent
  TensorView<const T, 3> initial_state = {};  ///< [batch, width - 1, channel], oldest first, or absent

  template <class Row, RowWay Way>
  __device__ __forceinline__ void finish(const Row& row, const TokenRows<const T>& x, int batch, int channel,
                                         const char* staged, RowWords<Row::own>& words) const {
    constexpr int own = Row::own, residues = Row::residues;
    // Tokens before a run come in packets that lie in one unit, and wholly before the row or not at all.
    constexpr int alignment = alignment_of(Row::warps == 1 ? residues : own, 8);
    constexpr int each = history > 2 && alignment >= 4 ? 4 : history > 1 && alignment >= 2 ? 2 : 1;
    constexpr int packets = (history + each - 1) / each, before = packets * each;
    const T* const tokens = x.row(batch, channel);
    const auto first_of = [&](int a, int b) { return residues * (16 * a + b) + row.first_residue(); };
    const int first_run = residues * (32 * LanePlace(row.lane()).column + LanePlace(row.lane()).group);
    const T* const from = arch::made_anew(tokens + first_run);

    Packet<T, each> earlier[8][packets > 0 ? packets : 1];
    for_input_runs(row.lane(), [&](int i, int a, int b) {
#pragma unroll
      for (int k = 0; k < packets; ++k) {
        const int n = first_of(a, b) - before + k * each;
        if (i == 0 && n < 0)
          earlier[i][k] = of_state<each>(batch, channel, n);
        else if constexpr (Way == RowWay::runs)
          earlier[i][k] = n < x.tokens ? Packet<T, each>::load_streamed(from + (n - first_run)) : Packet<T, each>{};
        else
          earlier[i][k] = Packet<T, each>::load(
              reinterpret_cast<const T*>(staged + place_before<Row>(row.first_residue(), a, b, before - k * each)));
      }
    });
    float weights[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) weights[j] = activation_scale<A, T> * taps(channel, j);
    const float offset = bias.present() ? activation_scale<A, T> * bias(channel) : 0.f;
    for_input_runs(row.lane(), [&](int i, int a, int b) {
      float inputs[history + own], outputs[own];
#pragma unroll
      for (int k = 0; k < packets; ++k) {
        float values[each];
        earlier[i][k].widen(values);
#pragma unroll
        for (int e = 0; e < each; ++e)
          if (k * each + e >= before - history) inputs[k * each + e - (before - history)] = values[e];
      }
#pragma unroll
      for (int e = 0; e < own; ++e) {
        const float2 pair = arch::unpack<T>(words[i][e / 2]);
        inputs[history + e] = e % 2 ? pair.y : pair.x;
      }
      short_conv_run<A, T>(weights, offset, inputs, outputs);
#pragma unroll
      for (int e = 0; e < own; e += 2)
        words[i][e / 2] = arch::pack<T>(outputs[e], e + 1 < own ? outputs[e + 1 < own ? e + 1 : e] : 0.f);
    });
    if (x.tokens == Row::points) return;
    for_input_runs(row.lane(), [&](int i, int a, int b) {
#pragma unroll
      for (int e = 0; e < own; ++e)
        if (first_of(a, b) + (Way == RowWay::runs ? 0 : e) >= x.tokens)
          words[i][e / 2] &= e % 2 ? 0x0000ffffu : 0xffff0000u;
    });
  }

 private:
  /// Where the token is staged that lies `offset` before residue c of run a, b.
  template <class Row>
  __device__ __forceinline__ static int place_before(int c, int a, int b, int offset) {
    using Layout = StagedInput<Row::residues>;
    if constexpr (Row::residues < most_fused_width) {
      return Layout::point(Row::residues * (16 * a + b) + c - offset);
    } else {
      const bool earlier_run = c < offset;
      return Layout::point(earlier_run && b == 0 ? a - 1 : a, earlier_run ? (b + 15) % 16 : b,
                           c - offset + (earlier_run ? Row::residues : 0));
    }
  }
  /// Tokens from the negative `first` on.
  template <int Count>
  __device__ Packet<T, Count> of_state(int batch, int channel, int first) const {
    float values[Count] = {};
    if (initial_state.present())
#pragma unroll
      for (int e = 0; e < Count; ++e)
        if (first + e + history >= 0) values[e] = float(initial_state(batch, first + e + history, channel));
    return Packet<T, Count>::rounded(values);
  }
};

}  // namespace chela::cuda::detail
