#pragma once
// Norms on the CPU: each row is read twice while it is in the L1 cache.
#include <cmath>

#include "chela/block/norm.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/block/rows.hpp"

namespace chela::cpu {

namespace rowwise {

template <class A>
struct RowStatistics {
  A mean, inverse;  ///< (x - mean) * inverse is the normalised part
};

template <class A>
RowStatistics<A> part_statistics(const Norm::Shape& s, const A* x) {
  const A mean = s.kind == NormKind::layer ? sum_row<A>(s.width, Same<A>{}, x) / A(s.width) : A(0);
  A square = 0;
  if (mean == A(0)) {
    square = sum_row<A>(
        s.width, [](Lanes<A> a) { return Eigen::internal::pmul(a, a); }, x);
  } else {
    // The tail of a padded packet would add mean^2 for each missing entry, so whole packets go first.
    const Index whole = s.width / lane_count<A> * lane_count<A>;
    const Lanes<A> shift = splat(mean);
    square = sum_row<A>(
        whole,
        [&](Lanes<A> a) {
          const Lanes<A> d = Eigen::internal::psub(a, shift);
          return Eigen::internal::pmul(d, d);
        },
        x);
    for (Index i = whole; i < s.width; ++i) square += (x[i] - mean) * (x[i] - mean);
  }
  return {mean, A(1) / std::sqrt(square / A(s.width) + A(s.epsilon))};
}

/// The gain of entry i of a part, as a packet function over the part: a row of gains, or one for all of it.
template <class A>
struct PartGain {
  const A* row;  ///< null when `one` serves the whole part
  A one;
  PartGain(const Norm::Shape& s, const Norm::Parameters<const A>& p, Index group)
      : row(s.kind == NormKind::scale ? nullptr : p.gain.data + group * s.width),
        one(s.kind == NormKind::scale ? p.gain.data[group] : A(1)) {}
};

/// y = norm(x) on one thread; `statistics` [row, group, 2] of the same rows, or null.
template <class A>
void norm(const Norm::Shape& s, const Norm::Parameters<const A>& p, TensorView<const A, 2> x, TensorView<A, 2> y,
          A* statistics) {
  using namespace Eigen::internal;
  if (s.kind == NormKind::none) {
    if (y.data != x.data) as_rows(y) = as_rows(x);
    return;
  }
  for (Index r = 0; r < x.extents[0]; ++r)
    for (Index group = 0; group < s.groups; ++group) {
      const A* in = x.data + r * x.strides[0] + group * s.width;
      A* out = y.data + r * y.strides[0] + group * s.width;
      const auto [mean, inverse] = part_statistics(s, in);
      if (statistics) *statistics++ = mean, *statistics++ = inverse;
      const PartGain<A> gain(s, p, group);
      const Lanes<A> factor = splat(inverse * gain.one), shift = splat(mean);
      if (s.kind == NormKind::layer)
        map_row<A>(
            s.width, [&](Lanes<A> a, Lanes<A> g, Lanes<A> b) { return pmadd(pmul(psub(a, shift), factor), g, b); }, out,
            in, gain.row, p.bias.data + group * s.width);
      else if (s.kind == NormKind::rms)
        map_row<A>(
            s.width, [&](Lanes<A> a, Lanes<A> g) { return pmul(pmul(a, factor), g); }, out, in, gain.row);
      else
        map_row<A>(
            s.width, [&](Lanes<A> a) { return pmul(a, factor); }, out, in);
    }
}

/// grad_x = (add ? grad_x : 0) + gradient of norm on one thread; grad_x may be grad_y's memory when `add` is false.
/// Gradients of gain and bias are added to `grad_gain` and `grad_bias`, laid out as the parameters.
template <class A>
void norm_backward(const Norm::Shape& s, const Norm::Parameters<const A>& p, TensorView<const A, 2> x,
                   const A* statistics, TensorView<const A, 2> grad_y, TensorView<A, 2> grad_x, bool add, A* grad_gain,
                   A* grad_bias) {
  using namespace Eigen::internal;
  if (s.kind == NormKind::none) {
    if (add)
      as_rows(grad_x) += as_rows(grad_y);
    else if (grad_x.data != grad_y.data)
      as_rows(grad_x) = as_rows(grad_y);
    return;
  }
  const bool layer = s.kind == NormKind::layer, scale = s.kind == NormKind::scale;
  for (Index r = 0; r < x.extents[0]; ++r)
    for (Index group = 0; group < s.groups; ++group) {
      const Index at = group * s.width;
      const A* in = x.data + r * x.strides[0] + at;
      const A* dy = grad_y.data + r * grad_y.strides[0] + at;
      A* dx = grad_x.data + r * grad_x.strides[0] + at;
      const A mean = *statistics++, inverse = *statistics++;
      const PartGain<A> gain(s, p, group);
      const Lanes<A> shift = splat(mean), factor = splat(inverse);
      const auto normalised = [&](Lanes<A> a) { return pmul(psub(a, shift), factor); };

      // Gradient of the normalised part: u = dy * gain. A padded tail has dy = 0, so it adds nothing.
      A u_sum = 0, u_dot;
      if (scale) {
        const A dot = sum_row<A>(
            s.width, [&](Lanes<A> g, Lanes<A> a) { return pmul(g, normalised(a)); }, dy, in);
        grad_gain[group] += dot;
        u_dot = dot * gain.one;
      } else {
        add_row<A>(
            s.width, [&](Lanes<A> g, Lanes<A> a) { return pmul(g, normalised(a)); }, grad_gain + at, dy, in);
        u_dot = sum_row<A>(
            s.width, [&](Lanes<A> g, Lanes<A> a, Lanes<A> w) { return pmul(pmul(g, w), normalised(a)); }, dy, in,
            gain.row);
      }
      if (layer) {
        u_sum = sum_row<A>(s.width, Product<A>{}, dy, gain.row);
        add_row<A>(s.width, Same<A>{}, grad_bias + at, dy);
      }

      const Lanes<A> sum = splat(u_sum / A(s.width)), dot = splat(u_dot / A(s.width)), one = splat(gain.one);
      const Lanes<A> keep = splat(A(add ? 1 : 0));
      const auto gradient = [&](Lanes<A> old, Lanes<A> u, Lanes<A> a) {
        const Lanes<A> inner = psub(psub(u, sum), pmul(normalised(a), dot));
        return pmadd(inner, factor, pmul(keep, old));
      };
      const A* old = add ? dx : dy;  // dy is finite memory to multiply by zero
      if (scale)
        map_row<A>(
            s.width, [&](Lanes<A> o, Lanes<A> g, Lanes<A> a) { return gradient(o, pmul(g, one), a); }, dx, old, dy, in);
      else
        map_row<A>(
            s.width, [&](Lanes<A> o, Lanes<A> g, Lanes<A> a, Lanes<A> w) { return gradient(o, pmul(g, w), a); }, dx,
            old, dy, in, gain.row);
    }
}

/// out[i] = sum over blocks of partial[block, i], in the order of the blocks.
template <class A, Executor E>
void sum_partials(TensorView<const A, 2> partial, TensorView<A, 1> out, const E& executor) {
  constexpr Index run_len = 1024;
  executor.for_each(ceil_div(out.extents[0], run_len), [&](Index task, int) {
    const Index first = task * run_len, count = std::min(run_len, out.extents[0] - first);
    std::fill_n(out.data + first, count, A(0));
    for (Index block = 0; block < partial.extents[0]; ++block)
      add_row<A>(count, Same<A>{}, out.data + first, partial.data + block * partial.strides[0] + first);
  });
}

}  // namespace rowwise

/// y = norm(x), see chela/block/norm.hpp.
template <Element T, Executor E>
Status norm(const NormArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  rowwise::for_each_row_block(args.x.extents[0], executor, [&](Index first, Index count, int, Index) {
    T* statistics = args.statistics.present() ? args.statistics.data + first * args.shape.groups * 2 : nullptr;
    rowwise::norm<T>(args.shape, args.parameters, rowwise::row_range(args.x, first, count),
                     rowwise::row_range(args.y, first, count), statistics);
  });
  return {};
}

/// Gradients of the same pass. Scratch: one set of parameter gradients per block of rows.
template <Element T, Executor E>
Status norm_backward(const NormBackwardArgs<T>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  const Index rows = args.x.extents[0], width = args.shape.row();
  const bool none = args.shape.kind == NormKind::none;
  Tensor<T, 2> gains(none ? 0 : ceil_div(rows, rowwise::row_block), width), biases(gains.extents());
  rowwise::for_each_row_block(rows, executor, [&](Index first, Index count, int, Index block) {
    const T* statistics = none ? nullptr : args.statistics.data + first * args.shape.groups * 2;
    rowwise::norm_backward<T>(args.shape, args.parameters, rowwise::row_range(args.x, first, count), statistics,
                              rowwise::row_range(args.grad_y, first, count),
                              rowwise::row_range(args.grad_x, first, count), false, gains.data() + block * width,
                              biases.data() + block * width);
  });
  if (none) return {};
  rowwise::sum_partials<T>(gains, args.grad_parameters.gain, executor);
  if (args.shape.kind == NormKind::layer) rowwise::sum_partials<T>(biases, args.grad_parameters.bias, executor);
  return {};
}

}  // namespace chela::cpu
