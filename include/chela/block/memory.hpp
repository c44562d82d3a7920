#pragma once
// Memories: the long-range filter of a block's input, Z = Memory(X), X and Z in R^{batch x token x width}. A memory is
// a module (see block/parameters.hpp) whose Shape has `Index width; Span span`, filled in by the block that holds it.
//
//   ShortLongMemory<Kernel, Widths...>   Z = LongConv(SiLU(ShortConv(X)))     CHELA, arXiv 2406.08128, section 3.1
//   EmaMemory<Widths...>                 the same with Mega's moving average as long kernel: a state of constant size
//   NoMemory                             Z = X
//
// The short stage is the sum of one branch per width (structural reparameterisation): training keeps the branches, and
// one kernel of the largest width gives the same outputs (conv/branches.hpp folds them). Without widths there is no
// short stage and no SiLU. The long kernel is causal; a bidirectional memory has a second one that looks ahead. The
// short stage always looks back.
#include <algorithm>
#include <array>
#include <cmath>

#include "chela/attention/linear.hpp"
#include "chela/block/long_kernel.hpp"

namespace chela {

/// Z = X: for blocks whose mixer needs no help, and for measuring what a memory brings.
struct NoMemory {
  struct Shape {
    Index width = 0;
    Span span = Span::causal;
  };

  template <class A>
  struct Parameters {};

  template <class F, class... P>
  static void visit(const Shape&, F&&, P&...) {}

  static constexpr Status check(const Shape&) { return {}; }
};

template <class LongKernel, int... ShortWidths>
struct ShortLongMemory {
  using Kernel = LongKernel;
  static constexpr int branches = sizeof...(ShortWidths);
  static constexpr std::array<int, branches> widths = {ShortWidths...};
  static constexpr int short_width = std::max({0, ShortWidths...});  ///< of the folded kernel; 0 without a short stage
  static_assert(((ShortWidths >= 1 && ShortWidths <= 64) && ...), "widths of short branches must be 1 to 64");

  struct Shape {
    Index width = 0;  ///< channels
    Span span = Span::causal;
    typename Kernel::Shape kernel = {};  ///< width is taken from the memory

    constexpr typename Kernel::Shape kernel_shape() const {
      typename Kernel::Shape s = kernel;
      s.width = width;
      return s;
    }
  };

  template <class A>
  struct Parameters {
    std::array<TensorView<A, 2>, branches>
        short_taps;                                 ///< [width, short width] each; taps[d, 0] meets the newest input
    TensorView<A, 1> short_bias;                    ///< [width], or absent without a short stage
    typename Kernel::template Parameters<A> back;   ///< the kernel that looks back
    typename Kernel::template Parameters<A> ahead;  ///< the kernel that looks ahead; absent when causal
    TensorView<A, 1> skip;                          ///< [width] weight of the long stage's own input
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    for (std::size_t b = 0; b < widths.size(); ++b) {
      const double bound = 1 / std::sqrt(double(widths[b]) * branches);
      f(ParameterInfo{"short." + std::to_string(b) + ".taps", {s.width, widths[b]}, uniform_init(-bound, bound)},
        p.short_taps[b]...);
    }
    if (branches > 0) f(ParameterInfo{"short.bias", {s.width}}, p.short_bias...);
    visit_nested<Kernel>("long.back", s.kernel_shape(), f, p.back...);
    if (s.span == Span::bidirectional) visit_nested<Kernel>("long.ahead", s.kernel_shape(), f, p.ahead...);
    f(ParameterInfo{"long.skip", {s.width}, constant_init(1)}, p.skip...);
  }

  static constexpr Status check(const Shape& s) { return Kernel::check(s.kernel_shape()); }
};

/// Mega's memory, whose decode state is of constant size.
template <int... ShortWidths>
using EmaMemory = ShortLongMemory<EmaKernel, ShortWidths...>;

}  // namespace chela
