#pragma once
// Memories on the CPU. Compute<Memory> has forward, backward and step over [batch, token, width] and, for a step,
// [batch, width].
//
// A long kernel K comes in by Compute<K>, in cpu/block/long_kernel.hpp.
#include <algorithm>

#include "chela/block/memory.hpp"
#include "chela/cpu/block/long_kernel.hpp"
#include "chela/cpu/conv/branches.hpp"
#include "chela/cpu/conv/long.hpp"
#include "chela/cpu/conv/short.hpp"

namespace chela::cpu {

template <>
struct Compute<NoMemory> {
  using Shape = NoMemory::Shape;
  template <class A>
  using Parameters = NoMemory::Parameters<A>;

  template <class A>
  struct Cache {};
  template <class A>
  struct Prepared {};
  template <class A>
  struct State {
    State() = default;
    State(const Shape&, Index) {}
    std::size_t bytes() const { return 0; }
  };

  template <class A, Executor E>
  static Status forward(const Shape&, const Parameters<const A>&, TensorView<const A, 3> x, TensorView<A, 3> z,
                        Cache<A>&, const E&) {
    std::copy_n(x.data, x.size(), z.data);
    return {};
  }
  template <class A, Executor E>
  static Status backward(const Shape&, const Parameters<const A>&, Cache<A>&, TensorView<const A, 3>,
                         TensorView<const A, 3> grad_z, TensorView<A, 3> grad_x, const Parameters<A>&, const E&) {
    std::copy_n(grad_z.data, grad_z.size(), grad_x.data);
    return {};
  }
  template <class A, Executor E>
  static Prepared<A> prepare(const Shape&, const Parameters<const A>&, const E&) {
    return {};
  }
  template <class A, Executor E>
  static Status step(const Shape&, const Parameters<const A>&, const Prepared<A>&, TensorView<const A, 2> x,
                     TensorView<A, 2> z, State<A>&, const E&) {
    std::copy_n(x.data, x.size(), z.data);
    return {};
  }
};

template <class LongKernel, int... Widths>
struct Compute<ShortLongMemory<LongKernel, Widths...>> {
  using Memory = ShortLongMemory<LongKernel, Widths...>;
  using Kernel = Compute<LongKernel>;
  using Shape = typename Memory::Shape;
  template <class A>
  using Parameters = typename Memory::template Parameters<A>;
  static constexpr int short_width = Memory::short_width;
  static constexpr bool has_short = Memory::branches > 0;

  template <class A>
  struct Cache {
    Tensor<A, 1> folded, inner, grad_folded, grad_inner;  // inner: the output of the short stage
    typename Kernel::template Cache<A> back, ahead;
    KernelSpectrum<A> spectrum;
  };

  template <class A>
  struct Prepared {
    Tensor<A, 1> folded;
    typename Kernel::template Prepared<A> kernel;
  };

  template <class A>
  struct State {
    Tensor<A, 3> recent;  ///< [batch, short width - 1, width] last inputs of the short stage, a ring
    Index steps = 0;      ///< that it has seen
    typename Kernel::template State<A> kernel;
    State() = default;
    State(const Shape& s, Index batch)
        : recent(batch, std::max(short_width - 1, 0), s.width), kernel(s.kernel_shape(), batch) {}
    std::size_t bytes() const { return std::size_t(recent.size()) * sizeof(A) + kernel.bytes(); }
  };

  /// x and z [batch, token, width].
  /// x and z [batch, token, width].
  template <class A, Executor E>
  static Status forward(const Shape& s, const Parameters<const A>& p, TensorView<const A, 3> x, TensorView<A, 3> z,
                        Cache<A>& cache, const E& executor) {
    const Index tokens = x.extents[1];
    TensorView<const A, 3> inner = x;
    if constexpr (has_short) {
      const auto out = inner_of(cache, x);
      const auto folded = fold(s, p, cache.folded, executor);
      if (Status bad = short_conv<short_width, Activation::silu>(
              ShortConvArgs<A>{.x = x, .taps = folded, .bias = p.short_bias, .y = out}, executor);
          !bad.ok())
        return bad;
      inner = out;
    }
    const auto taps = Kernel::template taps<A>(s.kernel_shape(), p.back, tokens, cache.back, executor);
    TensorView<const A, 2> back_taps;
    if (s.span == Span::bidirectional)
      back_taps = Kernel::template taps<A>(s.kernel_shape(), p.ahead, tokens, cache.ahead, executor);
    cache.spectrum = kernel_spectrum(taps, back_taps, tokens, executor);
    return long_conv(LongConvArgs<A>{.x = inner, .skip = p.skip, .y = z}, cache.spectrum, executor);
  }

  /// Gradients of the pass that filled `cache`; all are overwritten.
  template <class A, Executor E>
  static Status backward(const Shape& s, const Parameters<const A>& p, Cache<A>& cache, TensorView<const A, 3> x,
                         TensorView<const A, 3> grad_z, TensorView<A, 3> grad_x, const Parameters<A>& grad,
                         const E& executor) {
    if constexpr (has_short) {
      const auto grad_inner = detail::reserve(cache.grad_inner, x.extents[0], x.extents[1], s.width);
      if (Status bad = long_backward<A>(s, p, cache, inner_of(cache, x), grad_z, grad_inner, grad, executor); !bad.ok())
        return bad;
      // Taps and their gradient have the channel last in memory, as the operator likes them.
      const auto grad_folded = transposed(detail::reserve(cache.grad_folded, Index(short_width), s.width), 0, 1);
      if (Status bad = short_conv_backward<short_width, Activation::silu>(
              ShortConvBackwardArgs<A>{.x = x,
                                       .taps = folded_view<A>(s, cache.folded),
                                       .bias = p.short_bias,
                                       .grad_y = grad_inner,
                                       .grad_x = grad_x,
                                       .grad_taps = grad_folded,
                                       .grad_bias = grad.short_bias},
              executor);
          !bad.ok())
        return bad;
      const auto branches = branches_of(p);
      std::array<ConvBranchGradients<A>, Memory::branches> grads;
      for (std::size_t b = 0; b < grads.size(); ++b) grads[b].taps = grad.short_taps[b];
      return fold_branches_backward(
          FoldBranchesBackwardArgs<A>{.branches = branches, .grad_taps = grad_folded, .grads = grads}, executor);
    } else {
      return long_backward<A>(s, p, cache, x, grad_z, grad_x, grad, executor);
    }
  }

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E& executor) {
    Prepared<A> prepared;
    if constexpr (has_short) fold(s, p, prepared.folded, executor);
    prepared.kernel = Kernel::template prepare<A>(s.kernel_shape(), p.back, executor);
    return prepared;
  }

  /// x and z [batch, width]; causal memories only.
  template <class A, Executor E>
  static Status step(const Shape& s, const Parameters<const A>& p, const Prepared<A>& prepared,
                     TensorView<const A, 2> x, TensorView<A, 2> z, State<A>& state, const E& executor) {
    TensorView<const A, 2> inner = x;
    if constexpr (has_short) {
      if (Status bad = short_conv_step<short_width, Activation::silu>(
              ShortConvStepArgs<A>{.x = x,
                                   .taps = folded_view<A>(s, prepared.folded),
                                   .bias = p.short_bias,
                                   .y = z,
                                   .state = state.recent,
                                   .position = state.steps},
              executor);
          !bad.ok())
        return bad;
      ++state.steps;
      inner = z;
    }
    return Kernel::template step<A>(s.kernel_shape(), p.back, prepared.kernel, p.skip, inner, z, state.kernel,
                                    executor);
  }

 private:
  template <class A>
  static TensorView<A, 3> inner_of(Cache<A>& cache, TensorView<const A, 3> x) {
    return detail::reserve(cache.inner, x.extents[0], x.extents[1], x.extents[2]);
  }

  /// [channel, width], with the channel last in memory.
  template <class A>
  static TensorView<const A, 2> folded_view(const Shape& s, const Tensor<A, 1>& memory) {
    return transposed(contiguous(memory.data(), Index(short_width), s.width), 0, 1);
  }

  template <class A>
  static auto branches_of(const Parameters<const A>& p) {
    std::array<ConvBranch<A>, Memory::branches> branches;
    for (std::size_t b = 0; b < branches.size(); ++b) branches[b].taps = p.short_taps[b];
    return branches;
  }

  template <class A, Executor E>
  static TensorView<const A, 2> fold(const Shape& s, const Parameters<const A>& p, Tensor<A, 1>& memory,
                                     const E& executor) {
    const auto branches = branches_of(p);
    const auto folded = transposed(detail::reserve(memory, Index(short_width), s.width), 0, 1);
    // Cannot fail: the shapes come from `visit`.
    static_cast<void>(fold_branches(FoldBranchesArgs<A>{.branches = branches, .taps = folded}, executor));
    return folded;
  }

  /// Gradients of the long stage over its input `inner`.
  template <class A, Executor E>
  static Status long_backward(const Shape& s, const Parameters<const A>& p, Cache<A>& cache,
                              TensorView<const A, 3> inner, TensorView<const A, 3> grad_z, TensorView<A, 3> grad_inner,
                              const Parameters<A>& grad, const E& executor) {
    const Index tokens = inner.extents[1];
    const auto kernel = s.kernel_shape();
    const bool two_sided = s.span == Span::bidirectional;
    LongConvBackwardArgs<A> args{
        .x = inner, .skip = p.skip, .grad_y = grad_z, .grad_x = grad_inner, .grad_skip = grad.skip};
    args.grad_taps = Kernel::template grad_taps<A>(kernel, tokens, cache.back, grad.back);
    if (two_sided) args.grad_back_taps = Kernel::template grad_taps<A>(kernel, tokens, cache.ahead, grad.ahead);
    if (Status bad = long_conv_backward(args, cache.spectrum, executor); !bad.ok()) return bad;
    if (Status bad = Kernel::template backward<A>(kernel, p.back, tokens, cache.back, grad.back, executor); !bad.ok())
      return bad;
    return two_sided ? Kernel::template backward<A>(kernel, p.ahead, tokens, cache.ahead, grad.ahead, executor)
                     : Status{};
  }
};

}  // namespace chela::cpu
