#pragma once
// Decay over one packed tile. With b_t the product of the decays from the tile's first token to t,
//
//   S_t / b_t = S_{t-1} / b_{t-1} + (k_t / b_t) v_t^T        o_t = (S_t / b_t)^T (b_t q_t)
//
// so scaling the packed rows of q by b and of k by 1 / b (or of o and v, for decay along value columns) turns a decayed tile
// into a plain one, and the state takes b of the last token at the end. Nothing cancels, so this is as exact as the plain form
// while b stays in range; a tile that keeps less than exp(least_kept_log) is walked with one more multiplication per state element
// instead, which holds for any decay, a reset to zero included.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

/// What is decayed: rows of the state (its keys), or its columns (in backward passes, where the state is transposed).
enum class DecaySide { none, keys, values };

namespace detail {

/// log(1e-12): below, k / b of inputs up to 1e4 could leave the range of float.
inline constexpr double least_kept_log = -27.6;

/// Log-decays of a tile's tokens [tokens, width]: those met on the way to each token. The first `absent` of them lie
/// outside of the sequence and keep everything.
template <class S>
struct TileLogDecays {
  TensorView<const S, 2> rows;
  Index absent = 0;
  TensorView<const S, 2> uncut = {};  ///< all columns, where `rows` are a run of them

  Index tokens() const { return rows.extents[0] + absent; }
  Index width() const { return rows.extents[1]; }
  /// One number for the whole row.
  bool uniform() const { return rows.strides[1] == 0 || std::max(rows.extents[1], uncut.extents[1]) == 1; }
  const S* row(Index t) const { return rows.data + (t - absent) * rows.strides[0]; }
};

/// exp of every lane.
template <class S, class Packet>
Packet exp_of(const Packet& x) {
  using namespace Eigen::internal;
  if constexpr (packet_traits<S>::HasExp) {
    return pexp(x);
  } else {
    S lane[packet_traits<S>::size];
    pstoreu(lane, x);
    for (S& y : lane) y = std::exp(y);
    return ploadu<Packet>(lane);
  }
}

/// x[0, count) = exp(x), by packets even where they do not fill one. Left to itself, Eigen hands what lies outside of
/// aligned packets to the library's function, which rounds otherwise: the answer would depend on where a worker's
/// memory begins.
template <class S>
void exp_by_packets(S* x, Index count) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr Index lanes = packet_traits<S>::size;
  Index i = 0;
  for (; i + lanes <= count; i += lanes) pstoreu(x + i, exp_of<S>(ploadu<Packet>(x + i)));
  if (i == count) return;
  S rest[lanes] = {};
  std::copy_n(x + i, count - i, rest);
  pstoreu(rest, exp_of<S>(ploadu<Packet>(rest)));
  std::copy_n(rest, count - i, x + i);
}

/// Whether every column keeps enough over the tile.
template <class S>
bool columns_keep_enough(TensorView<const S, 2> rows) {
  constexpr Index block = 64;
  for (Index begin = 0; begin < rows.extents[1]; begin += block) {
    const Index count = std::min(block, rows.extents[1] - begin);
    S sum[block] = {};
    for (Index t = 0; t < rows.extents[0]; ++t)
      for (Index c = 0; c < count; ++c) sum[c] += rows(t, begin + c);
    for (Index c = 0; c < count; ++c)
      if (!(sum[c] >= S(least_kept_log))) return false;
  }
  return true;
}

/// Whether the columns outside of a cut do as well: were only its own asked, the sharing out of columns to workers would decide
/// how a tile is walked, and so rounded.
template <class S>
bool uncut_keeps_enough(const TileLogDecays<S>& g) {
  return g.uncut.extents[1] <= g.width() || columns_keep_enough(g.uncut);
}

/// sum[0, width) = before[0, width) (or zero) + g[0, width), whose entries are `stride` apart.
template <class S>
void add_row(const S* before, const S* g, Index stride, Index width, S* sum) {
  using Array = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
  using Const = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>;
  if (stride != 1)
    for (Index i = 0; i < width; ++i) sum[i] = (before ? before[i] : S(0)) + g[i * stride];
  else if (before)
    Array(sum, width) = Const(before, width) + Const(g, width);
  else
    std::copy_n(g, width, sum);
}

/// What q (or o) and k (or v) of a tile are multiplied by, in memory of its owner: query_factor b and key_factor / b
/// [tokens, padded], or [tokens] if uniform; and b of the last token [padded].
template <class S>
struct RunningDecay {
  S *read, *write, *at_end;
  S query_factor = 1, key_factor = 1;
};

/// up_factor exp(x) and down_factor exp(-x) of every lane, |x| < 87. With x = n log(2) + r, |r| <= log(2) / 2: exp(+-x) = 2^(+-n)
/// (cosh(r) +- sinh(r)), so that the two share all but the last steps, where 1 / exp(x) takes a division.
template <class S, class Packet>
CHELA_ALWAYS_INLINE void exp_both_ways(const Packet& x, const Packet& up_factor, const Packet& down_factor,
                                       Packet (&to)[2]) {
  using namespace Eigen::internal;
  if constexpr (std::is_same_v<S, float> && packet_traits<S>::size > 1) {
    using Bits = typename unpacket_traits<Packet>::integer_packet;
    const auto all = [](float value) { return pset1<Packet>(value); };
    constexpr float bias = 127, shift = 12582912 + bias;  // 1.5 2^23: the sum's last bits are then those of n + 127
    constexpr int mantissa_bits = 23, two_biases = 254 << mantissa_bits;
    const Packet shifted = pmadd(x, all(1.44269504f), all(shift)), minus_n = psub(all(shift), shifted);
    const Packet r = pmadd(minus_n, all(-2.12194440e-4f), pmadd(minus_n, all(0.693359375f), x)), square = pmul(r, r);
    const Packet cosh =
        pmadd(square, pmadd(square, pmadd(square, all(1.f / 720), all(1.f / 24)), all(1.f / 2)), all(1.f));
    const Packet sinh = pmul(r, pmadd(square, pmadd(square, all(0.00836887824f), all(0.166665186f)), all(1.f)));
    const Bits power = plogical_shift_left<mantissa_bits>(preinterpret<Bits>(shifted));
    const Bits inverse = psub(pset1<Bits>(two_biases), power);
    to[0] = pmul(padd(cosh, sinh), pmul(preinterpret<Packet>(power), up_factor));
    to[1] = pmul(psub(cosh, sinh), pmul(preinterpret<Packet>(inverse), down_factor));
  } else {
    const Packet up = exp_of<S>(x);
    to[0] = pmul(up, up_factor), to[1] = pdiv(down_factor, up);
  }
}

/// Turns sums of log-decays in `to.read` into both.
template <class S>
void fold_sums(const RunningDecay<S>& to, Index count) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr Index lanes = packet_traits<S>::size;
  const Packet query_factor = pset1<Packet>(to.query_factor), key_factor = pset1<Packet>(to.key_factor);
  const auto fold = [&](S* read, S* write) {
    Packet factors[2];
    exp_both_ways<S>(ploadu<Packet>(read), query_factor, key_factor, factors);
    pstoreu(read, factors[0]);
    pstoreu(write, factors[1]);
  };
  Index i = 0;
  for (; i + lanes <= count; i += lanes) fold(to.read + i, to.write + i);
  if (i == count) return;
  S read[lanes] = {}, write[lanes];
  std::copy(to.read + i, to.read + count, read);
  fold(read, write);
  std::copy_n(read, count - i, to.read + i);
  std::copy_n(write, count - i, to.write + i);
}

/// Whether each column of a tile keeps enough, the sums being in `last`; turns them into what is kept.
template <class S>
bool keep_at_end(S* last, Index padded) {
  if (!(Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>(last, padded) >= S(least_kept_log)).all()) return false;
  exp_by_packets(last, padded);
  return true;
}

/// Fills them. Returns false, and leaves nothing of use, if too little is kept; that is seen from sums alone.
template <class S>
bool running_decay(const TileLogDecays<S>& g, const RunningDecay<S>& to, Index padded) {
  constexpr Index lanes = Eigen::internal::packet_traits<S>::size;
  const Index tokens = g.tokens(), width = g.width();
  if (g.uniform()) {
    S sum = 0;
    for (Index t = 0; t < tokens; ++t) to.read[t] = sum += t < g.absent ? S(0) : g.row(t)[0];
    S last[lanes];
    std::fill_n(last, lanes, sum);
    if (!keep_at_end(last, lanes)) return false;
    std::fill_n(to.at_end, padded, last[0]);
    fold_sums(to, tokens);
    return true;
  }
  for (Index t = 0; t < tokens; ++t) {
    S* sum = to.read + t * padded;
    if (t >= g.absent)
      add_row(t > 0 ? sum - padded : nullptr, g.row(t), g.rows.strides[1], width, sum);
    else
      std::fill_n(sum, width, S(0));
    std::fill(sum + width, sum + padded, S(0));
  }
  std::copy_n(to.read + (tokens - 1) * padded, padded, to.at_end);
  if (!keep_at_end(to.at_end, padded) || !uncut_keeps_enough(g)) return false;
  fold_sums(to, tokens * padded);
  return true;
}

/// Where each column has its own decays: for each register of columns, begin(column) gives what is then called with every token in
/// turn, its factor for reading, query_factor b, and that for writing, key_factor / b. `at_end` becomes b of the last token. Returns
/// false, and leaves nothing of use, if too little is kept.
template <class S, class BeginColumn>
bool fold_columns(const TileLogDecays<S>& g, S query_factor, S key_factor, S* at_end, Index padded,
                  const BeginColumn& begin) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr Index lanes = packet_traits<S>::size;
  const Index tokens = g.tokens(), width = g.width();
  const Packet read = pset1<Packet>(query_factor), write = pset1<Packet>(key_factor);
  for (Index column = 0; column < padded; column += lanes) {
    auto take = begin(column);
    Packet sum = pset1<Packet>(S(0));
    for (Index t = 0; t < g.absent; ++t) take(read, write);
    const auto fold = [&](const Packet& row) {
      sum = padd(sum, row);
      Packet factors[2];
      exp_both_ways<S>(sum, read, write, factors);
      take(factors[0], factors[1]);
    };
    if (g.rows.strides[1] == 1 && column + lanes <= width) {
      for (Index t = g.absent; t < tokens; ++t) fold(ploadu<Packet>(g.row(t) + column));
    } else {
      S part[lanes];
      for (Index t = g.absent; t < tokens; ++t) {
        pack_row(g.row(t) + column * g.rows.strides[1], g.rows.strides[1], std::clamp<Index>(width - column, 0, lanes),
                 S(1), part, lanes);
        fold(ploadu<Packet>(part));
      }
    }
    pstoreu(at_end + column, sum);
  }
  return keep_at_end(at_end, padded) && uncut_keeps_enough(g);
}

/// to[0, padded) = exp of a row of log-decays, and of zeros. Eigen's packets stop at the least normal number, and
/// differently on each machine: below it, down to the zero of a reset, and for NaN, the library's function is asked.
template <class S>
void exp_row(const S* g, Index stride, Index width, S* to, Index padded) {
  constexpr S least_normal = std::is_same_v<S, double> ? S(-708) : S(-87);
  constexpr S zero = std::is_same_v<S, double> ? S(-746) : S(-104);
  Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>> all(to, padded);
  pack_row(g, stride, width, S(1), to, padded);
  const bool ordinary = all.minCoeff() >= least_normal && !std::isnan(all.sum());
  all = all.max(least_normal);
  exp_by_packets(to, padded);
  if (ordinary) return;
  int between = 0;  // counted without a branch: resets come at random
  for (Index i = 0; i < width; ++i) {
    const S x = g[i * stride];
    to[i] = x < zero ? S(0) : to[i];
    between += !(x >= least_normal) & !(x < zero);
  }
  for (Index i = 0; between > 0 && i < width; ++i)
    if (const S x = g[i * stride]; !(x >= least_normal) && !(x < zero)) to[i] = std::exp(x);
}

/// The decays themselves, [tokens, padded].
template <class S>
void single_decays(const TileLogDecays<S>& g, S* decay, Index padded) {
  for (Index t = 0; t < g.tokens(); ++t) {
    S* to = decay + t * padded;
    if (t < g.absent)
      std::fill_n(to, padded, S(1));
    else if (g.uniform())
      std::fill_n(to, padded, std::exp(g.row(t)[0]));
    else
      exp_row(g.row(t), g.rows.strides[1], g.width(), to, padded);
  }
}

/// rows[t, :] *= factor[t], or *= factor[t, :].
template <class S>
void scale_rows(S* rows, Index tokens, Index padded, const S* factor, bool uniform) {
  using Array = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
  using Const = Eigen::Map<const Eigen::Array<S, Eigen::Dynamic, 1>>;
  if (!uniform) {
    Array(rows, tokens * padded) *= Const(factor, tokens * padded);
    return;
  }
  for (Index t = 0; t < tokens; ++t) Array(rows + t * padded, padded) *= factor[t];
}

}  // namespace detail
}  // namespace chela::cpu
