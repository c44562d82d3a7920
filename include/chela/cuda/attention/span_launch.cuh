#pragma once
// The launches of one call by its span: a walk in time; with a decay and a bidirectional span also one back in time, whose
// queries do not see their own tokens and whose outputs are added to those of the first; without decay no walk at all.
#include "chela/cuda/attention/key_decay_launch.cuh"
#include "chela/cuda/attention/linear_float.cuh"
#include "chela/cuda/attention/linear_launch.cuh"

namespace chela::cuda::detail {

template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status launch_walk(const LinearAttentionArgs<T, D, R, F>& args, const LinearPlan& plan, const LinearPass& pass,
                   cudaStream_t stream) {
  const bool warpgroups = plan.instructions == Instructions::warpgroup;
  if constexpr (D == DecayKind::per_key)
    return warpgroups ? launch_key_decay_warpgroups(args, plan, pass, stream)
                      : launch_key_decay_warps<P, InTime>(args, plan, pass, stream);
  else
    return warpgroups ? launch_warpgroups<InTime>(args, plan, pass, stream)
                      : launch_warps<P, InTime>(args, plan, pass, stream);
}

/// After launch_walk with the same arguments. Back in time a token is decayed by what decays the state before it in time, so
/// that a scalar decay is the one of the token before. Decays per key have no walk back, and go in time along reversed views,
/// which only warps can read.
template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status launch_joining_walk(const LinearAttentionArgs<T, D, R, F>& args, const LinearPlan& plan, LinearPass pass,
                           cudaStream_t stream) {
  pass.initial_state = {}, pass.final_state = {}, pass.state_slots = {};
  if constexpr (D == DecayKind::per_key) {
    LinearAttentionArgs<T, D, R, F> turned = args;
    turned.q = reversed(args.q, 1), turned.k = reversed(args.k, 1), turned.v = reversed(args.v, 1);
    turned.o = reversed(args.o, 1), pass.log_decay = reversed(pass.log_decay, 1), pass.sequences.reversed = true;
    pass.segments = 1, pass.segment_states = {};
    return launch_key_decay_warps<P, Walk<false, false, true>>(turned, plan, pass, stream);
  } else {
    pass.log_decay_lag = 1;
    if (pass.segments == 1) pass.segment_states = {};
    return plan.instructions == Instructions::warpgroup ? launch_warpgroups<JoiningBack>(args, plan, pass, stream)
                                                        : launch_warps<P, JoiningBack>(args, plan, pass, stream);
  }
}

template <class T, RuleKind R, class F>
Status launch_total_state(const LinearAttentionArgs<T, DecayKind::none, R, F>& args, const LinearPlan& plan,
                          const LinearPass& pass, cudaStream_t stream) {
  const TotalStatePass<T> total{make_warp_pass<InTime>(args, pass), MeanOver::reads};
  if (Status s = launch_total_states(total, plan.shape.state_heads(), stream); !s.ok()) return s;
  return launch_reads(total, stream);
}

/// All of a call but its last states.
template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status launch_pass(const LinearAttentionArgs<T, D, R, F>& args, const LinearPlan& plan, const LinearPass& pass,
                   cudaStream_t stream) {
  if constexpr (std::same_as<T, float>) {
    if constexpr (P.float_products == FloatProducts::none || D == DecayKind::per_key)
      return {Code::unsupported};  // see check_float
    else
      return launch_floats<P>(args, plan, pass, stream);
  } else if constexpr (D == DecayKind::none) {
    return plan.reads_total ? launch_total_state(args, plan, pass, stream) : launch_walk<P>(args, plan, pass, stream);
  } else {
    if (Status s = launch_walk<P>(args, plan, pass, stream); !s.ok()) return s;
    return args.span == Span::bidirectional ? launch_joining_walk<P>(args, plan, pass, stream) : Status{};
  }
}

}  // namespace chela::cuda::detail
