#pragma once
// Gates on the CPU. The numbers of one token are packed into a row of the accumulator type, padded to whole registers,
// and go through the gate a register at a time; so no result depends on strides or on who computes it.
#include <algorithm>
#include <cmath>

#include "chela/attention/gates.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/attention/wide.hpp"
#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

namespace detail {

/// [batch, token, head] as [batch, token, head, 1].
template <class T, int Rank>
constexpr TensorView<T, 4> with_key_axis(TensorView<T, Rank> view) {
  TensorView<T, 4> out{view.data, {1, 1, 1, 1}, {0, 0, 0, 1}};
  for (int axis = 0; axis < Rank; ++axis)
    out.extents[axis] = view.extents[axis], out.strides[axis] = view.strides[axis];
  return out;
}

/// The numbers of each token as one row, [head * key], in memory padded with zeros.
template <class T>
class TokenRows {
 public:
  explicit TokenRows(TensorView<T, 4> view) : view_(view) {
    if (view_.extents[3] == 1) view_ = transposed(view_, 2, 3);
    if (view_.strides[2] == view_.extents[3] * view_.strides[3])  // heads follow each other without a gap: one run
      view_.extents[3] *= view_.extents[2], view_.extents[2] = 1;
  }

  Index count() const { return view_.extents[0] * view_.extents[1]; }
  Index width() const { return view_.extents[2] * view_.extents[3]; }

  template <class A>
  void read(Index row, A* to, Index padded) const {
    const Index keys = view_.extents[3];
    for (Index h = 0; h < view_.extents[2]; ++h)
      pack_row(at(row) + h * view_.strides[2], view_.strides[3], keys, A(1), to + h * keys, keys);
    std::fill(to + width(), to + padded, A(0));
  }

  template <class A>
  void write(Index row, const A* from) const {
    const Index keys = view_.extents[3];
    for (Index h = 0; h < view_.extents[2]; ++h)
      unpack_row(from + h * keys, keys, at(row) + h * view_.strides[2], view_.strides[3]);
  }

 private:
  T* at(Index row) const {
    return view_.data + row / view_.extents[1] * view_.strides[0] + row % view_.extents[1] * view_.strides[1];
  }

  TensorView<T, 4> view_;
};

/// Rows are padded to whole cache lines.
inline Index padded_width(Index width) { return round_up(width, 16); }

/// Rows of one task: enough to be worth handing out, few enough tasks that their partial sums stay small. A function of
/// the shape alone, so that no sum depends on the number of workers.
inline Index rows_per_task(Index rows, Index width) {
  constexpr Index least_rows = 64, least_numbers = 16384, most_tasks = 256;
  return std::max({least_rows, least_numbers / std::max<Index>(width, 1), ceil_div(rows, most_tasks)});
}

/// Calls f(row, worker, task) for every row, the rows of one task in order.
template <Executor E, class F>
void for_each_token_row(Index rows, Index width, const E& executor, F&& f) {
  const Index share = rows_per_task(rows, width);
  executor.for_each(ceil_div(rows, share), [&](Index task, int worker) {
    for (Index row = task * share; row < std::min(rows, (task + 1) * share); ++row) f(row, worker, task);
  });
}

/// A gate's parameters, spread to one rate and one bias per number of a row.
template <class A>
struct GateParameters {
  Tensor<A, 1> rate, bias;

  template <int BiasRank>
  GateParameters(TensorView<const A, 1> log_rate, TensorView<const A, BiasRank> bias_view, Index heads, Index keys)
      : rate({padded_width(heads * keys)}, A(1)), bias(padded_width(heads * keys)) {
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < keys; ++i) {
        if (log_rate.present()) rate(h * keys + i) = std::exp(log_rate(h));
        if (!bias_view.present()) continue;
        if constexpr (BiasRank == 1)
          bias(h * keys + i) = bias_view(h);
        else
          bias(h * keys + i) = bias_view(h, i);
      }
  }
};

/// What a decay gate or a beta gate runs on: registers if it takes them, else single numbers.
template <class G, class A>
struct RunsOn {
  using type = A;
};
template <class G, class A>
requires(
    requires(Widest<A> x) { G::log_decay(x, x); } || requires(Widest<A> x) { G::beta(x); }) struct RunsOn<G, A> {
  using type = Widest<A>;
};

// The passes over one padded row. Each is compiled once, not once per executor that it is inlined into: compilers fuse
// multiplications and additions as their surroundings suggest, and the last bit would depend on who hands out the
// tasks.

/// z = G(z + bias, rate).
template <class G, class A>
[[gnu::noinline]] void gate_row(Index padded, const A* rate, const A* bias, A* z) {
  using V = typename RunsOn<G, A>::type;
  for (Index i = 0; i < padded; i += width_of<V, A>)
    store(z + i, G::log_decay(load<V>(z + i) + load<V>(bias + i), load<V>(rate + i)));
}

/// x = grad * dG/dlogit, which is added to `bias_sum`, and grad * dG/dlog_rate to `rate_sum`, if these are wanted.
template <class G, class A>
[[gnu::noinline]] void gate_row_backward(Index padded, const A* rate, const A* bias, const A* grad, A* x, A* rate_sum,
                                         A* bias_sum) {
  using V = typename RunsOn<G, A>::type;
  for (Index i = 0; i < padded; i += width_of<V, A>) {
    const V z = load<V>(x + i) + load<V>(bias + i), g = load<V>(grad + i);
    const GateDerivatives<V> d = G::derivatives(z, load<V>(rate + i));
    const V by_logit = chela::detail::product(g, d.by_logit);
    store(x + i, by_logit);
    if (bias_sum) store(bias_sum + i, load<V>(bias_sum + i) + by_logit);
    if (rate_sum) store(rate_sum + i, load<V>(rate_sum + i) + chela::detail::product(g, d.by_log_rate));
  }
}

/// x = G(x).
template <class G, class A>
[[gnu::noinline]] void beta_row(Index padded, A* x) {
  using V = typename RunsOn<G, A>::type;
  for (Index i = 0; i < padded; i += width_of<V, A>) store(x + i, G::beta(load<V>(x + i)));
}

/// x = grad * dG/dx.
template <class G, class A>
[[gnu::noinline]] void beta_row_backward(Index padded, const A* grad, A* x) {
  using V = typename RunsOn<G, A>::type;
  for (Index i = 0; i < padded; i += width_of<V, A>) store(x + i, load<V>(grad + i) * G::derivative(load<V>(x + i)));
}

/// Sums over tasks of their partial rows, [task, padded] to [padded], in the order of the tasks.
template <class A>
void sum_tasks(TensorView<const A, 2> partial, A* sum) {
  std::fill_n(sum, partial.extents[1], A(0));
  for (Index task = 0; task < partial.extents[0]; ++task)
    for (Index i = 0; i < partial.extents[1]; ++i) sum[i] += partial(task, i);
}

}  // namespace detail

/// log_decay = G(logits), see chela/attention/gates.hpp. Scratch: one row per worker, and the parameters of one row.
template <Element T, DecayGate G, int Rank, Executor E>
Status decay_gate(const DecayGateArgs<T, G, Rank>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const auto logits = detail::with_key_axis(args.logits);
  const detail::TokenRows in(logits);
  const detail::TokenRows out(detail::with_key_axis(args.log_decay));
  const Index padded = detail::padded_width(in.width());
  const detail::GateParameters<A> p(args.log_rate, args.bias, logits.extents[2], logits.extents[3]);
  Tensor<A, 2> scratch(executor.workers(), padded);
  detail::for_each_token_row(in.count(), in.width(), executor, [&](Index row, int worker, Index) {
    A* z = &scratch(worker, 0);
    in.read(row, z, padded);
    detail::gate_row<G>(padded, p.rate.data(), p.bias.data(), z);
    out.write(row, z);
  });
  return {};
}

/// Gradients of the same pass. Scratch: two rows per worker, and two rows of partial sums for each of at most 256
/// tasks.
template <Element T, DecayGate G, int Rank, Executor E>
Status decay_gate_backward(const DecayGateBackwardArgs<T, G, Rank>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const auto logits = detail::with_key_axis(args.logits);
  const Index heads = logits.extents[2], keys = logits.extents[3];
  const detail::TokenRows in(logits);
  const detail::TokenRows grad(detail::with_key_axis(args.grad_log_decay));
  const detail::TokenRows out(detail::with_key_axis(args.grad_logits));
  const Index rows = in.count(), padded = detail::padded_width(in.width());
  const detail::GateParameters<A> p(args.log_rate, args.bias, heads, keys);
  const Index tasks = ceil_div(rows, detail::rows_per_task(rows, in.width()));
  Tensor<A, 2> scratch(executor.workers(), 2 * padded), rate_sums(args.grad_log_rate.present() ? tasks : 0, padded),
      bias_sums(args.grad_bias.present() ? tasks : 0, padded);
  detail::for_each_token_row(rows, in.width(), executor, [&](Index row, int worker, Index task) {
    A *x = &scratch(worker, 0), *grad_g = x + padded;
    in.read(row, x, padded);
    grad.read(row, grad_g, padded);
    detail::gate_row_backward<G>(padded, p.rate.data(), p.bias.data(), grad_g, x,
                                 args.grad_log_rate.present() ? &rate_sums(task, 0) : nullptr,
                                 args.grad_bias.present() ? &bias_sums(task, 0) : nullptr);
    if (args.grad_logits.present()) out.write(row, x);
  });

  Tensor<A, 1> sum(padded);
  if (args.grad_log_rate.present()) {
    detail::sum_tasks<A>(rate_sums, sum.data());
    for (Index h = 0; h < heads; ++h) {
      A of_keys = 0;
      for (Index i = 0; i < keys; ++i) of_keys += sum(h * keys + i);
      args.grad_log_rate(h) = of_keys;
    }
  }
  if (args.grad_bias.present()) {
    detail::sum_tasks<A>(bias_sums, sum.data());
    for (Index h = 0; h < heads; ++h) {
      if constexpr (Rank == 3)
        args.grad_bias(h) = sum(h);
      else
        for (Index i = 0; i < keys; ++i) args.grad_bias(h, i) = sum(h * keys + i);
    }
  }
  return {};
}

/// beta = G(logits). Scratch: one row per worker.
template <Element T, BetaGate G, Executor E>
Status beta_gate(const BetaGateArgs<T, G>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const detail::TokenRows in(detail::with_key_axis(args.logits));
  const detail::TokenRows out(detail::with_key_axis(args.beta));
  const Index padded = detail::padded_width(in.width());
  Tensor<A, 2> scratch(executor.workers(), padded);
  detail::for_each_token_row(in.count(), in.width(), executor, [&](Index row, int worker, Index) {
    A* x = &scratch(worker, 0);
    in.read(row, x, padded);
    detail::beta_row<G>(padded, x);
    out.write(row, x);
  });
  return {};
}

/// Gradient of the same pass. Scratch: two rows per worker.
template <Element T, BetaGate G, Executor E>
Status beta_gate_backward(const BetaGateBackwardArgs<T, G>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  using A = Accumulator<T>;
  const detail::TokenRows in(detail::with_key_axis(args.logits));
  const detail::TokenRows grad(detail::with_key_axis(args.grad_beta));
  const detail::TokenRows out(detail::with_key_axis(args.grad_logits));
  const Index padded = detail::padded_width(in.width());
  Tensor<A, 2> scratch(executor.workers(), 2 * padded);
  detail::for_each_token_row(in.count(), in.width(), executor, [&](Index row, int worker, Index) {
    A *x = &scratch(worker, 0), *grad_beta = x + padded;
    in.read(row, x, padded);
    grad.read(row, grad_beta, padded);
    detail::beta_row_backward<G>(padded, grad_beta, x);
    out.write(row, x);
  });
  return {};
}

}  // namespace chela::cpu
