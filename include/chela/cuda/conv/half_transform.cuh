#pragma once
// Long convolutions of 16-bit data by transforms on tensor cores, one over each whole row: up to 16384 tokens and taps.
//
// Everything between the data and the outputs is in __half (half_parts.cuh), and sums over the batch of up to eight rows;
// what is added of those is in float. Rows are scaled by powers of two: their amplitude plays no part. Against exact sums
// the outputs of random rows are off by 0.0009 to 0.0012 of their root mean square and kernels' gradients by 0.0013 to
// 0.0016, plus outputs' own rounding (0.0017 in bf16; measured on one H100). That error is one of the whole row: outputs
// much smaller than those are have it too, before a burst of large inputs as well as after.
//
// There are transforms of 256 R points for R = 1 to 8 and for 12 and 16 times 1, 2 and 4, and 12288 points as 16 times 3;
// a row takes the next one, which has up to a third more points from 768 tokens on and up to half more from 2048 on.
//
// Where tokens are neighbours in memory, [B,D,T], rows are read and written where they are. Of [B,T,D] data a block turns
// eight neighbouring channels up to 2048 tokens; longer rows, states and gradients go through copies in the workspace.
#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "chela/cuda/conv/half_gradient.cuh"
#include "chela/cuda/conv/half_tiles.cuh"
#include "chela/cuda/conv/turn_rows.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

template <class... Rows>
struct HalfRowList {};
using HalfRows =
    HalfRowList<WarpRow<1>, WarpRow<2>, WarpRow<3>, WarpRow<4>, WarpRow<5>, WarpRow<6>, WarpRow<7>, WarpRow<8>,
                BlockRow<12, 1>, BlockRow<16, 1>, BlockRow<12, 2>, BlockRow<16, 2>, BlockRow<16, 3>, BlockRow<16, 4>>;
inline constexpr Index most_half_points = BlockRow<16, 4>::points;

/// Calls f with the null pointer of the shortest row that has so many points.
template <class F, class Row, class... Longer>
auto with_half_row(HalfRowList<Row, Longer...>, Index points, const F& f) {
  if constexpr (sizeof...(Longer) > 0)
    if (points > Row::points) return with_half_row(HalfRowList<Longer...>{}, points, f);
  return f(static_cast<Row*>(nullptr));
}

/// The points of a row's transform: one for each token, tap and lag that looks ahead.
template <class Args>
Index least_half_points(const Args& a) {
  const LongConvShape s = long_conv_shape(a);
  return std::max({s.tokens, s.taps, s.back_taps + 1});
}

template <class Row>
HalfSpectrumView half_spectrum_view(Parts& parts, Index channels) {
  HalfSpectrumView v;
  v.roots = parts.take<uint4>(32 * Row::roots);
  v.units = parts.take<uint4>(channels * spectrum_units<Row>);
  v.scale = parts.take<float>(channels);
  return v;
}

/// [batch, token, channel] with neighbouring tokens, at multiples of eight.
template <class T>
TensorView<T, 3> turned_view(Parts& parts, const LongConvShape& s) {
  const Index stride = round_up(s.tokens, 8);
  T* const data = parts.take<T>(s.batch * s.channels * stride);
  return {data, {s.batch, s.tokens, s.channels}, {s.channels * stride, 1, stride}};
}

template <class T>
bool has_neighbouring_tokens(TensorView<T, 3> x) {
  return x.strides[1] == 1 || x.extents[1] == 1;
}

template <class Row, class T>
TokenRows<T> token_rows(TensorView<T, 3> x) {
  const auto aligned_to = [&](int elements) {
    bool fits = reinterpret_cast<std::uintptr_t>(x.data) % (2 * std::size_t(elements)) == 0;
    for (int axis : {0, 2}) fits = fits && (x.extents[axis] == 1 || x.strides[axis] % elements == 0);
    return fits;
  };
  constexpr int run = reads_runs<Row> ? Row::residues : 1;
  return {x.data,        x.strides[0],
          x.strides[2],  int(x.extents[1]),
          aligned_to(8), reads_runs<Row> && x.extents[1] % run == 0 && aligned_to(run)};
}

/// What a block of the current device may have, or 0 if there is none.
inline int most_shared_bytes() {
  Device device;
  return current_device(device).ok() ? device.shared_bytes : 0;
}

template <class Row>
inline constexpr int row_block_threads = 32 * Row::warps* Row::rows_per_block;
template <class Row>
dim3 row_blocks(Index rows) {
  return dim3(unsigned(ceil_div(rows, Row::rows_per_block)));
}
template <class Row, class Kernel, class Call>
Status launch_rows(Kernel* kernel, Index rows, int bytes_of_row, const Call& call, cudaStream_t stream) {
  return launch(kernel, row_blocks<Row>(rows), row_block_threads<Row>, Row::rows_per_block * bytes_of_row, stream,
                call);
}

/// A strategy as in cuda/conv/long_strategy.cuh.
template <HalfElement T>
struct HalfTransformLongConv {
  template <class Args>
  static bool serves(const LongConvPolicy& policy, const Args& a) {
    const LongConvShape s = long_conv_shape(a);
    constexpr Index most_rows = (Index(1) << 31) - 1;
    return policy.method != LongConvMethod::blocks && !a.cu_seqlens.present() &&
           least_half_points(a) <= most_half_points && s.batch * s.channels <= most_rows / turned_tile &&
           shared_bytes(a) <= most_shared_bytes();
  }

  template <class Args>
  static std::size_t kernel_bytes(const LongConvPolicy&, const Args& a) {
    return with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      Parts parts(nullptr);
      half_spectrum_view<Row>(parts, a.x.extents[2]);
      return parts.used();
    });
  }

  template <class Args>
  static Status prepare(const LongConvPolicy&, const Args& a, void* kernel, cudaStream_t stream) {
    return with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      const LongConvShape s = long_conv_shape(a);
      Parts parts(kernel);
      const HalfSpectrumCall call{a.taps,
                                  a.back_taps,
                                  a.skip,
                                  int(s.channels),
                                  int(s.taps),
                                  int(s.back_taps),
                                  half_spectrum_view<Row>(parts, s.channels)};
      const Status roots = launch(half_roots_kernel<Row>, dim3(unsigned(ceil_div(32 * Row::roots, root_threads))),
                                  root_threads, 0, stream, call.spectrum);
      if (!roots.ok()) return roots;
      const auto queue = [&]<bool TwoSided>(std::bool_constant<TwoSided>) {
        return launch_early(half_spectrum_kernel<Row, TwoSided>, row_blocks<Row>(s.channels), row_block_threads<Row>,
                            Row::rows_per_block * spectrum_row_bytes<Row, TwoSided>, stream, call);
      };
      return s.back_taps > 0 ? queue(std::true_type{}) : queue(std::false_type{});
    });
  }

  /// The most that a kernel without tiles takes.
  template <class Args>
  static int shared_bytes(const Args& a) {
    return with_half_row(HalfRows{}, least_half_points(a), []<class Row>(Row*) {
      constexpr int of_rows =
          std::same_as<Args, LongConvBackwardArgs<T>> ? HalfGradientPlan<Row>::bytes : convolution_row_bytes<Row>;
      return Row::rows_per_block * std::max(of_rows, spectrum_row_bytes<Row, true>);
    });
  }

  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvArgs<T>& a) {
    Parts parts(nullptr);
    if (!takes_tiles(a)) turned_rows(parts, a);
    return parts.used();
  }
  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvBackwardArgs<T>& a) {
    return with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      Parts parts(nullptr);
      turned_rows(parts, a);
      gradient_call<Row>(parts, a);
      return parts.used();
    });
  }

  /// A source other than the stored tokens goes without an initial state.
  template <class Source = StoredTokens>
  static Status forward(const LongConvPolicy&, const LongConvArgs<T>& a, const void* kernel, Workspace workspace,
                        cudaStream_t stream, const Source& source = {}) {
    if (takes_tiles(a)) return queue_tiles(a, kernel, stream, source);
    Parts parts(workspace.data);
    const auto [x, y] = turned_rows(parts, a);
    if (x.data != a.x.data)
      if (Status s = turn_rows(a.x, x, stream); !s.ok()) return s;
    const Status status = with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      auto call = convolution_call<Row>(as_const_rows(x), y, a.taps.extents[0], kernel, source);
      call.history.rows = a.initial_state;
      return queue_convolution<Row, false>(call, has_rows(a.initial_state), stream);
    });
    if (!status.ok() || y.data == a.y.data) return status;
    return turn_rows(as_const_rows(y), a.y, stream);
  }

  static Status backward(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, const void* kernel,
                         Workspace workspace, cudaStream_t stream) {
    Parts parts(workspace.data);
    const auto [x, grad_y, grad_x] = turned_rows(parts, a);
    if (x.data != a.x.data)
      if (Status s = turn_rows(a.x, x, stream); !s.ok()) return s;
    if (grad_y.data != a.grad_y.data)
      if (Status s = turn_rows(a.grad_y, grad_y, stream); !s.ok()) return s;
    const Status status = with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      if (wants_taps(a)) return queue_gradient<Row>(parts, a, x, grad_y, grad_x, kernel, stream);
      if (!grad_x.present() && !has_rows(a.grad_initial_state)) return Status{};
      HalfConvolutionCall<T> call = convolution_call<Row>(as_const_rows(grad_y), grad_x, a.taps.extents[0], kernel);
      call.history_gradient.rows = a.grad_initial_state;
      return queue_convolution<Row, true>(call, has_rows(a.grad_initial_state), stream);
    });
    if (!status.ok() || grad_x.data == a.grad_x.data) return status;
    return turn_rows(as_const_rows(grad_x), a.grad_x, stream);
  }

 private:
  using Rows = TensorView<T, 3>;
  using ConstRows = TensorView<const T, 3>;

  static ConstRows as_const_rows(Rows x) { return x; }
  static ConstRows as_const_rows(ConstRows x) { return x; }
  template <class V>
  static bool has_rows(const V& state) {
    return state.present() && state.extents[1] > 0;
  }
  static bool wants_taps(const LongConvBackwardArgs<T>& a) {
    return a.grad_taps.present() || a.grad_back_taps.present() || a.grad_skip.present();
  }

  /// The caller's rows, or where tokens are no neighbours there, room for copies. Inputs are not written through the
  /// pointers that this gives them.
  static Rows own_or_turned(Parts& parts, ConstRows x, const LongConvShape& s) {
    if (!x.present()) return {};
    if (has_neighbouring_tokens(x))
      return {const_cast<T*>(x.data),
              {x.extents[0], x.extents[1], x.extents[2]},
              {x.strides[0], x.strides[1], x.strides[2]}};
    return turned_view<T>(parts, s);
  }
  struct ForwardRows {
    Rows x, y;
  };
  static ForwardRows turned_rows(Parts& parts, const LongConvArgs<T>& a) {
    const LongConvShape s = long_conv_shape(a);
    ForwardRows rows;
    rows.x = own_or_turned(parts, a.x, s), rows.y = own_or_turned(parts, a.y, s);
    return rows;
  }
  struct BackwardRows {
    Rows x, grad_y, grad_x;
  };
  static BackwardRows turned_rows(Parts& parts, const LongConvBackwardArgs<T>& a) {
    const LongConvShape s = long_conv_shape(a);
    BackwardRows rows;
    rows.x = own_or_turned(parts, a.x, s), rows.grad_y = own_or_turned(parts, a.grad_y, s);
    rows.grad_x = own_or_turned(parts, a.grad_x, s);
    return rows;
  }

  /// Whether the rows of eight channels are turned within blocks, without copies in the workspace.
  static bool takes_tiles(const LongConvArgs<T>& a) {
    if (has_neighbouring_tokens(a.x) || has_rows(a.initial_state)) return false;
    if (!has_channel_units(a.x) || !has_channel_units(a.y)) return false;
    return with_half_row(HalfRows{}, least_half_points(a), []<class Row>(Row*) { return has_tiles<Row>; });
  }
  template <class Source>
  static Status queue_tiles(const LongConvArgs<T>& a, const void* kernel, cudaStream_t stream, const Source& source) {
    return with_half_row(HalfRows{}, least_half_points(a), [&]<class Row>(Row*) {
      if constexpr (has_tiles<Row>) {
        const LongConvShape s = long_conv_shape(a);
        const HalfTileCall<T, Source> call{convolution_call<Row>(a.x, a.y, s.channels, kernel, source), a.x.strides[1],
                                           a.y.strides[1]};
        return launch(half_tile_kernel<Row, T, Source>, dim3(unsigned(s.batch * (s.channels / tile_channels))),
                      tile_threads, tile_bytes<Row>, stream, call);
      } else {
        return Status{Code::unsupported, "these rows are too long for tiles"};
      }
    });
  }

  template <class Row, class Source = StoredTokens>
  static HalfConvolutionCall<T, Source> convolution_call(ConstRows x, Rows y, Index channels, const void* kernel,
                                                         const Source& source = {}) {
    Parts parts(const_cast<void*>(kernel));
    HalfConvolutionCall<T, Source> call;
    call.source = source;
    call.x = token_rows<Row>(x);
    if (y.present()) call.y = token_rows<Row>(y);
    call.batch = FixedDivisor(unsigned(x.extents[0])), call.channels = int(channels);
    call.spectrum = half_spectrum_view<Row>(parts, channels);
    return call;
  }
  template <class Row, bool Conjugate, class Source>
  static Status queue_convolution(const HalfConvolutionCall<T, Source>& call, bool history, cudaStream_t stream) {
    const Index rows = Index(call.batch.value()) * call.channels;
    const auto queue = [&](auto kernel) {
      return launch_rows<Row>(kernel, rows, convolution_row_bytes<Row>, call, stream);
    };
    if constexpr (std::same_as<Source, StoredTokens>)
      if (history) return queue(half_convolution_kernel<Row, T, Conjugate, true, RowWay::staged, Source>);
    if constexpr (reads_runs<Row>)
      if (call.x.in_runs && call.y.in_runs)
        return launch_rows<Row>(half_convolution_kernel<Row, T, Conjugate, false, RowWay::runs, Source>, rows, 0, call,
                                stream);
    return queue(half_convolution_kernel<Row, T, Conjugate, false, RowWay::staged, Source>);
  }

  /// Without the memory of the rows and of the prepared kernel.
  template <class Row>
  static HalfGradientCall<T> gradient_call(Parts& parts, const LongConvBackwardArgs<T>& a) {
    const LongConvShape s = long_conv_shape(a);
    HalfGradientCall<T> call;
    if (!wants_taps(a)) return call;
    call.batch = int(s.batch), call.channels = int(s.channels);
    call.sums_of_channel = int(ceil_div(s.batch, Index(rows_of_worker) * Row::rows_per_block));
    const Index blocks = s.channels * call.sums_of_channel;
    call.sums = parts.take<float4>(call.sums_of_channel > 1 ? blocks * sum_units<Row> : 0);
    call.skips = parts.take<float>(call.sums_of_channel > 1 ? blocks : 0);
    return call;
  }

  template <class Row>
  static Status queue_gradient(Parts& parts, const LongConvBackwardArgs<T>& a, Rows x, Rows grad_y, Rows grad_x,
                               const void* kernel, cudaStream_t stream) {
    const LongConvShape s = long_conv_shape(a);
    HalfGradientCall<T> call = gradient_call<Row>(parts, a);
    Parts of_kernel(const_cast<void*>(kernel));
    call.spectrum = half_spectrum_view<Row>(of_kernel, s.channels);
    call.x = token_rows<Row>(as_const_rows(x)), call.grad_y = token_rows<Row>(as_const_rows(grad_y));
    if (grad_x.present()) call.grad_x = token_rows<Row>(grad_x);
    call.history.rows = a.initial_state, call.history_gradient.rows = a.grad_initial_state;
    call.gradient = {a.grad_taps, a.grad_back_taps, a.grad_skip};
    const auto queue = [&](auto kernel_function) {
      return launch(kernel_function, dim3(unsigned(s.channels * call.sums_of_channel)), HalfGradientPlan<Row>::threads,
                    Row::rows_per_block * HalfGradientPlan<Row>::bytes, stream, call);
    };
    const auto queue_form = [&] {
      if (has_rows(a.initial_state) || has_rows(a.grad_initial_state))
        return queue(half_gradient_kernel<Row, T, true, RowWay::staged>);
      if constexpr (reads_runs<Row>)
        if (call.x.in_runs && call.grad_y.in_runs && (!call.grad_x.data || call.grad_x.in_runs))
          return queue(half_gradient_kernel<Row, T, false, RowWay::runs>);
      return queue(half_gradient_kernel<Row, T, false, RowWay::staged>);
    };
    if (Status status = queue_form(); !status.ok() || call.sums_of_channel == 1) return status;
    const HalfGradientSumCall sum{call.sums,     call.skips,           call.spectrum.roots,
                                  call.channels, call.sums_of_channel, call.gradient};
    return launch_rows<Row>(half_gradient_sum_kernel<Row>, s.channels, convolution_row_bytes<Row>, sum, stream);
  }
};

}  // namespace chela::cuda::detail
