#pragma once
// The host's side of linear attention's gradients: what is refused, how the walks are cut, and what lies where in the
// workspace.
#include "chela/cuda/attention/decay_gradient.cuh"
#include "chela/cuda/attention/head_sums.cuh"
#include "chela/cuda/attention/key_gradient_pass.cuh"
#include "chela/cuda/attention/linear_launch.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// Refuses what the contract allows and the GPU does not.
template <class T, DecayKind D, RuleKind R, class F>
Status check_for_gpu(const LinearAttentionBackwardArgs<T, D, R, F>& args) {
  const auto aligned = [](const auto& view) { return !view.present() || has_aligned_rows(view); };
  const LinearAttentionArgs<T, D, R, F> forward{
      .q = args.q, .k = args.k, .v = args.v, .span = args.span, .cu_seqlens = args.cu_seqlens};
  if (Status s = check_for_gpu(forward); !s.ok()) return s;
  return first_failure(
      require(D != DecayKind::per_key || args.span == Span::causal, Code::unsupported,
              "a bidirectional span with a decay per key has no gradients on the GPU; the CPU has them"),
      require(has_aligned_rows(args.grad_o), Code::bad_stride,
              "grad_o must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(aligned(args.grad_q), Code::bad_stride,
              "grad_q must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(aligned(args.grad_k), Code::bad_stride,
              "grad_k must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(aligned(args.grad_v), Code::bad_stride,
              "grad_v must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(has_aligned_pairs(args.log_decay), Code::bad_stride,
              "log_decay per key must have a unit last stride, other strides multiples of 2, and data 8-byte aligned"),
      require(!args.grad_log_decay.present() || has_aligned_pairs(args.grad_log_decay), Code::bad_stride,
              "grad_log_decay per key must have a unit last stride, other strides multiples of 2, and data 8-byte "
              "aligned"));
}

/// What one call will do.
struct GradientPlan {
  LinearAttentionShape shape;
  Index sequences = 0;
  Device device;
  Instructions instructions = Instructions::warp;
  bool wants_decay = false;           ///< the log-decays' gradient
  int window = 0;                     ///< tokens from one anchor of it to the next
  bool in_time = false;               ///< whether dq is walked; the log-decays' gradient needs it, and dk, too
  bool keys = false, values = false;  ///< whether dk and dv are; dv also leads to the initial state's
  LinearSchedule queries, back;       ///< of dq; of dk and dv
  int columns_together = 64;  ///< of q and k, whose products are summed by one block for the log-decays' gradient
  Index kept_values = 0;      ///< values of a kept state, with padding
  bool staged_queries = false, staged_back = false;  ///< begin from states that a kernel before put into the workspace
  bool reads_total = false;                          ///< all tokens of a sequence read one state (total_state.cuh)
  bool turned = false;  ///< the second direction of a bidirectional span, along reversed views: adds to the first's
};

/// `turned`: args are along reversed views.
template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status plan_gradients(const LinearAttentionBackwardArgs<T, D, R, F>& args, GradientPlan& plan, bool turned = false) {
  constexpr LinearPolicy policy = LinearPolicyConstant<P>::value;
  plan.turned = turned;
  const LinearAttentionShape s = plan.shape = linear_attention_shape(args.q, args.k, args.v);
  plan.sequences = sequences_of(args).size();
  plan.wants_decay = args.grad_log_decay.present();
  plan.window = D == DecayKind::per_head ? short_window : long_window;
  plan.in_time = args.grad_q.present() || plan.wants_decay;
  plan.keys = args.grad_k.present() || plan.wants_decay;
  plan.values = args.grad_v.present() || args.grad_initial_state.present();
  if (Status status = current_device(plan.device); !status.ok()) return status;
  if (D == DecayKind::none && args.span == Span::bidirectional) {
    const auto segments = [&](Index heads) {
      return total_state_segments(plan.sequences, heads, s, plan.device.multiprocessors, policy);
    };
    plan.reads_total = plan.staged_queries = plan.staged_back = true;
    plan.queries.segments = segments(s.state_heads()), plan.back.segments = segments(s.output_heads());
    return check_total_state_policy(policy);
  }

  if constexpr (policy.instructions != Instructions::warp) {
    const auto fits = [](Index dim) { return dim == 64 || dim == 128; };
    const auto copies = [](const auto& view) { return !view.present() || copies_by_tensor(view); };
    bool there = fits(s.key_dim) && fits(s.value_dim) && copies(args.q) && copies(args.k) && copies(args.v) &&
                 copies(args.grad_o) && copies(args.grad_q) && copies(args.grad_k) && copies(args.grad_v) &&
                 plan.device.capability == 90;
    if (there)
      if (Status status = has_warpgroup_kernels<T, DecayOf<D>>(there); !status.ok()) return status;
    if (there) plan.instructions = Instructions::warpgroup;
    if (!there && policy.instructions == Instructions::warpgroup)
      return {Code::unsupported,
              "Instructions::warpgroup needs a device of compute capability 9.0, code compiled for sm_90a, key_dim and "
              "value_dim 64 or 128, and positive strides; Instructions::automatic takes what there is"};
  }
  if (plan.instructions == Instructions::warpgroup) {
    LinearAttentionShape columns_of_keys = s;  // as dq and dk see it
    std::swap(columns_of_keys.key_dim, columns_of_keys.value_dim);
    const int multiprocessors = plan.device.multiprocessors;
    if (D == DecayKind::per_key) {
      plan.queries = plan.back = tuned_key_decay_schedule(s, plan.sequences, multiprocessors, policy);
    } else {
      plan.queries = tuned_warpgroup_schedule(columns_of_keys, plan.sequences, multiprocessors, policy);
      plan.back = tuned_warpgroup_schedule(s, plan.sequences, multiprocessors, policy);
    }
    // With so many stages two blocks of a pair fit on a multiprocessor.
    if (D != DecayKind::per_key && policy.stages == 0 && s.key_dim == 64 && s.value_dim == 64 &&
        2 * plan.sequences * s.output_heads() > multiprocessors)
      plan.back.stages = D == DecayKind::none ? 3 : 2;
  }
  plan.kept_values = s.value_dim;
  if constexpr (D == DecayKind::per_key) {
    plan.window = key_window, plan.kept_values = key_gradient_class(s.value_dim);
  } else if (plan.instructions == Instructions::warp) {
    const Status status = for_warp_sizes<P, DecayOf<D>, Walk<false, D != DecayKind::none>>(
        s.value_dim, plan.device, [&]<int KeyClass, int ValueWarps, int, int, int>() {
          plan.kept_values = KeyClass, plan.columns_together = 16 * ValueWarps;
          return Status{};
        });
    if (!status.ok()) return status;
  }
  plan.staged_queries = plan.queries.segments > 1;
  plan.staged_back =
      plan.back.segments > 1 || may_overlap(key_major<F>(args.grad_final_state), key_major<F>(args.grad_initial_state));
  return {};
}

/// The workspace of a call.
template <class T>
struct GradientBuffers {
  TensorView<T, 4> q, k, v;          ///< gradients of output heads that share a head, to be summed; or absent
  TensorView<float, 4> last_states;  ///< likewise of the initial state
  TensorView<float, 5> query_segments, back_segments;  ///< states at the segments' beginnings, [.., key_dim, value_dim]
  float *query_ages = nullptr, *back_ages = nullptr;
  float *query_rows = nullptr, *key_rows = nullptr, *kept_states = nullptr, *anchors = nullptr;
  double* totals = nullptr;
  KeyDecayGradient<T> key_decay;  ///< with a decay per key, in place of these
  std::size_t bytes = 0;

  template <DecayKind D, RuleKind R, class F>
  GradientBuffers(const LinearAttentionBackwardArgs<T, D, R, F>& args, const GradientPlan& plan, void* memory) {
    const LinearAttentionShape& s = plan.shape;
    const SequenceBatch sequences = sequences_of(args);
    const Index heads = s.output_heads();
    Parts parts(memory);
    const auto own_heads = [&](const auto& wanted) {
      if (!wanted.present() || wanted.extents[2] == heads) return TensorView<T, 4>{};
      const Index dim = wanted.extents[3];
      return contiguous(parts.take<T>(s.batch * s.tokens * heads * dim), s.batch, s.tokens, heads, dim);
    };
    q = own_heads(args.grad_q), k = own_heads(args.grad_k), v = own_heads(args.grad_v);
    if (args.grad_initial_state.present() && heads > s.state_heads())
      last_states = contiguous(parts.take<float>(plan.sequences * heads * s.key_dim * s.value_dim), plan.sequences,
                               heads, s.key_dim, s.value_dim);
    const auto segments = [&](bool staged, Index count, Index of_heads, float*& ages) {
      if (!staged) return TensorView<float, 5>{};
      const Index states = count * plan.sequences * of_heads;
      const auto view = contiguous(parts.take<float>(states * s.key_dim * s.value_dim), count, plan.sequences, of_heads,
                                   s.value_dim, s.key_dim);
      ages = parts.take<float>(states * (D == DecayKind::per_key ? s.key_dim : 1));
      return transposed(view, 3, 4);
    };
    query_segments = segments(plan.staged_queries, plan.queries.segments, s.state_heads(), query_ages);
    back_segments = segments(plan.staged_back, plan.back.segments, heads, back_ages);
    if constexpr (D == DecayKind::per_key) {
      if (plan.wants_decay) {
        key_decay.queries =
            contiguous(parts.take<T>(s.batch * s.tokens * heads * s.key_dim), s.batch, s.tokens, heads, s.key_dim);
        const Index kept = s.state_heads() * s.key_dim * plan.kept_values;
        key_decay.kept_states = parts.take<T>(most_inner_windows(sequences, plan.window) * kept);
        key_decay.ends_at_zero = !args.grad_final_state.present();
        if (!key_decay.ends_at_zero) key_decay.kept_ends = parts.take<float>(plan.sequences * kept);
        key_decay.segment_states = transposed(query_segments, 3, 4);
        key_decay.log_decay = args.grad_log_decay;
        if (heads > s.state_heads())
          key_decay.log_decay = contiguous(parts.take<float>(s.batch * s.tokens * heads * s.key_dim), s.batch, s.tokens,
                                           heads, s.key_dim);
      }
    } else if (plan.wants_decay) {
      const Index rows = row_parts(plan) * s.batch * s.tokens * heads;
      query_rows = parts.take<float>(rows), key_rows = parts.take<float>(rows);
      kept_states = parts.take<float>(most_inner_windows(sequences, plan.window) * s.state_heads() * s.key_dim *
                                      plan.kept_values);
      anchors = parts.take<float>(most_windows(sequences, plan.window) * heads * (s.key_dim / 16));
      if (D == DecayKind::per_head) totals = parts.take<double>(most_windows(sequences, plan.window) * s.state_heads());
    }
    bytes = parts.used();
  }

  /// Row sums come in so many parts.
  static Index row_parts(const GradientPlan& plan) {
    return ceil_div(plan.shape.key_dim, Index(plan.columns_together));
  }
};

}  // namespace chela::cuda::detail
