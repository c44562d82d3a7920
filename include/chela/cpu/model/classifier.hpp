#pragma once
// Training and use of a sequence classifier on the CPU. The parameters live in a flat buffer of
// parameter_count<Model>(shape) elements, seen through bind_parameters<Model>, with Model = chela::Classifier<Block>.
#include <span>

#include "chela/cpu/model/cross_entropy.hpp"
#include "chela/cpu/model/stack.hpp"
#include "chela/model/classifier.hpp"

namespace chela::cpu {

template <class Block>
struct Compute<Classifier<Block>> {
  using Model = Classifier<Block>;
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
  };

  /// The mean cross-entropy of `labels` [batch], in nats, and its gradients, which are overwritten. `tokens` [batch,
  /// token] and labels are of any integer types.
  template <class A, class Token, class Label, Executor E>
  static Status loss_and_gradients(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                                   TensorView<Label, 1> labels, Cache<A>& cache, const Given<Parameters<A>>& grad,
                                   double& loss, const E& executor) {
    if (Status bad = check_labels(s, tokens, labels); !bad.ok()) return bad;
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, true, cache, pass, executor); !bad.ok()) return bad;
    rowwise::project<A>(pass.pooled, p.head.weight, p.head.bias, pass.logits);
    loss = mean_loss(pass, labels, true);
    rowwise::weight_gradients<A>({{pass.pooled, pass.logits, grad.head.weight, grad.head.bias}}, executor);
    rowwise::project_back<A>(pass.logits, p.head.weight, pass.grad_pooled);
    for (A& value : std::span<A>(pass.grad_pooled.data, std::size_t(pass.grad_pooled.size()))) value /= A(pass.length);

    const Index length = tokens.extents[1], width = s.block.width;
    const TensorView<A, 2> grad_last =
        rowwise::flat_rows(Stacked::template grad_last<A>(s, tokens.extents[0], length, cache.stack), width);
    rowwise::for_each_row_block(grad_last.extents[0], executor, [&](Index first, Index count, int, Index block) {
      const auto dx = rowwise::row_range(grad_last, first, count);
      for (Index r = first; r < first + count; ++r)
        std::copy_n(&pass.grad_pooled(r / length, 0), width, &grad_last(r, 0));
      A* sums = &pass.partial(block, 0);
      std::fill_n(sums, 2 * width, A(0));
      rowwise::norm_backward<A>(s.norm_shape(), p.norm, rowwise::row_range(pass.x, first, count),
                                &pass.statistics(first, 0, 0), dx, dx, false, sums, sums + width);
    });
    if (grad.norm.gain.present())
      rowwise::sum_partials<A>(rowwise::columns(pass.partial, 0, grad.norm.gain.extents[0]), grad.norm.gain, executor);
    if (grad.norm.bias.present())
      rowwise::sum_partials<A>(rowwise::columns(pass.partial, width, width), grad.norm.bias, executor);
    std::fill_n(grad.embedding.data, grad.embedding.size(), A(0));
    return Stacked::template backward<A>(s, p, tokens, cache.stack, grad, executor);
  }

  /// The loss alone, with the activations of one block at a time.
  template <class A, class Token, class Label, Executor E>
  static Status loss(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                     TensorView<Label, 1> labels, Cache<A>& cache, double& loss, const E& executor) {
    if (Status bad = check_labels(s, tokens, labels); !bad.ok()) return bad;
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, false, cache, pass, executor); !bad.ok()) return bad;
    rowwise::project<A>(pass.pooled, p.head.weight, p.head.bias, pass.logits);
    loss = mean_loss(pass, labels, false);
    return {};
  }

  /// Logits [batch, classes] with a unit last stride; the largest is the model's answer.
  template <class A, class Token, Executor E>
  static Status logits(const Shape& s, const Given<Parameters<const A>>& p, TensorView<Token, 2> tokens,
                       Given<TensorView<A, 2>> logits, Cache<A>& cache, const E& executor) {
    if (!has_extents(logits, tokens.extents[0], s.classes) || !writable(logits) || !unit_last_stride(logits))
      return {Code::bad_shape, "logits must be [batch, classes] with data and a unit last stride"};
    Pass<A> pass;
    if (Status bad = forward(s, p, tokens, false, cache, pass, executor); !bad.ok()) return bad;
    rowwise::project<A>(pass.pooled, p.head.weight, p.head.bias, logits);
    return {};
  }

 private:
  template <class A>
  struct Pass {
    TensorView<A, 2> x, h;                 ///< [row, width] X_last and its norm
    TensorView<A, 2> pooled, grad_pooled;  ///< [batch, width]; the gradient is that of each token
    TensorView<A, 2> logits;               ///< [batch, classes], later their gradient
    TensorView<A, 3> statistics;           ///< [row, 1, 2]
    TensorView<A, 2> partial;              ///< [block of rows, gain | bias]
    Index length = 0;
  };

  template <class A, class Token, Executor E>
  static Status forward(const Shape& s, const Parameters<const A>& p, TensorView<Token, 2> tokens, bool keep,
                        Cache<A>& cache, Pass<A>& pass, const E& executor) {
    if (Status bad = Model::check(s); !bad.ok()) return bad;
    if (tokens.extents[1] < 1) return {Code::bad_shape, "a classifier needs at least one token: it takes their mean"};
    TensorView<A, 3> last;
    if (Status bad = Stacked::template forward<A>(s, p, tokens, keep, cache.stack, last, executor); !bad.ok())
      return bad;
    const Index batch = tokens.extents[0], length = tokens.extents[1], rows = batch * length, width = s.block.width;
    pass = detail::lay_out(cache.head, [&](auto take) {
      Pass<A> made;
      made.h = take(rows, width);
      made.pooled = take(batch, width), made.grad_pooled = take(batch, width);
      made.logits = take(batch, s.classes);
      made.statistics = take(rows, 1, 2);
      made.partial = take(ceil_div(rows, rowwise::row_block), 2 * width);
      return made;
    });
    pass.x = rowwise::flat_rows(last, width);
    pass.length = length;
    rowwise::for_each_row_block(rows, executor, [&](Index first, Index count, int, Index) {
      rowwise::norm<A>(s.norm_shape(), p.norm, rowwise::row_range(pass.x, first, count),
                       rowwise::row_range(pass.h, first, count), &pass.statistics(first, 0, 0));
    });
    executor.for_each(batch, [&](Index b, int) {
      A* sum = &pass.pooled(b, 0);
      std::fill_n(sum, width, A(0));
      for (Index t = 0; t < length; ++t)
        rowwise::add_row<A>(width, rowwise::Same<A>{}, sum, &pass.h(b * length + t, 0));
      for (Index d = 0; d < width; ++d) sum[d] /= A(length);
    });
    return {};
  }

  /// Batches are small next to their tokens, so this runs on one thread.
  template <class A, class Label>
  static double mean_loss(const Pass<A>& pass, TensorView<Label, 1> labels, bool gradient) {
    const Index batch = labels.extents[0], classes = pass.logits.extents[1];
    Index counted = 0;
    for (Index b = 0; b < batch; ++b) counted += std::int64_t(labels(b)) >= 0;
    const A factor = gradient ? A(1) / A(std::max<Index>(counted, 1)) : A(0);
    double sum = 0;
    for (Index b = 0; b < batch; ++b) {
      if (std::int64_t(labels(b)) >= 0)
        sum += rowwise::cross_entropy(&pass.logits(b, 0), classes, Index(labels(b)), factor);
      else
        std::fill_n(&pass.logits(b, 0), classes, A(0));
    }
    return sum / double(std::max<Index>(counted, 1));
  }

  template <class Token, class Label>
  static Status check_labels(const Shape& s, TensorView<Token, 2> tokens, TensorView<Label, 1> labels) {
    static_assert(std::is_integral_v<Label>, "labels are integers");
    if (!has_extents(labels, tokens.extents[0]) || !readable(labels))
      return {Code::bad_shape, "labels must be [batch] with data"};
    for (Index b = 0; b < labels.extents[0]; ++b)
      if (std::int64_t(labels(b)) >= s.classes)
        return {Code::bad_value, "labels must be less than the number of classes; below zero they are not counted"};
    return {};
  }
};

}  // namespace chela::cpu
