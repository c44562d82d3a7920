#pragma once
// Short-long convolutions on a GPU against both sums in double: `check_forward` and `check_backward` run one case under a
// policy, with guard zones around every tensor, outputs that start as NaN, and all of it twice.
#include "chela/cuda/conv/short_long.cuh"
#include "chela/reference/short_long.hpp"
#include "conv/long_cuda.cuh"

namespace chela::test {

struct ShortLongCase {
  Index batch = 1, tokens = 1, channels = 1, taps = 1, back_taps = 0;
  bool short_state = false, long_state = false;
  bool short_final = false, long_final = false, inner = false;  ///< what is asked for besides z
  bool skip = true, bias = true;
  Layout layout = Layout::tokens_last;
};

inline std::ostream& operator<<(std::ostream& out, const ShortLongCase& c) {
  return out << "B" << c.batch << " T" << c.tokens << " D" << c.channels << " L" << c.taps << " M" << c.back_taps
             << (c.short_state ? " short state" : "") << (c.long_state ? " long state" : "")
             << (c.short_final ? " short final" : "") << (c.long_final ? " long final" : "")
             << (c.inner ? " inner" : "") << (c.skip ? " skip" : "") << (c.bias ? " bias" : "")
             << (c.layout == Layout::tokens_last ? " [B,D,T]" : " [B,T,D]");
}

/// Inputs on the host.
template <class T, int Width>
struct ShortLongInputs {
  ShortLongCase c;
  Tensor<T, 3> x, short_initial, long_initial, grad_z;
  Tensor<float, 2> short_taps, taps, back_taps;
  Tensor<float, 1> short_bias, skip;

  explicit ShortLongInputs(const ShortLongCase& c)
      : c(c),
        x(random_tensor<T>(1, c.batch, c.tokens, c.channels)),
        short_initial(random_tensor<T>(2, c.batch, Width - 1, c.channels)),
        long_initial(random_tensor<T>(3, c.batch, c.taps - 1, c.channels)),
        grad_z(random_tensor<T>(4, c.batch, c.tokens, c.channels)),
        short_taps(random_tensor<float>(5, c.channels, Width)),
        taps(random_tensor<float>(6, c.channels, c.taps)),
        back_taps(random_tensor<float>(7, c.channels, c.back_taps)),
        short_bias(random_tensor<float>(8, c.channels)),
        skip(random_tensor<float>(9, c.channels)) {}
};

template <class T>
struct ShortLongOutputs {
  Tensor<T, 3> z, inner, short_final, long_final;
};
template <class T>
struct ShortLongGradientOutputs {
  Tensor<T, 3> x, short_initial, long_initial;
  Tensor<float, 2> short_taps, taps, back_taps;
  Tensor<float, 1> short_bias, skip;
};

/// What both directions read, on the device.
template <class T, int Width>
struct ShortLongOnDevice {
  ShortLongCase c;
  DeviceRows<T> x, short_initial, long_initial;
  DeviceTensor<float, 2> short_taps, taps, back_taps;
  DeviceTensor<float, 1> short_bias, skip;

  explicit ShortLongOnDevice(const ShortLongInputs<T, Width>& in)
      : c(in.c),
        x(in.x, c.layout),
        short_initial(in.short_initial, c.layout),
        long_initial(in.long_initial, c.layout),
        short_taps(in.short_taps),
        taps(in.taps),
        back_taps(in.back_taps),
        short_bias(in.short_bias),
        skip(in.skip) {}

  template <class Args>
  Args args() const {
    Args a;
    a.x = x.view(), a.short_taps = short_taps.view(), a.taps = taps.view();
    if (c.bias) a.short_bias = short_bias.view();
    if (c.skip) a.skip = skip.view();
    if (c.back_taps > 0) a.back_taps = back_taps.view();
    if (c.short_state) a.short_initial_state = short_initial.view();
    if (c.long_state) a.long_initial_state = long_initial.view();
    return a;
  }
};

/// Calls f(workspace, stream) with as much memory as `bytes`, and waits.
template <class F>
void with_workspace(std::size_t bytes, F f) {
  const DeviceTensor<char, 1> scratch(Tensor<char, 1>({Index(bytes)}, char(0xff)));
  const Stream stream;
  const Status status = f(Workspace{scratch.view().data, bytes}, stream);
  stream.wait();
  require_ok(status);
  CHECK(scratch.guards_intact());
}

/// The operator's answer, or REQUIRE fails.
template <int Width, LongConvPolicy P, class T>
ShortLongOutputs<T> short_long_conv_on_device(const ShortLongInputs<T, Width>& in) {
  const ShortLongCase& c = in.c;
  const ShortLongOnDevice<T, Width> d(in);
  const auto blank = nan_tensor<T>(c.batch, c.tokens, c.channels);
  const DeviceRows<T> z(blank, c.layout), inner(blank, c.layout),
      short_final(nan_tensor<T>(c.batch, Width - 1, c.channels), c.layout),
      long_final(nan_tensor<T>(c.batch, c.taps - 1, c.channels), c.layout);
  auto a = d.template args<ShortLongConvArgs<T>>();
  a.z = z.view();
  if (c.inner) a.inner = inner.view();
  if (c.short_final) a.short_final_state = short_final.view();
  if (c.long_final) a.long_final_state = long_final.view();
  with_workspace(cuda::workspace_bytes<P>(a), [&](Workspace workspace, cudaStream_t stream) {
    return cuda::short_long_conv<Width, P>(a, workspace, stream);
  });
  for (const auto* rows : {&z, &inner, &short_final, &long_final, &d.x, &d.short_initial, &d.long_initial})
    CHECK(rows->guards_intact());
  CHECK(same_bits(d.x.host(), in.x));
  return {z.host(), inner.host(), short_final.host(), long_final.host()};
}

template <int Width, LongConvPolicy P, class T>
ShortLongGradientOutputs<T> short_long_conv_backward_on_device(const ShortLongInputs<T, Width>& in,
                                                               const Tensor<T, 3>* inner = nullptr) {
  const ShortLongCase& c = in.c;
  const ShortLongOnDevice<T, Width> d(in);
  const DeviceRows<T> grad_z(in.grad_z, c.layout), grad_x(nan_tensor<T>(c.batch, c.tokens, c.channels), c.layout),
      given(inner ? *inner : in.x, c.layout),
      grad_short_initial(nan_tensor<T>(c.batch, Width - 1, c.channels), c.layout),
      grad_long_initial(nan_tensor<T>(c.batch, c.taps - 1, c.channels), c.layout);
  const DeviceTensor<float, 2> grad_short_taps(nan_tensor<float>(c.channels, Width)),
      grad_taps(nan_tensor<float>(c.channels, c.taps)), grad_back_taps(nan_tensor<float>(c.channels, c.back_taps));
  const DeviceTensor<float, 1> grad_short_bias(nan_tensor<float>(c.channels)), grad_skip(nan_tensor<float>(c.channels));
  auto a = d.template args<ShortLongConvBackwardArgs<T>>();
  a.grad_z = grad_z.view(), a.grad_x = grad_x.view();
  a.grad_short_taps = grad_short_taps.view(), a.grad_short_bias = grad_short_bias.view();
  a.grad_taps = grad_taps.view();
  if (c.skip) a.grad_skip = grad_skip.view();
  if (c.back_taps > 0) a.grad_back_taps = grad_back_taps.view();
  if (c.short_state) a.grad_short_initial_state = grad_short_initial.view();
  if (c.long_state) a.grad_long_initial_state = grad_long_initial.view();
  if (inner) a.inner = given.view();
  with_workspace(cuda::workspace_bytes<P>(a), [&](Workspace workspace, cudaStream_t stream) {
    return cuda::short_long_conv_backward<Width, P>(a, workspace, stream);
  });
  for (const auto* rows : {&grad_x, &grad_short_initial, &grad_long_initial}) CHECK(rows->guards_intact());
  for (const auto* rows : {&grad_short_taps, &grad_taps, &grad_back_taps}) CHECK(rows->guards_intact());
  for (const auto* rows : {&grad_short_bias, &grad_skip}) CHECK(rows->guards_intact());
  return {grad_x.host(),    grad_short_initial.host(), grad_long_initial.host(), grad_short_taps.host(),
          grad_taps.host(), grad_back_taps.host(),     grad_short_bias.host(),   grad_skip.host()};
}

/// Inputs in double, and the reference's answers.
struct ShortLongReference {
  Tensor<double, 3> x, short_initial, long_initial, grad_z;
  Tensor<double, 2> short_taps, taps, back_taps;
  Tensor<double, 1> short_bias, skip;
  reference::ShortLongConvInputs in;

  template <class T, int Width>
  explicit ShortLongReference(const ShortLongInputs<T, Width>& p)
      : x(converted<double>(p.x.view())),
        short_initial(converted<double>(p.short_initial.view())),
        long_initial(converted<double>(p.long_initial.view())),
        grad_z(converted<double>(p.grad_z.view())),
        short_taps(converted<double>(p.short_taps.view())),
        taps(converted<double>(p.taps.view())),
        back_taps(converted<double>(p.back_taps.view())),
        short_bias(converted<double>(p.short_bias.view())),
        skip(converted<double>(p.skip.view())) {
    if (!p.c.short_state) short_initial.fill(0);
    if (!p.c.long_state) long_initial.fill(0);
    if (!p.c.bias) short_bias.fill(0);
    if (!p.c.skip) skip.fill(0);
    in.x = x.view(), in.short_taps = short_taps.view(), in.short_bias = short_bias.view(), in.taps = taps.view();
    if (p.c.back_taps > 0) in.back_taps = back_taps.view();
    in.skip = skip.view(), in.short_initial_state = short_initial.view(), in.long_initial_state = long_initial.view();
  }
};

/// One case under one policy.
template <int Width, LongConvPolicy P, class T>
void check_forward(const ShortLongCase& c) {
  CAPTURE(c);
  CAPTURE(Width);
  const ShortLongInputs<T, Width> in(c);
  const ShortLongOutputs<T> got = short_long_conv_on_device<Width, P>(in),
                            again = short_long_conv_on_device<Width, P>(in);
  ShortLongReference want(in);
  Tensor<double, 3> inner(want.x), z(want.x), short_final(want.short_initial), long_final(want.long_initial);
  reference::short_long_conv(want.in, inner, z, short_final, long_final);
  // The long stage sees u rounded to T, by which outputs that nearly cancel are off.
  const auto seen = converted<double>(converted<T>(converted<float>(inner.view()).view()).view());
  reference::long_conv(seen, want.in.taps, want.in.back_taps, want.in.skip, want.in.long_initial_state, z, {});
  CHECK(relative_error(got.z, z) < long_conv_tolerance<T>());
  if (c.inner) CHECK(relative_error(got.inner, inner) < tolerance<T>(Width + 1));
  if (c.short_final) CHECK(relative_error(got.short_final, short_final) == 0);
  if (c.long_final) CHECK(relative_error(got.long_final, long_final) < tolerance<T>(Width + 1));
  CHECK(same_bits(got.z, again.z));
  CHECK(same_bits(got.inner, again.inner));
  CHECK(same_bits(got.short_final, again.short_final));
  CHECK(same_bits(got.long_final, again.long_final));
}

/// The bias as one more tap, which always meets a one: alone it is a sum of few numbers that nearly cancel.
template <class T>
Tensor<T, 2> with_bias(const Tensor<T, 2>& taps, const Tensor<T, 1>& bias) {
  const Index channels = taps.extents()[0], width = taps.extents()[1];
  Tensor<T, 2> all(channels, width + 1);
  for_each_index(all.view(), [&](Index d, Index j) { all(d, j) = j < width ? taps(d, j) : bias(d); });
  return all;
}

template <int Width, LongConvPolicy P, class T>
void check_backward(const ShortLongCase& c) {
  CAPTURE(c);
  CAPTURE(Width);
  const ShortLongInputs<T, Width> in(c);
  const auto got = short_long_conv_backward_on_device<Width, P>(in),
             again = short_long_conv_backward_on_device<Width, P>(in);
  ShortLongReference want(in);
  ShortLongReference grads(in);  // its tensors take the gradients
  reference::ShortLongConvGradients to;
  to.x = grads.x, to.short_taps = grads.short_taps, to.short_bias = grads.short_bias, to.taps = grads.taps;
  if (c.back_taps > 0) to.back_taps = grads.back_taps;
  to.skip = grads.skip, to.short_initial_state = grads.short_initial, to.long_initial_state = grads.long_initial;
  reference::short_long_conv_backward(want.in, want.grad_z, to);
  const double bound = short_long_conv_gradient_tolerance<T>();
  CHECK(relative_error(got.x, grads.x) < bound);
  CHECK(relative_error(with_bias(got.short_taps, got.short_bias), with_bias(grads.short_taps, grads.short_bias)) <
        bound);
  CHECK(relative_error(got.taps, grads.taps) < bound);
  if (c.skip) CHECK(relative_error(got.skip, grads.skip) < bound);
  if (c.back_taps > 0) CHECK(relative_error(got.back_taps, grads.back_taps) < bound);
  if (c.short_state) CHECK(relative_error(got.short_initial, grads.short_initial) < bound);
  if (c.long_state) CHECK(relative_error(got.long_initial, grads.long_initial) < bound);
  CHECK(same_bits(got.x, again.x));
  CHECK(same_bits(got.short_taps, again.short_taps));
  CHECK(same_bits(got.short_bias, again.short_bias));
  CHECK(same_bits(got.taps, again.taps));
  CHECK(same_bits(got.skip, again.skip));
}

}  // namespace chela::test
