#pragma once
// The CHELA block (arXiv 2406.08128, section 3.3): Mega's shell (arXiv 2209.10655, section 3.4) around any memory and
// any mixer. For X in R^{batch x token x width}, with N = Norm(X) when `pre_norm`, else N = X:
//
//   Z  = Memory(N)                                             [batch, token, width]
//   Zs = SiLU(Z Wz + bz)                                       [batch, token, head * key_dim]
//   Q  = kq * Zs + mq,  K = kk * Zs + mk                       scale and offset per dimension
//   V  = SiLU(N Wv + bv)                                       [batch, token, head * value_dim]
//   O  = HeadNorm(Mixer(Q, K, V))                              each head on its own
//   G  = SiLU(Z Wg + bg)                                       [batch, token, head * value_dim]
//   GatedResidual   R = (G * O) Wo + bo + X
//   UpdateGate      H = SiLU(Z Wh + (G * O) Wo + bh),  P = sigmoid(Z Wp + bp),  R = P * H + (1 - P) * X
//   pre_norm        Y = R + FeedForward(Norm'(R))
//   else            Y = Norm'(R' + FeedForward(R')),  R' = Norm(R);  without a feed-forward layer Y = R'
//
// Wz, Wg, Wh and Wp read the same Z and are one matrix [Wz | Wg | Wh | Wp].
#include <cmath>

#include "chela/block/feed_forward.hpp"
#include "chela/block/memory.hpp"
#include "chela/block/mixer.hpp"
#include "chela/block/norm.hpp"

namespace chela {

/// Output policy of CHELA: the gated attention output is added to the input.
struct GatedResidual {
  static constexpr bool update_gate = false;
};

/// Output policy of Mega: a learned gate chooses between a candidate and the input.
struct UpdateGate {
  static constexpr bool update_gate = true;
};

template <class MemoryModule = ShortLongMemory<ExplicitKernel, 4>, class MixerModule = LinearAttentionMixer,
          class OutputPolicy = GatedResidual>
struct ChelaBlock {
  using Memory = MemoryModule;
  using Mixer = MixerModule;
  using Output = OutputPolicy;

  struct Shape {
    Index width = 0;      ///< D, the width of inputs and outputs
    Index heads = 1;      ///< H
    Index key_dim = 0;    ///< K, per head
    Index value_dim = 0;  ///< V, per head
    Span span = Span::causal;
    bool pre_norm = true;
    NormKind norm = NormKind::layer;       ///< of the block's and the feed-forward layer's input (pre) or output (post)
    NormKind head_norm = NormKind::rms;    ///< of attention outputs
    double epsilon = 1e-5;                 ///< of both norms
    typename Memory::Shape memory = {};    ///< width and span are taken from the block
    typename Mixer::Shape mixer = {};      ///< heads, dims, span and width are taken from the block
    FeedForward::Shape feed_forward = {};  ///< width is taken from the block
    double deviation = 0.02;               ///< of initial weights, as in Mega; width^-1/2 suits narrow models better
    /// Residual branches of a stack, 2 per block: their output weights begin smaller by residual_branches^-1/2, so that
    /// the sum of a deep stack begins at the scale of one branch.
    double residual_branches = 1;

    constexpr Index keys() const { return heads * key_dim; }
    constexpr Index values() const { return heads * value_dim; }
    constexpr Norm::Shape norm_shape() const { return {norm, width, 1, epsilon}; }
    constexpr Norm::Shape head_norm_shape() const { return {head_norm, value_dim, heads, epsilon}; }
    constexpr typename Memory::Shape memory_shape() const {
      typename Memory::Shape s = memory;
      s.width = width, s.span = span;
      return s;
    }
    constexpr typename Mixer::Shape mixer_shape() const {
      typename Mixer::Shape s = mixer;
      s.heads = heads, s.key_dim = key_dim, s.value_dim = value_dim, s.span = span, s.width = width;
      return s;
    }
    FeedForward::Shape feed_forward_shape() const {
      FeedForward::Shape s = feed_forward;
      s.width = width, s.deviation = deviation, s.output_deviation = deviation / std::sqrt(residual_branches);
      return s;
    }
    constexpr Projection::Shape from_memory_shape() const {
      return {width, keys() + values() + (Output::update_gate ? 2 * width : 0), true, deviation};
    }
    constexpr Projection::Shape value_shape() const { return {width, values(), true, deviation}; }
    /// The update gate's bias bh is among those of [Wz | Wg | Wh | Wp].
    Projection::Shape output_shape() const {
      return {values(), width, !Output::update_gate, deviation / std::sqrt(residual_branches)};
    }
  };

  template <class A>
  struct Parameters {
    Norm::Parameters<A> norm;
    typename Memory::template Parameters<A> memory;
    Projection::Parameters<A> from_memory;                              ///< [Wz | Wg], or [Wz | Wg | Wh | Wp]
    Projection::Parameters<A> value;                                    ///< Wv, bv
    TensorView<A, 1> query_scale, query_offset, key_scale, key_offset;  ///< kq, mq, kk, mk: [head * key_dim]
    typename Mixer::template Parameters<A> mixer;
    Norm::Parameters<A> head_norm;
    Projection::Parameters<A> output;  ///< Wo, bo
    Norm::Parameters<A> feed_forward_norm;
    FeedForward::Parameters<A> feed_forward;
  };

  /// Scales of queries and keys begin around 1 [choice]: Mega's normal(0, 0.02) is made for a softmax, and linear
  /// attention would start with outputs below the epsilon of the norm that follows.
  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    visit_nested<Norm>("norm", s.norm_shape(), f, p.norm...);
    visit_nested<Memory>("memory", s.memory_shape(), f, p.memory...);
    visit_nested<Projection>("from_memory", s.from_memory_shape(), f, p.from_memory...);
    visit_nested<Projection>("value", s.value_shape(), f, p.value...);
    f(ParameterInfo{"query_scale", {s.keys()}, normal_init(1, 0.02)}, p.query_scale...);
    f(ParameterInfo{"query_offset", {s.keys()}}, p.query_offset...);
    f(ParameterInfo{"key_scale", {s.keys()}, normal_init(1, 0.02)}, p.key_scale...);
    f(ParameterInfo{"key_offset", {s.keys()}}, p.key_offset...);
    visit_nested<Mixer>("mixer", s.mixer_shape(), f, p.mixer...);
    visit_nested<Norm>("head_norm", s.head_norm_shape(), f, p.head_norm...);
    visit_nested<Projection>("output", s.output_shape(), f, p.output...);
    if (!has_feed_forward(s)) return;
    visit_nested<Norm>("feed_forward_norm", s.norm_shape(), f, p.feed_forward_norm...);
    visit_nested<FeedForward>("feed_forward", s.feed_forward_shape(), f, p.feed_forward...);
  }

  /// Refuses shapes that no block can have.
  static Status check(const Shape& s) {
    return first_failure(require(s.width > 0 && s.heads > 0 && s.key_dim > 0 && s.value_dim > 0, Code::bad_shape,
                                 "a block needs width, heads, key_dim and value_dim of at least 1"),
                         require(s.epsilon > 0, Code::bad_value, "epsilon must be positive: a row may be all zero"),
                         Memory::check(s.memory_shape()), FeedForward::check(s.feed_forward_shape()));
  }

  static constexpr bool has_feed_forward(const Shape& s) { return s.feed_forward.kind != FeedForwardKind::none; }
};

}  // namespace chela
