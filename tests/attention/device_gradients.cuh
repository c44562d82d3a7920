#pragma once
// Gradients of linear attention on a device, and their errors.
#include <doctest/doctest.h>

#include <string>

#include "attention/linear_policies.cuh"
#include "chela/cuda/attention/linear_backward.cuh"
#include "support/attention.hpp"
#include "support/device.cuh"
#include "support/tolerance.hpp"

namespace chela::test {

/// A problem on the device, with room for its gradients.
template <class T, DecayKind D>
struct DeviceGradients {
  using Args = LinearAttentionBackwardArgs<T, D>;
  DeviceTensor<T, 4> q, k, v, grad_o, grad_q, grad_k, grad_v;
  DeviceTensor<float, 4> initial_state, grad_final_state, grad_initial_state;
  DeviceTensor<float, log_decay_rank(D)> log_decay, grad_log_decay;
  Span span;
  Stream stream;

  explicit DeviceGradients(const Problem<T, D, RuleKind::additive>& p)
      : q(p.q),
        k(p.k),
        v(p.v),
        grad_o(p.grad_o),
        grad_q(unwritten(p.q)),
        grad_k(unwritten(p.k)),
        grad_v(unwritten(p.v)),
        initial_state(p.initial_state),
        grad_final_state(p.grad_final_state),
        grad_initial_state(unwritten(p.initial_state)),
        log_decay(p.log_decay),
        grad_log_decay(unwritten(p.log_decay)),
        span(p.span) {}

  Args args() const {
    Args a{.q = q,
           .k = k,
           .v = v,
           .grad_o = grad_o,
           .grad_q = grad_q,
           .grad_k = grad_k,
           .grad_v = grad_v,
           .initial_state = initial_state,
           .grad_final_state = grad_final_state,
           .grad_initial_state = grad_initial_state,
           .span = span};
    if constexpr (D != DecayKind::none) a.log_decay = log_decay, a.grad_log_decay = grad_log_decay;
    return a;
  }
  bool guards_intact() const {
    return grad_q.guards_intact() && grad_k.guards_intact() && grad_v.guards_intact() &&
           grad_initial_state.guards_intact() && grad_log_decay.guards_intact();
  }

 private:
  template <class X, int Rank>
  static Tensor<X, Rank> unwritten(const Tensor<X, Rank>& like) {
    return Tensor<X, Rank>(like.extents(), X(std::numeric_limits<float>::quiet_NaN()));
  }
};

template <LinearPolicy P = LinearPolicy{}, class Args>
Status run_on_device(const Args& args, const Stream& stream) {
  const DeviceMemory scratch(cuda::workspace_bytes<P>(args));
  // NaN: what is read must have been written.
  require_cuda(cudaMemsetAsync(scratch.data(), 0xff, scratch.bytes(), stream));
  const Status status = cuda::linear_attention_backward<P>(args, Workspace{scratch.data(), scratch.bytes()}, stream);
  stream.wait();
  return status;
}

template <class Gradients>
bool same_gradients(const Gradients& a, const Gradients& b) {
  return same_bits(a.grad_q.host(), b.grad_q.host()) && same_bits(a.grad_k.host(), b.grad_k.host()) &&
         same_bits(a.grad_v.host(), b.grad_v.host()) &&
         same_bits(a.grad_initial_state.host(), b.grad_initial_state.host()) &&
         same_bits(a.grad_log_decay.host(), b.grad_log_decay.host());
}

template <class X>
double norm(const X& x) {
  double sum = 0;
  for (double e : x) sum += e * e;
  return std::sqrt(sum);
}

/// Every gradient in double. A decay below 2^-126 is a reset on the GPU.
template <class T, DecayKind D>
struct WantedGradients {
  Tensor<double, 4> q, k, v, initial_state, per_key;
  Tensor<double, log_decay_rank(D)> log_decay, decay_scale;  ///< the scale of a sum: its terms without their signs

  explicit WantedGradients(Problem<T, D, RuleKind::additive> p)
      : q(p.q.extents()),
        k(p.k.extents()),
        v(p.v.extents()),
        initial_state(p.initial_state.extents()),
        log_decay(p.log_decay.extents()),
        decay_scale(p.log_decay.extents()) {
    for (float& g : p.log_decay)
      if (g * 1.44269504f < -126.f) g = -std::numeric_limits<float>::infinity();
    const DoubleProblem wide(p);
    per_key = Tensor<double, 4>(wide.log_decay.extents());
    reference::linear_attention_backward(wide.problem, wide.grad_o, wide.grad_final_state,
                                         {q, k, v, initial_state, per_key});
    Tensor<double, 4> forth(per_key.extents());  // of the direction in time
    if (p.span == Span::bidirectional && p.decays) {
      auto causal = wide.problem;
      causal.bidirectional = false;
      Tensor<double, 4> unused[] = {q, k, v, initial_state};
      reference::linear_attention_backward(causal, wide.grad_o, wide.grad_final_state,
                                           {unused[0], unused[1], unused[2], unused[3], forth});
    }
    const auto [batch, tokens, heads, keys] = per_key.extents();
    for (Index b = 0; b < batch; ++b)
      for (Index t = 0; t < tokens; ++t)
        for (Index h = 0; h < heads; ++h) {
          if constexpr (D == DecayKind::per_key)
            for (Index i = 0; i < keys; ++i) log_decay(b, t, h, i) = decay_scale(b, t, h, i) = per_key(b, t, h, i);
          double sum = 0, sum_forth = 0;
          for (Index i = 0; i < keys; ++i) sum += per_key(b, t, h, i), sum_forth += forth(b, t, h, i);
          if constexpr (D == DecayKind::per_head)
            log_decay(h) += sum, decay_scale(h) += std::abs(sum_forth) + std::abs(sum - sum_forth);
          if constexpr (D == DecayKind::per_token) log_decay(b, t, h) = decay_scale(b, t, h) = sum;
        }
  }

  /// Largest relative error of the log-decays' gradient. A sum over all tokens is judged by its terms' magnitudes.
  double decay_bound() const {
    if (D != DecayKind::per_head || norm(log_decay) == 0) return tensor_core_decay_gradient_tolerance<T>();
    return tensor_core_gradient_tolerance<T>() * norm(decay_scale) / norm(log_decay);
  }
};

/// Largest error of the gradients over its bound, or 1e9 where a guard zone was written to.
template <LinearPolicy P, class T, DecayKind D>
double error_of(const Problem<T, D, RuleKind::additive>& p, const WantedGradients<T, D>& want) {
  const DeviceGradients<T, D> device(p);
  const Status status = run_on_device<P>(device.args(), device.stream);
  CAPTURE(std::string(status.why));
  REQUIRE(status.ok());
  if (!device.guards_intact()) return 1e9;
  double worst = 0;
  const auto check = [&](const auto& got, const auto& wanted, double bound, const char* what) {
    const double flushed = tensor_core_flushed<T>() * std::sqrt(double(wanted.size()));
    const double size = norm(wanted),
                 error = relative_error(got.host(), wanted) / (size > 0 ? bound + flushed / size : bound);
    if (!(error < 1)) MESSAGE(std::string(what) << " " << error << " of what is allowed");
    if (error > worst || error != error) worst = error;
  };
  check(device.grad_q, want.q, tensor_core_gradient_tolerance<T>(), "grad_q");
  check(device.grad_k, want.k, tensor_core_gradient_tolerance<T>(), "grad_k");
  check(device.grad_v, want.v, tensor_core_gradient_tolerance<T>(), "grad_v");
  check(device.grad_initial_state, want.initial_state, tensor_core_gradient_tolerance<T>(), "grad_initial_state");
  if (D != DecayKind::none) check(device.grad_log_decay, want.log_decay, want.decay_bound(), "grad_log_decay");
  return worst;
}

template <LinearPolicy... P, class T, DecayKind D>
void check_errors(const Problem<T, D, RuleKind::additive>& p) {
  const WantedGradients<T, D> want(p);
  CAPTURE(p.shape);
  for (double error : {error_of<P>(p, want)...}) CHECK(error < 1);
}

/// The tokens [begin, begin + count) of a call, as a call of its own.
template <class Args>
Args tokens_of(Args args, Index begin, Index count) {
  const auto cut = [&](auto& x) { x = run(x, 1, begin, count); };
  cut(args.q), cut(args.k), cut(args.v), cut(args.grad_o), cut(args.grad_q), cut(args.grad_k), cut(args.grad_v);
  if constexpr (args.log_decay.rank > 1) cut(args.log_decay), cut(args.grad_log_decay);
  return args;
}

/// Packed sequences have the gradients that each has alone, bit for bit. `p` has 1700 tokens and two heads of each kind.
template <LinearPolicy P, class T, DecayKind D>
void check_ragged(Problem<T, D, RuleKind::additive> p) {
  const std::int64_t offsets[] = {0, 0, 5, 69, 70, 70, 198, 300, 512, 1700};
  constexpr Index sequences = 9;
  const Index key_dim = p.k.extents()[3];
  p.k(0, 69, 0, 3) = T(std::numeric_limits<float>::quiet_NaN());  // must not reach its neighbours
  const DeviceGradients<T, D> packed(p), alone(p);
  const DeviceTensor<float, 4> starts(random_tensor<float>(11, sequences, Index(2), key_dim, Index(64))),
      ends(random_tensor<float>(12, sequences, Index(2), key_dim, Index(64)));
  const auto none = nan_tensor<float>(sequences, Index(2), key_dim, Index(64));
  const DeviceTensor<float, 4> packed_states(none), alone_states(none);
  Tensor<std::int64_t, 1> cu_seqlens(sequences + 1);
  std::copy(std::begin(offsets), std::end(offsets), cu_seqlens.begin());
  const DeviceTensor<std::int64_t, 1> device_offsets(cu_seqlens);

  auto args = packed.args();
  args.initial_state = starts, args.grad_final_state = ends, args.grad_initial_state = packed_states;
  args.cu_seqlens = device_offsets.view();
  REQUIRE(run_on_device<P>(args, packed.stream).ok());
  for (Index i = 0; i < sequences; ++i) {
    auto one = tokens_of(alone.args(), offsets[i], offsets[i + 1] - offsets[i]);
    const auto own = [&](const auto& states) { return chela::run(states.view(), 0, i, 1); };
    one.initial_state = own(starts), one.grad_final_state = own(ends), one.grad_initial_state = own(alone_states);
    REQUIRE(run_on_device<P>(one, alone.stream).ok());
  }
  CHECK(same_bits(packed.grad_q.host(), alone.grad_q.host()));
  CHECK(same_bits(packed.grad_k.host(), alone.grad_k.host()));
  CHECK(same_bits(packed.grad_v.host(), alone.grad_v.host()));
  CHECK(same_bits(packed_states.host(), alone_states.host()));
  if (D != DecayKind::none) CHECK(same_bits(packed.grad_log_decay.host(), alone.grad_log_decay.host()));
}

}  // namespace chela::test
