#pragma once
// The launches of the gradients of linear attention with a decay per key: dq and dk by key_gradient_pass, on warps whatever
// the dimensions (their arithmetic hides behind their traffic), and dv beside dk or by the pass of outputs, back in time.
#include "chela/cuda/attention/key_decay_launch.cuh"
#include "chela/cuda/attention/key_gradient_pass.cuh"
#include "chela/cuda/attention/linear_backward_launch.cuh"

namespace chela::cuda::detail {

/// The states at the beginnings of a walk's segments, into segment_states.
template <class T, bool Reversed>
Status launch_key_segment_states(const GradientWalk<T>& walk, const GradientPlan& plan, int value_tile,
                                 cudaStream_t stream) {
  if (walk.pass.segments > 1) {
    const Status sums = for_warpgroup_sizes(walk.pass.key_dim, value_tile, [&]<int KeyDim, int ValueGroups>() {
      WarpgroupPass<T> args{};
      if (Status s = describe_walk<KeyDim, ValueGroups>(args, walk); !s.ok()) return s;
      const int states = args.pass.heads.outputs / args.pass.heads.outputs_per_state;
      args.pass.heads.outputs = states, args.pass.heads.outputs_per_state = 1;
      args.pass.stages = 4;
      return launch(key_decay_segment_sums<T, KeyDim, ValueGroups, Reversed>,
                    dim3(unsigned(plan.sequences * states * args.pass.value_tiles), unsigned(args.pass.segments - 1)),
                    128 * (1 + ValueGroups), KeyDecayTiles<KeyDim, ValueGroups, false>::bytes(args.pass.stages), stream,
                    args);
    });
    if (!sums.ok()) return sums;
  }
  return launch_scan<KeyDecay>(walk.pass, stream);
}

/// dq, or back in time dk, or dk and dv.
template <class T, bool Reversed, bool Values = false>
Status launch_key_gradient(const KeyGradientPass<T>& given, const GradientPlan& plan, cudaStream_t stream) {
  KeyGradientPass<T> args = given;
  const auto fits = [&](int bytes) { return bytes + int(sizeof(Place)) <= plan.device.shared_bytes; };
  const auto run = [&]<int ReadClass, int KeyTile, int Stages>() {
    using Tiles = KeyGradientTiles<ReadClass, KeyTile, Stages, Reversed, Values>;
    if (!fits(Tiles::bytes))
      return Status{Code::unsupported, "value_dim above 128 needs more shared memory than the device has"};
    args.pass.value_tiles = int(ceil_div(Index(args.pass.value_dim), KeyTile));
    const Index blocks = plan.sequences * plan.shape.output_heads() * args.pass.value_tiles;
    return launch(key_gradient_pass<T, ReadClass, KeyTile, Stages, Reversed, Values>,
                  dim3(unsigned(blocks), unsigned(args.pass.segments)), Tiles::threads, Tiles::bytes, stream, args);
  };
  const int values = key_gradient_class(plan.shape.value_dim);
  if (values == 64) return run.template operator()<64, 64, 3>();
  if constexpr (Values) {
    return run.template operator()<128, 128, 3>();
  } else {
    if (values == 256) return run.template operator()<256, 64, 3>();
    return fits(KeyGradientTiles<128, 128, 4, Reversed>::bytes) ? run.template operator()<128, 128, 4>()
                                                                : run.template operator()<128, 64, 3>();
  }
}

/// dv, and the gradient of the initial state.
template <class T>
Status launch_key_values_by_warpgroups(const GradientWalk<T>& walk, const GradientPlan& plan, cudaStream_t stream) {
  return for_warpgroup_sizes(walk.pass.key_dim, plan.back.value_tile, [&]<int KeyDim, int ValueGroups>() {
    using Tiles = KeyDecayTiles<KeyDim, ValueGroups, true>;
    const int bytes = Tiles::bytes(walk.pass.stages);
    if (bytes + int(sizeof(KeyDecayBarriers) + sizeof(Place)) > plan.device.shared_bytes)
      return Status{Code::unsupported, "LinearPolicy::stages need more shared memory than the device has; take fewer"};
    WarpgroupPass<T> args{};
    if (Status s = describe_walk<KeyDim, ValueGroups>(args, walk); !s.ok()) return s;
    const Index blocks = plan.sequences * plan.shape.output_heads() * args.pass.value_tiles;
    return launch(key_decay_pass<T, KeyDim, ValueGroups, true>, dim3(unsigned(blocks), unsigned(args.pass.segments)),
                  128 * (1 + ValueGroups), bytes, stream, args);
  });
}

template <LinearPolicy P, class T, DecayKind D, class F>
Status launch_key_gradients(const GradientPlan& plan, const GradientWalks<T, D, F>& walks,
                            const GradientBuffers<T>& buffers, cudaStream_t stream) {
  const auto pass_of = [&](const GradientWalk<T>& walk) {
    return KeyGradientPass<T>{walk.q, walk.k, walk.v, {}, walk.o, {}, walk.pass, buffers.key_decay};
  };
  if (plan.in_time) {
    if (plan.staged_queries)
      if (Status s = launch_key_segment_states<T, false>(walks.states(), plan, plan.queries.value_tile, stream);
          !s.ok())
        return s;
    if (Status s = launch_key_gradient<T, false>(pass_of(walks.queries()), plan, stream); !s.ok()) return s;
  }
  if (!plan.keys && !plan.values) return {};
  const GradientWalk<T> values = walks.values();
  if (plan.staged_back)
    if (Status s = launch_key_segment_states<T, true>(values, plan, plan.back.value_tile, stream); !s.ok()) return s;
  const bool warpgroups = plan.instructions == Instructions::warpgroup;
  if (plan.keys) {
    const GradientWalk<T> keys = walks.keys();
    KeyGradientPass<T> pass = pass_of(keys);
    // What it takes of shared memory is to be had where there are warpgroups.
    if (warpgroups && plan.values && plan.shape.key_dim <= key_gradient_class(plan.shape.value_dim)) {
      pass.primal = keys.primal, pass.values = values.o;
      pass.pass.final_state = transposed(values.pass.final_state, 2, 3);
      pass.pass.final_factor = values.pass.final_factor;
      return launch_key_gradient<T, true, true>(pass, plan, stream);
    }
    if (plan.wants_decay) pass.primal = keys.primal;
    if (Status s = launch_key_gradient<T, true>(pass, plan, stream); !s.ok()) return s;
  }
  if (!plan.values) return {};
  if (warpgroups) return launch_key_values_by_warpgroups(values, plan, stream);
  return launch_key_decay_warps<P, Walk<true, false>>(WarpPass<T>{values.q, values.k, values.v, values.o, values.pass},
                                                      plan.sequences * plan.shape.output_heads(), plan.device, stream);
}

}  // namespace chela::cuda::detail
