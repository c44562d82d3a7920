#pragma once
// Mixers: how a block's queries, keys and values [batch, token, head, dim] become outputs. A mixer is a module (see
// block/parameters.hpp) whose Shape has
//
//   Index heads, key_dim, value_dim; Span span; Index width    filled in by the block that holds it
//
// and which a backend computes (`cpu/block/mixer.hpp`). It may have parameters of its own and read the block's input.
#include "chela/attention/linear.hpp"
#include "chela/block/parameters.hpp"

namespace chela {

/// CHELA's mixer: linear attention without decay (arXiv 2406.08128, section 3.2). It has no parameters.
struct LinearAttentionMixer {
  struct Shape {
    Index heads = 0, key_dim = 0, value_dim = 0;
    Span span = Span::causal;
    Index width = 0;  ///< of the block's input; not used by this mixer
  };

  template <class A>
  struct Parameters {};

  template <class F, class... P>
  static void visit(const Shape&, F&&, P&...) {}
};

}  // namespace chela
