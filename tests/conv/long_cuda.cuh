#pragma once
// Long convolutions on a GPU against sums in double, for any way of evaluating: `check_forward` and `check_backward`
// run one case under a policy, with guard zones around every tensor, outputs that start as NaN, and all of it twice.
#include <doctest/doctest.h>

#include <numeric>
#include <string>
#include <vector>

#include "chela/cuda/conv/long.cuh"
#include "chela/cuda/conv/long_backward.cuh"
#include "chela/reference/long.hpp"
#include "conv/long_problem.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {

using cuda::Workspace;

/// How [batch, token, channel] lies in memory.
enum class Layout { channels_last, tokens_last };

struct LongCase {
  Index batch = 1, tokens = 1, channels = 1, taps = 1, back_taps = 0;
  bool state = false, skip = false;
  Layout layout = Layout::channels_last;
  std::vector<Index> lengths = {};  ///< of packed sequences: then batch is 1, and tokens their sum
  bool in_place = false;            ///< the final state takes the initial state's memory
  std::vector<Index> offsets = {};  ///< given to the operator in place of those that belong to the lengths

  Index sequences() const { return lengths.empty() ? batch : Index(lengths.size()); }
  LongShape shape() const { return {batch, tokens, channels, taps, back_taps, state, skip}; }
  Sequence sequence(Index i) const {
    if (lengths.empty()) return {i, 0, tokens};
    return {0, std::accumulate(lengths.begin(), lengths.begin() + std::ptrdiff_t(i), Index(0)),
            lengths[std::size_t(i)]};
  }
};

inline std::ostream& operator<<(std::ostream& out, const LongCase& c) {
  out << c.shape() << (c.layout == Layout::tokens_last ? " [B,D,T]" : " [B,T,D]") << (c.in_place ? " in place" : "");
  for (Index length : c.lengths) out << " " << length;
  return out;
}

inline LongCase packed(LongCase c, std::vector<Index> lengths) {
  c.batch = 1, c.tokens = std::accumulate(lengths.begin(), lengths.end(), Index(0));
  c.lengths = std::move(lengths);
  return c;
}

/// A tensor [a, token, channel] on the device in either layout.
template <class T>
class DeviceRows {
 public:
  DeviceRows(const Tensor<T, 3>& host, Layout layout) : layout_(layout), memory_(stored(host, layout)) {}
  TensorView<T, 3> view() const {
    return layout_ == Layout::tokens_last ? transposed(memory_.view(), 1, 2) : memory_.view();
  }
  operator TensorView<T, 3>() const { return view(); }
  operator TensorView<const T, 3>() const { return view(); }
  Tensor<T, 3> host() const { return stored(memory_.host(), layout_); }
  bool guards_intact() const { return memory_.guards_intact(); }

 private:
  static Tensor<T, 3> stored(const Tensor<T, 3>& x, Layout layout) {
    if (layout == Layout::channels_last) return x;
    return converted<T>(transposed(TensorView<const T, 3>(x.view()), 1, 2));
  }
  Layout layout_;
  DeviceTensor<T, 3> memory_;
};

/// Inputs and, with sequences' states, the same in double.
template <class T>
struct LongInputs {
  LongCase c;
  LongProblem<T> p;
  Tensor<T, 3> grad_final_state;

  explicit LongInputs(const LongCase& wanted)
      : c(wanted), p(wanted.shape()), grad_final_state(random_tensor<T>(8, c.sequences(), c.taps - 1, c.channels)) {
    p.state = random_tensor<T>(5, c.sequences(), c.taps - 1, c.channels);
  }
};

template <class T>
struct LongOutputs {
  Tensor<T, 3> y, final_state;
};
template <class T>
struct LongGradientOutputs {
  Tensor<T, 3> x, state;
  Tensor<float, 2> taps, back_taps;
  Tensor<float, 1> skip;
};

inline DeviceTensor<Index, 1> device_offsets(const LongCase& c) {
  Tensor<Index, 1> offsets(c.sequences() + 1);
  for (Index i = 0; i < c.sequences(); ++i) offsets(i + 1) = offsets(i) + (c.lengths.empty() ? 0 : c.sequence(i).count);
  std::copy(c.offsets.begin(), c.offsets.end(), offsets.begin());
  return DeviceTensor<Index, 1>(offsets);
}

inline void require_ok(const Status& status) {
  const std::string why = status.why;
  CAPTURE(why);
  REQUIRE(status.ok());
}

/// The operator's answer, or REQUIRE fails.
template <LongConvPolicy P, class T>
LongOutputs<T> long_conv_on_device(const LongInputs<T>& in) {
  const LongCase& c = in.c;
  const DeviceRows<T> x(in.p.x, c.layout), state(in.p.state, c.layout),
      y(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout),
      final_state(nan_tensor<T>(c.sequences(), c.taps - 1, c.channels), c.layout);
  const DeviceTensor<float, 2> taps(in.p.taps), back_taps(in.p.back_taps);
  const DeviceTensor<float, 1> skip(in.p.skip);
  const DeviceTensor<Index, 1> offsets = device_offsets(c);
  LongConvArgs<T> a{.x = x.view(), .taps = taps.view(), .y = y.view()};
  a.final_state = c.in_place ? state.view() : final_state.view();
  if (c.back_taps > 0) a.back_taps = back_taps.view();
  if (c.skip) a.skip = skip.view();
  if (c.state) a.initial_state = state.view();
  if (!c.lengths.empty()) a.cu_seqlens = offsets.view();
  const DeviceTensor<char, 1> scratch(Tensor<char, 1>({Index(cuda::workspace_bytes<P>(a))}, char(0xff)));
  const Stream stream;
  const Status status =
      cuda::long_conv<P>(a, Workspace{scratch.view().data, std::size_t(scratch.view().size())}, stream);
  stream.wait();
  require_ok(status);
  CHECK(y.guards_intact());
  CHECK(final_state.guards_intact());
  CHECK(state.guards_intact());
  CHECK(scratch.guards_intact());
  CHECK(same_bits(x.host(), in.p.x));
  return {y.host(), c.in_place ? state.host() : final_state.host()};
}

/// `change` may change the arguments.
template <LongConvPolicy P, class T, class Change = void (*)(LongConvBackwardArgs<T>&)>
LongGradientOutputs<T> long_conv_backward_on_device(
    const LongInputs<T>& in, Change change = [](auto&) {}) {
  const LongCase& c = in.c;
  const DeviceRows<T> x(in.p.x, c.layout), state(in.p.state, c.layout), grad_y(in.p.grad_y, c.layout),
      grad_final_state(in.grad_final_state, c.layout), grad_x(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout),
      grad_state(nan_tensor<T>(c.sequences(), c.taps - 1, c.channels), c.layout);
  const DeviceTensor<float, 2> taps(in.p.taps), back_taps(in.p.back_taps),
      grad_taps(nan_tensor<float>(c.channels, c.taps)), grad_back_taps(nan_tensor<float>(c.channels, c.back_taps));
  const DeviceTensor<float, 1> skip(in.p.skip), grad_skip(nan_tensor<float>(c.channels));
  const DeviceTensor<Index, 1> offsets = device_offsets(c);
  LongConvBackwardArgs<T> a{.x = x.view(), .taps = taps.view(), .grad_y = grad_y.view()};
  a.grad_x = grad_x.view(), a.grad_taps = grad_taps.view(), a.grad_skip = grad_skip.view();
  if (c.back_taps > 0) a.back_taps = back_taps.view(), a.grad_back_taps = grad_back_taps.view();
  if (c.skip) a.skip = skip.view();
  if (c.state) a.initial_state = state.view(), a.grad_final_state = grad_final_state.view();
  if (c.state) a.grad_initial_state = grad_state.view();
  if (!c.lengths.empty()) a.cu_seqlens = offsets.view();
  change(a);
  const DeviceTensor<char, 1> scratch(Tensor<char, 1>({Index(cuda::workspace_bytes<P>(a))}, char(0xff)));
  const Stream stream;
  const Status status =
      cuda::long_conv_backward<P>(a, Workspace{scratch.view().data, std::size_t(scratch.view().size())}, stream);
  stream.wait();
  require_ok(status);
  for (const auto* rows : {&grad_x, &grad_state}) CHECK(rows->guards_intact());
  for (const auto* rows : {&grad_taps, &grad_back_taps}) CHECK(rows->guards_intact());
  CHECK(grad_skip.guards_intact());
  CHECK(scratch.guards_intact());
  return {grad_x.host(), grad_state.host(), grad_taps.host(), grad_back_taps.host(), grad_skip.host()};
}

/// Sequence i as a problem of its own, [1, token, channel] and [1, L - 1, channel] in double.
template <class View>
auto rows_of(View x, const Sequence& s) {
  return run(run(x, 0, s.batch, 1), 1, s.begin, s.count);
}
template <class View>
auto state_of(View x, Index i) {
  return run(x, 0, i, 1);
}

/// What `LongConvPolicy::taps` leaves of a kernel.
template <class T>
LongProblem<double> reference_problem(const LongInputs<T>& in, const LongConvPolicy& policy) {
  LongProblem<double> wide = in.p.in_double();
  for (Index d = 0; d < in.c.channels; ++d)
    for (Index j = policy.taps; policy.taps > 0 && j < in.c.taps; ++j) wide.taps(d, j) = 0;
  return wide;
}

/// One case under one policy: outputs, final states, guard zones, and the same bits twice.
template <LongConvPolicy P, class T>
void check_forward(const LongCase& c, double bound = long_conv_tolerance<T>()) {
  CAPTURE(c);
  const LongInputs<T> in(c);
  const LongOutputs<T> got = long_conv_on_device<P>(in), again = long_conv_on_device<P>(in);
  const LongProblem<double> wide = reference_problem(in, P);
  const LongConvArgs<double> a = wide.args();
  Tensor<double, 3> y = nan_tensor<double>(c.batch, c.tokens, c.channels),
                    state = nan_tensor<double>(c.sequences(), c.taps - 1, c.channels);
  for (Index i = 0; i < c.sequences(); ++i) {
    const Sequence s = c.sequence(i);
    reference::long_conv(rows_of(a.x, s), a.taps, a.back_taps, a.skip,
                         c.state ? state_of(a.initial_state, i) : a.initial_state, rows_of(y.view(), s),
                         state_of(state.view(), i));
  }
  CHECK(relative_error(got.y, y) < bound);
  CHECK(relative_error(got.final_state, state) == 0);
  CHECK(same_bits(got.y, again.y));
  CHECK(same_bits(got.final_state, again.final_state));
}

/// A transform is off by a share of its whole row, which the gradients of inputs and of those before them are: where the
/// latter are the smaller, their bound is that share.
inline double whole_row_share(const LongConvPolicy& policy, const LongGradients<double>& want) {
  if (policy.method != LongConvMethod::transform) return 1;
  const auto mean_square = [](const Tensor<double, 3>& x) {
    double sum = 0;
    for (Index i = 0; i < x.size(); ++i) sum += x.data()[i] * x.data()[i];
    return sum / double(std::max<Index>(x.size(), 1));
  };
  const double state = mean_square(want.state);
  return state > 0 ? std::sqrt(std::max(1.0, mean_square(want.x) / state)) : 1.0;
}

template <LongConvPolicy P, class T>
void check_backward(const LongCase& c, double bound = long_conv_tolerance<T>()) {
  CAPTURE(c);
  const LongInputs<T> in(c);
  const LongGradientOutputs<T> got = long_conv_backward_on_device<P>(in), again = long_conv_backward_on_device<P>(in);
  const LongProblem<double> wide = reference_problem(in, P);
  const LongConvBackwardArgs<double> a = wide.backward_args();
  const Tensor<double, 3> grad_final_state = converted<double>(in.grad_final_state.view());
  LongGradients<double> want(c.shape()), part(c.shape());
  want.state = nan_tensor<double>(c.sequences(), c.taps - 1, c.channels);
  want.taps.fill(0), want.back_taps.fill(0), want.skip.fill(0);
  const auto add = [](auto& sum, const auto& term) {
    for (Index k = 0; k < sum.size(); ++k) sum.data()[k] += term.data()[k];
  };
  for (Index i = 0; i < c.sequences(); ++i) {
    const Sequence s = c.sequence(i);
    reference::long_conv_backward(
        rows_of(a.x, s), a.taps, a.back_taps, a.skip, c.state ? state_of(a.initial_state, i) : a.initial_state,
        rows_of(a.grad_y, s), rows_of(want.x.view(), s), part.taps.view(),
        c.back_taps > 0 ? part.back_taps.view() : TensorView<double, 2>{}, part.skip.view(),
        c.state ? state_of(want.state.view(), i) : TensorView<double, 3>{},
        c.state ? state_of(TensorView<const double, 3>(grad_final_state.view()), i) : TensorView<const double, 3>{});
    add(want.taps, part.taps), add(want.skip, part.skip);
    if (c.back_taps > 0) add(want.back_taps, part.back_taps);
  }
  for (Index d = 0; d < c.channels; ++d)
    for (Index j = P.taps; P.taps > 0 && j < c.taps; ++j) want.taps(d, j) = 0;
  CHECK(relative_error(got.x, want.x) < bound);
  CHECK(relative_error(got.taps, want.taps) < bound);
  CHECK(relative_error(got.skip, want.skip) < bound);
  if (c.back_taps > 0) CHECK(relative_error(got.back_taps, want.back_taps) < bound);
  if (c.state) CHECK(relative_error(got.state, want.state) < bound * whole_row_share(P, want));
  CHECK(same_bits(got.x, again.x));
  CHECK(same_bits(got.taps, again.taps));
  CHECK(same_bits(got.back_taps, again.back_taps));
  CHECK(same_bits(got.skip, again.skip));
  CHECK(same_bits(got.state, again.state));
}

/// Shapes on both sides of every boundary that sums over taps and tokens have; a strategy adds those of its own.
inline std::vector<LongCase> long_conv_cases() {
  std::vector<LongCase> cases;
  for (Index tokens : {1, 2, 7, 8, 9, 63, 64, 65, 130, 300})
    for (Layout layout : {Layout::channels_last, Layout::tokens_last})
      cases.push_back({.batch = 2, .tokens = tokens, .channels = 40, .taps = tokens, .skip = true, .layout = layout});
  for (Index taps : {1, 2, 8, 9, 17, 64, 100, 260})
    for (Index back_taps : {0, 1, 9, 70, 200}) {
      const Layout layout = taps % 2 == 0 ? Layout::tokens_last : Layout::channels_last;
      cases.push_back(
          {.batch = 1, .tokens = 150, .channels = 17, .taps = taps, .back_taps = back_taps, .layout = layout});
    }
  for (Index tokens : {1, 5, 16, 70, 200})
    for (Index taps : {1, 3, 16, 17, 65, 130})
      for (Index back_taps : {0, 20})
        cases.push_back({.batch = 3,
                         .tokens = tokens,
                         .channels = 20,
                         .taps = taps,
                         .back_taps = back_taps,
                         .state = true,
                         .skip = taps % 2 == 0,
                         .layout = tokens % 2 == 0 ? Layout::tokens_last : Layout::channels_last});
  return cases;
}
inline std::vector<LongCase> packed_long_conv_cases() {
  std::vector<LongCase> cases;
  for (Layout layout : {Layout::channels_last, Layout::tokens_last})
    for (Index back_taps : {0, 11})
      for (Index taps : {1, 40, 300}) {
        const LongCase c{.channels = 18, .taps = taps, .back_taps = back_taps, .skip = true, .layout = layout};
        cases.push_back(packed(c, {5, 0, 1, 64, 65, 200}));
        cases.push_back(packed(c, {0, 130, 7, 0}));
        cases.back().state = true;
      }
  return cases;
}

}  // namespace chela::test
