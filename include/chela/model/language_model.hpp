#pragma once
// A language model around any block: a stack of them and a head,
//
//   logits = H W,  H [batch, token, width] as in model/stack.hpp,  W = E^T when tied
//
// trained by the mean cross-entropy, in nats, of the target of each position: bits per token are that over ln 2.
// Targets below zero (signed token types) are not counted.
#include "chela/block/projection.hpp"
#include "chela/model/stack.hpp"

namespace chela {

template <class BlockModule>
struct LanguageModel {
  using Block = BlockModule;

  struct Shape : Stack<Block>::Shape {
    bool tied = true;  ///< whether the head reuses the embedding's matrix

    constexpr Projection::Shape head_shape() const {
      return {this->block.width, this->vocabulary, false, this->block.deviation};
    }
  };

  template <class A>
  struct Parameters : Stack<Block>::template Parameters<A> {
    Projection::Parameters<A> head;  ///< [width, vocabulary], or absent when tied
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    Stack<Block>::visit(s, f, p...);
    if (!s.tied) visit_nested<Projection>("head", s.head_shape(), f, p.head...);
  }

  static Status check(const Shape& s) { return Stack<Block>::check(s); }
};

}  // namespace chela
