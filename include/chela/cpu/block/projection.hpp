#pragma once
// Projections on the CPU: one Eigen product per block of rows forward, one per block of the weight for its gradient.
#include <initializer_list>

#include "chela/block/projection.hpp"
#include "chela/cpu/block/rows.hpp"

namespace chela::cpu {

namespace rowwise {

/// y = x W + bias + residual on one thread; bias and residual may be absent, and the residual may be y's memory.
template <class A>
void project(TensorView<const A, 2> x, TensorView<const A, 2> weight, TensorView<const A, 1> bias, TensorView<A, 2> y,
             TensorView<const A, 2> residual = {}) {
  auto out = as_rows(y);
  if (residual.present()) {
    if (residual.data != y.data) out = as_rows(residual);
    out.noalias() += as_rows(x) * as_rows(weight);
  } else {
    out.noalias() = as_rows(x) * as_rows(weight);
  }
  if (bias.present())
    for (Index r = 0; r < y.extents[0]; ++r) add_row<A>(y.extents[1], Same<A>{}, y.data + r * y.strides[0], bias.data);
}

/// grad_x = (add ? grad_x : 0) + grad_y W^T on one thread.
template <class A>
void project_back(TensorView<const A, 2> grad_y, TensorView<const A, 2> weight, TensorView<A, 2> grad_x,
                  bool add = false) {
  auto out = as_rows(grad_x);
  if (add)
    out.noalias() += as_rows(grad_y) * as_rows(weight).transpose();
  else
    out.noalias() = as_rows(grad_y) * as_rows(weight).transpose();
}

/// grad_weight = x^T grad_y and grad_bias = sum of the rows of grad_y; absent outputs are skipped.
template <class A>
struct WeightGradient {
  TensorView<const A, 2> x, grad_y;
  TensorView<A, 2> grad_weight;
  TensorView<A, 1> grad_bias;

  // A block of the weight as large as this keeps the packing of its operands a small part of the product.
  static constexpr Index in_block = 64, out_block = 256;

  Index in_blocks() const { return std::max<Index>(1, ceil_div(x.extents[1], in_block)); }
  Index tasks() const { return in_blocks() * ceil_div(grad_y.extents[1], out_block); }

  void run_task(Index task) const {
    const Index in = task % in_blocks() * in_block, out = task / in_blocks() * out_block;
    const Index ins = std::min(in_block, x.extents[1] - in), outs = std::min(out_block, grad_y.extents[1] - out);
    const auto gradient = columns(grad_y, out, outs);
    if (grad_weight.present() && ins > 0)
      as_rows(run(columns(grad_weight, out, outs), 0, in, ins)).noalias() =
          as_rows(columns(x, in, ins)).transpose() * as_rows(gradient);
    if (grad_bias.present() && in == 0) {
      A* sum = grad_bias.data + out;
      std::fill_n(sum, outs, A(0));
      for (Index r = 0; r < gradient.extents[0]; ++r) add_row<A>(outs, Same<A>{}, sum, &gradient(r, 0));
    }
  }
};

/// All tasks of several weight gradients in one round, so that workers do not wait between them.
template <class A, Executor E>
void weight_gradients(std::initializer_list<WeightGradient<A>> jobs, const E& executor) {
  Index tasks = 0;
  for (const auto& job : jobs) tasks += job.tasks();
  executor.for_each(tasks, [&](Index task, int) {
    for (const auto& job : jobs) {
      if (task < job.tasks()) return job.run_task(task);
      task -= job.tasks();
    }
  });
}

}  // namespace rowwise

/// y = activation(x W + bias), see chela/block/projection.hpp.
template <Element T, Executor E>
Status projection(const ProjectionArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  rowwise::for_each_row_block(args.x.extents[0], executor, [&](Index first, Index count, int, Index) {
    const auto y = rowwise::row_range(args.y, first, count);
    const auto before = args.before.present() ? rowwise::row_range(args.before, first, count) : y;
    rowwise::project(rowwise::row_range(args.x, first, count), args.weight, args.bias, before);
    if (args.activation == Activation::silu)
      rowwise::map_rows(rowwise::Silu<T>{}, y, before);
    else if (before.data != y.data)
      rowwise::as_rows(y) = rowwise::as_rows(before);
  });
  return {};
}

/// Gradients of the same pass.
template <Element T, Executor E>
Status projection_backward(const ProjectionBackwardArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  const bool active = args.activation == Activation::silu;
  const TensorView<const T, 2> gradient = active ? TensorView<const T, 2>(args.grad_before) : args.grad_y;
  rowwise::for_each_row_block(args.x.extents[0], executor, [&](Index first, Index count, int, Index) {
    if (active)
      rowwise::map_rows(rowwise::SiluGradient<T>{}, rowwise::row_range(args.grad_before, first, count),
                        rowwise::row_range(args.before, first, count), rowwise::row_range(args.grad_y, first, count));
    if (args.grad_x.present())
      rowwise::project_back(rowwise::row_range(gradient, first, count), args.weight,
                            rowwise::row_range(args.grad_x, first, count));
  });
  if (args.grad_weight.present() || args.grad_bias.present())
    rowwise::weight_gradients<T>({{args.x, gradient, args.grad_weight, args.grad_bias}}, executor);
  return {};
}

}  // namespace chela::cpu
