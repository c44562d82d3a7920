#pragma once
// A sequence classifier around any block, bidirectional ones as a rule: a stack of them, the mean over tokens and a
// head,
//
//   logits = mean_t H[:, t, :] W + b,  H [batch, token, width] as in model/stack.hpp
//
// trained by the mean cross-entropy, in nats, of the labels. Labels below zero (signed types) are not counted.
#include "chela/block/projection.hpp"
#include "chela/model/stack.hpp"

namespace chela {

template <class BlockModule>
struct Classifier {
  using Block = BlockModule;

  struct Shape : Stack<Block>::Shape {
    Index classes = 2;

    constexpr Projection::Shape head_shape() const { return {this->block.width, classes, true, this->block.deviation}; }
  };

  template <class A>
  struct Parameters : Stack<Block>::template Parameters<A> {
    Projection::Parameters<A> head;  ///< [width, classes]
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    Stack<Block>::visit(s, f, p...);
    visit_nested<Projection>("head", s.head_shape(), f, p.head...);
  }

  static Status check(const Shape& s) {
    return first_failure(Stack<Block>::check(s), require(s.classes > 0, Code::bad_shape, "classes must be at least 1"));
  }
};

}  // namespace chela
