#pragma once
// Embedding and blocks on the CPU, forward and backward, up to the input of the last norm.
#include <type_traits>
#include <vector>

#include "chela/cpu/block/chela.hpp"
#include "chela/model/stack.hpp"

namespace chela::cpu {

template <class Block>
struct Compute<Stack<Block>> {
  using Run = Compute<Block>;
  using Shape = typename Stack<Block>::Shape;
  template <class A>
  using Parameters = typename Stack<Block>::template Parameters<A>;
  template <class T>
  using Given = std::type_identity_t<T>;

  template <class A>
  struct Cache {
    std::vector<Tensor<A, 1>> inputs;  ///< of each block, and the output of the last: [row, width]
    std::vector<typename Run::template Cache<A>> blocks;
    typename Run::template Scratch<A> scratch;
    Tensor<A, 1> gradients[2];  ///< [row, width], by turns
  };

  template <class A>
  struct Prepared {
    std::vector<typename Run::template Prepared<A>> blocks;
  };

  template <class A>
  struct State {
    std::vector<typename Run::template State<A>> blocks;
    Tensor<A, 1> inputs[2];  ///< of the token at work
    State() = default;
    State(const Shape& s, Index batch) {
      for (Index i = 0; i < s.layers; ++i) blocks.emplace_back(s.block_shape(), batch);
    }
    std::size_t bytes() const {
      std::size_t sum = 0;
      for (const auto& block : blocks) sum += block.bytes();
      return sum;
    }
  };

  /// X_last [batch, token, width] in the cache's memory. Without `keep`, no backward pass follows, and one block's
  /// activations are held at a time.
  template <class A, class Token, Executor E>
  static Status forward(const Shape& s, const Parameters<const A>& p, TensorView<Token, 2> tokens, bool keep,
                        Cache<A>& cache, TensorView<A, 3>& last, const E& executor) {
    if (Status bad = check_tokens(s, tokens); !bad.ok()) return bad;
    const std::size_t layers = std::size_t(s.layers);
    cache.inputs.resize(std::max(cache.inputs.size(), keep ? layers + 1 : 2));
    cache.blocks.resize(std::max<std::size_t>(cache.blocks.size(), keep ? layers : 1));
    const auto input = [&](std::size_t i) {
      return detail::reserve(cache.inputs[keep ? i : i % 2], tokens.extents[0], tokens.extents[1], s.block.width);
    };
    embed(p.embedding, tokens, rowwise::flat_rows(input(0), s.block.width), executor);
    const auto block_shape = s.block_shape();
    for (std::size_t i = 0; i < layers; ++i)
      if (Status bad =
              Run::forward(block_shape, p.blocks[i], input(i), input(i + 1), cache.blocks[keep ? i : 0], executor);
          !bad.ok())
        return bad;
    last = input(layers);
    return {};
  }

  /// Where the gradient of X_last is to be written before `backward`.
  template <class A>
  static TensorView<A, 3> grad_last(const Shape& s, Index batch, Index tokens, Cache<A>& cache) {
    return detail::reserve(cache.gradients[s.layers % 2], batch, tokens, s.block.width);
  }

  /// Gradients of blocks (overwritten) and embedding (added to) of the pass that filled the cache, which kept.
  template <class A, class Token, Executor E>
  static Status backward(const Shape& s, const Parameters<const A>& p, TensorView<Token, 2> tokens, Cache<A>& cache,
                         const Parameters<A>& grad, const E& executor) {
    const auto view = [&](Tensor<A, 1>& memory) {
      return detail::reserve(memory, tokens.extents[0], tokens.extents[1], s.block.width);
    };
    const auto block_shape = s.block_shape();
    for (std::size_t i = std::size_t(s.layers); i-- > 0;)
      if (Status bad = Run::backward(block_shape, p.blocks[i], cache.blocks[i], view(cache.inputs[i]),
                                     view(cache.gradients[(i + 1) % 2]), view(cache.gradients[i % 2]), grad.blocks[i],
                                     cache.scratch, executor);
          !bad.ok())
        return bad;
    embed_backward<A>(rowwise::flat_rows(view(cache.gradients[0]), s.block.width), tokens, grad.embedding, executor);
    return {};
  }

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E& executor) {
    Prepared<A> prepared;
    for (const auto& block : p.blocks)
      prepared.blocks.push_back(Run::template prepare<A>(s.block_shape(), block, executor));
    return prepared;
  }

  /// X_last [batch, width] of one token per sequence, in the state's memory.
  template <class A, class Token, Executor E>
  static Status step(const Shape& s, const Parameters<const A>& p, const Prepared<A>& prepared,
                     TensorView<Token, 1> tokens, State<A>& state, TensorView<A, 2>& last, const E& executor) {
    const auto row = contiguous(tokens.data, tokens.extents[0], 1);
    TensorView<Token, 2> one_each = row;
    one_each.strides[0] = tokens.strides[0];
    if (Status bad = check_tokens(s, one_each); !bad.ok()) return bad;
    const std::size_t layers = std::size_t(s.layers);
    if (prepared.blocks.size() != layers || state.blocks.size() != layers)
      return {Code::bad_shape, "prepared and state must be made for this model's number of layers"};
    const auto input = [&](std::size_t i) {
      return detail::reserve(state.inputs[i % 2], tokens.extents[0], s.block.width);
    };
    embed(p.embedding, one_each, input(0), executor);
    const auto block_shape = s.block_shape();
    for (std::size_t i = 0; i < layers; ++i)
      if (Status bad = Run::step(block_shape, p.blocks[i], prepared.blocks[i], input(i), input(i + 1), state.blocks[i],
                                 executor);
          !bad.ok())
        return bad;
    last = input(layers);
    return {};
  }

 private:
  template <class Token>
  static Status check_tokens(const Shape& s, TensorView<Token, 2> tokens) {
    static_assert(std::is_integral_v<Token>,
                  "tokens are integers: std::uint8_t for bytes, std::int32_t for vocabularies");
    if (Status bad = Stack<Block>::check(s); !bad.ok()) return bad;
    if (!readable(tokens)) return {Code::bad_shape, "tokens need data and extents of zero or more"};
    for (Index b = 0; b < tokens.extents[0]; ++b)
      for (Index t = 0; t < tokens.extents[1]; ++t)
        if (std::int64_t(tokens(b, t)) < 0 || std::int64_t(tokens(b, t)) >= s.vocabulary)
          return {Code::bad_value, "tokens must be 0 or more and less than the vocabulary"};
    return {};
  }

  template <class A, class Token, Executor E>
  static void embed(TensorView<const A, 2> table, TensorView<Token, 2> tokens, TensorView<A, 2> x, const E& executor) {
    rowwise::for_each_row_block(x.extents[0], executor, [&](Index first, Index count, int, Index) {
      for (Index r = first; r < first + count; ++r)
        std::copy_n(&table(Index(tokens(r / tokens.extents[1], r % tokens.extents[1])), 0), x.extents[1], &x(r, 0));
    });
  }

  /// Each task owns some columns of the table and walks all rows, so that every sum is taken in the order of the
  /// tokens.
  template <class A, class Token, Executor E>
  static void embed_backward(TensorView<const A, 2> grad_x, TensorView<Token, 2> tokens, TensorView<A, 2> grad_table,
                             const E& executor) {
    constexpr Index column_run = 64;
    const Index width = grad_x.extents[1];
    executor.for_each(ceil_div(width, column_run), [&](Index task, int) {
      const Index begin = task * column_run, count = std::min(column_run, width - begin);
      for (Index r = 0; r < grad_x.extents[0]; ++r)
        rowwise::add_row<A>(count, rowwise::Same<A>{},
                            &grad_table(Index(tokens(r / tokens.extents[1], r % tokens.extents[1])), begin),
                            &grad_x(r, begin));
    });
  }
};

}  // namespace chela::cpu
