#pragma once
// Blocks to test: small shapes of every kind, and the same block as the reference sees it.
#include <doctest/doctest.h>

#include "block/modules.hpp"
#include "chela/cpu/block/chela.hpp"
#include "chela/reference/block.hpp"

namespace chela::test {

/// `gains` keeps the entries of a gain that serves whole parts.
inline reference::NormWeights norm_weights(const Norm::Shape& s, const Norm::Parameters<const double>& p,
                                           Tensor<double, 1>& gains) {
  if (s.kind == NormKind::none) return {};
  gains = Tensor<double, 1>(s.row());
  for (Index i = 0; i < s.row(); ++i) gains(i) = p.gain(s.kind == NormKind::scale ? i / s.width : i);
  return {s.kind == NormKind::layer ? reference::NormKind::layer : reference::NormKind::rms, gains, p.bias};
}

inline Tensor<double, 2> kernel_taps(const ExplicitKernel::Shape&, const ExplicitKernel::Parameters<const double>& p,
                                     Index) {
  return converted<double>(p.taps);
}

inline void add_memory(reference::BlockProblem&, const NoMemory::Shape&, const NoMemory::Parameters<const double>&,
                       Index, Tensor<double, 2>&, Tensor<double, 2>&, Tensor<double, 2>&) {}

/// The taps of kernels that make them come from the CPU backend, which has tests of its own for them.
inline Tensor<double, 2> kernel_taps(const SgConvKernel::Shape& s, const SgConvKernel::Parameters<const double>& p,
                                     Index) {
  Tensor<double, 2> taps(s.width, s.length);
  REQUIRE(cpu::sgconv_taps(SgConvTapsArgs<double>{.weights = p.weights, .taps = taps, .decay = s.decay}).ok());
  return taps;
}
inline Tensor<double, 2> kernel_taps(const EmaKernel::Shape& s, const EmaParameters<const double>& p, Index tokens) {
  Tensor<double, 2> taps(s.width, tokens);
  REQUIRE(cpu::ema_taps(EmaTapsArgs<double>{p, taps}).ok());
  return taps;
}

template <class Shape, class P>
requires requires(P p) { p.skip; }
void add_memory(reference::BlockProblem& problem, const Shape& s, const P& p, Index tokens, Tensor<double, 2>& folded,
                Tensor<double, 2>& taps, Tensor<double, 2>& back_taps) {
  const auto make = [&](const auto& of, Tensor<double, 2>& to) {
    const auto made = kernel_taps(s.kernel_shape(), of, tokens);
    to = converted<double>(made.view());
    return to.view();
  };
  problem.taps = make(p.back, taps);
  if (s.span == Span::bidirectional) problem.back_taps = make(p.ahead, back_taps);
  problem.skip = p.skip;
  if (p.short_taps.empty()) return;
  Index width = 0;
  for (const auto& branch : p.short_taps) width = std::max(width, branch.extents[1]);
  folded = Tensor<double, 2>(s.width, width);
  for (const auto& branch : p.short_taps)
    for_each_index(branch, [&](Index d, Index j) { folded(d, j) += branch(d, j); });
  problem.short_taps = folded, problem.short_bias = p.short_bias;
}

/// y of the reference for parameters in double.
template <class Block>
Tensor<double, 3> reference_block(const typename Block::Shape& s,
                                  const typename Block::template Parameters<const double>& p,
                                  const Tensor<double, 3>& x) {
  reference::BlockProblem r;
  r.heads = s.heads, r.pre_norm = s.pre_norm, r.bidirectional = s.span == Span::bidirectional, r.epsilon = s.epsilon;
  Tensor<double, 1> gains[3];
  r.norm = norm_weights(s.norm_shape(), p.norm, gains[0]);
  r.head_norm = norm_weights(s.head_norm_shape(), p.head_norm, gains[1]);
  if (Block::has_feed_forward(s)) r.feed_forward_norm = norm_weights(s.norm_shape(), p.feed_forward_norm, gains[2]);
  Tensor<double, 2> folded, taps, back_taps;
  add_memory(r, s.memory_shape(), p.memory, x.extents()[1], folded, taps, back_taps);
  Index column = 0;
  const auto next = [&](auto& weight, auto& bias, Index count) {
    weight = run(p.from_memory.weight, 1, column, count), bias = run(p.from_memory.bias, 0, column, count);
    column += count;
  };
  next(r.wz, r.bz, s.keys()), next(r.wg, r.bg, s.values());
  if (Block::Output::update_gate) next(r.wh, r.bh, s.width), next(r.wp, r.bp, s.width);
  r.wv = p.value.weight, r.bv = p.value.bias, r.wo = p.output.weight, r.bo = p.output.bias;
  r.query_scale = p.query_scale, r.query_offset = p.query_offset;
  r.key_scale = p.key_scale, r.key_offset = p.key_offset;
  r.feed_forward = {p.feed_forward.expand.weight, p.feed_forward.expand.bias, p.feed_forward.contract.weight,
                    p.feed_forward.contract.bias};
  Tensor<double, 3> y = nan_tensor<double>(x.extents()[0], x.extents()[1], x.extents()[2]);
  reference::chela_block(r, x, y);
  return y;
}

template <class MemoryShape>
void set_kernel(MemoryShape& s, Index length) {
  if constexpr (requires { s.kernel.length; }) s.kernel.length = length;
  if constexpr (requires { s.kernel.sub_width; }) s.kernel.sub_width = 2;
  if constexpr (requires { s.kernel.averages; }) s.kernel.averages = 3;
}

/// Every combination of the run-time policies, one entry after the other.
template <class Block>
std::vector<typename Block::Shape> small_shapes() {
  std::vector<typename Block::Shape> shapes;
  int turn = 0;
  for (const bool pre_norm : {true, false})
    for (const Span span : {Span::causal, Span::bidirectional})
      for (const FeedForwardKind kind : {FeedForwardKind::none, FeedForwardKind::silu, FeedForwardKind::swiglu}) {
        typename Block::Shape s;
        s.width = 6, s.heads = 2, s.key_dim = 3, s.value_dim = 4, s.span = span, s.pre_norm = pre_norm;
        s.epsilon = 0.1;  // the smoother, the better differences do
        s.feed_forward.kind = kind, s.feed_forward.hidden = 5;
        constexpr NormKind norms[] = {NormKind::layer, NormKind::rms, NormKind::scale, NormKind::none};
        s.norm = norms[turn % 4], s.head_norm = norms[(turn + 1) % 4];
        set_kernel(s.memory, 4 + turn % 5);  // shorter and longer than the sequences
        ++turn;
        shapes.push_back(s);
      }
  return shapes;
}

template <class Shape>
void describe(std::ostream& out, const Shape& s) {
  out << (s.pre_norm ? "pre" : "post") << "-norm " << int(s.norm) << " head norm " << int(s.head_norm) << " span "
      << int(s.span) << " feed-forward " << int(s.feed_forward.kind);
}

}  // namespace chela::test
