#pragma once
// Training and decoding of a language model on the CPU. With
//
//   using Model = chela::LanguageModel<chela::ChelaBlock<>>;
//   using Run = chela::cpu::Compute<Model>;
//
// the parameters live in a flat buffer of parameter_count<Model>(shape) elements, seen through bind_parameters<Model>.
// Head, softmax and loss are taken one block of rows at a time.
#include <numeric>

#include "chela/cpu/model/cross_entropy.hpp"
#include "chela/cpu/model/stack.hpp"
#include "chela/model/language_model.hpp"

namespace chela::cpu {

template <class Block>
struct Compute<LanguageModel<Block>> {
  using Model = LanguageModel<Block>;
  using Stacked = Compute<Stack<Block>>;
  using Shape = typename Model::Shape;
  template <class A>
  using Parameters = typename Model::template Parameters<A>;
  template <class T>
  using Given = std::type_identity_t<T>;

  template <class A>
  struct Cache {
    typename Stacked::template Cache<A> stack;
    Tensor<A, 1> head;  ///< activations and gradients of the head
    std::vector<double> losses;
  };

  template <class A>
  using Prepared = typename Stacked::template Prepared<A>;

  template <class A>
  struct State : Stacked::template State<A> {
    using Stacked::template State<A>::State;
  };

  /// The mean cross-entropy of `targets`, [batch, token] like `tokens`, in nats, and its gradients, which are
  /// overwritten. Tokens are of any integer type. The cache is reused by later calls; it grows with the sizes and never
  /// shrinks.
  template <class A, class Token, Executor E>
  static Status loss_and_gradients(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                                   Given<TensorView<Token, 2>> targets, Cache<A>& cache,
                                   const Given<Parameters<A>>& grad, double& loss, const E& executor) {
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, true, cache, pass, executor); !bad.ok()) return bad;
    if (Status bad = check_targets(s, tokens, targets); !bad.ok()) return bad;
    const TensorView<A, 2> grad_last = rowwise::flat_rows(
        Stacked::template grad_last<A>(s, tokens.extents[0], tokens.extents[1], cache.stack), s.block.width);
    const Index counted = counted_targets(targets);
    const Norm::Shape norm_shape = s.norm_shape();
    loss =
        head_loss(s, p, pass, targets, A(1) / A(std::max<Index>(counted, 1)), cache, executor, [&](const auto& part) {
          const TensorView<A, 2> grad_h = part.rows(pass.grad_h);
          if (s.tied)
            rowwise::project<A>(part.logits, p.embedding, {}, grad_h);
          else
            rowwise::project_back<A>(part.logits, p.head.weight, grad_h);
          A* sums = &pass.partial(part.block, 0);
          std::fill_n(sums, 2 * s.block.width, A(0));
          rowwise::norm_backward<A>(norm_shape, p.norm, part.rows(pass.x), &pass.statistics(part.first, 0, 0), grad_h,
                                    part.rows(grad_last), false, sums, sums + s.block.width);
        });
    loss /= double(std::max<Index>(counted, 1));

    using Job = rowwise::WeightGradient<A>;
    if (s.tied) {
      rowwise::weight_gradients<A>({Job{pass.logits, pass.h, grad.embedding, {}}}, executor);
    } else {
      rowwise::weight_gradients<A>({Job{pass.h, pass.logits, grad.head.weight, {}}}, executor);
      std::fill_n(grad.embedding.data, grad.embedding.size(), A(0));
    }
    if (grad.norm.gain.present())
      rowwise::sum_partials<A>(rowwise::columns(pass.partial, 0, grad.norm.gain.extents[0]), grad.norm.gain, executor);
    if (grad.norm.bias.present())
      rowwise::sum_partials<A>(rowwise::columns(pass.partial, s.block.width, s.block.width), grad.norm.bias, executor);
    return Stacked::template backward<A>(s, p, tokens, cache.stack, grad, executor);
  }

  /// The loss alone, with the activations of one block at a time.
  template <class A, class Token, Executor E>
  static Status loss(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                     Given<TensorView<Token, 2>> targets, Cache<A>& cache, double& loss, const E& executor) {
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, false, cache, pass, executor); !bad.ok()) return bad;
    if (Status bad = check_targets(s, tokens, targets); !bad.ok()) return bad;
    loss = head_loss(s, p, pass, targets, A(0), cache, executor, [](const auto&) {});
    loss /= double(std::max<Index>(counted_targets(targets), 1));
    return {};
  }

  /// Logits [batch, token, vocabulary], contiguous, of every position.
  template <class A, class Token, Executor E>
  static Status logits(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                       Given<TensorView<A, 3>> logits, Cache<A>& cache, const E& executor) {
    if (!has_extents(logits, tokens.extents[0], tokens.extents[1], s.vocabulary) || !writable(logits))
      return {Code::bad_shape, "logits must be [batch, token, vocabulary] with data"};
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, false, cache, pass, executor); !bad.ok()) return bad;
    const TensorView<A, 2> out = rowwise::flat_rows(logits, s.vocabulary);
    rowwise::for_each_row_block(pass.x.extents[0], executor, [&](Index first, Index count, int, Index) {
      head_rows<A>(s, p, pass, first, count, rowwise::row_range(out, first, count));
    });
    return {};
  }

  /// What decoding needs of the parameters besides themselves; to be made again when they change.
  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E& executor) {
    return Stacked::template prepare<A>(s, p, executor);
  }

  /// One token per sequence: `tokens` [batch], `logits` [batch, vocabulary] of the next. `state` begins as
  /// State<A>(shape, batch) and has seen all tokens so far.
  template <class A, class Token, Executor E>
  static Status step(const Shape& s, const Given<Parameters<const A>>& p, const Given<Prepared<A>>& prepared,
                     TensorView<Token, 1> tokens, Given<TensorView<A, 2>> logits, State<A>& state, const E& executor) {
    if (!has_extents(logits, tokens.extents[0], s.vocabulary) || !writable(logits) || !unit_last_stride(logits))
      return {Code::bad_shape, "logits must be [batch, vocabulary] with data and a unit last stride"};
    TensorView<A, 2> last;
    if (Status bad = Stacked::template step<A>(s, p, prepared, tokens, state, last, executor); !bad.ok()) return bad;
    rowwise::for_each_row_block(tokens.extents[0], executor, [&](Index first, Index count, int, Index) {
      const TensorView<A, 2> x = rowwise::row_range(last, first, count);
      rowwise::norm<A>(s.norm_shape(), p.norm, x, x, nullptr);
      head<A>(s, p, x, rowwise::row_range(logits, first, count));
    });
    return {};
  }

 private:
  /// Rows [row, ...] of the head, all but x in the cache's `head`.
  template <class A>
  struct Pass {
    TensorView<A, 2> x;           ///< X_last
    TensorView<A, 2> h, grad_h;   ///< [row, width] H
    TensorView<A, 2> logits;      ///< [row, vocabulary], later their gradient; without gradients one block per worker
    TensorView<A, 3> statistics;  ///< [row, 1, 2]
    TensorView<A, 2> partial;     ///< [block of rows, gain | bias]
    bool keep = false;
  };

  /// One block of rows whose logits hold their gradient.
  template <class A>
  struct Part {
    Index first, count, block;
    TensorView<A, 2> logits;
    TensorView<A, 2> rows(TensorView<A, 2> view) const { return rowwise::row_range(view, first, count); }
  };

  template <class A, class Token, Executor E>
  static Status forward(const Shape& s, const Parameters<const A>& p, TensorView<Token, 2> tokens, bool keep,
                        Cache<A>& cache, Pass<A>& pass, const E& executor) {
    TensorView<A, 3> last;
    if (Status bad = Stacked::template forward<A>(s, p, tokens, keep, cache.stack, last, executor); !bad.ok())
      return bad;
    const Index rows = tokens.extents[0] * tokens.extents[1], blocks = ceil_div(rows, rowwise::row_block);
    pass = detail::lay_out(cache.head, [&](auto take) {
      Pass<A> made;
      made.h = take(rows, s.block.width), made.grad_h = take(keep ? rows : 0, s.block.width);
      made.logits = take(keep ? rows : executor.workers() * rowwise::row_block, s.vocabulary);
      made.statistics = take(rows, 1, 2);
      made.partial = take(keep ? blocks : 0, 2 * s.block.width);
      return made;
    });
    pass.x = rowwise::flat_rows(last, s.block.width);
    pass.keep = keep;
    return {};
  }

  /// Logits of rows of H.
  template <class A>
  static void head(const Shape& s, const Parameters<const A>& p, TensorView<const A, 2> h, TensorView<A, 2> logits) {
    if (s.tied)
      rowwise::project_back<A>(h, p.embedding, logits);
    else
      rowwise::project<A>(h, p.head.weight, {}, logits);
  }

  template <class A>
  static void head_rows(const Shape& s, const Parameters<const A>& p, const Pass<A>& pass, Index first, Index count,
                        TensorView<A, 2> logits) {
    const auto h = rowwise::row_range(pass.h, first, count);
    rowwise::norm<A>(s.norm_shape(), p.norm, rowwise::row_range(pass.x, first, count), h,
                     &pass.statistics(first, 0, 0));
    head<A>(s, p, h, logits);
  }

  /// The sum of the losses, block by block of rows; `then(part)` runs on each block if gradients, times `factor`, are
  /// wanted.
  template <class A, class Token, Executor E, class Then>
  static double head_loss(const Shape& s, const Parameters<const A>& p, const Pass<A>& pass,
                          TensorView<Token, 2> targets, A factor, Cache<A>& cache, const E& executor,
                          const Then& then) {
    const Index rows = pass.x.extents[0];
    cache.losses.assign(std::size_t(ceil_div(rows, rowwise::row_block)), 0.0);
    rowwise::for_each_row_block(rows, executor, [&](Index first, Index count, int worker, Index block) {
      const Index place = pass.keep ? first : Index(worker) * rowwise::row_block;
      const Part<A> part{first, count, block, rowwise::row_range(pass.logits, place, count)};
      head_rows<A>(s, p, pass, first, count, part.logits);
      double sum = 0;
      for (Index r = 0; r < count; ++r) {
        const auto target = targets((first + r) / targets.extents[1], (first + r) % targets.extents[1]);
        A* row = &part.logits(r, 0);
        if (std::int64_t(target) >= 0)
          sum += rowwise::cross_entropy(row, s.vocabulary, Index(target), factor);
        else
          std::fill_n(row, s.vocabulary, A(0));
      }
      cache.losses[std::size_t(block)] = sum;
      if (pass.keep) then(part);
    });
    return std::accumulate(cache.losses.begin(), cache.losses.end(), 0.0);
  }

  template <class Token>
  static Index counted_targets(TensorView<Token, 2> targets) {
    Index count = 0;
    for (Index b = 0; b < targets.extents[0]; ++b)
      for (Index t = 0; t < targets.extents[1]; ++t) count += std::int64_t(targets(b, t)) >= 0;
    return count;
  }

  template <class Token>
  static Status check_targets(const Shape& s, TensorView<Token, 2> tokens, TensorView<Token, 2> targets) {
    if (!same_extents(tokens, targets) || !readable(targets))
      return {Code::bad_shape, "targets must have the extents of tokens, with data"};
    for (Index b = 0; b < targets.extents[0]; ++b)
      for (Index t = 0; t < targets.extents[1]; ++t)
        if (std::int64_t(targets(b, t)) >= s.vocabulary)
          return {Code::bad_value, "targets must be less than the vocabulary; below zero they are not counted"};
    return {};
  }
};

}  // namespace chela::cpu
