#pragma once
// What one pass of a block keeps, and the part of the pass that treats each row by itself: everything but memory and
// mixer.
#include "chela/block/chela.hpp"
#include "chela/cpu/block/feed_forward.hpp"
#include "chela/cpu/block/norm.hpp"

namespace chela::cpu::detail {

/// Letters as in chela/block/chela.hpp. The first axis is the row, batch * tokens of them.
template <class Block, class A>
struct BlockActivations {
  TensorView<A, 2> n;                 ///< [row, width] N; with post-norm the input itself, and not kept
  TensorView<A, 3> statistics;        ///< [row, 1, 2] of Norm
  TensorView<A, 2> z;                 ///< [row, width] Z
  TensorView<A, 2> mixed;             ///< [row, from_memory.out] [Wz | Wg | Wh | Wp] columns before their activations
  TensorView<A, 2> v_before;          ///< [row, values] V before SiLU
  TensorView<A, 2> q, k;              ///< [row, keys]
  TensorView<A, 2> v, o;              ///< [row, values]; O before its norm
  TensorView<A, 3> head_statistics;   ///< [row, heads, 2]
  TensorView<A, 2> o_normed;          ///< [row, values]
  TensorView<A, 2> gated;             ///< [row, values] G * O
  TensorView<A, 2> r;                 ///< [row, width] R
  TensorView<A, 2> inner;             ///< [row, width] input of the feed-forward layer
  TensorView<A, 3> inner_statistics;  ///< [row, 1, 2] of the feed-forward layer's norm
  rowwise::FeedForwardActivations<A> hidden;
  TensorView<A, 2> sum;  ///< [row, width] post-norm: R' + F(R')

  static BlockActivations in(Tensor<A, 1>& memory, const typename Block::Shape& s, Index rows) {
    return lay_out(memory, [&](auto take) {
      const Index layer = Block::has_feed_forward(s) ? rows : 0;
      const FeedForward::Shape f = s.feed_forward_shape();
      BlockActivations a;
      a.n = take(s.pre_norm ? rows : 0, s.width);
      a.statistics = take(rows, 1, 2);
      a.z = take(rows, s.width);
      a.mixed = take(rows, s.from_memory_shape().out);
      a.v_before = take(rows, s.values());
      a.q = take(rows, s.keys()), a.k = take(rows, s.keys());
      a.v = take(rows, s.values()), a.o = take(rows, s.values());
      a.head_statistics = take(rows, s.heads, 2);
      a.o_normed = take(rows, s.values()), a.gated = take(rows, s.values());
      a.r = take(rows, s.width);
      a.inner = take(s.pre_norm ? layer : rows, s.width);
      a.inner_statistics = take(layer, 1, 2);
      a.hidden = {take(layer, f.expanded()), take(layer, f.hidden)};
      a.sum = take(s.pre_norm ? 0 : layer, s.width);
      return a;
    });
  }
};

/// The row-by-row parts of a forward pass, between which memory and mixer run.
template <class Block, class A>
struct BlockRows {
  using Parameters = typename Block::template Parameters<const A>;
  const typename Block::Shape& s;
  const Parameters& p;
  BlockActivations<Block, A> a;
  TensorView<const A, 2> x;  ///< [row, width] X

  TensorView<const A, 2> input() const { return s.pre_norm ? TensorView<const A, 2>(a.n) : x; }
  /// Columns of `mixed`, or of its gradient.
  TensorView<A, 2> z_columns(TensorView<A, 2> m) const { return rowwise::columns(m, 0, s.keys()); }
  TensorView<A, 2> g_columns(TensorView<A, 2> m) const { return rowwise::columns(m, s.keys(), s.values()); }
  TensorView<A, 2> h_columns(TensorView<A, 2> m) const { return rowwise::columns(m, s.keys() + s.values(), s.width); }
  TensorView<A, 2> p_columns(TensorView<A, 2> m) const {
    return rowwise::columns(m, s.keys() + s.values() + s.width, s.width);
  }

  /// X to N.
  template <Executor E>
  void enter(const E& executor) const {
    if (!s.pre_norm) return;
    rowwise::for_each_row_block(x.extents[0], executor, [&](Index first, Index count, int, Index) {
      rowwise::norm<A>(s.norm_shape(), p.norm, rowwise::row_range(x, first, count),
                       rowwise::row_range(a.n, first, count), &a.statistics(first, 0, 0));
    });
  }

  /// N and Z to Q, K, V and the gates.
  template <Executor E>
  void project(const E& executor) const {
    rowwise::for_each_row_block(x.extents[0], executor, [&](Index first, Index count, int, Index) {
      const auto rows = [&](auto view) { return rowwise::row_range(view, first, count); };
      rowwise::project<A>(rows(a.z), p.from_memory.weight, p.from_memory.bias, rows(a.mixed));
      rowwise::project<A>(rows(input()), p.value.weight, p.value.bias, rows(a.v_before));
      rowwise::map_rows(rowwise::Silu<A>{}, rows(a.v), rows(a.v_before));
      rowwise::map_rows(rowwise::Silu<A>{}, rows(a.q), rows(z_columns(a.mixed)));
      const auto affine = [](auto zs, auto scale, auto offset) { return Eigen::internal::pmadd(zs, scale, offset); };
      for (Index r = first; r < first + count; ++r) {
        rowwise::map_row<A>(s.keys(), affine, &a.k(r, 0), &a.q(r, 0), p.key_scale.data, p.key_offset.data);
        rowwise::map_row<A>(s.keys(), affine, &a.q(r, 0), &a.q(r, 0), p.query_scale.data, p.query_offset.data);
      }
    });
  }

  /// O to Y.
  template <Executor E>
  void leave(TensorView<A, 2> y, const E& executor) const {
    rowwise::for_each_row_block(x.extents[0], executor, [&](Index first, Index count, int, Index) {
      const auto rows = [&](auto view) { return rowwise::row_range(view, first, count); };
      rowwise::norm<A>(s.head_norm_shape(), p.head_norm, rows(a.o), rows(a.o_normed), &a.head_statistics(first, 0, 0));
      rowwise::map_rows(rowwise::SwiGlu<A>{}, rows(a.gated), rows(g_columns(a.mixed)), rows(a.o_normed));
      const bool last = s.pre_norm && !Block::has_feed_forward(s);
      merge(first, count, last ? rows(y) : rows(a.r));
      if (!last) feed_forward(first, count, rows(y));
    });
  }

 private:
  /// G * O and X to R.
  void merge(Index first, Index count, TensorView<A, 2> r) const {
    const auto rows = [&](auto view) { return rowwise::row_range(view, first, count); };
    if constexpr (Block::Output::update_gate) {
      const auto h = rows(h_columns(a.mixed));
      rowwise::project<A>(rows(a.gated), p.output.weight, {}, h, h);
      const auto choose = [](auto candidate, auto gate, auto old) {
        using namespace Eigen::internal;
        return pmadd(rowwise::Sigmoid<A>{}(gate), psub(rowwise::Silu<A>{}(candidate), old), old);
      };
      rowwise::map_rows(choose, r, h, rows(p_columns(a.mixed)), rows(x));
    } else {
      rowwise::project<A>(rows(a.gated), p.output.weight, p.output.bias, r, rows(x));
    }
  }

  /// R to Y.
  void feed_forward(Index first, Index count, TensorView<A, 2> y) const {
    const auto rows = [&](auto view) { return rowwise::row_range(view, first, count); };
    const auto hidden = [&] { return a.hidden.rows(first, count); };
    const FeedForward::Shape f = s.feed_forward_shape();
    if (s.pre_norm) {
      rowwise::norm<A>(s.norm_shape(), p.feed_forward_norm, rows(a.r), rows(a.inner), &a.inner_statistics(first, 0, 0));
      rowwise::feed_forward<A>(f, p.feed_forward, rows(a.inner), rows(a.r), hidden(), y);
    } else if (Block::has_feed_forward(s)) {
      rowwise::norm<A>(s.norm_shape(), p.norm, rows(a.r), rows(a.inner), &a.statistics(first, 0, 0));
      rowwise::feed_forward<A>(f, p.feed_forward, rows(a.inner), rows(a.inner), hidden(), rows(a.sum));
      rowwise::norm<A>(s.norm_shape(), p.feed_forward_norm, rows(a.sum), y, &a.inner_statistics(first, 0, 0));
    } else {
      rowwise::norm<A>(s.norm_shape(), p.norm, rows(a.r), y, &a.statistics(first, 0, 0));
    }
  }
};

}  // namespace chela::cpu::detail
