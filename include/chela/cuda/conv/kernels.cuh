#pragma once
// Taps of long kernels from their parameters, and gradients back to them, on NVIDIA GPUs (conv/kernels.hpp has the
// equations and the argument structs). Parameters and taps are float or double; powers and sums are double. Each
// function queues its work on `stream` and returns: no workspace, nothing allocated, nothing waited for, the same bits
// on every run, any strides.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "chela/conv/kernels.hpp"
#include "chela/cuda/device.cuh"

namespace chela::cuda {

namespace detail {

template <class A>
CHELA_HOST_DEVICE A squashed(A w, A threshold) {
  return w > threshold ? w - threshold : w < -threshold ? w + threshold : A(0) * w;
}

/// A sub-kernel of SGConv: `width` values, each at the middle of `run` taps.
struct SgConvScale {
  Index width, run;

  /// What value r is multiplied by in tap `at` of the sub-kernel.
  CHELA_HOST_DEVICE double share(Index r, Index at) const {
    const Index past = at - run / 2,
                before = past < 0 ? 0 : past / run;  // the value whose middle is at or before the tap
    if (past < 0) return r == 0 ? 1 : 0;
    if (before >= width - 1) return r == width - 1 ? 1 : 0;
    const double to_next = run == 1 ? 0.0 : (double(past - before * run) + 0.5) / double(run);
    return r == before ? 1 - to_next : r == before + 1 ? to_next : 0.0;
  }
  /// The taps that value r has a share in.
  CHELA_HOST_DEVICE Index first_tap(Index r) const { return r == 0 ? 0 : run / 2 + (r - 1) * run; }
  CHELA_HOST_DEVICE Index end_tap(Index r) const { return r == width - 1 ? width * run : run / 2 + (r + 1) * run; }
};

/// Tap j of a channel.
template <class A>
CHELA_HOST_DEVICE A sgconv_tap(const SgConvTapsArgs<A>& a, Index channel, Index j) {
  double factor = 1 / (a.norm.present() ? double(a.norm(channel)) : 1.0);
  const Index width = a.weights.extents[2];
  Index scale = 0, begin = 0, run = 1;
  for (; begin + width * run <= j; ++scale, run *= 2) begin += width * run, factor *= double(a.decay);
  const SgConvScale s{width, run};
  const Index past = j - begin - run / 2, r = past < 0 ? 0 : past / run < width ? past / run : width - 1;
  double sum = s.share(r, j - begin) * double(a.weights(scale, channel, r));
  if (r + 1 < width) sum += s.share(r + 1, j - begin) * double(a.weights(scale, channel, r + 1));
  return A(factor * sum);
}

/// base^exponent by squares.
CHELA_HOST_DEVICE inline double whole_power(double base, Index exponent) {
  double power = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2 == 1) power *= base;
  return power;
}

/// One average of EMA.
struct EmaAverage {
  double alpha, delta, beta, eta, phi;

  template <class A>
  CHELA_HOST_DEVICE EmaAverage(const EmaParameters<const A>& p, Index channel, Index n)
      : alpha(1 / (1 + exp(-double(p.alpha(channel, n))))),
        delta(1 / (1 + exp(-double(p.delta(channel, n))))),
        beta(double(p.beta(channel, n))),
        eta(double(p.eta(channel, n))),
        phi(1 - alpha * delta) {}

  /// From the sums of grad_taps phi^j, and of its derivative with respect to phi.
  template <class A>
  CHELA_HOST_DEVICE void gradients(double sum, double slope, const EmaParameters<A>& grad, Index channel,
                                   Index n) const {
    const double grad_phi = eta * alpha * beta * slope;
    grad.eta(channel, n) = A(alpha * beta * sum), grad.beta(channel, n) = A(eta * alpha * sum);
    grad.alpha(channel, n) = A((eta * beta * sum - delta * grad_phi) * alpha * (1 - alpha));
    grad.delta(channel, n) = A(-alpha * grad_phi * delta * (1 - delta));
  }
};

/// The powers of phi that one of `threads` threads meets: at taps first, first + threads, ..
struct EmaPowers {
  double power, before, step;  ///< phi^j, phi^(j - 1) or zero, phi^threads
  Index j, threads;

  CHELA_HOST_DEVICE EmaPowers(double phi, Index first, Index count)
      : power(whole_power(phi, first)),
        before(first > 0 ? whole_power(phi, first - 1) : 0),
        step(whole_power(phi, count)),
        j(first),
        threads(count) {
    if (first == 0) after_zero_ = whole_power(phi, count - 1);
  }
  CHELA_HOST_DEVICE double slope() const { return double(j) * before; }
  CHELA_HOST_DEVICE void next() {
    before = j == 0 ? after_zero_ : before * step;
    power *= step, j += threads;
  }

 private:
  double after_zero_ = 0;
};

inline constexpr int kernel_threads = 256;

/// Calls work(i) for i < size, a thread each.
template <class Work>
struct EachCall {
  Work work;
  Index size;
};
template <class Work>
__global__ void __launch_bounds__(kernel_threads) each_kernel(const __grid_constant__ EachCall<Work> call) {
  for (Index i = Index(blockIdx.x) * kernel_threads + threadIdx.x; i < call.size;
       i += Index(gridDim.x) * kernel_threads)
    call.work(i);
}
/// Calls work(i) for i < size, a warp each.
template <class Work>
__global__ void __launch_bounds__(kernel_threads) each_by_warp_kernel(const __grid_constant__ EachCall<Work> call) {
  constexpr Index warps = kernel_threads / 32;
  for (Index i = Index(blockIdx.x) * warps + threadIdx.x / 32; i < call.size; i += Index(gridDim.x) * warps)
    call.work(i);
}

template <class Work>
Status launch_each(const Work& work, Index size, bool by_warp, cudaStream_t stream) {
  if (size == 0) return {};
  const Index blocks = std::min<Index>(ceil_div(size, by_warp ? kernel_threads / 32 : kernel_threads), 1 << 16);
  return launch(by_warp ? each_by_warp_kernel<Work> : each_kernel<Work>, dim3(unsigned(blocks)), kernel_threads, 0,
                stream, {work, size});
}

/// Over the 32 lanes of a warp; every lane gets it.
__device__ inline double warp_sum(double x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

template <class A>
struct SquashTaps {
  SquashTapsArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index d = i / a.taps.extents[1], j = i % a.taps.extents[1];
    a.taps(d, j) = squashed(a.weights(d, j), a.threshold);
  }
};

template <class A>
struct SquashTapsBackward {
  SquashTapsBackwardArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index d = i / a.weights.extents[1], j = i % a.weights.extents[1];
    const A w = a.weights(d, j);
    a.grad_weights(d, j) = w > a.threshold || w < -a.threshold ? a.grad_taps(d, j) : A(0);
  }
};

template <class A>
struct SgConvTaps {
  SgConvTapsArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index d = i / a.taps.extents[1], j = i % a.taps.extents[1];
    a.taps(d, j) = sgconv_tap(a, d, j);
  }
};

/// A warp sums over the taps that a value has a share in.
template <class A>
struct SgConvTapsBackward {
  SgConvTapsBackwardArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index width = a.grad_weights.extents[2], channels = a.grad_weights.extents[1];
    const Index r = i % width, d = i / width % channels, scale = i / width / channels;
    const SgConvScale s{width, Index(1) << scale};
    const Index begin = sgconv_reach_before(scale, width), length = a.grad_taps.extents[1];
    double sum = 0;
    for (Index at = s.first_tap(r) + threadIdx.x % 32; at < s.end_tap(r) && begin + at < length; at += 32)
      sum += s.share(r, at) * double(a.grad_taps(d, begin + at));
    sum = warp_sum(sum);
    const double factor = whole_power(double(a.decay), scale) / (a.norm.present() ? double(a.norm(d)) : 1.0);
    if (threadIdx.x % 32 == 0) a.grad_weights(scale, d, r) = A(factor * sum);
  }
  __device__ static Index sgconv_reach_before(Index scale, Index width) { return width * ((Index(1) << scale) - 1); }
};

/// The norm of one channel's taps.
template <class A>
struct TapsNorm {
  TensorView<const A, 2> taps;
  TensorView<A, 1> norm;
  __device__ void operator()(Index d) const {
    double sum = 0;
    for (Index j = threadIdx.x % 32; j < taps.extents[1]; j += 32) sum += double(taps(d, j)) * double(taps(d, j));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) norm(d) = A(sqrt(sum));
  }
};

/// A warp has `ema_warp_taps` taps of a channel, a lane every 32nd of them.
inline constexpr int ema_lane_taps = 16, ema_warp_taps = 32 * ema_lane_taps;

template <class A>
struct EmaTaps {
  EmaTapsArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index length = a.taps.extents[1], runs = ceil_div(length, ema_warp_taps), d = i / runs;
    const Index first = i % runs * ema_warp_taps + threadIdx.x % 32;
    double sums[ema_lane_taps] = {};
    for (Index n = 0; n < a.parameters.alpha.extents[1]; ++n) {
      const EmaAverage c(a.parameters, d, n);
      const double step = whole_power(c.phi, 32);
      double power = c.eta * c.alpha * c.beta * whole_power(c.phi, first);
#pragma unroll
      for (double& sum : sums) sum += power, power *= step;
    }
#pragma unroll
    for (int k = 0; k < ema_lane_taps; ++k)
      if (first + 32 * k < length) a.taps(d, first + 32 * k) = A(sums[k]);
  }
};

template <class A>
struct EmaTapsBackward {
  EmaTapsBackwardArgs<A> a;
  __device__ void operator()(Index i) const {
    const Index averages = a.parameters.alpha.extents[1], d = i / averages, n = i % averages;
    const EmaAverage c(a.parameters, d, n);
    double sum = 0, slope = 0;
    for (EmaPowers p(c.phi, threadIdx.x % 32, 32); p.j < a.grad_taps.extents[1]; p.next()) {
      const auto g = double(a.grad_taps(d, p.j));
      sum += g * p.power, slope += g * p.slope();
    }
    sum = warp_sum(sum), slope = warp_sum(slope);
    if (threadIdx.x % 32 == 0) c.gradients(sum, slope, a.grad, d, n);
  }
};

}  // namespace detail

template <std::floating_point A>
Status squash_taps(const SquashTapsArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  return detail::launch_each(detail::SquashTaps<A>{a}, a.taps.size(), false, stream);
}

template <std::floating_point A>
Status squash_taps_backward(const SquashTapsBackwardArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  return detail::launch_each(detail::SquashTapsBackward<A>{a}, a.weights.size(), false, stream);
}

template <std::floating_point A>
Status sgconv_taps(const SgConvTapsArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  return detail::launch_each(detail::SgConvTaps<A>{a}, a.taps.size(), false, stream);
}

template <std::floating_point A>
Status sgconv_taps_backward(const SgConvTapsBackwardArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  return detail::launch_each(detail::SgConvTapsBackward<A>{a}, a.grad_weights.size(), true, stream);
}

/// The norms to divide by from then on: those of the kernels of `a` as they are, with `a.norm` not read. `a.taps` is used
/// as scratch, so it holds the kernels before division.
template <std::floating_point A>
Status sgconv_norm(SgConvTapsArgs<A> a, TensorView<A, 1> norm, cudaStream_t stream) {
  a.norm = {};
  if (Status s = require(has_extents(norm, a.taps.extents[0]) && writable(norm), Code::bad_shape,
                         "norm must be [channel] without a broadcast axis");
      !s.ok())
    return s;
  if (Status s = sgconv_taps(a, stream); !s.ok()) return s;
  return detail::launch_each(detail::TapsNorm<A>{a.taps, norm}, norm.extents[0], true, stream);
}

template <std::floating_point A>
Status ema_taps(const EmaTapsArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  const Index runs = ceil_div(a.taps.extents[1], detail::ema_warp_taps);
  return detail::launch_each(detail::EmaTaps<A>{a}, a.taps.extents[0] * runs, true, stream);
}

template <std::floating_point A>
Status ema_taps_backward(const EmaTapsBackwardArgs<A>& a, cudaStream_t stream) {
  if (Status s = check(a); !s.ok()) return s;
  return detail::launch_each(detail::EmaTapsBackward<A>{a}, a.parameters.alpha.size(), true, stream);
}

}  // namespace chela::cuda
