#pragma once
// Problems of linear attention on a device, and their errors.
#include <doctest/doctest.h>

#include <string>

#include "attention/linear_policies.cuh"
#include "chela/cuda/attention/linear.cuh"
#include "support/attention.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {

/// A problem on the device, with room for one answer.
template <class T, DecayKind D>
struct DeviceProblem {
  using Args = LinearAttentionArgs<T, D>;
  const Problem<T, D, RuleKind::additive>& on_host;
  DeviceTensor<T, 4> q, k, v, o;
  DeviceTensor<float, 4> initial_state, final_state;
  DeviceTensor<float, log_decay_rank(D)> log_decay;
  Stream stream;

  explicit DeviceProblem(const Problem<T, D, RuleKind::additive>& p)
      : on_host(p),
        q(p.q),
        k(p.k),
        v(p.v),
        o(p.output()),
        initial_state(p.initial_state),
        final_state(p.state()),
        log_decay(p.log_decay) {}

  Args args() const {
    Args a{.q = q,
           .k = k,
           .v = v,
           .o = o,
           .initial_state = initial_state,
           .final_state = final_state,
           .span = on_host.span};
    if constexpr (D != DecayKind::none) a.log_decay = log_decay;
    return a;
  }
};

template <LinearPolicy P = LinearPolicy{}, class Args>
Status run_on_device(const Args& args, const Stream& stream) {
  const DeviceMemory scratch(cuda::workspace_bytes<P>(args));
  const Status status = cuda::linear_attention<P>(args, Workspace{scratch.data(), scratch.bytes()}, stream);
  stream.wait();
  return status;
}

/// Largest relative error of outputs and final states, or 1e9 where a guard zone was written to.
template <LinearPolicy P, class T, DecayKind D>
double error_of(const Problem<T, D, RuleKind::additive>& p) {
  const DeviceProblem<T, D> device(p);
  const Status status = run_on_device<P>(device.args(), device.stream);
  CAPTURE(std::string(status.why));
  REQUIRE(status.ok());
  const DoubleProblem wide(p);
  Tensor<double, 4> want(p.output().extents()), want_state(p.state().extents());
  reference::linear_attention(wide.problem, want, want_state);
  if (!device.o.guards_intact() || !device.final_state.guards_intact()) return 1e9;
  const double output = relative_error(device.o.host(), want),
               state = relative_error(device.final_state.host(), want_state);
  return output > state || output != output ? output : state;
}

/// The tokens [begin, begin + count) of a call, as a call of its own.
template <class Args>
Args tokens_of(Args args, Index begin, Index count) {
  const auto cut = [&](auto& x) { x = run(x, 1, begin, count); };
  cut(args.q), cut(args.k), cut(args.v), cut(args.o);
  if constexpr (args.log_decay.rank >= 3) cut(args.log_decay);
  return args;
}

struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};

/// Runs on [batch, head, token, dim] tensors whose rows have room to spare, and compares with the packed layout.
template <LinearPolicy P, class T, DecayKind D>
void check_strides(const Problem<T, D, RuleKind::additive>& p) {
  const auto spread = [](const Tensor<T, 4>& packed) {
    const auto [b, t, h, d] = packed.extents();
    Tensor<T, 4> wide(std::array<Index, 4>{b, h, t, d + 24}, T(7.f));
    for_each_index(packed.view(), [&](auto i, auto j, auto l, auto m) { wide(i, l, j, m) = packed(i, j, l, m); });
    return wide;
  };
  const auto narrow_view = [](const DeviceTensor<T, 4>& wide) {
    return transposed(chela::run(wide.view(), 3, 0, wide.view().extents[3] - 24), 1, 2);
  };
  const DeviceProblem<T, D> packed(p);
  const DeviceTensor<T, 4> q(spread(p.q)), k(spread(p.k)), v(spread(p.v)), o(spread(p.output()));
  REQUIRE(run_on_device<P>(packed.args(), packed.stream).ok());
  auto args = packed.args();
  args.q = narrow_view(q), args.k = narrow_view(k), args.v = narrow_view(v), args.o = narrow_view(o);
  REQUIRE(run_on_device<P>(args, packed.stream).ok());
  CHECK(same_bits(o.host(), spread(packed.o.host())));
}

}  // namespace chela::test
