#pragma once
// Linear attention on the CPU; contract and equation in attention/linear.hpp.
#include <utility>

#include "chela/attention/linear.hpp"
#include "chela/cpu/attention/linear_pass.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu {

namespace detail {

/// Sums runs of neighbouring heads: `sum` [batch, token, heads / run, dim] = sum over each run of `parts` [.., heads, ..].
template <class A, class T, Executor E>
void sum_head_runs(TensorView<const A, 4> parts, TensorView<T, 4> sum, const E& executor) {
  const Index run_length = parts.extents[2] / sum.extents[2];
  executor.for_each(sum.extents[0] * sum.extents[1], [&](Index task, int) {
    const auto from = slice(slice(parts, task / sum.extents[1]), task % sum.extents[1]);
    const auto to = slice(slice(sum, task / sum.extents[1]), task % sum.extents[1]);
    for (Index head = 0; head < to.extents[0]; ++head)
      for (Index i = 0; i < to.extents[1]; ++i) {
        A total = 0;
        for (Index part = 0; part < run_length; ++part) total += from(head * run_length + part, i);
        to(head, i) = static_cast<T>(total);
      }
  });
}

/// A gradient pass of every output head into `grad`, which may have fewer heads: then their parts are summed in order.
template <ChunkPolicy P, class T, Executor E>
void run_gradient_pass(LinearPass<T, T> pass, TensorView<T, 4> grad, Index heads, const E& executor) {
  using A = Accumulator<T>;
  pass.o = grad;
  if (grad.extents[2] == heads) return run_pass<P>(pass, executor);
  Tensor<A, 4> parts(grad.extents[0], grad.extents[1], heads, grad.extents[3]);
  run_pass<P>(LinearPass<T, A>{pass.q, pass.k, pass.v, parts.view(), pass.initial_state, pass.final_state,
                               pass.query_factor, pass.key_factor, pass.everything},
              executor);
  sum_head_runs<A>(parts.view(), grad, executor);
}

}  // namespace detail

/// Outputs and final state of one pass. Any strides, any sizes, token counts of zero included; a call that continues from the
/// final state of another gives the same bits as one call over both (token recurrence), or the same answer to rounding
/// (chunked; the same bits when the cut is on a chunk boundary).
template <ChunkPolicy P = ChunkPolicy{}, Element T, Executor E>
Status linear_attention(const LinearAttentionArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  detail::run_pass<P>(detail::LinearPass<T, T>{args.q, args.k, args.v, args.o, args.initial_state, args.final_state,
                                               attention_scale(args.scale, args.span, shape), Accumulator<T>(1),
                                               args.span == Span::bidirectional},
                      executor);
  return {};
}

/// Gradients with respect to q, k, v and the initial state. Without decay each is linear attention again: with dO the gradient
/// of o and states R that run back in time from the gradient dS of the final state,
///
///   dq_t = scale S_t dO_t                     attention of (dO, v, k), forward, from S_0^T
///   dk_t = R_t v_t                            attention of (v, dO, q), backward, from dS^T
///   dv_t = R_t^T k_t                          attention of (k, q, dO), backward, from dS; its last state is dS_0
///   R_t  = R_{t+1} + scale q_t dO_t^T
///
/// so nothing of the forward pass needs keeping. Shared heads sum the parts of their run in order.
template <ChunkPolicy P = ChunkPolicy{}, Element T, Executor E>
Status linear_attention_backward(const LinearAttentionBackwardArgs<T>& args, const E& executor) {
  using A = Accumulator<T>;
  if (Status s = check(args); !s.ok()) return s;
  const LinearAttentionShape shape = linear_attention_shape(args.q, args.k, args.v);
  const A scale = attention_scale(args.scale, args.span, shape);
  const bool everything = args.span == Span::bidirectional;
  const Index heads = shape.output_heads(), per_state = heads / shape.state_heads();
  const auto back_in_time = [](auto x) { return reversed(x, 1); };

  if (args.grad_q.present()) {
    detail::LinearPass<T, T> pass{.q = args.grad_o,
                                  .k = args.v,
                                  .v = args.k,
                                  .o = {},
                                  .initial_state = transposed(args.initial_state, 2, 3),
                                  .final_state = {},
                                  .query_factor = scale,
                                  .key_factor = A(1),
                                  .everything = everything};
    detail::run_gradient_pass<P>(pass, args.grad_q, heads, executor);
  }
  if (!args.grad_k.present() && !args.grad_v.present() && !args.grad_initial_state.present()) return {};

  // A state shared by a run of output heads has one gradient, which must enter only one of the run's passes.
  TensorView<const A, 4> entering = args.grad_final_state;
  Tensor<A, 4> first_of_run;
  if (entering.present() && per_state > 1) {
    first_of_run = Tensor<A, 4>(shape.batch, heads, shape.key_dim, shape.value_dim);
    for (Index b = 0; b < shape.batch; ++b)
      for (Index head = 0; head < shape.state_heads(); ++head)
        pack_rows(slice(slice(entering, b), head), A(1), &first_of_run(b, head * per_state, 0, 0), shape.value_dim);
    entering = first_of_run;
  }

  if (args.grad_k.present()) {
    detail::LinearPass<T, T> pass{.q = back_in_time(args.v),
                                  .k = back_in_time(args.grad_o),
                                  .v = back_in_time(args.q),
                                  .o = {},
                                  .initial_state = transposed(entering, 2, 3),
                                  .final_state = {},
                                  .query_factor = A(1),
                                  .key_factor = scale,
                                  .everything = everything};
    detail::run_gradient_pass<P>(pass, back_in_time(args.grad_k), heads, executor);
  }
  if (args.grad_v.present() || args.grad_initial_state.present()) {
    Tensor<T, 4> unwanted;
    if (!args.grad_v.present()) unwanted = Tensor<T, 4>(shape.batch, shape.tokens, shape.value_heads, shape.value_dim);
    Tensor<A, 4> leaving;  // per output head, when a run of them shares a state
    if (args.grad_initial_state.present() && per_state > 1)
      leaving = Tensor<A, 4>(shape.batch, heads, shape.key_dim, shape.value_dim);
    detail::LinearPass<T, T> pass{.q = back_in_time(args.k),
                                  .k = back_in_time(args.q),
                                  .v = back_in_time(args.grad_o),
                                  .o = {},
                                  .initial_state = entering,
                                  .final_state = leaving.data() ? leaving.view() : args.grad_initial_state,
                                  .query_factor = A(1),
                                  .key_factor = scale,
                                  .everything = everything};
    detail::run_gradient_pass<P>(pass, back_in_time(args.grad_v.present() ? args.grad_v : unwanted.view()), heads,
                                 executor);
    if (leaving.data()) {  // [batch, head, key, value] as [batch, key, head, value], the layout of the sum
      detail::sum_head_runs<A>(transposed(std::as_const(leaving).view(), 1, 2),
                               transposed(args.grad_initial_state, 1, 2), executor);
    }
  }
  return {};
}

/// One token per sequence: the state is read and written once, in place. The same bits as a pass of one token.
template <Element T, Executor E>
Status linear_attention_step(const LinearAttentionStepArgs<T>& args, const E& executor) {
  using A = Accumulator<T>;
  using Block = RegisterBlock<A>;
  if (Status s = check(args); !s.ok()) return s;
  const Index batch = args.q.extents[0], heads = args.o.extents[1], state_heads = args.state.extents[1];
  const Index key_dim = args.q.extents[2], value_dim = args.v.extents[2];
  const LinearAttentionShape shape{.tokens = 1, .key_dim = key_dim};
  const A scale = attention_scale(args.scale, Span::causal, shape);
  const Index keys = round_up(key_dim, Block::rows), columns = round_up(value_dim, Block::columns);
  const bool in_place = keys == key_dim && columns == value_dim && args.state.strides[3] == 1;
  const Index per_state = heads / state_heads;

  Tensor<A, 2> scratch(executor.workers(), 2 * keys + 2 * columns + (in_place ? 0 : keys * columns));
  executor.for_each(batch * state_heads, [&](Index task, int worker) {
    const Index b = task / state_heads, state_head = task % state_heads;
    A* q = &scratch(worker, 0);
    A* k = q + keys;
    A* v = k + keys;
    A* o = v + columns;
    const auto row_of = [&](auto x, Index of_heads, Index head) {  // [batch, head, dim] -> [1, dim]
      auto row = run(slice(x, b), 0, head / (of_heads / x.extents[1]), 1);
      return row;
    };
    const TensorView<A, 2> kept = slice(slice(args.state, b), state_head);
    A* state = in_place ? kept.data : o + columns;
    const Index state_stride = in_place ? kept.strides[0] : columns;
    if (!in_place) {
      std::fill_n(state, keys * columns, A(0));
      pack_rows<A>(kept, A(1), state, columns);
    }
    pack_rows(row_of(args.k, state_heads, state_head), A(1), k, keys);
    pack_rows(row_of(args.v, state_heads, state_head), A(1), v, columns);
    for (Index member = 0; member < per_state; ++member) {
      const Index head = state_head * per_state + member;
      pack_rows(row_of(args.q, heads, head), scale, q, keys);
      recur_over_tile(q, k, v, o, Index(1), keys, columns, state, state_stride, FetchNothing{});
      unpack_rows(o, columns, row_of(args.o, heads, head));
      std::fill_n(k, keys, A(0));  // the token has entered the state; further queries of the run only read it
    }
    if (!in_place) unpack_rows(state, columns, kept);
  });
  return {};
}

}  // namespace chela::cpu
