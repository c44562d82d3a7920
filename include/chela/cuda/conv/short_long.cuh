#pragma once
// The short-long convolution on NVIDIA GPUs (conv/short_long.hpp has the equation and the argument structs).
//
// Where the long stage is one transform of 16-bit data a row (half_transform.cuh: up to 16384 tokens and taps), the short
// width at most 8, and neither u nor a long state is asked for or given, z comes in one pass over x: the short
// convolution and its activation happen while a row is loaded. Else, and backwards, the stages follow each other through
// u in the workspace, or in `inner` where that is given. Both ways give the same bits.
#include <cuda_runtime.h>

#include "chela/conv/short_long.hpp"
#include "chela/cuda/conv/long.cuh"
#include "chela/cuda/conv/long_backward.cuh"
#include "chela/cuda/conv/short.cuh"
#include "chela/cuda/conv/short_tokens.cuh"

namespace chela::cuda {

namespace detail {

/// Where u or its gradient lies in a workspace: tokens or channels neighbours as x's are, at multiples of 16 bytes. Without
/// memory, an address that is aligned as that would be.
template <class T>
TensorView<T, 3> inner_view(TensorView<const T, 3> x, char* memory) {
  constexpr Index unit = 16 / Index(sizeof(T));
  const Index tokens = x.extents[1], channels = x.extents[2];
  TensorView<T, 3> inner{reinterpret_cast<T*>(memory ? memory : reinterpret_cast<char*>(256)),
                         {x.extents[0], tokens, channels}};
  if (tokens_are_neighbours(x)) {
    inner.strides[1] = 1, inner.strides[2] = round_up(tokens, unit);
    inner.strides[0] = channels * inner.strides[2];
  } else {
    inner.strides[2] = 1, inner.strides[1] = round_up(channels, unit);
    inner.strides[0] = tokens * inner.strides[1];
  }
  return inner;
}
template <class T>
std::size_t inner_bytes(TensorView<const T, 3> x) {
  const TensorView<T, 3> inner = inner_view(x, nullptr);
  return std::size_t(round_up(inner.extents[0] * inner.strides[0] * Index(sizeof(T)), 256));
}

template <class T>
bool has_rows(TensorView<T, 3> state) {
  return state.present() && state.extents[1] > 0;
}

/// Whether z comes in one pass over x.
template <LongConvPolicy P, Element T>
bool is_one_pass(const ShortLongConvArgs<T>& a) {
  if constexpr (HalfElement<T>) {
    if (a.short_taps.extents[1] > most_fused_width || a.inner.present() || has_rows(a.long_initial_state) ||
        has_rows(a.long_final_state) || a.x.size() == 0)
      return false;
    bool served = false;
    const Status status = with_strategy<P, T>(within_reach(P, long_stage(a, a.x)), [&]<class S>(S) {
      served = std::same_as<S, HalfTransformLongConv<T>>;
      return Status{};
    });
    return status.ok() && served;
  } else {
    return false;
  }
}

/// The long stage as it will be called, but for the addresses of u and its gradient.
template <LongConvPolicy P, Element T>
LongConvArgs<T> planned_long_stage(const ShortLongConvArgs<T>& a) {
  if (is_one_pass<P>(a)) return long_stage(a, a.x);
  return long_stage(a, TensorView<const T, 3>(a.inner.present() ? a.inner : inner_view(a.x, nullptr)));
}
template <LongConvPolicy P, Element T>
LongConvBackwardArgs<T> planned_long_stage(const ShortLongConvBackwardArgs<T>& a) {
  const TensorView<T, 3> inner = inner_view(a.x, nullptr);
  return long_stage(a, a.inner.present() ? a.inner : TensorView<const T, 3>(inner), inner);
}

/// Bytes of u, and backwards of its gradient, in the workspace.
template <LongConvPolicy P, Element T>
std::size_t stages_bytes(const ShortLongConvArgs<T>& a) {
  return is_one_pass<P>(a) || a.inner.present() ? 0 : inner_bytes(a.x);
}
template <LongConvPolicy P, Element T>
std::size_t stages_bytes(const ShortLongConvBackwardArgs<T>& a) {
  return (a.inner.present() ? 1 : 2) * inner_bytes(a.x);
}
/// Of what the stages need one after the other.
template <LongConvPolicy P, Element T>
std::size_t scratch_of_stages(const ShortLongConvArgs<T>& a) {
  return workspace_bytes_with_kernel<P>(planned_long_stage<P>(a));
}
template <LongConvPolicy P, Element T>
std::size_t scratch_of_stages(const ShortLongConvBackwardArgs<T>& a) {
  const TensorView<const T, 3> grad_inner = inner_view(a.x, nullptr);
  return std::max(workspace_bytes_with_kernel<P>(planned_long_stage<P>(a)),
                  workspace_bytes(short_stage_backward(a, grad_inner)));
}

/// The part of a workspace behind its first bytes.
inline Workspace behind(Workspace workspace, std::size_t bytes) {
  return {static_cast<char*>(workspace.data) + bytes, workspace.bytes - bytes};
}

}  // namespace detail

/// The arguments of a pass in either direction.
template <class Args>
concept ShortLongConvCall = std::same_as<Args, ShortLongConvArgs<detail::LongConvElement<Args>>> ||
    std::same_as<Args, ShortLongConvBackwardArgs<detail::LongConvElement<Args>>>;

/// As for the long convolution (cuda/conv/long.cuh): bytes of the prepared kernel, of scratch for calls with one, and of
/// scratch for calls without.
template <LongConvPolicy P = LongConvPolicy{}, ShortLongConvCall Args>
std::size_t prepared_kernel_bytes(const Args& args) {
  if (!check(args, args.short_taps.extents[1]).ok()) return 0;
  return prepared_kernel_bytes<P>(detail::planned_long_stage<P>(args));
}
template <LongConvPolicy P = LongConvPolicy{}, ShortLongConvCall Args>
std::size_t workspace_bytes_with_kernel(const Args& args) {
  if (!check(args, args.short_taps.extents[1]).ok()) return 0;
  return detail::stages_bytes<P>(args) + detail::scratch_of_stages<P>(args);
}
template <LongConvPolicy P = LongConvPolicy{}, ShortLongConvCall Args>
std::size_t workspace_bytes(const Args& args) {
  return prepared_kernel_bytes<P>(args) + workspace_bytes_with_kernel<P>(args);
}

/// Queues the preparation of the long stage's taps and skip.
template <LongConvPolicy P = LongConvPolicy{}, ShortLongConvCall Args>
Status prepare_kernel(const Args& args, PreparedKernel kernel, cudaStream_t stream) {
  if (Status s = check(args, args.short_taps.extents[1]); !s.ok()) return s;
  return prepare_kernel<P>(detail::planned_long_stage<P>(args), kernel, stream);
}

/// Queues both stages on `stream` and returns: z and, if wanted, u and the final states. Allocates nothing, waits for
/// nothing, can be captured into a graph. Any strides; z has memory of its own. The same arguments give the same bits on
/// every run.
template <int Width, LongConvPolicy P = LongConvPolicy{}, Element T>
Status short_long_conv(const ShortLongConvArgs<T>& args, PreparedKernel kernel, Workspace workspace,
                       cudaStream_t stream) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_workspace(workspace, workspace_bytes_with_kernel<P>(args)); !s.ok()) return s;
  if constexpr (HalfElement<T> && Width <= detail::most_fused_width) {
    if (detail::is_one_pass<P>(args)) {
      using Strategy = detail::HalfTransformLongConv<T>;
      const LongConvArgs<T> met = detail::within_reach(P, long_stage(args, args.x));
      if (Status s = detail::check_memory<P, Strategy>(met, kernel, workspace); !s.ok()) return s;
      const detail::ShortConvTokens<T, Width, Activation::silu> source{args.short_taps, args.short_bias,
                                                                       args.short_initial_state};
      if (Status s = Strategy::forward(P, met, kernel.data, workspace, stream, source); !s.ok()) return s;
      if constexpr (Width > 1)
        if (args.short_final_state.present())
          return detail::launch_final_states<Width>(short_stage(args, args.z), stream);
      return {};
    }
  }
  const TensorView<T, 3> inner =
      args.inner.present() ? args.inner : detail::inner_view(args.x, static_cast<char*>(workspace.data));
  if (Status s = short_conv<Width, Activation::silu>(short_stage(args, inner), stream); !s.ok()) return s;
  return long_conv<P>(long_stage(args, TensorView<const T, 3>(inner)), kernel,
                      detail::behind(workspace, detail::stages_bytes<P>(args)), stream);
}

/// Queues those gradients of `short_long_conv` that are present, under its conditions. u is computed again unless
/// `inner` is given.
template <int Width, LongConvPolicy P = LongConvPolicy{}, Element T>
Status short_long_conv_backward(const ShortLongConvBackwardArgs<T>& args, PreparedKernel kernel, Workspace workspace,
                                cudaStream_t stream) {
  chela::detail::require_short_width<Width>();
  if (Status s = check(args, Width); !s.ok()) return s;
  if (Status s = check_workspace(workspace, workspace_bytes_with_kernel<P>(args)); !s.ok()) return s;
  char* const memory = static_cast<char*>(workspace.data);
  const TensorView<T, 3> grad_inner = detail::inner_view(args.x, memory);
  TensorView<const T, 3> inner = args.inner;
  if (!inner.present()) {
    const TensorView<T, 3> own = detail::inner_view(args.x, memory ? memory + detail::inner_bytes(args.x) : nullptr);
    if (Status s = short_conv<Width, Activation::silu>(short_stage(args, own), stream); !s.ok()) return s;
    inner = own;
  }
  const Workspace rest = detail::behind(workspace, detail::stages_bytes<P>(args));
  if (Status s = long_conv_backward<P>(long_stage(args, inner, grad_inner), kernel, rest, stream); !s.ok()) return s;
  return short_conv_backward<Width, Activation::silu>(short_stage_backward(args, TensorView<const T, 3>(grad_inner)),
                                                      rest, stream);
}

namespace detail {

/// The same with taps that are prepared by this call, in the workspace.
template <LongConvPolicy P, class Args, class Call>
Status with_kernel_of_workspace(const Args& args, Workspace workspace, cudaStream_t stream, Call call) {
  if (Status s = check(args, args.short_taps.extents[1]); !s.ok()) return s;
  if (Status s = check_workspace(workspace, workspace_bytes<P>(args)); !s.ok()) return s;
  const auto [kernel, rest] = cut_workspace(workspace, prepared_kernel_bytes<P>(args));
  if (Status s = prepare_kernel<P>(args, kernel, stream); !s.ok()) return s;
  return call(kernel, rest);
}

}  // namespace detail

/// Both with taps that are prepared by this call, in the workspace.
template <int Width, LongConvPolicy P = LongConvPolicy{}, Element T>
Status short_long_conv(const ShortLongConvArgs<T>& args, Workspace workspace, cudaStream_t stream) {
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::with_kernel_of_workspace<P>(args, workspace, stream, [&](PreparedKernel kernel, Workspace rest) {
    return short_long_conv<Width, P>(args, kernel, rest, stream);
  });
}
template <int Width, LongConvPolicy P = LongConvPolicy{}, Element T>
Status short_long_conv_backward(const ShortLongConvBackwardArgs<T>& args, Workspace workspace, cudaStream_t stream) {
  if (Status s = check(args, Width); !s.ok()) return s;
  return detail::with_kernel_of_workspace<P>(args, workspace, stream, [&](PreparedKernel kernel, Workspace rest) {
    return short_long_conv_backward<Width, P>(args, kernel, rest, stream);
  });
}

}  // namespace chela::cuda
