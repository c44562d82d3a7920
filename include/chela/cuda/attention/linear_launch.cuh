#pragma once
// The host's side of linear attention: what is refused, which kernels with which sizes, and their launches.
#include <cstdint>
#include <utility>

#include "chela/attention/linear.hpp"
#include "chela/cuda/attention/key_decay_pass.cuh"
#include "chela/cuda/attention/linear_tuning.cuh"
#include "chela/cuda/attention/segment_states.cuh"
#include "chela/cuda/attention/total_state_launch.cuh"
#include "chela/cuda/attention/warp_pass.cuh"
#include "chela/cuda/attention/warpgroup_pass.cuh"
#include "chela/cuda/device.cuh"
#include "chela/cuda/tensor_map.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

template <DecayKind D>
using DecayOf = std::conditional_t<D == DecayKind::none, WithoutDecay,
                                   std::conditional_t<D == DecayKind::per_key, KeyDecay, ScalarDecay>>;

/// Rows of 16-byte units: what every kernel loads and stores.
template <class T>
constexpr bool has_aligned_rows(TensorView<T, 4> view) {
  for (int axis = 0; axis < 3; ++axis)
    if (view.extents[axis] > 1 && view.strides[axis] % Index(16 / sizeof(T)) != 0) return false;
  return unit_last_stride(view) && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
}

/// Pairs of floats that can be loaded at once: how the kernels read log-decays per key. Other kinds may lie anyhow.
template <class G, int Rank>
constexpr bool has_aligned_pairs(TensorView<G, Rank> log_decay) {
  if constexpr (Rank == 4) {
    for (int axis = 0; axis < 3; ++axis)
      if (log_decay.extents[axis] > 1 && log_decay.strides[axis] % 2 != 0) return false;
    return unit_last_stride(log_decay) && reinterpret_cast<std::uintptr_t>(log_decay.data) % 8 == 0;
  }
  return true;
}

/// Refuses what the contract allows and the GPU does not.
template <class T, DecayKind D, RuleKind R, class F>
Status check_for_gpu(const LinearAttentionArgs<T, D, R, F>& args) {
  const LinearAttentionShape s = linear_attention_shape(args.q, args.k, args.v);
  constexpr Index most_tokens = Index(1) << 30, most_blocks = (Index(1) << 31) - 1;
  const auto fits = [](Index dim) { return dim % 16 == 0 && dim <= 256; };
  return first_failure(
      require(!args.boundary_states.present() || args.boundary_every % chunk_len == 0, Code::bad_value,
              "boundary_every must be a multiple of 64 on the GPU, the tokens of one chunk"),
      require(fits(s.key_dim), Code::unsupported,
              "key_dim must be a multiple of 16 up to 256 on the GPU; pad q and k with zeros"),
      require(fits(s.value_dim), Code::unsupported,
              "value_dim must be a multiple of 16 up to 256 on the GPU; pad v, or give its columns to several heads"),
      require(has_aligned_rows(args.q), Code::bad_stride,
              "q must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(has_aligned_rows(args.k), Code::bad_stride,
              "k must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(has_aligned_rows(args.v), Code::bad_stride,
              "v must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(has_aligned_rows(args.o), Code::bad_stride,
              "o must have a unit last stride, other strides multiples of 16 bytes, and data 16-byte aligned"),
      require(has_aligned_pairs(args.log_decay), Code::bad_stride,
              "log_decay per key must have a unit last stride, other strides multiples of 2, and data 8-byte aligned"),
      require(s.tokens < most_tokens, Code::unsupported,
              "the token extent must be below 2^30 on the GPU; call in pieces, passing the state"),
      require(sequences_of(args).size() <= most_blocks / (4 * s.output_heads()), Code::unsupported,
              "sequences times heads must stay below 2^29 on the GPU; call in pieces"));
}

/// What one call will do.
struct LinearPlan {
  LinearAttentionShape shape;
  Index sequences = 0;
  Device device;
  Instructions instructions = Instructions::warp;
  LinearSchedule schedule;
  Index ages = 1;            ///< numbers that say what a segment leaves of a state: one, or one for each key
  bool staged = false;       ///< the pass begins from states that a kernel before it put into the workspace
  bool reads_total = false;  ///< all queries of a sequence read one state (total_state.cuh)

  Index states() const { return staged ? schedule.segments * sequences * shape.state_heads() : 0; }
  std::size_t workspace_bytes() const {
    return std::size_t(states()) * std::size_t(shape.key_dim * shape.value_dim + ages) * sizeof(float);
  }
};

/// Whether two views may share memory, judged by the runs of memory that they lie in.
template <class A, class B, int Rank>
bool may_overlap(TensorView<A, Rank> a, TensorView<B, Rank> b) {
  const auto bounds = [](auto view) {
    const auto first = reinterpret_cast<std::uintptr_t>(view.data);
    Index low = 0, high = 1;
    for (int axis = 0; axis < Rank; ++axis) {
      const Index reach = (view.extents[axis] - 1) * view.strides[axis];
      (reach < 0 ? low : high) += reach;
    }
    return std::pair(first + std::uintptr_t(low * Index(sizeof(*view.data))),
                     first + std::uintptr_t(high * Index(sizeof(*view.data))));
  };
  if (!a.present() || !b.present() || a.size() == 0 || b.size() == 0) return false;
  const auto [a_begin, a_end] = bounds(a);
  const auto [b_begin, b_end] = bounds(b);
  return a_begin < b_end && b_begin < a_end;
}

/// Whether warpgroup kernels are in the program for the current device: elsewhere they are compiled to nothing, not
/// even their barriers.
template <class T, class D>
Status has_warpgroup_kernels(bool& there) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaSuccess;
  if constexpr (std::is_same_v<D, KeyDecay>)
    error = cudaFuncGetAttributes(&attributes, key_decay_pass<T, 64, 1>);
  else
    error = cudaFuncGetAttributes(&attributes, warpgroup_pass<T, D, 64, 1>);
  there = error == cudaSuccess && attributes.sharedSizeBytes >= sizeof(std::uint64_t[most_stages]);
  return from_cuda(error);
}

template <LinearPolicy P, class T, DecayKind D, RuleKind R, class F>
Status plan_linear(const LinearAttentionArgs<T, D, R, F>& args, LinearPlan& plan) {
  constexpr LinearPolicy policy = LinearPolicyConstant<P>::value;
  plan.shape = linear_attention_shape(args.q, args.k, args.v);
  plan.sequences = sequences_of(args).size();
  if (D == DecayKind::per_key) plan.ages = plan.shape.key_dim;
  if (Status s = current_device(plan.device); !s.ok()) return s;
  if (D == DecayKind::none && args.span == Span::bidirectional) {
    plan.reads_total = plan.staged = true;
    plan.schedule.segments =
        total_state_segments(plan.sequences, plan.shape.state_heads(), plan.shape, plan.device.multiprocessors, policy);
    return check_total_state_policy(policy);
  }

  if constexpr (policy.instructions != Instructions::warp) {
    const auto fits = [](Index dim) { return dim == 64 || dim == 128; };
    bool there = fits(plan.shape.key_dim) && fits(plan.shape.value_dim) && copies_by_tensor(args.q) &&
                 copies_by_tensor(args.k) && copies_by_tensor(args.v) && copies_by_tensor(args.o) &&
                 plan.device.capability == 90;
    if (there)
      if (Status s = has_warpgroup_kernels<T, DecayOf<D>>(there); !s.ok()) return s;
    if (there) plan.instructions = Instructions::warpgroup;
    if (!there && policy.instructions == Instructions::warpgroup)
      return {Code::unsupported,
              "Instructions::warpgroup needs a device of compute capability 9.0, code compiled for sm_90a, key_dim and "
              "value_dim 64 or 128, and positive strides; Instructions::automatic takes what there is"};
  }
  if (plan.instructions == Instructions::warpgroup)
    plan.schedule = D == DecayKind::per_key
                        ? tuned_key_decay_schedule(plan.shape, plan.sequences, plan.device.multiprocessors, policy)
                        : tuned_warpgroup_schedule(plan.shape, plan.sequences, plan.device.multiprocessors, policy);
  const bool shared_states = plan.shape.output_heads() > plan.shape.state_heads();
  plan.staged = plan.schedule.segments > 1 ||
                (shared_states && may_overlap(key_major<F>(args.initial_state), key_major<F>(args.final_state)));
  return {};
}

template <class T, DecayKind D, RuleKind R, class F>
LinearPass make_pass(const LinearAttentionArgs<T, D, R, F>& args, const LinearPlan& plan, Workspace workspace) {
  const LinearAttentionShape& s = plan.shape;
  LinearPass pass;
  pass.sequences = sequences_of(args);
  pass.heads = {int(s.output_heads()), int(s.output_heads() / s.query_heads), int(s.output_heads() / s.state_heads()),
                int(s.state_heads() / s.key_heads), int(s.state_heads() / s.value_heads)};
  pass.key_dim = int(s.key_dim), pass.value_dim = int(s.value_dim);
  pass.segments = plan.schedule.segments, pass.stages = plan.schedule.stages;
  pass.scale = attention_scale(args.scale, s);
  if constexpr (D != DecayKind::none) pass.log_decay = slice_axis<3>(spread_log_decay(args.log_decay, s), 0);
  pass.initial_state = key_major<F>(args.initial_state);
  pass.final_state = key_major<F>(args.final_state);
  pass.state_slots = args.state_slots;
  pass.boundary_states = key_major<F>(args.boundary_states);
  pass.boundary_every = int(std::min<Index>(args.boundary_every, Index(1) << 30));
  if (args.last_states.extents[1] > 0) pass.last_states = key_major<F>(args.last_states);
  if (plan.staged) {
    const auto states = contiguous(static_cast<float*>(workspace.data), Index(pass.segments), plan.sequences,
                                   s.state_heads(), s.value_dim, s.key_dim);
    pass.segment_states = transposed(states, 3, 4);
    pass.segment_ages = states.data + states.size();
  }
  return pass;
}

/// The states at the beginnings of segments, from what each segment adds.
template <class D>
Status launch_scan(const LinearPass& pass, cudaStream_t stream) {
  constexpr int threads = 256;
  const Index elements = pass.segment_states.size() / pass.segments;
  return launch(scan_segments<D>, dim3(unsigned(ceil_div(elements, threads))), threads, 0, stream, pass);
}

/// Calls f<KeyDim, ValueGroups>().
template <class F>
Status for_warpgroup_sizes(Index key_dim, int value_tile, F f) {
  if (key_dim == 64) return value_tile == 64 ? f.template operator()<64, 1>() : f.template operator()<64, 2>();
  return value_tile == 64 ? f.template operator()<128, 1>() : f.template operator()<128, 2>();
}

/// What the kernels of one walk are given that have value tiles of 64 ValueGroups columns.
template <class W, int KeyDim, int ValueGroups, class T, DecayKind D, RuleKind R, class F>
Status fill_warpgroup_pass(WarpgroupPass<T>& to, const LinearAttentionArgs<T, D, R, F>& args, const LinearPass& pass) {
  to.output = args.o, to.pass = pass;
  to.pass.value_tiles = pass.value_dim / (64 * ValueGroups);
  const auto encode = [](CUtensorMap& map, TensorView<const T, 4> view, int panels) {
    return view.size() == 0 ? Status{} : encode_tensor_map<T>(map, view, panels);
  };
  return first_failure(encode(to.q, args.q, KeyDim / 64), encode(to.k, args.k, KeyDim / 64),
                       encode(to.v, args.v, ValueGroups), encode(to.o, args.o, 1),
                       W::joins ? encode(to.beside, args.o, 1) : Status{});
}

template <class W, class T, DecayKind DK, RuleKind R, class F>
Status launch_warpgroups(const LinearAttentionArgs<T, DK, R, F>& args, const LinearPlan& plan, const LinearPass& pass,
                         cudaStream_t stream) {
  using D = DecayOf<DK>;
  constexpr int static_bytes = int(sizeof(WarpgroupBarriers) + sizeof(Place));
  return for_warpgroup_sizes(plan.shape.key_dim, plan.schedule.value_tile, [&]<int KeyDim, int ValueGroups>() {
    WarpgroupPass<T> kernel_args{};
    if (Status s = fill_warpgroup_pass<W, KeyDim, ValueGroups>(kernel_args, args, pass); !s.ok()) return s;
    LinearPass& p = kernel_args.pass;
    const Index tiles = plan.sequences * p.value_tiles;

    if (pass.segments > 1) {
      using Tiles = WarpgroupTiles<KeyDim, ValueGroups, false, D::decays>;
      WarpgroupPass<T> sums = kernel_args;
      sums.pass.heads.outputs = int(plan.shape.state_heads()), sums.pass.heads.outputs_per_state = 1;
      sums.pass.stages =
          std::min(most_stages, (plan.device.shared_bytes - static_bytes - Tiles::bytes(0)) / Tiles::stage);
      if (Status s = launch(warpgroup_segment_sums<T, D, KeyDim, ValueGroups, W::reversed>,
                            dim3(unsigned(tiles * plan.shape.state_heads()), unsigned(pass.segments - 1)),
                            128 * ValueGroups, Tiles::bytes(sums.pass.stages), stream, sums);
          !s.ok())
        return s;
    }
    if (p.segment_states.present())
      if (Status s = launch_scan<D>(p, stream); !s.ok()) return s;

    using Tiles = WarpgroupTiles<KeyDim, ValueGroups, true, D::decays, W::joins>;
    if (W::joins)  // it has another tile on its way
      p.stages = std::min(
          p.stages, (plan.device.shared_bytes - static_bytes - Tiles::bytes(0)) / (Tiles::bytes(1) - Tiles::bytes(0)));
    const int bytes = Tiles::bytes(p.stages);
    if (bytes + static_bytes > plan.device.shared_bytes)
      return Status{Code::unsupported, "LinearPolicy::stages need more shared memory than the device has; take fewer"};
    return launch(warpgroup_pass<T, D, KeyDim, ValueGroups, W>,
                  dim3(unsigned(tiles * plan.shape.output_heads()), unsigned(pass.segments)), pass_threads<ValueGroups>,
                  bytes, stream, kernel_args);
  });
}

/// Calls f<KeyClass, ValueWarps, ScoreWarps, Tokens, Stages>() for the first instance that holds key_dim and fits the
/// device. Measured with the warpgroups' (linear_tuning.cuh).
template <LinearPolicy P, class D, class W, class F>
Status for_warp_sizes(Index key_dim, const Device& device, F f) {
  constexpr bool given = P.instructions == Instructions::warp && P.stages > 0;
  constexpr int few = given ? P.stages : 3, more = given ? P.stages : 4;
  const auto fits = [&](int bytes) { return bytes + int(sizeof(Place)) <= device.shared_bytes; };
  if (key_dim <= 64 && fits(WarpTiles<D::decays, 64, 4, 4, 64, more, W::may_sum>::bytes))
    return f.template operator()<64, 4, 4, 64, more>();
  if (key_dim <= 128 && fits(WarpTiles<D::decays, 128, 8, 0, 64, few, W::may_sum>::bytes))
    return f.template operator()<128, 8, 0, 64, few>();
  if (key_dim <= 128) return f.template operator()<128, 8, 0, 32, few>();
  return f.template operator()<256, 8, 0, 32, few>();
}

/// A pass by warps, over so many output heads of all sequences.
template <LinearPolicy P, class T, class D, class W>
Status launch_warp_pass(WarpPass<T> args, Index heads, const Device& device, cudaStream_t stream) {
  return for_warp_sizes<
      P, D, W>(args.pass.key_dim, device, [&]<int KeyClass, int ValueWarps, int ScoreWarps, int Tokens, int Stages>() {
    using Tiles = WarpTiles<D::decays, KeyClass, ValueWarps, ScoreWarps, Tokens, Stages, W::may_sum>;
    if (Tiles::bytes + int(sizeof(Place)) > device.shared_bytes)
      return Status{Code::unsupported, "LinearPolicy::stages need more shared memory than the device has; take fewer"};
    args.pass.value_tiles = int(ceil_div(Index(args.pass.value_dim), 16 * ValueWarps));
    return launch(warp_pass<T, D, KeyClass, ValueWarps, ScoreWarps, Tokens, Stages, W>,
                  dim3(unsigned(heads * args.pass.value_tiles)), Tiles::threads, Tiles::bytes, stream, args);
  });
}

/// A call's inputs and outputs as a walk by warps takes them.
template <class W, class T, DecayKind D, RuleKind R, class F>
WarpPass<T> make_warp_pass(const LinearAttentionArgs<T, D, R, F>& args, const LinearPass& pass) {
  WarpPass<T> walk{args.q, args.k, args.v, args.o, pass};
  if constexpr (W::joins) walk.earlier = args.o;
  return walk;
}

template <LinearPolicy P, class W, class T, DecayKind DK, RuleKind R, class F>
Status launch_warps(const LinearAttentionArgs<T, DK, R, F>& args, const LinearPlan& plan, const LinearPass& pass,
                    cudaStream_t stream) {
  using D = DecayOf<DK>;
  if (pass.segment_states.present())
    if (Status s = launch_scan<D>(pass, stream); !s.ok()) return s;
  return launch_warp_pass<P, T, D, W>(make_warp_pass<W>(args, pass), plan.sequences * plan.shape.output_heads(),
                                      plan.device, stream);
}

}  // namespace chela::cuda::detail
