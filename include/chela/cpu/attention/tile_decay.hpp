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

/// Whether every column keeps enough over the tile, those outside of a cut included: were only its own asked, the
/// sharing out of columns to workers would decide how a tile is walked, and so rounded.
template <class S>
bool uncut_keeps_enough(const TileLogDecays<S>& g) {
  constexpr Index block = 64;
  const Index width = g.uncut.extents[1];
  for (Index begin = 0; begin < width && width > g.width(); begin += block) {
    const Index count = std::min(block, width - begin);
    S sum[block] = {};
    for (Index t = 0; t < g.rows.extents[0]; ++t)
      for (Index c = 0; c < count; ++c) sum[c] += g.uncut(t, begin + c);
    for (Index c = 0; c < count; ++c)
      if (!(sum[c] >= S(least_kept_log))) return false;
  }
  return true;
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

/// Turns sums of log-decays in `to.read` into both.
template <class S>
void fold_sums(const RunningDecay<S>& to, Index count) {
  using namespace Eigen::internal;
  using Packet = typename packet_traits<S>::type;
  constexpr Index lanes = packet_traits<S>::size;
  const Packet query_factor = pset1<Packet>(to.query_factor), key_factor = pset1<Packet>(to.key_factor);
  const auto fold = [&](S* read, S* write) {
    const Packet kept = exp_of<S>(ploadu<Packet>(read));
    pstoreu(write, pdiv(key_factor, kept));
    pstoreu(read, pmul(kept, query_factor));
  };
  Index i = 0;
  for (; i + lanes <= count; i += lanes) fold(to.read + i, to.write + i);
  S read[lanes] = {}, write[lanes];
  std::copy(to.read + i, to.read + count, read);
  fold(read, write);
  std::copy_n(read, count - i, to.read + i);
  std::copy_n(write, count - i, to.write + i);
}

/// Fills them. Returns false, and leaves nothing of use, if too little is kept; that is seen from sums alone.
template <class S>
bool running_decay(const TileLogDecays<S>& g, const RunningDecay<S>& to, Index padded) {
  using Array = Eigen::Map<Eigen::Array<S, Eigen::Dynamic, 1>>;
  const Index tokens = g.tokens(), width = g.uniform() ? 1 : g.width(), row = g.uniform() ? 1 : padded;
  for (Index t = 0; t < tokens; ++t) {
    S* sum = to.read + t * row;
    if (t >= g.absent)
      add_row(t > 0 ? sum - row : nullptr, g.row(t), g.rows.strides[1], width, sum);
    else
      std::fill_n(sum, width, S(0));
    std::fill(sum + width, sum + row, S(0));
  }
  const Array last(to.read + (tokens - 1) * row, row);
  if (!(last >= S(least_kept_log)).all() || !uncut_keeps_enough(g)) return false;
  if (g.uniform())
    std::fill_n(to.at_end, padded, last[0]);
  else
    Array(to.at_end, padded) = last;
  exp_by_packets(to.at_end, padded);
  fold_sums(to, tokens * row);
  return true;
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
