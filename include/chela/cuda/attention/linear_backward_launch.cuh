#pragma once
// The walks of linear attention's gradients and their launches. Each is the pass of the outputs with the roles of q, k and
// v exchanged:
//
//   dq   attention of (dO, v, k) in time, from S_0^T
//   dk   attention of (v, dO, q) back in time, from X_T^T      X: the gradient of the state
//   dv   attention of (k, q, dO) back in time, from X_T, to X_0
//
// The scale multiplies outputs, so the states of the last two are X / scale.
#include "chela/cuda/attention/linear_backward_plan.cuh"

namespace chela::cuda::detail {

/// One walk: what it reads as queries, keys and values, the tensor that its output is the gradient of, and the output.
template <class T>
struct GradientWalk {
  TensorView<const T, 4> q, k, v, primal;
  TensorView<T, 4> o;
  LinearPass pass;
  TensorView<const T, 4> earlier = {};  ///< what the output is added to, or absent
};

/// The three walks of a call.
template <class T, DecayKind D, class F>
class GradientWalks {
 public:
  using Args = LinearAttentionBackwardArgs<T, D, RuleKind::additive, F>;

  GradientWalks(const Args& args, const GradientPlan& plan, const GradientBuffers<T>& buffers)
      : args_(args), plan_(plan), buffers_(buffers), scale_(attention_scale(args.scale, plan.shape)) {}

  GradientWalk<T> queries() const {
    const LinearAttentionShape& s = plan_.shape;
    GradientWalk<T> walk{args_.grad_o,
                         args_.v,
                         args_.k,
                         args_.q,
                         target(buffers_.q, args_.grad_q),
                         pass(s.value_dim, s.key_dim, plan_.queries)};
    HeadSharing& heads = walk.pass.heads;
    heads.outputs_per_state = outputs_per(s.state_heads());
    heads.states_per_key = int(s.state_heads() / s.value_heads);
    heads.states_per_value = int(s.state_heads() / s.key_heads);
    heads.outputs_per_primal = outputs_per(s.query_heads);
    walk.pass.initial_state = transposed(key_major<F>(args_.initial_state), 2, 3);
    if (plan_.staged_queries) {
      walk.pass.segment_states = transposed(buffers_.query_segments, 3, 4);
      walk.pass.segment_ages = buffers_.query_ages;
    }
    walk.earlier = earlier(buffers_.q, args_.grad_q);
    walk.pass.sums.rows = buffers_.query_rows, walk.pass.sums.kept_states = buffers_.kept_states;
    walk.pass.sums.window = plan_.window;
    return walk;
  }
  /// The states that the walk of dq begins its segments with, as a pass of outputs has them.
  GradientWalk<T> states() const {
    const LinearAttentionShape& s = plan_.shape;
    GradientWalk<T> walk{args_.q, args_.k, args_.v, {}, {}, pass(s.key_dim, s.value_dim, plan_.queries)};
    HeadSharing& heads = walk.pass.heads;
    heads.outputs_per_state = outputs_per(s.state_heads());
    heads.states_per_key = int(s.state_heads() / s.key_heads);
    heads.states_per_value = int(s.state_heads() / s.value_heads);
    walk.pass.initial_state = key_major<F>(args_.initial_state);
    walk.pass.segment_states = buffers_.query_segments, walk.pass.segment_ages = buffers_.query_ages;
    return walk;
  }
  GradientWalk<T> keys() const {
    const LinearAttentionShape& s = plan_.shape;
    GradientWalk<T> walk{args_.v,
                         args_.grad_o,
                         args_.q,
                         args_.k,
                         target(buffers_.k, args_.grad_k),
                         pass_back(s.value_dim, s.key_dim, s.value_heads, 1, outputs_per(s.query_heads))};
    walk.pass.heads.outputs_per_primal = outputs_per(s.key_heads);
    walk.pass.initial_state = transposed(key_major<F>(args_.grad_final_state), 2, 3);
    if (plan_.staged_back) walk.pass.segment_states = transposed(buffers_.back_segments, 3, 4);
    walk.earlier = earlier(buffers_.k, args_.grad_k);
    walk.pass.sums.rows = buffers_.key_rows, walk.pass.sums.kept_states = buffers_.kept_states;
    walk.pass.sums.anchors = buffers_.anchors, walk.pass.sums.window = plan_.window;
    walk.pass.sums.first_states = transposed(key_major<F>(args_.initial_state), 2, 3);
    return walk;
  }
  GradientWalk<T> values() const {
    const LinearAttentionShape& s = plan_.shape;
    GradientWalk<T> walk{args_.k,
                         args_.q,
                         args_.grad_o,
                         args_.v,
                         target(buffers_.v, args_.grad_v),
                         pass_back(s.key_dim, s.value_dim, s.key_heads, outputs_per(s.query_heads), 1)};
    walk.pass.initial_state = key_major<F>(args_.grad_final_state);
    walk.pass.final_state =
        buffers_.last_states.present() ? buffers_.last_states : key_major<F>(args_.grad_initial_state);
    walk.pass.final_factor = scale_;
    walk.earlier = earlier(buffers_.v, args_.grad_v);
    if (plan_.staged_back) walk.pass.segment_states = buffers_.back_segments;
    return walk;
  }

 private:
  int outputs_per(Index heads) const { return int(plan_.shape.output_heads() / heads); }
  static TensorView<T, 4> target(TensorView<T, 4> parts, TensorView<T, 4> wanted) {
    return parts.present() ? parts : wanted;
  }
  TensorView<const T, 4> earlier(TensorView<T, 4> parts, TensorView<T, 4> wanted) const {
    return plan_.turned && !parts.present() ? wanted : TensorView<T, 4>{};
  }
  LinearPass pass(Index key_dim, Index value_dim, const LinearSchedule& schedule) const {
    LinearPass pass;
    pass.sequences = sequences_of(args_), pass.sequences.reversed = plan_.turned;
    pass.heads.outputs = int(plan_.shape.output_heads());
    pass.key_dim = int(key_dim), pass.value_dim = int(value_dim);
    pass.segments = schedule.segments, pass.stages = schedule.stages;
    pass.scale = scale_;
    if constexpr (D != DecayKind::none)
      pass.log_decay = slice_axis<3>(spread_log_decay(args_.log_decay, plan_.shape), 0);
    return pass;
  }
  /// Back in time, where each output head carries a state.
  LinearPass pass_back(Index key_dim, Index value_dim, Index query_heads, int per_key, int per_value) const {
    const LinearAttentionShape& s = plan_.shape;
    LinearPass back = pass(key_dim, value_dim, plan_.back);
    back.heads.outputs_per_query = outputs_per(query_heads);
    back.heads.states_per_key = per_key, back.heads.states_per_value = per_value;
    back.heads.states_per_given = outputs_per(s.state_heads());
    back.initial_factor = 1 / scale_;
    back.segment_ages = buffers_.back_ages;
    return back;
  }

  const Args& args_;
  const GradientPlan& plan_;
  const GradientBuffers<T>& buffers_;
  float scale_;
};

/// A walk as warpgroups of these sizes take it.
template <int KeyDim, int ValueGroups, class T>
Status describe_walk(WarpgroupPass<T>& to, const GradientWalk<T>& walk) {
  const auto encode = [](CUtensorMap& map, TensorView<const T, 4> view, int panels) {
    return view.size() == 0 || !view.present() ? Status{} : encode_tensor_map<T>(map, view, panels);
  };
  to.output = walk.o, to.pass = walk.pass;
  to.pass.value_tiles = walk.pass.value_dim / (64 * ValueGroups);
  return first_failure(encode(to.q, walk.q, KeyDim / 64), encode(to.k, walk.k, KeyDim / 64),
                       encode(to.v, walk.v, ValueGroups), encode(to.o, walk.o, 1), encode(to.beside, walk.primal, 1));
}

/// The states at the beginnings of a walk's segments, into segment_states.
template <class T, class D, bool Reversed>
Status launch_segment_states(const GradientWalk<T>& walk, const GradientPlan& plan, int value_tile,
                             cudaStream_t stream) {
  if (walk.pass.segments > 1) {
    value_tile = std::min(value_tile, walk.pass.value_dim);
    const Status sums = for_warpgroup_sizes(walk.pass.key_dim, value_tile, [&]<int KeyDim, int ValueGroups>() {
      using Tiles = WarpgroupTiles<KeyDim, ValueGroups, false, D::decays>;
      constexpr int static_bytes = int(sizeof(WarpgroupBarriers) + sizeof(Place));
      WarpgroupPass<T> args{};
      if (Status s = describe_walk<KeyDim, ValueGroups>(args, walk); !s.ok()) return s;
      const int states = args.pass.heads.outputs / args.pass.heads.outputs_per_state;
      args.pass.heads.outputs = states, args.pass.heads.outputs_per_state = 1;
      args.pass.stages =
          std::min(most_stages, (plan.device.shared_bytes - static_bytes - Tiles::bytes(0)) / Tiles::stage);
      return launch(warpgroup_segment_sums<T, D, KeyDim, ValueGroups, Reversed>,
                    dim3(unsigned(plan.sequences * states * args.pass.value_tiles), unsigned(args.pass.segments - 1)),
                    128 * ValueGroups, Tiles::bytes(args.pass.stages), stream, args);
    });
    if (!sums.ok()) return sums;
  }
  return launch_scan<D>(walk.pass, stream);
}

/// One walk, or two of the same sizes side by side.
template <class T, class D, class W, class... Walks>
Status launch_walks(const GradientPlan& plan, int value_tile, cudaStream_t stream, const GradientWalk<T>& first,
                    const Walks&... second) {
  static_assert(sizeof...(second) <= 1);
  value_tile = std::min(value_tile, first.pass.value_dim);
  return for_warpgroup_sizes(first.pass.key_dim, value_tile, [&]<int KeyDim, int ValueGroups>() {
    using Tiles = WarpgroupTiles<KeyDim, ValueGroups, true, D::decays, W::may_sum>;
    constexpr int static_bytes = int(sizeof(WarpgroupBarriers) + sizeof(Place));
    const int bytes = Tiles::bytes(first.pass.stages);
    if (bytes + static_bytes > plan.device.shared_bytes)
      return Status{Code::unsupported, "LinearPolicy::stages need more shared memory than the device has; take fewer"};
    const Index blocks = plan.sequences * plan.shape.output_heads() * (first.pass.value_dim / (64 * ValueGroups));
    const dim3 grid(unsigned(blocks * (1 + sizeof...(second))), unsigned(first.pass.segments));
    if constexpr (sizeof...(second) == 0) {
      WarpgroupPass<T> args{};
      if (Status s = describe_walk<KeyDim, ValueGroups>(args, first); !s.ok()) return s;
      return launch(warpgroup_pass<T, D, KeyDim, ValueGroups, W>, grid, pass_threads<ValueGroups>, bytes, stream, args);
    } else {
      WarpgroupPair<T> args{};
      if (Status s = first_failure(describe_walk<KeyDim, ValueGroups>(args.passes[0], first),
                                   describe_walk<KeyDim, ValueGroups>(args.passes[1], second)...);
          !s.ok())
        return s;
      return launch(warpgroup_pair<T, D, KeyDim, ValueGroups, W>, grid, pass_threads<ValueGroups>, bytes, stream, args);
    }
  });
}

template <class T, DecayKind DK, class F>
Status launch_warpgroup_gradients(const GradientPlan& plan, const GradientWalks<T, DK, F>& walks, cudaStream_t stream) {
  using D = DecayOf<DK>;
  using Forth = Walk<false, D::decays>;
  using Back = Walk<true, D::decays>;
  if (plan.in_time) {
    const GradientWalk<T> queries = walks.queries();
    if (plan.staged_queries)
      if (Status s = launch_segment_states<T, D, false>(queries, plan, plan.queries.value_tile, stream); !s.ok())
        return s;
    if (Status s = launch_walks<T, D, Forth>(plan, plan.queries.value_tile, stream, queries); !s.ok()) return s;
  }
  if (!plan.keys && !plan.values) return {};
  const GradientWalk<T> keys = walks.keys(), values = walks.values();
  if (plan.staged_back)
    if (Status s = launch_segment_states<T, D, true>(values, plan, plan.back.value_tile, stream); !s.ok()) return s;
  const int value_tile = plan.back.value_tile;
  if (plan.keys && plan.values && plan.shape.key_dim == plan.shape.value_dim)
    return launch_walks<T, D, Back>(plan, value_tile, stream, keys, values);
  if (plan.keys)
    if (Status s = launch_walks<T, D, Back>(plan, value_tile, stream, keys); !s.ok()) return s;
  return plan.values ? launch_walks<T, D, Back>(plan, value_tile, stream, values) : Status{};
}

/// With Joins, those of a direction that adds to another's.
template <LinearPolicy P, bool Joins = false, class T, DecayKind DK, class F>
Status launch_warp_gradients(const GradientPlan& plan, const GradientWalks<T, DK, F>& walks, cudaStream_t stream) {
  using D = DecayOf<DK>;
  using Back = Walk<true, D::decays, Joins>;
  const auto run = [&]<class W>(const GradientWalk<T>& walk, W) {
    return launch_warp_pass<P, T, D, W>({walk.q, walk.k, walk.v, walk.o, walk.pass, walk.primal, walk.earlier},
                                        plan.sequences * plan.shape.output_heads(), plan.device, stream);
  };
  if (plan.in_time)
    if (Status s = run(walks.queries(), Walk<false, D::decays, Joins>{}); !s.ok()) return s;
  if (plan.staged_back)
    if (Status s = launch_scan<D>(walks.values().pass, stream); !s.ok()) return s;
  if (plan.keys)
    if (Status s = run(walks.keys(), Back{}); !s.ok()) return s;
  return plan.values ? run(walks.values(), Back{}) : Status{};
}

/// What remains when the walks are done: sums over heads that share, and the log-decays' gradient.
template <class T, DecayKind D, class F>
Status launch_sums(const LinearAttentionBackwardArgs<T, D, RuleKind::additive, F>& args, const GradientPlan& plan,
                   const GradientBuffers<T>& buffers, cudaStream_t stream) {
  constexpr int threads = 256;
  const LinearAttentionShape& s = plan.shape;
  const auto sum = [&](TensorView<T, 4> parts, TensorView<T, 4> wanted) {
    const Index units = wanted.size() / 8;
    if (!parts.present() || units == 0) return Status{};
    return launch(sum_heads<T>, dim3(unsigned(ceil_div(units, threads))), threads, 0, stream,
                  HeadSums<T>{parts, wanted, plan.turned});
  };
  if (Status status = sum(buffers.q, args.grad_q); !status.ok()) return status;
  if (Status status = sum(buffers.k, args.grad_k); !status.ok()) return status;
  if (Status status = sum(buffers.v, args.grad_v); !status.ok()) return status;
  if (buffers.last_states.present()) {
    const StateSums states{buffers.last_states, key_major<F>(args.grad_initial_state)};
    if (Status status =
            launch(sum_states<>, dim3(unsigned(ceil_div(states.sum.size(), threads))), threads, 0, stream, states);
        !status.ok())
      return status;
  }
  if constexpr (D == DecayKind::per_key) {
    const StateSums shared{transposed(buffers.key_decay.log_decay, 1, 2), transposed(args.grad_log_decay, 1, 2)};
    if (!plan.wants_decay || s.output_heads() == s.state_heads() || shared.sum.size() == 0) return {};
    return launch(sum_states<>, dim3(unsigned(ceil_div(shared.sum.size(), threads))), threads, 0, stream, shared);
  } else if constexpr (D != DecayKind::none) {
    if (!plan.wants_decay) return {};
    DecayGradient gradient;
    gradient.sequences = sequences_of(args), gradient.sequences.reversed = plan.turned;
    gradient.adds = plan.turned;
    gradient.heads = int(s.output_heads()), gradient.state_heads = int(s.state_heads());
    gradient.row_parts = int(buffers.row_parts(plan)), gradient.anchor_parts = int(s.key_dim) / 16;
    gradient.query_rows = buffers.query_rows, gradient.key_rows = buffers.key_rows;
    gradient.anchors = buffers.anchors, gradient.totals = buffers.totals;
    gradient.window = plan.window, gradient.ends_at_zero = !args.grad_final_state.present();
    gradient.scale = attention_scale(args.scale, s);
    gradient.log_decay = slice_axis<3>(spread_log_decay(args.log_decay, s), 0);
    if constexpr (D == DecayKind::per_token)
      gradient.per_token = args.grad_log_decay;
    else
      gradient.per_head = args.grad_log_decay;
    const Index blocks = most_windows(gradient.sequences, plan.window) * s.state_heads();
    if (blocks > 0)
      if (Status status =
              launch(decay_gradient<>, dim3(unsigned(blocks)), plan.window / tokens_per_thread, 0, stream, gradient);
          !status.ok())
        return status;
    if (D == DecayKind::per_head)
      return launch(sum_decay_gradients<>, dim3(unsigned(s.state_heads())), threads, 0, stream, gradient);
  }
  return {};
}

}  // namespace chela::cuda::detail
