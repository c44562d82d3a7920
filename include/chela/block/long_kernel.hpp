#pragma once
// Long kernels as modules (see block/parameters.hpp), for memories to convolve with: what is learned of the taps
// [channel, length]. Equations in conv/kernels.hpp.
#include <cmath>

#include "chela/block/parameters.hpp"
#include "chela/conv/kernels.hpp"

namespace chela {

/// The taps are the parameters.
struct ExplicitKernel {
  struct Shape {
    Index width = 0;   ///< channels; taken from the memory
    Index length = 0;  ///< L: how many tokens back, this one included, an output sees
  };

  template <class A>
  struct Parameters {
    TensorView<A, 2> taps;  ///< [width, length]
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    f(ParameterInfo{"taps", {s.width, s.length}, normal_init(0, 0.02)}, p.taps...);
  }

  static constexpr Status check(const Shape& s) {
    return require(s.length > 0, Code::bad_shape, "a long kernel needs a length of at least 1");
  }
};

/// SGConv: sub-kernels of a few values each, stretched to twice the length of the one before and scaled down. Their
/// initial deviation makes the expected norm of the kernel 1, so there is no norm to divide by.
struct SgConvKernel {
  struct Shape {
    Index width = 0;       ///< channels; taken from the memory
    Index length = 0;      ///< L
    Index sub_width = 16;  ///< values of a sub-kernel
    double decay = 0.5;    ///< weight of each sub-kernel relative to the one before

    constexpr Index scales() const { return sgconv_scales(length, sub_width); }
  };

  template <class A>
  struct Parameters {
    TensorView<A, 3> weights;  ///< [scale, width, sub_width]
  };

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    double square = 0, weight = 1;
    for (Index i = 0; i < s.scales(); ++i, weight *= 2 * s.decay * s.decay) square += weight * double(s.sub_width);
    f(ParameterInfo{"weights", {s.scales(), s.width, s.sub_width}, normal_init(0, 1 / std::sqrt(square))},
      p.weights...);
  }

  static constexpr Status check(const Shape& s) {
    return first_failure(require(s.length > 0 && s.sub_width > 0, Code::bad_shape,
                                 "an SGConv kernel needs a length and a sub_width of at least 1"),
                         require(s.decay > 0, Code::bad_value, "decay must be greater than zero"));
  }
};

/// Mega's multi-dimensional damped moving average: an exponential kernel of unlimited length, whose decode state is of
/// constant size. It begins as in Mega [choice: beta normal(0, 1) where Mega alternates 1 and -1].
struct EmaKernel {
  struct Shape {
    Index width = 0;      ///< channels; taken from the memory
    Index averages = 16;  ///< n, per channel
  };

  template <class A>
  using Parameters = EmaParameters<A>;

  template <class F, class... P>
  static void visit(const Shape& s, F&& f, P&... p) {
    const std::vector<Index> extents = {s.width, s.averages};
    f(ParameterInfo{"alpha", extents, normal_init(0, 0.2)}, p.alpha...);
    f(ParameterInfo{"delta", extents, normal_init(0, 0.2)}, p.delta...);
    f(ParameterInfo{"beta", extents, normal_init(0, 1)}, p.beta...);
    f(ParameterInfo{"eta", extents, normal_init(0, 1 / std::sqrt(double(s.averages)))}, p.eta...);
  }

  static constexpr Status check(const Shape& s) {
    return require(s.averages > 0, Code::bad_shape, "a moving average needs averages of at least 1");
  }
};

}  // namespace chela
