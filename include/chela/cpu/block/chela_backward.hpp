#pragma once
// Gradients of the row-by-row parts of a block, in the reverse order of cpu/block/activations.hpp. Sums over rows are
// taken in two ways: weights by one product per block of the weight, everything else by one partial sum per block of
// rows.
#include "chela/cpu/block/activations.hpp"

namespace chela::cpu::detail {

/// Gradients of activations of one pass, which blocks of a stack may share.
template <class Block, class A>
struct BlockGradients {
  TensorView<A, 2> sum;       ///< [row, width] what flows into the feed-forward layer's output; pre-norm: grad_y itself
  TensorView<A, 2> expanded;  ///< [row, expanded]
  TensorView<A, 2> r;         ///< [row, width]
  TensorView<A, 2> mixed;     ///< [row, from_memory.out]
  TensorView<A, 2> o;         ///< [row, values]
  TensorView<A, 2> q, k;      ///< [row, keys]
  TensorView<A, 2> v;         ///< [row, values], later of V before SiLU
  TensorView<A, 2> z;         ///< [row, width]
  TensorView<A, 2> n, n_of_memory;  ///< [row, width] by way of V and the mixer, and by way of the memory
  TensorView<A, 2> partial;         ///< [block of rows, small parameters]
  TensorView<A, 3> work;            ///< [worker, block of rows, widest temporary]

  static BlockGradients in(Tensor<A, 1>& memory, const typename Block::Shape& s, Index rows, Index workers) {
    return lay_out(memory, [&](auto take) {
      const Index layer = Block::has_feed_forward(s) ? rows : 0;
      const FeedForward::Shape f = s.feed_forward_shape();
      BlockGradients g;
      g.sum = take(s.pre_norm ? 0 : rows, s.width);
      g.expanded = take(layer, f.expanded());
      g.r = take(rows, s.width);
      g.mixed = take(rows, s.from_memory_shape().out);
      g.o = take(rows, s.values());
      g.q = take(rows, s.keys()), g.k = take(rows, s.keys());
      g.v = take(rows, s.values());
      g.z = take(rows, s.width);
      g.n = take(rows, s.width), g.n_of_memory = take(rows, s.width);
      g.partial = take(ceil_div(rows, rowwise::row_block), SmallParameters(s).count);
      g.work = take(workers, rowwise::row_block, std::max({f.hidden, s.values(), s.keys(), s.width}));
      return g;
    });
  }

  /// Places of the parameters that are not matrices in a row of `partial`.
  struct SmallParameters {
    Index norm_gain, norm_bias, inner_gain, inner_bias, head_gain, head_bias;
    Index query_scale, query_offset, key_scale, key_offset, count = 0;
    explicit SmallParameters(const typename Block::Shape& s) {
      for (Index* place : {&norm_gain, &norm_bias, &inner_gain, &inner_bias}) *place = count, count += s.width;
      for (Index* place : {&head_gain, &head_bias}) *place = count, count += s.values();
      for (Index* place : {&query_scale, &query_offset, &key_scale, &key_offset}) *place = count, count += s.keys();
    }
  };
};

/// The row-by-row parts of a backward pass, between which mixer and memory run.
template <class Block, class A>
struct BlockRowsBackward {
  using Gradients = BlockGradients<Block, A>;
  const BlockRows<Block, A>& rows;
  Gradients g;
  typename Gradients::SmallParameters place{rows.s};

  /// grad_y to the gradients of O, of the gates, and of X by way of the residual.
  template <Executor E>
  void leave(TensorView<const A, 2> grad_y, TensorView<A, 2> grad_x, const E& executor) const {
    const auto& s = rows.s;
    const auto& a = rows.a;
    rowwise::for_each_row_block(grad_y.extents[0], executor, [&](Index first, Index count, int worker, Index block) {
      const auto part = [&](auto view) { return rowwise::row_range(view, first, count); };
      A* sums = &g.partial(block, 0);
      std::fill_n(sums, place.count, A(0));
      const auto grad_r = feed_forward(part(grad_y), first, count, worker, sums);

      TensorView<const A, 2> grad_output = grad_r;  // of (G * O) Wo
      if constexpr (Block::Output::update_gate) {
        choose(grad_r, part(grad_x), first, count);
        grad_output = part(rows.h_columns(g.mixed));
      } else {
        rowwise::as_rows(part(grad_x)) = rowwise::as_rows(grad_r);
      }

      const auto grad_gated = contiguous(&g.work(worker, 0, 0), count, s.values());
      rowwise::project_back<A>(grad_output, rows.p.output.weight, grad_gated);
      const auto gate = part(rows.g_columns(a.mixed));
      const auto by_gate = [](auto before, auto normed, auto gradient) {
        return rowwise::SiluGradient<A>{}(before, Eigen::internal::pmul(normed, gradient));
      };
      rowwise::map_rows(by_gate, part(rows.g_columns(g.mixed)), gate, part(a.o_normed), grad_gated);
      rowwise::map_rows(rowwise::SwiGlu<A>{}, grad_gated, gate, grad_gated);
      rowwise::norm_backward<A>(s.head_norm_shape(), rows.p.head_norm, part(a.o), &a.head_statistics(first, 0, 0),
                                grad_gated, part(g.o), false, sums + place.head_gain, sums + place.head_bias);
    });
  }

  /// Gradients of Q, K and V to those of Z and, but for the memory's part, of N.
  template <Executor E>
  void project(bool mixer_wrote_n, const E& executor) const {
    using namespace Eigen::internal;
    const auto& a = rows.a;
    const auto& p = rows.p;
    const Index keys = rows.s.keys();
    rowwise::for_each_row_block(g.z.extents[0], executor, [&](Index first, Index count, int worker, Index block) {
      const auto part = [&](auto view) { return rowwise::row_range(view, first, count); };
      A* sums = &g.partial(block, 0);
      A* zs = &g.work(worker, 0, 0);
      const auto before = rows.z_columns(a.mixed), grad_before = rows.z_columns(g.mixed);
      const auto affine = [](auto zs_before, auto dq, auto kq, auto dk, auto kk) {
        return rowwise::SiluGradient<A>{}(zs_before, pmadd(dk, kk, pmul(dq, kq)));
      };
      for (Index r = first; r < first + count; ++r) {
        const A* dq = &g.q(r, 0);
        const A* dk = &g.k(r, 0);
        rowwise::map_row<A>(keys, rowwise::Silu<A>{}, zs, &before(r, 0));
        rowwise::add_row<A>(keys, rowwise::Product<A>{}, sums + place.query_scale, zs, dq);
        rowwise::add_row<A>(keys, rowwise::Product<A>{}, sums + place.key_scale, zs, dk);
        rowwise::add_row<A>(keys, rowwise::Same<A>{}, sums + place.query_offset, dq);
        rowwise::add_row<A>(keys, rowwise::Same<A>{}, sums + place.key_offset, dk);
        rowwise::map_row<A>(keys, affine, &grad_before(r, 0), &before(r, 0), dq, p.query_scale.data, dk,
                            p.key_scale.data);
      }
      rowwise::map_rows(rowwise::SiluGradient<A>{}, part(g.v), part(a.v_before), part(g.v));
      rowwise::project_back<A>(part(g.mixed), p.from_memory.weight, part(g.z));
      rowwise::project_back<A>(part(g.v), p.value.weight, part(g.n), mixer_wrote_n);
    });
  }

  /// The gradient of N to that of X, added to what came by way of the residual.
  template <Executor E>
  void enter(TensorView<A, 2> grad_x, const E& executor) const {
    const auto& s = rows.s;
    rowwise::for_each_row_block(grad_x.extents[0], executor, [&](Index first, Index count, int, Index block) {
      const auto part = [&](auto view) { return rowwise::row_range(view, first, count); };
      rowwise::as_rows(part(g.n)) += rowwise::as_rows(part(g.n_of_memory));
      A* sums = &g.partial(block, 0);
      if (s.pre_norm)
        rowwise::norm_backward<A>(s.norm_shape(), rows.p.norm, part(rows.x), &rows.a.statistics(first, 0, 0), part(g.n),
                                  part(grad_x), true, sums + place.norm_gain, sums + place.norm_bias);
      else
        rowwise::as_rows(part(grad_x)) += rowwise::as_rows(part(g.n));
    });
  }

  /// Gradients of the parameters, once all the above have run.
  template <Executor E>
  void sum_over_rows(TensorView<const A, 2> grad_y, const typename Block::template Parameters<A>& grad,
                     const E& executor) const {
    const auto& s = rows.s;
    const auto& a = rows.a;
    const bool layer = Block::has_feed_forward(s);
    const TensorView<const A, 2> grad_layer = s.pre_norm ? grad_y : g.sum;
    TensorView<const A, 2> grad_output = g.r;
    if (s.pre_norm && !layer) grad_output = grad_y;
    if constexpr (Block::Output::update_gate) grad_output = rows.h_columns(g.mixed);
    using Job = rowwise::WeightGradient<A>;
    rowwise::weight_gradients<A>(
        {Job{a.z, g.mixed, grad.from_memory.weight, grad.from_memory.bias},
         Job{rows.input(), g.v, grad.value.weight, grad.value.bias},
         Job{a.gated, grad_output, grad.output.weight, grad.output.bias},
         layer ? Job{a.hidden.hidden, grad_layer, grad.feed_forward.contract.weight, grad.feed_forward.contract.bias}
               : Job{},
         layer ? Job{a.inner, g.expanded, grad.feed_forward.expand.weight, grad.feed_forward.expand.bias} : Job{}},
        executor);

    const std::pair<Index, TensorView<A, 1>> small[] = {{place.norm_gain, grad.norm.gain},
                                                        {place.norm_bias, grad.norm.bias},
                                                        {place.inner_gain, grad.feed_forward_norm.gain},
                                                        {place.inner_bias, grad.feed_forward_norm.bias},
                                                        {place.head_gain, grad.head_norm.gain},
                                                        {place.head_bias, grad.head_norm.bias},
                                                        {place.query_scale, grad.query_scale},
                                                        {place.query_offset, grad.query_offset},
                                                        {place.key_scale, grad.key_scale},
                                                        {place.key_offset, grad.key_offset}};
    executor.for_each(Index(std::size(small)), [&](Index i, int) {
      const auto& [at, sum] = small[i];
      if (sum.present())
        rowwise::sum_partials<A>(rowwise::columns(g.partial, at, sum.extents[0]), sum, SerialExecutor{});
    });
  }

 private:
  /// The gradient of R from that of Y.
  TensorView<const A, 2> feed_forward(TensorView<const A, 2> grad_y, Index first, Index count, int worker,
                                      A* sums) const {
    const auto& s = rows.s;
    const auto& a = rows.a;
    const auto part = [&](auto view) { return rowwise::row_range(view, first, count); };
    const bool layer = Block::has_feed_forward(s);
    const auto run_layer = [&](TensorView<const A, 2> grad_sum, TensorView<A, 2> grad_inner) {
      const FeedForward::Shape f = s.feed_forward_shape();
      rowwise::feed_forward_backward<A>(f, rows.p.feed_forward, a.hidden.rows(first, count), grad_sum,
                                        contiguous(&g.work(worker, 0, 0), count, f.hidden), part(g.expanded),
                                        grad_inner);
    };
    if (s.pre_norm) {
      if (!layer) return grad_y;
      const auto grad_inner = part(g.n);  // free until the mixer has run
      run_layer(grad_y, grad_inner);
      rowwise::as_rows(part(g.r)) = rowwise::as_rows(grad_y);
      rowwise::norm_backward<A>(s.norm_shape(), rows.p.feed_forward_norm, part(a.r), &a.inner_statistics(first, 0, 0),
                                grad_inner, part(g.r), true, sums + place.inner_gain, sums + place.inner_bias);
      return part(g.r);
    }
    const auto grad_r = part(g.r);
    if (layer) {
      rowwise::norm_backward<A>(s.norm_shape(), rows.p.feed_forward_norm, part(a.sum), &a.inner_statistics(first, 0, 0),
                                grad_y, part(g.sum), false, sums + place.inner_gain, sums + place.inner_bias);
      run_layer(part(g.sum), grad_r);
      rowwise::as_rows(grad_r) += rowwise::as_rows(part(g.sum));
    }
    rowwise::norm_backward<A>(s.norm_shape(), rows.p.norm, part(a.r), &a.statistics(first, 0, 0),
                              layer ? TensorView<const A, 2>(grad_r) : grad_y, grad_r, false, sums + place.norm_gain,
                              sums + place.norm_bias);
    return grad_r;
  }

  /// Gradients of the update gate: of H and P before their activations, and of X.
  void choose(TensorView<const A, 2> grad_r, TensorView<A, 2> grad_x, Index first, Index count) const {
    using namespace Eigen::internal;
    const auto part = [&](auto view) { return rowwise::row_range(view, first, count); };
    const auto h = part(rows.h_columns(rows.a.mixed)), gate = part(rows.p_columns(rows.a.mixed));
    const auto one = rowwise::splat(A(1));
    const auto of_candidate = [](auto before, auto gate_before, auto gradient) {
      return rowwise::SiluGradient<A>{}(before, pmul(gradient, rowwise::Sigmoid<A>{}(gate_before)));
    };
    const auto of_gate = [&](auto gate_before, auto before, auto old, auto gradient) {
      const auto keep = rowwise::Sigmoid<A>{}(gate_before);
      return pmul(pmul(gradient, psub(rowwise::Silu<A>{}(before), old)), pmul(keep, psub(one, keep)));
    };
    const auto of_input = [&](auto gate_before, auto gradient) {
      return pmul(gradient, psub(one, rowwise::Sigmoid<A>{}(gate_before)));
    };
    rowwise::map_rows(of_candidate, part(rows.h_columns(g.mixed)), h, gate, grad_r);
    rowwise::map_rows(of_gate, part(rows.p_columns(g.mixed)), gate, h, part(rows.x), grad_r);
    rowwise::map_rows(of_input, grad_x, gate, grad_r);
  }
};

}  // namespace chela::cpu::detail
