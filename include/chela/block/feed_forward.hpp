#pragma once
// The feed-forward layer behind each block:
//
//   silu     F(x) = SiLU(x W1 + b1) W2 + b2
//   swiglu   F(x) = (SiLU(x Wg + bg) * (x Wu + bu)) W2 + b2        arXiv 2002.05202; [Wg | Wu] is one matrix here
//   none     F(x) = 0
//
// The block adds the residual.
#include "chela/block/projection.hpp"

namespace chela {

enum class FeedForwardKind { none, silu, swiglu };

/// Parameters of the layer, by the module convention of block/parameters.hpp.
struct FeedForward {
  struct Shape {
    FeedForwardKind kind = FeedForwardKind::swiglu;
    Index width = 0;   ///< of inputs and outputs
    Index hidden = 0;  ///< entries of the hidden layer
    bool bias = true;
    double deviation = 0.02;         ///< of the initial expanding weight
    double output_deviation = 0.02;  ///< of the initial contracting weight

    constexpr Index expanded() const { return kind == FeedForwardKind::swiglu ? 2 * hidden : hidden; }
    constexpr Projection::Shape expand() const { return {width, expanded(), bias, deviation}; }
    constexpr Projection::Shape contract() const { return {hidden, width, bias, output_deviation}; }
  };

  template <class A>
  struct Parameters {
    Projection::Parameters<A> expand;    ///< [width, hidden], or [width, gate | up] for swiglu
    Projection::Parameters<A> contract;  ///< [hidden, width]
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    if (s.kind == FeedForwardKind::none) return;
    visit_nested<Projection>("expand", s.expand(), f, p.expand...);
    visit_nested<Projection>("contract", s.contract(), f, p.contract...);
  }

  /// Refuses shapes that no layer can have.
  static constexpr Status check(const Shape& s) {
    return require(
        s.kind == FeedForwardKind::none || (s.width > 0 && s.hidden > 0), Code::bad_shape,
        "a feed-forward layer needs a width and a hidden size of at least 1; FeedForwardKind::none is no layer");
  }
};

}  // namespace chela
