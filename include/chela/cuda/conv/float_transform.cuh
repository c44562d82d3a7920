#pragma once
// Long convolutions by right-angle transforms in float: modulo x^N - i, one complex transform of N points per real row,
// without padding (chela/conv/fft_plan.hpp). With X, K, G the spectra of inputs, kernel and output gradient,
//
//   y       = real part of inverse(X K)          earlier inputs, and taps that look ahead, are imaginary parts
//   grad_x  = real part of inverse(G conj K)     of earlier inputs: minus the imaginary part
//   grad_k  = inverse(sum_b G conj X)            the sum in the order of the batch
//
// Rows of float that are contiguous and fit a thread block take one kernel. Others pass through memory as points, a
// group of channels at a time. See cuda/conv/float_transform_rows.cuh for the kernel all share. Of 16-bit data the rows
// of transforms that take columns are in half precision, unless a policy asks for the accumulator's arithmetic.
#include "chela/cuda/conv/float_transform_columns.cuh"
#include "chela/cuda/conv/float_transform_plan.cuh"
#include "chela/cuda/conv/float_transform_rows.cuh"
#include "chela/cuda/conv/half_points.cuh"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

/// Launches for one part of a plan and a group of channels. `OneColumn`: for parts of one column only.
template <class Stored, bool OneColumn>
struct FloatTransformLaunch {
  FloatTransformPart part = {};
  ServedSequences sequences = {};
  Index first_channel = 0, channels = 0;
  cudaStream_t stream = nullptr;
  uint4* roots = nullptr;    ///< of rows in half precision
  int kernel_run_shift = 0;  ///< as in the rows' call
  static constexpr int channel_lanes = 8;
  static constexpr bool halves = StoredPoints<Stored>::scaled;

  /// What the way back multiplies by.
  static Index normalisation(const FloatTransformPart& part) { return halves ? part.columns : part.points(); }
  static Index root_bytes(const FloatTransformPart& part) {
    return halves ? half_points_root_bytes(part.row_points) : 0;
  }

  static Index bytes(const FloatTransformPart& part, Index transforms) {
    return StoredPoints<Stored>::bytes(transforms, part.columns, part.row_points);
  }
  Index transforms() const { return channels * sequences.places(); }
  StoredPoints<Stored> in(void* memory) const { return {memory, transforms(), part.columns, part.row_points}; }

  FloatRowsCall<Stored> rows() const {
    FloatRowsCall<Stored> call;
    call.sequences = sequences, call.places = sequences.places();
    call.first_channel = first_channel, call.channels = channels;
    call.columns = part.columns, call.column_nodes = part.column_nodes();
    call.roots = roots, call.kernel_run_shift = kernel_run_shift;
    return call;
  }
  Status run(const FloatRowsCall<Stored>& call) const { return transform_rows(call, part.row_points, stream); }

  template <class T>
  int lanes_for(const RealRows<T>& real) const {
    const auto& strides = real.ahead.present() ? real.ahead.strides : real.behind.strides;
    return strides[1] != 1 && strides[2] == 1 && channels >= channel_lanes ? channel_lanes : 1;
  }
  /// Neighbouring points that share a scale are 2^run_shift.
  template <class T>
  int run_shift(const RealRows<T>& real) const {
    return lanes_for(real) == 1 ? 5 : 2;
  }
  template <class T>
  Status run_columns(const RealRows<T>& real, const StoredPoints<Stored>& points, Index places) const {
    const FloatColumnsCall<T, Stored> call{real,     points, sequences,       first_channel,
                                           channels, places, part.row_points, lanes_for(real)};
    return transform_columns<OneColumn>(call, part.columns, stream);
  }

  /// Runs `call` with real rows as its source and, unless it names another, its destination. `points` are scratch when
  /// that takes more than one kernel.
  template <class T>
  Status through(const RealRows<const T>& from, FloatRowsCall<Stored> call, const RealRows<T>& to, bool one_kernel,
                 const StoredPoints<Stored>& points) const {
    if constexpr (std::same_as<T, float> && !halves) {
      if (one_kernel) {
        call.from = from, call.to = to;
        return run(call);
      }
    }
    if (Status s = run_columns(from, points, sequences.places()); !s.ok()) return s;
    call.points_from = points, call.run_shift = run_shift(from);
    if (!call.spectrum_to.present() && !call.discard) call.points_to = points;
    if (Status s = run(call); !s.ok() || !call.points_to.present()) return s;
    return run_columns(to, points, sequences.places());
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

/// A strategy as in cuda/conv/long_strategy.cuh. ColumnPoints: how points lie in memory that pass through it twice,
/// with what follows for their rows.
template <class T, class ColumnPoints>
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
    const FloatTransformPlan plan = plan_of(a);
    Index bytes = 0;
    for (int p = 0; p < plan.size; ++p) bytes += kernel_bytes_of(plan.parts[p], a.x.extents[2]);
    return std::size_t(bytes);
  }

  template <class Args>
  static Status prepare(const LongConvPolicy&, const Args& a, void* kernel, cudaStream_t stream) {
    return for_parts(a, kernel, stream, [&](const auto& launch, void* memory) {
      const auto taps = launch.for_taps();
      const auto spectrum = taps.in(memory);
      RealRows<const float> rows = tap_rows(taps.part, a.taps, a.back_taps);
      rows.factor = 1.0f / float(taps.normalisation(taps.part));
      auto call = taps.rows();
      call.spectrum_to = spectrum;
      if constexpr (taps.halves) {
        if (Status s = prepare_half_points(taps.roots, taps.part.row_points, stream); !s.ok()) return s;
        if (taps.kernel_run_shift > 0) return taps.run_columns(rows, spectrum, 1);
        call.skip = a.skip;
      }
      return taps.through(rows, call, RealRows<float>{}, taps.part.columns == 1, spectrum);
    });
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
    return for_parts(a, const_cast<void*>(kernel), stream, [&](const auto& all, void* spectra) {
      const bool one_kernel = in_one_kernel(all.part, a.x, a.y);
      return for_groups(all, spectra, one_kernel ? 0 : 1, [&](const auto& launch, const auto& spectrum) {
        auto call = launch.rows();
        call.kernel = spectrum, call.skip = a.skip;
        return launch.through(x, call, y, one_kernel, launch.in(workspace.data));
      });
    });
  }

  static Status backward(const LongConvPolicy&, const LongConvBackwardArgs<T>& a, const void* kernel,
                         Workspace workspace, cudaStream_t stream) {
    const bool input = a.grad_x.present() || a.grad_initial_state.present();
    const RealRows<const T> x{a.x, a.initial_state}, grad_y{a.grad_y};
    const RealRows<T> grad_x{a.grad_x, a.grad_initial_state};
    const Index most_points = plan_of(a).parts[0].points();
    return for_parts(a, const_cast<void*>(kernel), stream, [&](const auto& all, void* spectra) {
      return for_groups(all, spectra, copies(all.part, a), [&](const auto& launch, const auto& spectrum) {
        const auto inputs = launch.in(workspace.data);
        auto points = inputs;
        auto call = launch.rows();
        if (wants_kernel(a)) {
          points = launch.in(static_cast<char*>(workspace.data) + launch.bytes(launch.part, launch.transforms()));
          call.spectrum_to = inputs;
          if (Status s = launch.through(x, call, RealRows<T>{}, in_one_kernel(launch.part, a.x, a.x), inputs); !s.ok())
            return s;
          call = launch.rows(), call.correlate = inputs;
        }
        if (input)
          call.kernel = spectrum, call.conjugate = true, call.skip = a.skip;
        else
          call.discard = true;
        if (Status s = launch.through(grad_y, call, grad_x, gradients_in_one_kernel(launch.part, a), points); !s.ok())
          return s;
        if (!wants_kernel(a)) return Status{};
        return sum_kernel_gradient(launch, a, inputs, launch.part.points() != most_points);
      });
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

  /// Calls f(FloatTransformLaunch<Stored>) with how points of this part lie in memory.
  template <class F>
  static auto with_stored(const FloatTransformPart& part, const F& f) {
    if constexpr (StoredPoints<ColumnPoints>::scaled)
      if (part.columns > 1) return f(FloatTransformLaunch<ColumnPoints, false>{});
    return f(FloatTransformLaunch<float2, StoredPoints<ColumnPoints>::scaled>{});
  }
  static Index bytes_of(const FloatTransformPart& part, Index transforms) {
    return with_stored(part, [&](const auto& launch) { return launch.bytes(part, transforms); });
  }
  static ServedSequences served(const FloatTransformPart& part, const LongConvShape& s) {
    return {s.sequences, part.more_than, part.at_most};
  }
  static Index kernel_bytes_of(const FloatTransformPart& part, Index channels) {
    return with_stored(part,
                       [&](const auto& launch) { return launch.bytes(part, channels) + launch.root_bytes(part); });
  }

  template <class Args, class Copies>
  static std::size_t scratch_bytes(const Args& a, const Copies& copies_of) {
    const FloatTransformPlan plan = plan_of(a);
    const LongConvShape s = long_conv_shape(a);
    Index most = 0;
    for (int p = 0; p < plan.size; ++p) {
      const FloatTransformPart& part = plan.parts[p];
      const Index bytes = copies_of(part) * bytes_of(part, served(part, s).places());
      if (bytes > 0) most = std::max(most, bytes * float_transform_group(s.channels, bytes));
    }
    return std::size_t(most);
  }

  /// Calls f(launch, memory) for every part of a call's plan, with the memory of its kernels' spectra.
  template <class Args, class F>
  static Status for_parts(const Args& a, void* kernel, cudaStream_t stream, const F& f) {
    const FloatTransformPlan plan = plan_of(a);
    const LongConvShape s = long_conv_shape(a);
    char* memory = static_cast<char*>(kernel);
    for (int p = 0; p < plan.size; ++p) {
      const FloatTransformPart& part = plan.parts[p];
      const Status status = with_stored(part, [&](auto launch) {
        launch.part = part, launch.sequences = served(part, s);
        launch.channels = s.channels, launch.stream = stream;
        launch.roots = reinterpret_cast<uint4*>(memory + launch.bytes(part, s.channels));
        // A kernel that each row meets once is transformed with it rather than read and written once more.
        if (launch.halves && makes_kernel(part.row_points) && launch.sequences.places() == 1)
          launch.kernel_run_shift = launch.run_shift(tap_rows(part, a.taps, a.back_taps));
        return f(launch, static_cast<void*>(memory));
      });
      if (!status.ok()) return status;
      memory += kernel_bytes_of(part, s.channels);
    }
    return {};
  }

  /// Calls f(launch, spectrum) for groups of channels that need so many copies of their points. Without, for all.
  template <class Launch, class F>
  static Status for_groups(Launch launch, void* spectra, int copies, const F& f) {
    const FloatTransformPart& part = launch.part;
    const Index all = launch.channels, bytes = copies * launch.bytes(part, launch.sequences.places());
    const Index group = bytes > 0 ? float_transform_group(all, bytes) : all;
    const auto spectrum = launch.for_taps().in(spectra);
    for (Index first = 0; first < all; first += group) {
      launch.first_channel = first, launch.channels = std::min(group, all - first);
      if (Status s = f(launch, spectrum.from(first, part.columns, part.row_points)); !s.ok()) return s;
    }
    return {};
  }

  /// The gradients of the taps that a part's sequences meet, from the correlations of each, which are overwritten.
  template <class Stored, bool OneColumn>
  static Status sum_kernel_gradient(const FloatTransformLaunch<Stored, OneColumn>& launch,
                                    const LongConvBackwardArgs<T>& a, const StoredPoints<Stored>& correlations,
                                    bool add) {
    RealRows<float> to = tap_rows(launch.part, a.grad_taps, a.grad_back_taps);
    to.first = a.grad_skip, to.factor = 1.0f / float(launch.normalisation(launch.part)), to.add = add;
    FloatRowsCall<Stored> call = launch.rows();
    call.sum_from = correlations;
    if (launch.part.columns == 1) {
      call.to = to;
      return launch.run(call);
    }
    call.points_to = correlations;
    if (Status s = launch.run(call); !s.ok()) return s;
    return launch.for_taps().run_columns(to, correlations, launch.sequences.places());
  }
};

/// The same where all that it does is in columns, with rows in half precision.
template <HalfElement T>
struct HalfColumnsLongConv : FloatTransformLongConv<T, __half2> {
  template <class Args>
  static bool serves(const LongConvPolicy& policy, const Args& a) {
    using All = FloatTransformLongConv<T, __half2>;
    return All::serves(policy, a) && !a.cu_seqlens.present() && All::plan_of(a).parts[0].columns > 1;
  }
};

}  // namespace chela::cuda::detail
