#pragma once
// The recurrence S = Diag(a) S + k v^T, o = S^T q over a packed tile of tokens, with the state held in registers by blocks of
// key rows x value columns. Without decay that is two multiply-adds for each state element and token and nothing else, so it
// runs at the machine's multiply-add rate; a chunked form executes chunk_len / (2 key_dim) more and gains nothing where this
// one fits. Ordinary decay costs nothing inside either: it is folded into q, k (or o, v) and the end of the tile
// (cpu/attention/tile_decay.hpp).
#include <Eigen/Core>
#include <algorithm>
#include <type_traits>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

template <class S>
struct RegisterBlock {
  using Packet = typename Eigen::internal::packet_traits<S>::type;
  static constexpr int lanes = Eigen::internal::packet_traits<S>::size;
  /// Value registers per key row. One would be bound by the loads of k and q.
  static constexpr int vectors = 2;
  /// Key rows: 16 of 32 registers hold state, or 8 of 16.
  static constexpr int rows = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 8 : 4;
  static constexpr int columns = vectors * lanes;

  /// How keys and queries, and values, of a tile of so many tokens are packed.
  static constexpr Panels key_panels(Index tokens) { return {tokens, std::max(rows, lanes)}; }
  static constexpr Panels value_panels(Index tokens) { return {tokens, columns}; }
};

/// Calls f(a constant number of registers, first column) for strips of columns: as wide as RegisterBlock's, and a last one of a
/// single register where `values` asks for it.
template <class S, class F>
CHELA_ALWAYS_INLINE void for_each_strip(Index values, const F& f) {
  using Block = RegisterBlock<S>;
  Index column = 0;
  for (; column + Block::columns <= values; column += Block::columns)
    f(std::integral_constant<int, Block::vectors>{}, column);
  if (column < values) f(std::integral_constant<int, 1>{}, column);
}

/// How the state decays over a tile.
enum class TileDecay {
  none,
  rows,            ///< `decay` [tokens, keys] multiplies the state before each token
  columns,         ///< `decay` [tokens, values] does
  rows_at_end,     ///< `decay` [keys] multiplies the state after the last token
  columns_at_end,  ///< `decay` [values] does
};

/// When a token's query reads: what the token itself wrote included, or only what came before.
enum class ReadOrder { after_write, before_write };

/// One packed tile: `q` and `k` [tokens, keys] in key panels, `v` [tokens, values] in value panels, `state` [keys, values] with
/// rows `state_stride` apart; `keys` is a multiple of RegisterBlock::rows, `values` of RegisterBlock::lanes. Outputs go to rows
/// `out_stride` apart; `partial`, in value panels, holds them until all keys are summed.
template <class S>
struct PackedTile {
  const S *q, *k, *v;
  S* partial;
  Index tokens, keys, values;
  S* state;
  Index state_stride;
  S* out;
  Index out_stride;
  const S* decay = nullptr;
  const S* out_factor = nullptr;  ///< [tokens, values], multiplies the outputs where columns decay at the end
};

/// Writes the outputs and advances the state. Each output sums its keys in ascending order, whatever the tile length, so
/// without decay the cut of a sequence into tiles changes no bit. `ahead` packs the next tile meanwhile, a row for each token
/// of each register block.
template <TileDecay D = TileDecay::none, ReadOrder R = ReadOrder::after_write, class S, class Ahead>
void recur_over_tile(const PackedTile<S>& tile, Ahead&& ahead) {
  using namespace Eigen::internal;
  using Block = RegisterBlock<S>;
  using Packet = typename Block::Packet;
  constexpr int rows = Block::rows, lanes = Block::lanes;
  const Index tokens = tile.tokens, keys = tile.keys, values = tile.values;
  const Panels key_panels = Block::key_panels(tile.tokens), value_panels = Block::value_panels(tile.tokens);
  constexpr Index key_width = Block::key_panels(0).width, value_width = Block::value_panels(0).width;

  for_each_strip<S>(values, [&](auto strip, Index column) {
    constexpr int vectors = decltype(strip)::value;
    const S* const v = tile.v + value_panels.at(0, column);
    S* const partial = tile.partial + value_panels.at(0, column);
    for (Index row = 0; row < keys; row += rows) {
      const bool first = row == 0, last = row + rows == keys;
      const S* const keys_of_block = tile.k + key_panels.at(0, row);
      const S* const queries_of_block = tile.q + key_panels.at(0, row);
      S* const out = last ? tile.out + column : partial;
      const Index out_stride = last ? tile.out_stride : value_width;
      S* const state = tile.state + row * tile.state_stride + column;
      Packet s[rows][vectors];
      CHELA_UNROLL
      for (int r = 0; r < rows; ++r) CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) s[r][n] = ploadu<Packet>(state + r * tile.state_stride + n * lanes);

      auto copy = ahead.next(tokens);
      for (Index t = 0; t < tokens; ++t) {
        const S* k = keys_of_block + t * key_width;
        const S* q = queries_of_block + t * key_width;
        Packet value[vectors], sum[vectors], keep[vectors];
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) {
          const Index at = t * value_width + n * lanes;
          value[n] = ploadu<Packet>(v + at);
          sum[n] = first ? pset1<Packet>(S(0)) : ploadu<Packet>(partial + at);
          if constexpr (D == TileDecay::columns) keep[n] = ploadu<Packet>(tile.decay + t * values + column + n * lanes);
        }
        CHELA_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Packet key = pset1<Packet>(k[r]), query = pset1<Packet>(q[r]);
          if constexpr (D == TileDecay::rows) {
            const Packet row_keep = pset1<Packet>(tile.decay[t * keys + row + r]);
            CHELA_UNROLL
            for (int n = 0; n < vectors; ++n) keep[n] = row_keep;
          }
          CHELA_UNROLL
          for (int n = 0; n < vectors; ++n) {
            if constexpr (D == TileDecay::rows || D == TileDecay::columns) s[r][n] = pmul(s[r][n], keep[n]);
            if constexpr (R == ReadOrder::before_write) sum[n] = pmadd(query, s[r][n], sum[n]);
            s[r][n] = pmadd(key, value[n], s[r][n]);
            if constexpr (R == ReadOrder::after_write) sum[n] = pmadd(query, s[r][n], sum[n]);
          }
        }
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) {
          if constexpr (D == TileDecay::columns_at_end)
            if (last) sum[n] = pmul(sum[n], ploadu<Packet>(tile.out_factor + t * values + column + n * lanes));
          pstoreu(out + t * out_stride + n * lanes, sum[n]);
        }
        copy();
      }

      CHELA_UNROLL
      for (int r = 0; r < rows; ++r) CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) {
        if constexpr (D == TileDecay::rows_at_end) s[r][n] = pmul(s[r][n], pset1<Packet>(tile.decay[row + r]));
        if constexpr (D == TileDecay::columns_at_end)
          s[r][n] = pmul(s[r][n], ploadu<Packet>(tile.decay + column + n * lanes));
        pstoreu(state + r * tile.state_stride + n * lanes, s[r][n]);
      }
    }
  });
}

}  // namespace chela::cpu
