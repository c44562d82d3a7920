#pragma once
// What language models and classifiers have in common: tokens [batch, token] -> embedding -> blocks -> norm.
//
//   X_0 = E[token],  X_{i+1} = Block_i(X_i),  H = Norm(X_last)
#include <type_traits>
#include <vector>

#include "chela/block/norm.hpp"

namespace chela {

template <class BlockModule>
struct Stack {
  using Block = BlockModule;

  struct Shape {
    Index vocabulary = 256;            ///< tokens are 0 .. vocabulary - 1
    Index layers = 1;                  ///< blocks
    NormKind norm = NormKind::layer;   ///< after the last block
    typename Block::Shape block = {};  ///< of every block; residual_branches is taken from `layers`

    typename Block::Shape block_shape() const {
      typename Block::Shape s = block;
      s.residual_branches = 2 * double(layers > 0 ? layers : 1);
      return s;
    }
    constexpr Norm::Shape norm_shape() const { return {norm, block.width, 1, block.epsilon}; }
  };

  template <class A>
  struct Parameters {
    TensorView<A, 2> embedding;  ///< [vocabulary, width]
    std::vector<typename Block::template Parameters<A>> blocks;
    Norm::Parameters<A> norm;
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    f(ParameterInfo{"embedding", {s.vocabulary, s.block.width}, normal_init(0, s.block.deviation), true},
      p.embedding...);
    (resize_blocks(p, s.layers), ...);
    for (std::size_t i = 0; i < std::size_t(s.layers); ++i)
      visit_nested<Block>("blocks." + std::to_string(i), s.block_shape(), f, p.blocks[i]...);
    visit_nested<Norm>("norm", s.norm_shape(), f, p.norm...);
  }

  /// Refuses shapes that no stack can have.
  static Status check(const Shape& s) {
    return first_failure(require(s.vocabulary > 0, Code::bad_shape, "vocabulary must be at least 1"),
                         require(s.layers >= 0, Code::bad_shape, "layers must be zero or more"), Block::check(s.block));
  }

 private:
  template <class P>
  static void resize_blocks(P& parameters, Index layers) {
    if constexpr (!std::is_const_v<P>) parameters.blocks.resize(std::size_t(layers));
  }
};

}  // namespace chela
