#pragma once
// The CHELA block and its layers by their equations, in double, one entry at a time; math in chela/block/chela.hpp.
// Absent views are zero or left out.
#include <algorithm>
#include <cmath>

#include "chela/core/tensor.hpp"
#include "chela/reference/linear.hpp"
#include "chela/reference/long.hpp"
#include "chela/reference/short.hpp"

namespace chela::reference {

inline double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }
inline double silu(double a) { return a * sigmoid(a); }

/// y = x W + bias [row, out], through SiLU if wanted.
inline void projection(TensorView<const double, 2> x, TensorView<const double, 2> weight,
                       TensorView<const double, 1> bias, bool through_silu, TensorView<double, 2> y) {
  for (Index r = 0; r < y.extents[0]; ++r)
    for (Index o = 0; o < y.extents[1]; ++o) {
      double sum = bias.present() ? bias(o) : 0.0;
      for (Index i = 0; i < x.extents[1]; ++i) sum += x(r, i) * weight(i, o);
      y(r, o) = through_silu ? silu(sum) : sum;
    }
}

enum class NormKind { none, layer, rms };

/// Parts of `width` entries of each row; gain and bias have one entry per entry of a row.
inline void norm(NormKind kind, Index width, double epsilon, TensorView<const double, 2> x,
                 TensorView<const double, 1> gain, TensorView<const double, 1> bias, TensorView<double, 2> y) {
  for (Index r = 0; r < x.extents[0]; ++r)
    for (Index first = 0; first < x.extents[1]; first += width) {
      double mean = 0, square = 0;
      for (Index i = first; i < first + width && kind == NormKind::layer; ++i) mean += x(r, i) / double(width);
      for (Index i = first; i < first + width; ++i) square += (x(r, i) - mean) * (x(r, i) - mean) / double(width);
      for (Index i = first; i < first + width; ++i)
        y(r, i) = kind == NormKind::none
                      ? x(r, i)
                      : (x(r, i) - mean) / std::sqrt(square + epsilon) * gain(i) + (bias.present() ? bias(i) : 0.0);
    }
}

struct FeedForwardWeights {
  TensorView<const double, 2>
      expand;  ///< [width, hidden], or [width, gate | up]: then twice as wide as `contract` is high
  TensorView<const double, 1> expand_bias;
  TensorView<const double, 2> contract;  ///< [hidden, width]; absent for no layer
  TensorView<const double, 1> contract_bias;
};

/// y = residual + F(x).
inline void feed_forward(TensorView<const double, 2> x, TensorView<const double, 2> residual,
                         const FeedForwardWeights& w, TensorView<double, 2> y) {
  const Index rows = x.extents[0], hidden = w.contract.present() ? w.contract.extents[0] : 0;
  Tensor<double, 2> expanded(rows, hidden > 0 ? w.expand.extents[1] : 0), inner(rows, hidden);
  if (hidden > 0) projection(x, w.expand, w.expand_bias, false, expanded);
  for (Index r = 0; r < rows; ++r)
    for (Index i = 0; i < hidden; ++i)
      inner(r, i) = silu(expanded(r, i)) * (w.expand.extents[1] == 2 * hidden ? expanded(r, hidden + i) : 1.0);
  if (hidden > 0) projection(inner, w.contract, w.contract_bias, false, y);
  for (Index r = 0; r < rows; ++r)
    for (Index i = 0; i < y.extents[1]; ++i) y(r, i) = residual(r, i) + (hidden > 0 ? y(r, i) : 0.0);
}

struct NormWeights {
  NormKind kind = NormKind::none;
  TensorView<const double, 1> gain, bias;
};

/// All that a block computes with. Letters as in chela/block/chela.hpp.
struct BlockProblem {
  Index heads = 1;
  bool pre_norm = true, bidirectional = false;
  double epsilon = 1e-5;
  NormWeights norm, head_norm, feed_forward_norm;
  TensorView<const double, 2> short_taps;  ///< [width, short width]; absent for no short stage and no SiLU
  TensorView<const double, 1> short_bias;
  TensorView<const double, 2> taps, back_taps;  ///< [width, length]; without taps, Z is the block's normed input
  TensorView<const double, 1> skip;
  TensorView<const double, 2> wz, wg, wh, wp, wv, wo;  ///< wh and wp present: the update gate
  TensorView<const double, 1> bz, bg, bh, bp, bv, bo;
  TensorView<const double, 1> query_scale, query_offset, key_scale, key_offset;
  FeedForwardWeights feed_forward;
};

namespace detail {

/// Z of a block's normed input, both [batch, token, width].
inline void memory(const BlockProblem& p, TensorView<const double, 3> x, TensorView<double, 3> z) {
  Tensor<double, 3> inner(x.extents[0], x.extents[1], x.extents[2]);
  for (Index b = 0; b < x.extents[0]; ++b)
    for (Index t = 0; t < x.extents[1]; ++t)
      for (Index d = 0; d < x.extents[2]; ++d) inner(b, t, d) = z(b, t, d) = x(b, t, d);
  if (p.short_taps.present()) short_conv(x, p.short_taps, p.short_bias, {}, true, inner, {});
  if (p.taps.present()) long_conv(inner, p.taps, p.back_taps, p.skip, {}, z, {});
}

/// O before its norm, [row, head * value_dim].
inline Tensor<double, 2> attention(const BlockProblem& p, Index batch, Index tokens, TensorView<const double, 2> zs,
                                   TensorView<const double, 2> v) {
  const Index key_dim = zs.extents[1] / p.heads, value_dim = v.extents[1] / p.heads;
  Tensor<double, 2> q(zs.extents[0], zs.extents[1]), k(zs.extents[0], zs.extents[1]), o(v.extents[0], v.extents[1]);
  for (Index r = 0; r < zs.extents[0]; ++r)
    for (Index i = 0; i < zs.extents[1]; ++i) {
      q(r, i) = p.query_scale(i) * zs(r, i) + p.query_offset(i);
      k(r, i) = p.key_scale(i) * zs(r, i) + p.key_offset(i);
    }
  const auto heads = [&](const double* data, Index dim) { return contiguous(data, batch, tokens, p.heads, dim); };
  linear_attention({heads(q.data(), key_dim), heads(k.data(), key_dim), heads(v.data, value_dim),
                    TensorView<const double, 4>{}, 1 / std::sqrt(double(key_dim)), p.bidirectional},
                   contiguous(o.data(), batch, tokens, p.heads, value_dim));
  return o;
}

}  // namespace detail

/// y = block(x), both [batch, token, width] and contiguous.
inline void chela_block(const BlockProblem& p, TensorView<const double, 3> x, TensorView<double, 3> y) {
  const Index batch = x.extents[0], tokens = x.extents[1], width = x.extents[2], rows = batch * tokens;
  const auto in = contiguous(x.data, rows, width);
  const auto out = contiguous(y.data, rows, width);
  const auto normed = [&](const NormWeights& n, TensorView<const double, 2> from) {
    Tensor<double, 2> to(rows, width);
    norm(n.kind, width, p.epsilon, from, n.gain, n.bias, to);
    return to;
  };
  const auto project = [&](TensorView<const double, 2> from, TensorView<const double, 2> w,
                           TensorView<const double, 1> b, bool through_silu) {
    Tensor<double, 2> to(rows, w.extents[1]);
    projection(from, w, b, through_silu, to);
    return to;
  };

  const Tensor<double, 2> n = normed(p.pre_norm ? p.norm : NormWeights{}, in);
  Tensor<double, 2> z(rows, width);
  detail::memory(p, contiguous(n.data(), batch, tokens, width), contiguous(z.data(), batch, tokens, width));
  const Tensor<double, 2> v = project(n, p.wv, p.bv, true);
  Tensor<double, 2> gated = detail::attention(p, batch, tokens, project(z, p.wz, p.bz, true), v);
  norm(p.head_norm.kind, v.extents()[1] / p.heads, p.epsilon, Tensor<double, 2>(gated), p.head_norm.gain,
       p.head_norm.bias, gated);
  const Tensor<double, 2> g = project(z, p.wg, p.bg, true);
  for (Index i = 0; i < gated.size(); ++i) gated.data()[i] *= g.data()[i];

  Tensor<double, 2> r = project(gated, p.wo, p.bo, false);
  if (p.wh.present()) {
    const Tensor<double, 2> h = project(z, p.wh, p.bh, false), gate = project(z, p.wp, p.bp, false);
    for (Index i = 0; i < r.size(); ++i) {
      const double keep = sigmoid(gate.data()[i]);
      r.data()[i] = keep * silu(h.data()[i] + r.data()[i]) + (1 - keep) * in.data[i];
    }
  } else {
    for (Index i = 0; i < r.size(); ++i) r.data()[i] += in.data[i];
  }

  if (p.pre_norm) {
    feed_forward(normed(p.feed_forward_norm, r), r, p.feed_forward, out);
  } else {
    const Tensor<double, 2> inner = normed(p.norm, r);
    feed_forward(inner, inner, p.feed_forward, out);
    norm(p.feed_forward_norm.kind, width, p.epsilon, Tensor<double, 2>(normed({}, out)), p.feed_forward_norm.gain,
         p.feed_forward_norm.bias, out);
  }
}

}  // namespace chela::reference
