#pragma once
// A language model around any block: tokens [batch, token] -> embedding -> blocks -> norm -> logits over the vocabulary.
//
//   X_0 = E[token],  X_{i+1} = Block_i(X_i),  logits = Norm(X_last) W,  W = E^T when tied
//
// trained by the mean cross-entropy, in nats, of the target of each position: bits per token are that over ln 2. Targets below
// zero (signed token types) are not counted.
#include <type_traits>
#include <vector>

#include "chela/block/norm.hpp"
#include "chela/block/projection.hpp"

namespace chela {

template <class BlockModule>
struct LanguageModel {
  using Block = BlockModule;

  struct Shape {
    Index vocabulary = 256;  ///< tokens are 0 .. vocabulary - 1
    Index layers = 1;        ///< blocks
    bool tied = true;        ///< whether the head reuses the embedding's matrix
    NormKind final_norm = NormKind::layer;
    typename Block::Shape block = {};  ///< of every block; residual_branches is taken from `layers`

    typename Block::Shape block_shape() const {
      typename Block::Shape s = block;
      s.residual_branches = 2 * double(layers);
      return s;
    }
    constexpr Norm::Shape norm_shape() const { return {final_norm, block.width, 1, block.epsilon}; }
    constexpr Projection::Shape head_shape() const { return {block.width, vocabulary, false, block.deviation}; }
  };

  template <class A>
  struct Parameters {
    TensorView<A, 2> embedding;  ///< [vocabulary, width]
    std::vector<typename Block::template Parameters<A>> blocks;
    Norm::Parameters<A> norm;
    Projection::Parameters<A> head;  ///< [width, vocabulary], or absent when tied
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    f(ParameterInfo{"embedding", {s.vocabulary, s.block.width}, normal_init(0, s.block.deviation), true},
      p.embedding...);
    (resize_blocks(p, s.layers), ...);
    for (std::size_t i = 0; i < std::size_t(s.layers); ++i)
      visit_nested<Block>("blocks." + std::to_string(i), s.block_shape(), f, p.blocks[i]...);
    visit_nested<Norm>("norm", s.norm_shape(), f, p.norm...);
    if (!s.tied) visit_nested<Projection>("head", s.head_shape(), f, p.head...);
  }

  /// Refuses shapes that no model can have.
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
