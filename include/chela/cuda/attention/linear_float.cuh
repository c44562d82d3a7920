#pragma once
// The launches of linear attention of float data (float_pass.cuh).
#include "chela/cuda/attention/float_pass.cuh"
#include "chela/cuda/attention/linear_launch.cuh"

namespace chela::cuda::detail {

/// Refuses what GPUs have for 16-bit data alone.
template <LinearPolicy P, DecayKind D, RuleKind R, class F>
Status check_float(const LinearAttentionArgs<float, D, R, F>& args) {
  return first_failure(
      require(
          P.float_products != FloatProducts::none, Code::unsupported,
          "float data needs LinearPolicy::float_products on the GPU: FloatProducts::three_tf32 for errors as of float "
          "arithmetic, FloatProducts::tf32 for those of 16-bit data"),
      require(D != DecayKind::per_key, Code::unsupported,
              "a decay per key takes 16-bit q, k and v on the GPU: convert them"),
      require(args.span == Span::causal, Code::unsupported,
              "a bidirectional span takes 16-bit q, k and v on the GPU: convert them"),
      require(P.instructions != Instructions::warpgroup && P.segments <= 1, Code::unsupported,
              "float data has kernels of Instructions::warp and one segment on the GPU: Instructions::automatic and "
              "segments 0 take them"));
}

/// A policy with what of it goes for the data.
template <LinearPolicy P, class T>
inline constexpr LinearPolicy policy_for = P;
template <LinearPolicy P>
inline constexpr LinearPolicy policy_for<P, float> = {.instructions = Instructions::warp,
                                                      .float_products = P.float_products};

template <FloatProducts M, class D, int KeyClass, int ValueWarps>
Status launch_float_pass(FloatPass args, Index heads, const Device& device, cudaStream_t stream) {
  using Tiles = FloatTiles<D::decays, KeyClass, ValueWarps>;
  if (Tiles::bytes + int(sizeof(Place)) > device.shared_bytes)
    return {Code::unsupported, "float data with these dimensions needs more shared memory than the device has"};
  args.pass.value_tiles = int(ceil_div(Index(args.pass.value_dim), 16 * ValueWarps));
  return launch(float_pass<M, D, KeyClass, ValueWarps>, dim3(unsigned(heads * args.pass.value_tiles)), Tiles::threads,
                Tiles::bytes, stream, args);
}

template <LinearPolicy P, DecayKind DK, RuleKind R, class F>
Status launch_floats(const LinearAttentionArgs<float, DK, R, F>& args, const LinearPlan& plan, const LinearPass& pass,
                     cudaStream_t stream) {
  using D = DecayOf<DK>;
  constexpr FloatProducts products = P.float_products;
  if (pass.segment_states.present())
    if (Status s = launch_scan<D>(pass, stream); !s.ok()) return s;
  const FloatPass walk{args.q, args.k, args.v, args.o, pass};
  const Index heads = plan.sequences * plan.shape.output_heads();
  if (pass.key_dim <= 64) return launch_float_pass<products, D, 64, 4>(walk, heads, plan.device, stream);
  if (pass.key_dim <= 128) return launch_float_pass<products, D, 128, 8>(walk, heads, plan.device, stream);
  return launch_float_pass<products, D, 256, 8>(walk, heads, plan.device, stream);
}

}  // namespace chela::cuda::detail
