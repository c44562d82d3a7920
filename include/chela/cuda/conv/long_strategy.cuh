#pragma once
// The ways to evaluate a long convolution on a GPU, and the rule that chooses among them from sizes, strides and policy
// alone.
#include <concepts>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/float_transform.cuh"
#include "chela/cuda/conv/half_transform.cuh"
#include "chela/cuda/conv/long_direct.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// A way to evaluate: a struct of static functions for both argument structs. It sees arguments within reach
/// (`within_reach`): at least one sequence, token and channel; taps that meet inputs only, and of the initial state and
/// its gradient the rows that they meet; no final state nor its gradient.
///
///   serves           whether it takes these arguments under a policy
///   kernel_bytes     of the taps in the form that it multiplies with, made by `prepare` and kept as long as they are
///   workspace_bytes  besides
///   forward          writes y
///   backward         writes the gradients that are present, but no state's of a sequence without tokens
template <class S, class Args>
concept EvaluatesLongConv = requires(const LongConvPolicy& policy, const Args& args, void* kernel,
                                     cudaStream_t stream) {
  { S::serves(policy, args) } -> std::same_as<bool>;
  { S::kernel_bytes(policy, args) } -> std::same_as<std::size_t>;
  { S::workspace_bytes(policy, args) } -> std::same_as<std::size_t>;
  { S::prepare(policy, args, kernel, stream) } -> std::same_as<Status>;
};
template <class S, class T>
concept LongConvStrategy = EvaluatesLongConv<S, LongConvArgs<T>> && EvaluatesLongConv<S, LongConvBackwardArgs<T>> &&
    requires(const LongConvPolicy& policy, const LongConvArgs<T>& args, const LongConvBackwardArgs<T>& backward_args,
             const void* kernel, Workspace workspace, cudaStream_t stream) {
  { S::forward(policy, args, kernel, workspace, stream) } -> std::same_as<Status>;
  { S::backward(policy, backward_args, kernel, workspace, stream) } -> std::same_as<Status>;
};

template <class T, LongConvStrategy<T>... S>
struct LongConvStrategies {};

/// The transforms that a policy allows for elements T, in the order in which they are asked.
template <LongConvPolicy P, class T>
constexpr auto long_conv_transforms() {
  if constexpr (!HalfElement<T> || P.arithmetic == TransformArithmetic::accumulator)
    return LongConvStrategies<T, FloatTransformLongConv<T, float2>>{};
  else if constexpr (P.arithmetic == TransformArithmetic::element)
    return LongConvStrategies<T, HalfTransformLongConv<T>, HalfColumnsLongConv<T>>{};
  else
    return LongConvStrategies<T, HalfTransformLongConv<T>, FloatTransformLongConv<T, __half2>>{};
}

template <LongConvPolicy P, class T, class Args, class F>
Status with_first_that_serves(LongConvStrategies<T>, const Args&, F f) {
  if constexpr (P.method == LongConvMethod::automatic)
    return f(DirectLongConv<T>{});
  else
    return {Code::unsupported,
            "no transform on the GPU takes these sizes and types; LongConvMethod::direct takes any, automatic what "
            "does"};
}
template <LongConvPolicy P, class T, class First, class... Rest, class Args, class F>
Status with_first_that_serves(LongConvStrategies<T, First, Rest...>, const Args& args, F f) {
  if (First::serves(P, args)) return f(First{});
  return with_first_that_serves<P>(LongConvStrategies<T, Rest...>{}, args, f);
}

template <class T>
constexpr bool meets_states(const LongConvArgs<T>& a) {
  return a.initial_state.present();
}
template <class T>
constexpr bool meets_states(const LongConvBackwardArgs<T>& a) {
  return a.initial_state.present() || a.grad_initial_state.present();
}

/// Calls f(strategy) with the one for these arguments, which are within reach. Only those that a policy may choose are
/// compiled.
template <LongConvPolicy P, class T, class Args, class F>
Status with_strategy(const Args& args, F f) {
  if constexpr (P.method == LongConvMethod::direct) {
    return f(DirectLongConv<T>{});
  } else {
    if constexpr (P.method == LongConvMethod::automatic) {
      const LongConvShape s = long_conv_shape(args);
      const double products = long_conv_products(s.tokens, s.taps, s.back_taps, meets_states(args));
      if (products <= double(direct_products<T>(P)) * double(s.tokens)) return f(DirectLongConv<T>{});
    }
    return with_first_that_serves<P>(long_conv_transforms<P, T>(), args, f);
  }
}

/// A copy of the arguments with what outputs can meet: taps by policy, tokens and states.
template <class Args>
Args within_reach(const LongConvPolicy& policy, Args a) {
  const LongConvShape s = long_conv_shape(a);
  const Index kept = policy.taps > 0 ? std::min<Index>(policy.taps, s.taps) : s.taps;
  const Index taps = meets_states(a) ? kept : std::clamp<Index>(kept, 1, std::max<Index>(s.tokens, 1));
  const Index back_taps = std::min(s.back_taps, std::max<Index>(s.tokens - 1, 0));
  const auto cut_columns = [](auto& view, Index count) {
    if (count == 0) view = {};
    if (view.present()) view = run(view, 1, 0, count);
  };
  const auto cut_state = [&](auto& state) {
    if (state.present()) state = run(state, 1, s.history() - (taps - 1), taps - 1);
  };
  cut_columns(a.taps, taps), cut_columns(a.back_taps, back_taps), cut_state(a.initial_state);
  if constexpr (requires { a.grad_taps; }) {
    cut_columns(a.grad_taps, taps), cut_columns(a.grad_back_taps, back_taps), cut_state(a.grad_initial_state);
    a.grad_final_state = {};
  } else {
    a.final_state = {};
  }
  return a;
}

}  // namespace chela::cuda::detail
