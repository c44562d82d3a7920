#pragma once
// The short-long convolution on the CPU: the two stages one after the other. See chela/conv/short_long.hpp.
#include <type_traits>

#include "chela/conv/short_long.hpp"
#include "chela/cpu/conv/long.hpp"
#include "chela/cpu/conv/long_step.hpp"
#include "chela/cpu/conv/short.hpp"

namespace chela::cpu {

namespace detail {

/// Runs both stages; `long_op(long_stage)` computes the second.
template <int Width, Element T, Executor E, class LongOp>
Status run_short_long_conv(const ShortLongConvArgs<T>& args, const E& executor, LongOp&& long_op) {
  Tensor<T, 3> own;
  if (!args.inner.present()) own = Tensor<T, 3>(args.x.extents[0], args.x.extents[1], args.x.extents[2]);
  const TensorView<T, 3> inner = args.inner.present() ? args.inner : own.view();
  if (Status s = short_conv<Width, Activation::silu>(short_stage(args, inner), executor); !s.ok()) return s;
  return long_op(long_stage(args, TensorView<const T, 3>(inner)));
}

/// Runs both stages backwards; `long_op(long_stage)` computes the first of them.
template <int Width, Element T, Executor E, class LongOp>
Status run_short_long_conv_backward(const ShortLongConvBackwardArgs<T>& args, const E& executor, LongOp&& long_op) {
  const Index batch = args.x.extents[0], tokens = args.x.extents[1], channels = args.x.extents[2];
  Tensor<T, 3> own, grad_inner(batch, tokens, channels);
  TensorView<const T, 3> inner = args.inner;
  if (!inner.present()) {
    own = Tensor<T, 3>(batch, tokens, channels);
    inner = own.view();
    if (Status s = short_conv<Width, Activation::silu>(short_stage(args, own.view()), executor); !s.ok()) return s;
  }
  if (Status s = long_op(long_stage(args, inner, grad_inner.view())); !s.ok()) return s;
  return short_conv_backward<Width, Activation::silu>(
      short_stage_backward(args, TensorView<const T, 3>(grad_inner.view())), executor);
}

}  // namespace detail

/// z and, if wanted, u and the final states. Scratch: u, unless `inner` is given, and the kernel's spectrum.
template <int Width, Element T, Executor E = DefaultExecutor>
Status short_long_conv(const ShortLongConvArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::run_short_long_conv<Width>(args, executor,
                                            [&](const auto& stage) { return long_conv(stage, executor); });
}

/// The same with a long kernel that was transformed before; the arguments' `taps` and `back_taps` are checked but not
/// read.
template <int Width, Element T, Executor E = DefaultExecutor>
Status short_long_conv(const ShortLongConvArgs<T>& args, const KernelSpectrum<Accumulator<T>>& spectrum,
                       const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::run_short_long_conv<Width>(args, executor,
                                            [&](const auto& stage) { return long_conv(stage, spectrum, executor); });
}

/// Those gradients of `short_long_conv` that are present. Scratch: u, unless `inner` is given, and its gradient.
template <int Width, Element T, Executor E = DefaultExecutor>
Status short_long_conv_backward(const ShortLongConvBackwardArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::run_short_long_conv_backward<Width>(
      args, executor, [&](const auto& stage) { return long_conv_backward(stage, executor); });
}

/// The same with a long kernel that was transformed before.
template <int Width, Element T, Executor E = DefaultExecutor>
Status short_long_conv_backward(const ShortLongConvBackwardArgs<T>& args,
                                const KernelSpectrum<Accumulator<T>>& spectrum, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::run_short_long_conv_backward<Width>(
      args, executor, [&](const auto& stage) { return long_conv_backward(stage, spectrum, executor); });
}

/// One token per sequence. The caller counts `position` on.
template <int Width, Element T, Executor E = DefaultExecutor>
Status short_long_conv_step(const ShortLongConvStepArgs<T>& args, const E& executor = {}) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = short_conv_step<Width, Activation::silu>(short_stage(args), executor); !s.ok()) return s;
  return long_conv_step(long_stage(args), executor);
}

}  // namespace chela::cpu
