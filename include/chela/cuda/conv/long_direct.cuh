#pragma once
// The strategy that takes the sums of the long convolution themselves: any sizes, strides, states and ragged batches,
// and every output from the inputs that its kernel meets and from no others. 16-bit data is multiplied on tensor cores,
// with taps rounded to its type (cuda/conv/toeplitz_pass.cuh), floats are not (cuda/conv/float_sums.cuh); all is summed
// in float. See cuda/conv/long_strategy.cuh for what a strategy is.
//
// The gradient of the inputs is the convolution of grad_y with the kernel run backwards, and that of the initial state
// are its outputs before the first token. The gradient of the kernel is summed over tokens and sequences in order, in
// as many runs of sequences as a large device has work for.
#include <algorithm>

#include "chela/conv/long.hpp"
#include "chela/cuda/conv/float_sums.cuh"
#include "chela/cuda/conv/toeplitz_pass.cuh"
#include "chela/cuda/conv/toeplitz_taps_gradient.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// The most products per output for which sums are taken directly. On an H100 they take 3.4 ps an element of bf16 with 16
/// taps, 4.7 with 256 and 8.1 with 1024 (B4 D1024 T16384, `bench_long_conv_cuda`), and floats 11 with 64; transforms
/// of 1024 to 16384 points take 2 to 4 in 16 bits.
template <class T>
constexpr int direct_products(const LongConvPolicy& policy) {
  constexpr int measured = 32;
  return policy.direct_products == LongConvPolicy::as_measured ? measured : policy.direct_products;
}

/// One convolution: of x with the kernel, or of grad_y with the kernel run backwards.
template <class T>
struct DirectPass {
  ConvTensors<const T> x = {};
  ConvTensors<T> y = {};
  TensorView<const float, 2> taps = {}, back_taps = {};
  TensorView<const float, 1> skip = {};
  bool reversed = false;
  Index least = 0, most = 0, channels = 0, history = 0;  ///< lags, and positions before the tokens in y
  SequenceBatch sequences = {};

  explicit DirectPass(const LongConvArgs<T>& a) : DirectPass(a, false) {
    x = conv_tensors<const T>(a.x, a.initial_state), y = conv_tensors<T>(a.y, {});
  }
  explicit DirectPass(const LongConvBackwardArgs<T>& a) : DirectPass(a, true) {
    x = conv_tensors<const T>(a.grad_y, {}), y = conv_tensors<T>(a.grad_x, a.grad_initial_state);
    history = a.grad_initial_state.present() ? long_conv_shape(a).history() : 0;
  }

  SequenceTiles tiles(int outputs) const { return {sequences, outputs, ceil_div(history, outputs)}; }

 private:
  template <class Args>
  DirectPass(const Args& a, bool backwards) : taps(a.taps), back_taps(a.back_taps), skip(a.skip), reversed(backwards) {
    const LongConvShape s = long_conv_shape(a);
    least = backwards ? -s.history() : -s.back_taps, most = backwards ? s.back_taps : s.history();
    channels = s.channels, sequences = s.sequences;
  }
};

/// What the kernel's gradient is summed in.
struct KernelGradientPlan {
  Index tiles = 1, runs = 1;  ///< of lags, and of sequences
  Index channels = 0, least = 0, lags = 0;

  KernelGradientPlan(const LongConvShape& s, Index least_tile, Index tile_lags)
      : channels(s.channels), least(-s.back_taps), lags(s.taps + s.back_taps) {
    constexpr Index enough_blocks = 512;
    tiles = ceil_div(lags + least - least_tile, tile_lags);
    const Index blocks = tiles * ceil_div(channels, conv_channels);
    runs = std::clamp<Index>(enough_blocks / blocks, 1, s.sequences.size());
  }
  std::size_t bytes() const { return std::size_t(runs) * std::size_t(channels * lags) * sizeof(float); }
};

inline Status check_blocks(Index blocks) {
  return require(blocks < Index(1) << 31, Code::unsupported,
                 "x is too large for one call on the GPU; call with fewer sequences or channels");
}

/// Sums by blocks of a tile's lags, of eight channels and a run of sequences.
template <class Tile, class T>
Status launch_taps_gradient(void (*kernel)(TapsGradientCall<T>), const LongConvBackwardArgs<T>& a,
                            const KernelGradientPlan& plan, float* sums, cudaStream_t stream) {
  const Index blocks = plan.tiles * plan.runs * ceil_div(plan.channels, conv_channels);
  if (Status s = check_blocks(blocks); !s.ok()) return s;
  const TapsGradientCall<T> call{conv_tensors<const T>(a.x, a.initial_state),
                                 conv_tensors<const T>(a.grad_y, {}),
                                 long_conv_shape(a).sequences,
                                 plan.channels,
                                 plan.least,
                                 plan.lags,
                                 plan.tiles,
                                 plan.runs,
                                 sums};
  return launch(kernel, dim3(unsigned(blocks)), Tile::threads, Tile::shared_bytes, stream, call);
}

/// 16-bit data, on tensor cores.
template <class T>
struct DirectProducts {
  /// Tiles of 128 outputs that a warp has.
  static int warp_tiles(const DirectPass<T>& pass) {
    return pass.sequences.tokens + pass.history > 512 ? 8 : pass.sequences.tokens + pass.history > 256 ? 4 : 2;
  }
  /// In slabs of about as many lags as a warp has outputs.
  static ToeplitzLags lags(const DirectPass<T>& pass) {
    const ToeplitzLags one(pass.least, pass.most, 1);
    const Index groups = one.end_group - one.first_group, each = 2 * warp_tiles(pass);
    const Index slabs = std::max<Index>((groups + each / 2) / each, 1);
    return {pass.least, pass.most, int(ceil_div(groups, slabs))};
  }
  static std::size_t kernel_bytes(const DirectPass<T>& pass) { return lags(pass).bytes(pass.channels); }

  static Status prepare(const DirectPass<T>& pass, void* kernel, cudaStream_t stream) {
    const ToeplitzLags l = lags(pass);
    return make_toeplitz_taps<T>({pass.taps, pass.back_taps, pass.reversed, l, {kernel, l, pass.channels}}, stream);
  }

  static Status convolve(const DirectPass<T>& pass, const void* kernel, cudaStream_t stream) {
    const ToeplitzLags l = lags(pass);
    const int tiles = warp_tiles(pass);
    const ToeplitzCall<T> call{
        pass.x,       pass.y, pass.skip, {const_cast<void*>(kernel), l, pass.channels}, l, pass.tiles(128 * tiles),
        pass.channels};
    return tiles == 8   ? launch_toeplitz<T, 8>(call, stream)
           : tiles == 4 ? launch_toeplitz<T, 4>(call, stream)
                        : launch_toeplitz<T, 2>(call, stream);
  }

  static KernelGradientPlan kernel_gradient_plan(const LongConvShape& s) {
    return {s, 8 * floor_div(-s.back_taps, 8), TapsGradientTile::lags};
  }
  static Status sum_kernel_gradient(const LongConvBackwardArgs<T>& a, const KernelGradientPlan& plan, float* sums,
                                    cudaStream_t stream) {
    return launch_taps_gradient<TapsGradientTile>(toeplitz_taps_gradient_kernel<T>, a, plan, sums, stream);
  }
};

/// Floats.
template <>
struct DirectProducts<float> {
  static std::size_t kernel_bytes(const DirectPass<float>&) { return 0; }
  static Status prepare(const DirectPass<float>&, void*, cudaStream_t) { return {}; }

  static Status convolve(const DirectPass<float>& pass, const void*, cudaStream_t stream) {
    const SequenceTiles tiles = pass.tiles(FloatSumsTile::outputs);
    const Index blocks = tiles.size() * ceil_div(pass.channels, conv_channels);
    if (Status s = check_blocks(blocks); !s.ok()) return s;
    const FloatConvCall<float> call{pass.x,        pass.y,     pass.taps, pass.back_taps, pass.skip,
                                    pass.reversed, pass.least, pass.most, pass.channels,  tiles};
    return launch(float_conv_kernel<float>, dim3(unsigned(blocks)), FloatSumsTile::threads, FloatSumsTile::shared_bytes,
                  stream, call);
  }

  static KernelGradientPlan kernel_gradient_plan(const LongConvShape& s) {
    return {s, -s.back_taps, FloatSumsTile::outputs};
  }
  static Status sum_kernel_gradient(const LongConvBackwardArgs<float>& a, const KernelGradientPlan& plan, float* sums,
                                    cudaStream_t stream) {
    return launch_taps_gradient<FloatSumsTile>(float_taps_gradient_kernel<float>, a, plan, sums, stream);
  }
};

template <class T>
constexpr bool wants_kernel_gradient(const LongConvBackwardArgs<T>& a) {
  return a.grad_taps.present() || a.grad_back_taps.present() || a.grad_skip.present();
}
template <class T>
constexpr bool wants_input_gradient(const LongConvBackwardArgs<T>& a) {
  return a.grad_x.present() || a.grad_initial_state.present();
}

template <class T>
struct DirectLongConv {
  using Products = DirectProducts<T>;

  template <class Args>
  static bool serves(const LongConvPolicy&, const Args&) {
    return true;
  }

  static std::size_t kernel_bytes(const LongConvPolicy&, const LongConvArgs<T>& a) {
    return Products::kernel_bytes(DirectPass<T>(a));
  }
  static std::size_t kernel_bytes(const LongConvPolicy&, const LongConvBackwardArgs<T>& a) {
    return wants_input_gradient(a) ? Products::kernel_bytes(DirectPass<T>(a)) : 0;
  }
  static Status prepare(const LongConvPolicy&, const LongConvArgs<T>& a, void* kernel, cudaStream_t stream) {
    return Products::prepare(DirectPass<T>(a), kernel, stream);
  }
  static Status prepare(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, void* kernel, cudaStream_t stream) {
    return wants_input_gradient(a) ? Products::prepare(DirectPass<T>(a), kernel, stream) : Status{};
  }

  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvArgs<T>&) { return 0; }
  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvBackwardArgs<T>& a) {
    return wants_kernel_gradient(a) ? Products::kernel_gradient_plan(long_conv_shape(a)).bytes() : 0;
  }

  static Status forward(const LongConvPolicy&, const LongConvArgs<T>& a, const void* kernel, Workspace,
                        cudaStream_t stream) {
    return Products::convolve(DirectPass<T>(a), kernel, stream);
  }

  static Status backward(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, const void* kernel,
                         Workspace workspace, cudaStream_t stream) {
    if (wants_input_gradient(a))
      if (Status s = Products::convolve(DirectPass<T>(a), kernel, stream); !s.ok()) return s;
    if (!wants_kernel_gradient(a)) return {};
    const KernelGradientPlan plan = Products::kernel_gradient_plan(long_conv_shape(a));
    auto* const sums = static_cast<float*>(workspace.data);
    if (Status s = Products::sum_kernel_gradient(a, plan, sums, stream); !s.ok()) return s;
    return launch_sum_runs(
        {sums, plan.runs, plan.channels, plan.least, plan.lags, a.grad_taps, a.grad_back_taps, a.grad_skip}, stream);
  }
};

}  // namespace chela::cuda::detail
