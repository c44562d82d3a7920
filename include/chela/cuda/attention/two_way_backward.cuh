#pragma once
// Gradients over a bidirectional span. With a decay those of both directions: a causal call, and one along reversed views whose
// queries do not see their own tokens and whose gradients are added to the first's. Without decay, those of a state that all
// queries of a sequence read.
#include <algorithm>

#include "chela/cuda/attention/key_gradient_launch.cuh"
#include "chela/cuda/attention/linear_backward_launch.cuh"
#include "chela/cuda/attention/total_state_launch.cuh"

namespace chela::cuda::detail {

/// Decays with which a bidirectional span is one walk in time and one back.
template <DecayKind D>
inline constexpr bool has_two_ways = D == DecayKind::per_head || D == DecayKind::per_token;

/// Only warps can read reversed views.
template <LinearPolicy P>
inline constexpr LinearPolicy policy_of_turned = {.instructions = Instructions::warp,
                                                  .stages = P.instructions == Instructions::warp ? P.stages : 0};

/// Arguments of the direction in time, and of that back in time as one in time along reversed views. States belong to the
/// first.
template <class Args>
Args in_time(Args args) {
  args.span = Span::causal;
  return args;
}
template <class T, DecayKind D, RuleKind R, class F>
LinearAttentionBackwardArgs<T, D, R, F> back_in_time(LinearAttentionBackwardArgs<T, D, R, F> args) {
  const auto turn = [](auto& x) {
    if (x.present()) x = reversed(x, 1);
  };
  turn(args.q), turn(args.k), turn(args.v), turn(args.grad_o), turn(args.grad_q), turn(args.grad_k), turn(args.grad_v);
  if constexpr (D == DecayKind::per_token) turn(args.log_decay), turn(args.grad_log_decay);
  args.initial_state = {}, args.grad_final_state = {}, args.grad_initial_state = {};
  args.span = Span::causal;
  return args;
}

/// Gradients of q from the total state, then those of k and v from its gradient.
template <class T, class F>
Status launch_total_gradients(const GradientPlan& plan, const GradientWalks<T, DecayKind::none, F>& walks,
                              cudaStream_t stream) {
  const auto total = [](const GradientWalk<T>& walk, MeanOver mean) {
    return TotalStatePass<T>{{walk.q, walk.k, walk.v, walk.o, walk.pass}, mean};
  };
  if (plan.in_time) {
    const TotalStatePass<T> queries = total(walks.queries(), MeanOver::reads);
    if (Status s = launch_total_states(queries, plan.shape.state_heads(), stream); !s.ok()) return s;
    if (Status s = launch_reads(queries, stream); !s.ok()) return s;
  }
  if (!plan.keys && !plan.values) return {};
  const TotalStatePass<T> values = total(walks.values(), MeanOver::sums);
  if (Status s = launch_total_states(values, plan.shape.output_heads(), stream); !s.ok()) return s;
  if (values.walk.o.present())
    if (Status s = launch_reads(values, stream); !s.ok()) return s;
  return plan.keys ? launch_reads(total(walks.keys(), MeanOver::sums), stream) : Status{};
}

/// The gradients of one call, or with Joins those of the direction along reversed views.
template <LinearPolicy P, bool Joins = false, class T, DecayKind D, RuleKind R, class F>
Status launch_direction(const LinearAttentionBackwardArgs<T, D, R, F>& args, Workspace workspace, cudaStream_t stream) {
  GradientPlan plan;
  if (Status s = plan_gradients<P>(args, plan, Joins); !s.ok()) return s;
  const GradientBuffers<T> buffers(args, plan, workspace.data);
  if (Status s = check_workspace(workspace, buffers.bytes); !s.ok()) return s;
  if (plan.sequences == 0) return launch_sums(args, plan, buffers, stream);
  const GradientWalks walks(args, plan, buffers);
  const auto launch_all = [&] {
    if constexpr (D == DecayKind::per_key) {
      return launch_key_gradients<P>(plan, walks, buffers, stream);
    } else {
      if constexpr (D == DecayKind::none) {
        if (plan.reads_total) return launch_total_gradients(plan, walks, stream);
      }
      if constexpr (!Joins) {
        if (plan.instructions == Instructions::warpgroup) return launch_warpgroup_gradients(plan, walks, stream);
      }
      return launch_warp_gradients<P, Joins>(plan, walks, stream);
    }
  };
  if (Status s = launch_all(); !s.ok()) return s;
  return launch_sums(args, plan, buffers, stream);
}

/// Bytes of workspace of a direction, or 0 where it is refused.
template <LinearPolicy P, bool Joins = false, class T, DecayKind D, RuleKind R, class F>
std::size_t direction_bytes(const LinearAttentionBackwardArgs<T, D, R, F>& args) {
  GradientPlan plan;
  return plan_gradients<P>(args, plan, Joins).ok() ? GradientBuffers<T>(args, plan, nullptr).bytes : 0;
}

/// Both directions, one after the other in the same workspace.
template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
std::size_t two_way_bytes(const LinearAttentionBackwardArgs<T, D, R, F>& args) {
  return std::max(direction_bytes<P>(in_time(args)), direction_bytes<policy_of_turned<P>, true>(back_in_time(args)));
}
template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status launch_two_way(const LinearAttentionBackwardArgs<T, D, R, F>& args, Workspace workspace, cudaStream_t stream) {
  if (Status s = check_workspace(workspace, two_way_bytes<P>(args)); !s.ok()) return s;
  if (Status s = launch_direction<P>(in_time(args), workspace, stream); !s.ok()) return s;
  return launch_direction<policy_of_turned<P>, true>(back_in_time(args), workspace, stream);
}

}  // namespace chela::cuda::detail
