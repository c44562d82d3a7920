#pragma once
// The launches of linear attention with a decay per key.
#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/key_decay_pass.cuh"
#include "chela/cuda/attention/key_decay_sums.cuh"
#include "chela/cuda/attention/key_decay_warp_pass.cuh"
#include "chela/cuda/attention/linear_launch.cuh"

namespace chela::cuda::detail {

template <class T, RuleKind R, class F>
Status launch_key_decay_warpgroups(const LinearAttentionArgs<T, DecayKind::per_key, R, F>& args, const LinearPlan& plan,
                                   const LinearPass& pass, cudaStream_t stream) {
  constexpr int static_bytes = int(sizeof(KeyDecayBarriers) + sizeof(Place) + sizeof(WarpLogSums));
  return for_warpgroup_sizes(plan.shape.key_dim, plan.schedule.value_tile, [&]<int KeyDim, int ValueGroups>() {
    WarpgroupPass<T> kernel_args{};
    if (Status s = fill_warpgroup_pass<InTime, KeyDim, ValueGroups>(kernel_args, args, pass); !s.ok()) return s;
    const LinearPass& p = kernel_args.pass;
    const auto launch_kernel = [&](auto kernel, int bytes, const WarpgroupPass<T>& a, Index heads, int segments) {
      if (bytes + static_bytes > plan.device.shared_bytes)
        return Status{Code::unsupported,
                      "LinearPolicy::stages need more shared memory than the device has; take fewer"};
      return launch(kernel, dim3(unsigned(plan.sequences * p.value_tiles * heads), unsigned(segments)),
                    128 * (1 + ValueGroups), bytes, stream, a);
    };

    if (pass.segments > 1) {
      WarpgroupPass<T> sums = kernel_args;
      sums.pass.heads.outputs = int(plan.shape.state_heads()), sums.pass.heads.outputs_per_state = 1;
      sums.pass.stages = 4;
      if (Status s = launch_kernel(key_decay_segment_sums<T, KeyDim, ValueGroups>,
                                   KeyDecayTiles<KeyDim, ValueGroups, false>::bytes(sums.pass.stages), sums,
                                   plan.shape.state_heads(), pass.segments - 1);
          !s.ok())
        return s;
    }
    if (plan.staged)
      if (Status s = launch_scan<KeyDecay>(p, stream); !s.ok()) return s;
    return launch_kernel(key_decay_pass<T, KeyDim, ValueGroups>,
                         KeyDecayTiles<KeyDim, ValueGroups, true>::bytes(pass.stages), kernel_args,
                         plan.shape.output_heads(), pass.segments);
  });
}

template <class T, int KeyClass, int ValueWarps, int Stages, class W>
Status launch_key_decay_warp_pass(WarpPass<T> args, Index heads, const Device& device, cudaStream_t stream) {
  using Tiles = KeyDecayWarpTiles<KeyClass, ValueWarps, Stages>;
  if (Tiles::bytes + int(sizeof(Place) + sizeof(WarpRows<T>)) > device.shared_bytes)
    return {Code::unsupported, "LinearPolicy::stages need more shared memory than the device has; take fewer"};
  args.pass.value_tiles = int(ceil_div(Index(args.pass.value_dim), 16 * ValueWarps));
  return launch(key_decay_warp_pass<T, KeyClass, ValueWarps, Stages, W>, dim3(unsigned(heads * args.pass.value_tiles)),
                Tiles::threads, Tiles::bytes, stream, args);
}

/// A pass by warps, over so many output heads of all sequences.
template <LinearPolicy P, class W, class T>
Status launch_key_decay_warps(const WarpPass<T>& args, Index heads, const Device& device, cudaStream_t stream) {
  constexpr int stages = P.instructions == Instructions::warp && P.stages > 0 ? P.stages : 4;
  const int key_dim = args.pass.key_dim;
  if (key_dim <= 64) return launch_key_decay_warp_pass<T, 64, 4, stages, W>(args, heads, device, stream);
  if (key_dim <= 128) return launch_key_decay_warp_pass<T, 128, 8, stages, W>(args, heads, device, stream);
  return launch_key_decay_warp_pass<T, 256, 4, stages, W>(args, heads, device, stream);
}

template <LinearPolicy P, class W, class T, RuleKind R, class F>
Status launch_key_decay_warps(const LinearAttentionArgs<T, DecayKind::per_key, R, F>& args, const LinearPlan& plan,
                              const LinearPass& pass, cudaStream_t stream) {
  if (pass.segment_states.present())
    if (Status s = launch_scan<KeyDecay>(pass, stream); !s.ok()) return s;
  return launch_key_decay_warps<P, W>(make_warp_pass<W>(args, pass), plan.sequences * plan.shape.output_heads(),
                                      plan.device, stream);
}

}  // namespace chela::cuda::detail
