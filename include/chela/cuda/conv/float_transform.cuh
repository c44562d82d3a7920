#pragma once
// Long convolutions by right-angle transforms in float: modulo x^N - i, one complex transform of N points per real row,
// without padding (chela/conv/fft_plan.hpp). With X, K, G the spectra of inputs, kernel and output gradient,
//
//   y       = real part of inverse(X K)          earlier inputs, and taps that look ahead, are imaginary parts
//   grad_x  = real part of inverse(G conj K)     of earlier inputs: minus the imaginary part
//   grad_k  = inverse(sum_b G conj X)            the sum in the order of the batch
//
// Rows of float that are contiguous and fit a thread block take one kernel. Others pass through memory as points, a
// group of channels at a time. See cuda/conv/float_transform_rows.cuh for the kernel all share.
#include "chela/cuda/conv/float_transform_columns.cuh"
#include "chela/cuda/conv/float_transform_plan.cuh"
#include "chela/cuda/conv/float_transform_rows.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// Launches for one part of a plan and a group of channels.
struct FloatTransformLaunch {
  FloatTransformPart part;
  ServedSequences sequences;
  Index first_channel, channels;
  cudaStream_t stream;

  FloatRowsCall rows() const {
    FloatRowsCall call;
    call.sequences = sequences, call.sequences_between = sequences.all.size();
    call.first_channel = first_channel, call.channels = channels;
    call.columns = part.columns, call.column_nodes = part.column_nodes();
    return call;
  }
  Status run(const FloatRowsCall& call) const { return transform_rows(call, part.row_points, stream); }

  /// `between`: sequences that the points of a channel have room for.
  template <class T, class Points>
  Status run_columns(const RealRows<T>& real, Points points, Index between) const {
    const auto& strides = real.ahead.present() ? real.ahead.strides : real.behind.strides;
    constexpr int lanes = 8;
    const bool token_major = strides[1] != 1 && strides[2] == 1 && channels >= lanes;
    const FloatColumnsCall<T> call{real,     points,  sequences,       first_channel,
                                   channels, between, part.row_points, token_major ? lanes : 1};
    return transform_columns(call, part.columns, stream);
  }
  template <class T>
  Status to_points(const RealRows<const T>& real, float2* points) const {
    return run_columns(real, points, sequences.all.size());
  }
  template <class T>
  Status to_real(const float2* points, const RealRows<T>& real) const {
    return run_columns(real, points, sequences.all.size());
  }

  /// The same for rows that a kernel of this part has: one for each channel.
  FloatTransformLaunch for_taps() const {
    FloatTransformLaunch taps = *this;
    taps.sequences = {{1, part.taps, {}}, 0, part.taps};
    return taps;
  }
};

/// A kernel's taps, or their gradients, as rows; `part` says how many take part.
template <class W>
RealRows<W> tap_rows(const FloatTransformPart& part, TensorView<W, 2> taps, TensorView<W, 2> back_taps) {
  RealRows<W> rows;
  if (taps.present()) rows.ahead = {taps.data, {1, part.taps, taps.extents[0]}, {0, taps.strides[1], taps.strides[0]}};
  if (back_taps.present() && part.back_taps > 0)
    rows.behind = reversed(
        TensorView<W, 3>{
            back_taps.data, {1, part.back_taps, back_taps.extents[0]}, {0, back_taps.strides[1], back_taps.strides[0]}},
        1);
  return rows;
}

/// A strategy as in cuda/conv/long_strategy.cuh.
template <class T>
struct FloatTransformLongConv {
  template <class Args>
  static FloatTransformPlan plan_of(const Args& a) {
    return {long_conv_shape(a), needs_history(a)};
  }

  template <class Args>
  static bool serves(const LongConvPolicy& policy, const Args& a) {
    const LongConvShape s = long_conv_shape(a);
    return policy.method != LongConvMethod::blocks &&
           right_angle_least_points(s.tokens, s.taps, s.back_taps, needs_history(a)) <= float_transform_most_points;
  }

  template <class Args>
  static std::size_t kernel_bytes(const LongConvPolicy&, const Args& a) {
    return std::size_t(plan_of(a).points() * a.x.extents[2]) * sizeof(float2);
  }

  template <class Args>
  static Status prepare(const LongConvPolicy&, const Args& a, void* kernel, cudaStream_t stream) {
    const FloatTransformPlan plan = plan_of(a);
    float2* to = static_cast<float2*>(kernel);
    for (int p = 0; p < plan.size; ++p) {
      const FloatTransformLaunch launch = whole(plan.parts[p], a, stream).for_taps();
      RealRows<const float> rows = tap_rows(launch.part, a.taps, a.back_taps);
      rows.factor = 1.0f / float(launch.part.points());
      FloatRowsCall call = launch.rows();
      call.spectrum_to = to;
      if (launch.part.columns == 1) {
        call.from = rows;
      } else {
        if (Status s = launch.to_points(rows, to); !s.ok()) return s;
        call.points_from = to;
      }
      if (Status s = launch.run(call); !s.ok()) return s;
      to += launch.part.points() * launch.channels;
    }
    return {};
  }

  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvArgs<T>& a) {
    return scratch_bytes(a, [&](const FloatTransformPart& part) { return in_one_kernel(part, a.x, a.y) ? 0 : 1; });
  }
  static std::size_t workspace_bytes(const LongConvPolicy&, const LongConvBackwardArgs<T>& a) {
    return scratch_bytes(a, [&](const FloatTransformPart& part) { return copies(part, a); });
  }

  static Status forward(const LongConvPolicy&, const LongConvArgs<T>& a, const void* kernel, Workspace workspace,
                        cudaStream_t stream) {
    const RealRows<const T> x{a.x, a.initial_state};
    const RealRows<T> y{a.y};
    return for_groups(
        a, kernel, stream, [&](const FloatTransformPart& part) { return in_one_kernel(part, a.x, a.y) ? 0 : 1; },
        [&](const FloatTransformLaunch& launch, const float2* spectrum) {
          FloatRowsCall call = launch.rows();
          call.kernel = spectrum, call.skip = a.skip;
          return through(launch, x, call, y, in_one_kernel(launch.part, a.x, a.y),
                         static_cast<float2*>(workspace.data));
        });
  }

  static Status backward(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, const void* kernel,
                         Workspace workspace, cudaStream_t stream) {
    const bool input = a.grad_x.present() || a.grad_initial_state.present();
    const RealRows<const T> x{a.x, a.initial_state}, grad_y{a.grad_y};
    const RealRows<T> grad_x{a.grad_x, a.grad_initial_state};
    const FloatTransformPlan plan = plan_of(a);
    return for_groups(
        a, kernel, stream, [&](const FloatTransformPart& part) { return copies(part, a); },
        [&](const FloatTransformLaunch& launch, const float2* spectrum) {
          float2* inputs = static_cast<float2*>(workspace.data);
          float2* points = inputs;
          FloatRowsCall call = launch.rows();
          if (wants_kernel(a)) {
            points += launch.part.points() * launch.channels * launch.sequences.all.size();
            call.spectrum_to = inputs;
            if (Status s = through(launch, x, call, {}, in_one_kernel(launch.part, a.x, a.x), inputs); !s.ok())
              return s;
            call = launch.rows(), call.correlate = inputs;
          }
          if (input)
            call.kernel = spectrum, call.conjugate = true, call.skip = a.skip;
          else
            call.discard = true;
          if (Status s = through(launch, grad_y, call, grad_x, gradients_in_one_kernel(launch.part, a), points);
              !s.ok())
            return s;
          if (!wants_kernel(a)) return Status{};
          return sum_kernel_gradient(launch, a, inputs, launch.part.points() != plan.parts[0].points());
        });
  }

 private:
  template <class U>
  static constexpr bool needs_history(const LongConvArgs<U>& a) {
    return a.initial_state.present();
  }
  template <class U>
  static constexpr bool needs_history(const LongConvBackwardArgs<U>& a) {
    return a.initial_state.present() || a.grad_initial_state.present();
  }
  static bool wants_kernel(const LongConvBackwardArgs<T>& a) {
    return a.grad_taps.present() || a.grad_back_taps.present() || a.grad_skip.present();
  }

  /// Whether the row kernel can read and write these tensors itself.
  static bool in_one_kernel(const FloatTransformPart& part, TensorView<const T, 3> from, TensorView<const T, 3> to) {
    return std::same_as<T, float> && part.columns == 1 && from.strides[1] == 1 && to.strides[1] == 1;
  }
  static bool gradients_in_one_kernel(const FloatTransformPart& part, const LongConvBackwardArgs<T>& a) {
    return in_one_kernel(part, a.grad_y, a.grad_x.present() ? a.grad_x : a.grad_y);
  }
  /// Points of every sequence and channel of a group that the workspace holds.
  static int copies(const FloatTransformPart& part, const LongConvBackwardArgs<T>& a) {
    return (wants_kernel(a) ? 1 : 0) + (gradients_in_one_kernel(part, a) ? 0 : 1);
  }

  template <class Args>
  static FloatTransformLaunch whole(const FloatTransformPart& part, const Args& a, cudaStream_t stream) {
    const LongConvShape s = long_conv_shape(a);
    return {part, {s.sequences, part.more_than, part.at_most}, 0, s.channels, stream};
  }
  template <class Args>
  static std::size_t bytes_of_channel(const FloatTransformPart& part, const Args& a, int copies) {
    return std::size_t(part.points() * long_conv_shape(a).sequences.size() * copies) * sizeof(float2);
  }
  template <class Args, class Copies>
  static std::size_t scratch_bytes(const Args& a, const Copies& copies_of) {
    const FloatTransformPlan plan = plan_of(a);
    std::size_t most = 0;
    for (int p = 0; p < plan.size; ++p)
      if (const std::size_t bytes = bytes_of_channel(plan.parts[p], a, copies_of(plan.parts[p])); bytes > 0)
        most = std::max(most, bytes * std::size_t(float_transform_group(a.x.extents[2], bytes)));
    return most;
  }

  /// Calls f(launch, kernel) for every part and group of channels. Without copies all channels are one group.
  template <class Args, class Copies, class F>
  static Status for_groups(const Args& a, const void* kernel, cudaStream_t stream, const Copies& copies_of,
                           const F& f) {
    const FloatTransformPlan plan = plan_of(a);
    const float2* spectrum = static_cast<const float2*>(kernel);
    for (int p = 0; p < plan.size; ++p) {
      FloatTransformLaunch launch = whole(plan.parts[p], a, stream);
      const Index all = launch.channels, points = launch.part.points();
      const std::size_t bytes = bytes_of_channel(launch.part, a, copies_of(launch.part));
      const Index group = bytes > 0 ? float_transform_group(all, bytes) : all;
      for (Index first = 0; first < all; first += group) {
        launch.first_channel = first, launch.channels = std::min(group, all - first);
        if (Status s = f(launch, spectrum + first * points); !s.ok()) return s;
      }
      spectrum += all * points;
    }
    return {};
  }

  /// Runs `call` from `from` to `to`, or to what the call names. `points` are scratch when it takes more than a kernel.
  static Status through(const FloatTransformLaunch& launch, const RealRows<const T>& from, FloatRowsCall call,
                        const RealRows<T>& to, bool one_kernel, float2* points) {
    if constexpr (std::same_as<T, float>) {
      if (one_kernel) {
        call.from = from, call.to = to;
        return launch.run(call);
      }
    }
    if (Status s = launch.to_points(from, points); !s.ok()) return s;
    call.points_from = points, call.points_to = points;
    if (Status s = launch.run(call); !s.ok() || call.spectrum_to || call.discard) return s;
    return launch.to_real(points, to);
  }

  /// The gradients of the taps that a part's sequences meet, from the correlations of each, which are overwritten.
  static Status sum_kernel_gradient(const FloatTransformLaunch& launch, const LongConvBackwardArgs<T>& a,
                                    float2* correlations, bool add) {
    const FloatTransformLaunch taps = launch.for_taps();
    RealRows<float> to = tap_rows(launch.part, a.grad_taps, a.grad_back_taps);
    to.first = a.grad_skip, to.factor = 1.0f / float(launch.part.points()), to.add = add;
    FloatRowsCall call = launch.rows();
    call.sum_from = correlations;
    if (launch.part.columns == 1) {
      call.to = to;
      return launch.run(call);
    }
    call.points_to = correlations;
    if (Status s = launch.run(call); !s.ok()) return s;
    return taps.template run_columns<float>(to, static_cast<const float2*>(correlations), launch.sequences.all.size());
  }
};

}  // namespace chela::cuda::detail
