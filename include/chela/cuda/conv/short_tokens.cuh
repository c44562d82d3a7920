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
    constexpr int own = Row::own;
    constexpr bool from_memory = Way == RowWay::runs;
    const bool whole_row = x.tokens == Row::points;
    const auto first_of = [&](int a, int b) { return Row::residues * (16 * a + b) + row.first_residue(); };

    // From global memory all are asked for before any is needed.
    Earlier<Row> earlier[from_memory ? 8 : 1];
    if constexpr (from_memory) {
      const int first_run = first_of(2 * LanePlace(row.lane()).column, LanePlace(row.lane()).group);
      const T* const from = arch::made_anew(x.row(batch, channel) + first_run);
      const auto take = [&](auto unchecked) {
        for_input_runs(row.lane(), [&](int i, int a, int b) {
          take_earlier(earlier[i], i == 0, first_of(a, b), batch, channel, [&](int n) {
            const bool inside = decltype(unchecked)::value || n < x.tokens;
            return inside ? Earlier<Row>::Words::load_streamed(from + (n - first_run)) : typename Earlier<Row>::Words{};
          });
        });
      };
      if (whole_row)
        take(std::true_type{});
      else
        take(std::false_type{});
    }
    float weights[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) weights[j] = activation_scale<A, T> * taps(channel, j);
    const float offset = bias.present() ? activation_scale<A, T> * bias(channel) : 0.f;
    for_input_runs(row.lane(), [&](int i, int a, int b) {
      Earlier<Row>& before = earlier[from_memory ? i : 0];
      const int first = first_of(a, b);
      if constexpr (!from_memory)
        take_earlier(before, i == 0, first, batch, channel, [&](int n) {
          const int place = place_before<Row>(row.first_residue(), a, b, first - n);
          return Earlier<Row>::Words::load(reinterpret_cast<const T*>(staged + place));
        });
      float inputs[history + own], outputs[own];
      before.widen(inputs);
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
    if (whole_row) return;
    for_input_runs(row.lane(), [&](int i, int a, int b) {
#pragma unroll
      for (int e = 0; e < own; ++e)
        if (first_of(a, b) + (from_memory ? 0 : e) >= x.tokens) words[i][e / 2] &= e % 2 ? 0x0000ffffu : 0xffff0000u;
    });
  }

 private:
  /// The tokens before a run, in packets that lie in one unit, and wholly before the row or not at all.
  template <class Row>
  struct Earlier {
    static constexpr int alignment = alignment_of(Row::warps == 1 ? Row::residues : Row::own, 8);
    static constexpr int each = history > 2 && alignment >= 4 ? 4 : history > 1 && alignment >= 2 ? 2 : 1;
    static constexpr int packets = (history + each - 1) / each, count = packets * each;
    using Words = Packet<T, each>;
    Words words[packets > 0 ? packets : 1];

    /// The last ones, as many as the taps meet.
    template <int Inputs>
    __device__ __forceinline__ void widen(float (&inputs)[Inputs]) const {
#pragma unroll
      for (int k = 0; k < packets; ++k) {
        float values[each];
        words[k].widen(values);
#pragma unroll
        for (int e = 0; e < each; ++e)
          if (k * each + e >= count - history) inputs[k * each + e - (count - history)] = values[e];
      }
    }
  };

  /// Those before token `first`, of which load(n) gives a packet from token n on; only runs that may be the row's first
  /// reach back over its beginning.
  template <class Row, class Load>
  __device__ __forceinline__ void take_earlier(Earlier<Row>& earlier, bool may_be_first, int first, int batch,
                                               int channel, const Load& load) const {
    constexpr int each = Earlier<Row>::each;
#pragma unroll
    for (int k = 0; k < Earlier<Row>::packets; ++k) {
      const int n = first - Earlier<Row>::count + k * each;
      if (may_be_first && n < 0)
        earlier.words[k] = of_state<each>(batch, channel, n);
      else
        earlier.words[k] = load(n);
    }
  }

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
