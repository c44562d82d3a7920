#pragma once
// Long kernels on the CPU, for memories (cpu/block/memory.hpp). Compute<Kernel> makes the taps of a pass from the
// parameters, turns the taps' gradient into that of the parameters, and steps. A pass over T tokens needs at most T
// taps.
#include "chela/block/long_kernel.hpp"
#include "chela/cpu/block/compute.hpp"
#include "chela/cpu/block/rows.hpp"
#include "chela/cpu/conv/kernels.hpp"
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

/// Taps that a kernel makes, and their gradient: [width, length] each.
template <class A>
struct TapsCache {
  Tensor<A, 1> taps, grad_taps;
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

template <>
struct Compute<SgConvKernel> {
  using Shape = SgConvKernel::Shape;
  template <class A>
  using Parameters = SgConvKernel::Parameters<A>;
  template <class A>
  using Cache = detail::TapsCache<A>;
  template <class A>
  using Prepared = Compute<ExplicitKernel>::Prepared<A>;
  template <class A>
  struct State : detail::RingState<A> {
    State() = default;
    State(const Shape& s, Index batch) : detail::RingState<A>(batch, s.length, s.width) {}
  };

  template <class A, Executor E>
  static TensorView<const A, 2> taps(const Shape& s, const Parameters<const A>& p, Index tokens, Cache<A>& cache,
                                     const E& executor) {
    const auto taps = detail::reserve(cache.taps, s.width, length(s, tokens));
    write_taps(s, p, taps, executor);
    return taps;
  }

  template <class A>
  static TensorView<A, 2> grad_taps(const Shape& s, Index tokens, Cache<A>& cache, const Parameters<A>&) {
    return detail::reserve(cache.grad_taps, s.width, length(s, tokens));
  }

  template <class A, Executor E>
  static Status backward(const Shape& s, const Parameters<const A>&, Index tokens, Cache<A>& cache,
                         const Parameters<A>& grad, const E& executor) {
    return sgconv_taps_backward(
        SgConvTapsBackwardArgs<A>{.grad_taps = detail::reserve(cache.grad_taps, s.width, length(s, tokens)),
                                  .grad_weights = grad.weights,
                                  .decay = A(s.decay)},
        executor);
  }

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E& executor) {
    Prepared<A> prepared{Tensor<A, 2>(s.length, s.width)};
    write_taps(s, p, transposed(prepared.taps.view(), 0, 1), executor);
    return prepared;
  }

  template <class A, Executor E>
  static Status step(const Shape&, const Parameters<const A>&, const Prepared<A>& prepared, TensorView<const A, 1> skip,
                     TensorView<const A, 2> x, TensorView<A, 2> z, State<A>& state, const E& executor) {
    return detail::ring_step(prepared.taps, skip, x, z, state, executor);
  }

 private:
  static Index length(const Shape& s, Index tokens) { return std::clamp<Index>(tokens, 1, s.length); }

  template <class A, Executor E>
  static void write_taps(const Shape& s, const Parameters<const A>& p, TensorView<A, 2> taps, const E& executor) {
    // Cannot fail: the shapes come from `visit`, and memories check the decay.
    static_cast<void>(
        sgconv_taps(SgConvTapsArgs<A>{.weights = p.weights, .taps = taps, .decay = A(s.decay)}, executor));
  }
};

template <>
struct Compute<EmaKernel> {
  using Shape = EmaKernel::Shape;
  template <class A>
  using Parameters = EmaParameters<A>;
  template <class A>
  using Cache = detail::TapsCache<A>;
  template <class A>
  struct Prepared {
    Tensor<A, 2> decay, read;  ///< [width, averages] phi, and eta alpha beta
  };

  /// z_t = phi z_{t-1} + x_t: [batch, width, averages], whatever the number of tokens.
  template <class A>
  struct State {
    Tensor<A, 3> averages;
    State() = default;
    State(const Shape& s, Index batch) : averages(batch, s.width, s.averages) {}
    std::size_t bytes() const { return std::size_t(averages.size()) * sizeof(A); }
  };

  template <class A, Executor E>
  static TensorView<const A, 2> taps(const Shape& s, const Parameters<const A>& p, Index tokens, Cache<A>& cache,
                                     const E& executor) {
    const auto taps = detail::reserve(cache.taps, s.width, std::max<Index>(tokens, 1));
    static_cast<void>(ema_taps(EmaTapsArgs<A>{p, taps}, executor));  // cannot fail: the shapes come from `visit`
    return taps;
  }

  template <class A>
  static TensorView<A, 2> grad_taps(const Shape& s, Index tokens, Cache<A>& cache, const Parameters<A>&) {
    return detail::reserve(cache.grad_taps, s.width, std::max<Index>(tokens, 1));
  }

  template <class A, Executor E>
  static Status backward(const Shape& s, const Parameters<const A>& p, Index tokens, Cache<A>& cache,
                         const Parameters<A>& grad, const E& executor) {
    return ema_taps_backward(EmaTapsBackwardArgs<A>{p, grad_taps(s, tokens, cache, grad), grad}, executor);
  }

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E&) {
    Prepared<A> prepared{Tensor<A, 2>(s.width, s.averages), Tensor<A, 2>(s.width, s.averages)};
    const auto sigmoid = [](A a) { return A(1) / (A(1) + std::exp(-a)); };
    for (Index d = 0; d < s.width; ++d)
      for (Index n = 0; n < s.averages; ++n) {
        const A alpha = sigmoid(p.alpha(d, n));
        prepared.decay(d, n) = A(1) - alpha * sigmoid(p.delta(d, n));
        prepared.read(d, n) = p.eta(d, n) * alpha * p.beta(d, n);
      }
    return prepared;
  }

  /// x and z [batch, width]; z may be x's memory. The same recurrence as `ema_step`, with its coefficients at hand.
  template <class A, Executor E>
  static Status step(const Shape& s, const Parameters<const A>&, const Prepared<A>& prepared,
                     TensorView<const A, 1> skip, TensorView<const A, 2> x, TensorView<A, 2> z, State<A>& state,
                     const E& executor) {
    executor.for_each(x.extents[0], [&](Index b, int) {
      for (Index d = 0; d < s.width; ++d) {
        const A input = x(b, d);
        const auto next = [entering = rowwise::splat(input)](auto old, auto decay) {
          return Eigen::internal::pmadd(old, decay, entering);
        };
        A* averages = &state.averages(b, d, 0);
        rowwise::map_row<A>(s.averages, next, averages, averages, &prepared.decay(d, 0));
        z(b, d) =
            skip(d) * input + rowwise::sum_row<A>(s.averages, rowwise::Product<A>{}, averages, &prepared.read(d, 0));
      }
    });
    return {};
  }
};

}  // namespace chela::cpu
