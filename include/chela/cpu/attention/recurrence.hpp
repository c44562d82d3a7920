#pragma once
// The recurrence S += k v^T, o = S^T q over a packed tile of tokens, with the state held in registers by blocks of key rows x
// value columns. Two multiply-adds for each state element and token and nothing else, so it runs at the machine's
// multiply-add rate; a chunked form executes chunk_len / (2 key_dim) more and gains nothing where this one fits.
#include <Eigen/Core>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"

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
};

/// Advances `state` by `tokens` tokens. `q` and `k` are packed [tokens, keys], `v` and `o` [tokens, values]; `keys` is a
/// multiple of RegisterBlock::rows, `values` of RegisterBlock::columns. `state` is [keys, values], rows `state_stride` apart.
/// Each output sums its keys in ascending order, whatever the tile length, so cutting a sequence changes no bit.
///
/// `fetch_ahead` is called once per token and register block; a pass brings the next tile's memory nearer with it, while the
/// multiply-adds run.
template <class S, class FetchAhead>
void recur_over_tile(const S* q, const S* k, const S* v, S* o, Index tokens, Index keys, Index values, S* state,
                     Index state_stride, FetchAhead&& fetch_ahead) {
  using namespace Eigen::internal;
  using Block = RegisterBlock<S>;
  using Packet = typename Block::Packet;
  constexpr int rows = Block::rows, vectors = Block::vectors, lanes = Block::lanes;

  for (Index column = 0; column < values; column += Block::columns) {
    for (Index row = 0; row < keys; row += rows) {
      Packet s[rows][vectors];
      CHELA_UNROLL
      for (int r = 0; r < rows; ++r) CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) s[r][n] = ploadu<Packet>(state + (row + r) * state_stride + column + n * lanes);

      for (Index t = 0; t < tokens; ++t) {
        const S* kt = k + t * keys + row;
        const S* qt = q + t * keys + row;
        S* ot = o + t * values + column;
        Packet value[vectors], sum[vectors];
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) {
          value[n] = ploadu<Packet>(v + t * values + column + n * lanes);
          sum[n] = row == 0 ? pset1<Packet>(S(0)) : ploadu<Packet>(ot + n * lanes);
        }
        CHELA_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Packet key = pset1<Packet>(kt[r]), query = pset1<Packet>(qt[r]);
          CHELA_UNROLL
          for (int n = 0; n < vectors; ++n) {
            s[r][n] = pmadd(key, value[n], s[r][n]);
            sum[n] = pmadd(query, s[r][n], sum[n]);
          }
        }
        CHELA_UNROLL
        for (int n = 0; n < vectors; ++n) pstoreu(ot + n * lanes, sum[n]);
        fetch_ahead();
      }

      CHELA_UNROLL
      for (int r = 0; r < rows; ++r) CHELA_UNROLL
      for (int n = 0; n < vectors; ++n) pstoreu(state + (row + r) * state_stride + column + n * lanes, s[r][n]);
    }
  }
}

}  // namespace chela::cpu
