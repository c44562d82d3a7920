#pragma once
// Long kernels on the CPU, for memories (cpu/block/memory.hpp). Compute<Kernel> makes the taps of a pass from the parameters,
// turns the taps' gradient into that of the parameters, and steps.
#include "chela/block/memory.hpp"
#include "chela/cpu/block/compute.hpp"
#include "chela/cpu/conv/long_step.hpp"

namespace chela::cpu {

namespace detail {

/// State of a kernel of bounded length: its last inputs, in a ring.
template <class A>
struct RingState {
  Tensor<A, 3> ring;  ///< [batch, length, width]
  Index position = 0;
  RingState() = default;
  RingState(Index batch, Index length, Index width) : ring(batch, length, width) {}
  std::size_t bytes() const { return std::size_t(ring.size()) * sizeof(A) + sizeof(position); }
};

/// z = skip x + taps * (ring and x). `taps` are kept [length, width].
template <class A, Executor E>
Status ring_step(const Tensor<A, 2>& taps, TensorView<const A, 1> skip, TensorView<const A, 2> x, TensorView<A, 2> z,
                 RingState<A>& state, const E& executor) {
  return long_conv_step(LongConvStepArgs<A>{.x = x,
                                            .taps = transposed(taps.view(), 0, 1),
                                            .skip = skip,
                                            .y = z,
                                            .ring = state.ring,
                                            .position = state.position++},
                        executor);
}

}  // namespace detail

template <>
struct Compute<ExplicitKernel> {
  using Shape = ExplicitKernel::Shape;
  template <class A>
  using Parameters = ExplicitKernel::Parameters<A>;

  template <class A>
  struct Cache {};
  template <class A>
  struct Prepared {
    Tensor<A, 2> taps;  ///< [length, width]
  };
  template <class A>
  struct State : detail::RingState<A> {
    State() = default;
    State(const Shape& s, Index batch) : detail::RingState<A>(batch, s.length, s.width) {}
  };

  /// [width, length] for a pass over this many tokens; valid until the cache is used again.
  template <class A, Executor E>
  static TensorView<const A, 2> taps(const Shape&, const Parameters<const A>& p, Index, Cache<A>&, const E&) {
    return p.taps;
  }

  /// Where the gradient of these taps is to be written before `backward`.
  template <class A>
  static TensorView<A, 2> grad_taps(const Shape&, Index, Cache<A>&, const Parameters<A>& grad) {
    return grad.taps;
  }

  template <class A, Executor E>
  static Status backward(const Shape&, const Parameters<const A>&, Index, Cache<A>&, const Parameters<A>&, const E&) {
    return {};
  }

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E&) {
    Prepared<A> prepared{Tensor<A, 2>(s.length, s.width)};
    for (Index j = 0; j < s.length; ++j)
      for (Index d = 0; d < s.width; ++d) prepared.taps(j, d) = p.taps(d, j);
    return prepared;
  }

  /// x and z [batch, width]; z may be x's memory.
  template <class A, Executor E>
  static Status step(const Shape&, const Parameters<const A>&, const Prepared<A>& prepared, TensorView<const A, 1> skip,
                     TensorView<const A, 2> x, TensorView<A, 2> z, State<A>& state, const E& executor) {
    return detail::ring_step(prepared.taps, skip, x, z, state, executor);
  }
};

}  // namespace chela::cpu
