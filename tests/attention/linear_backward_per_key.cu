// Gradients of linear attention on a GPU with a decay per key and bfloat16 data.
#include <cuda_bf16.h>

#include "chela/attention/member.hpp"

#define CHELA_MEMBERS Member<DecayKind::per_key, RuleKind::additive>

namespace chela::test {
using TestElement = __nv_bfloat16;
inline constexpr DecayKind plain_decay = DecayKind::per_key, test_decay = DecayKind::per_key;
}  // namespace chela::test

#include "attention/linear_backward_cuda.cuh"

namespace chela::test {

using PerKey = Problem<TestElement, DecayKind::per_key, RuleKind::additive>;

TEST_CASE("gradients with log-decays of any strength in each key, and of any layout") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  constexpr float strengths[] = {0, -1e-12f, -1e-3f, -0.05f, -0.7f, -3, -20, -88, -1000, minus_infinity};
  for (Index key_dim : {64, 128, 192}) {
    CAPTURE(key_dim);
    PerKey p(shape_of(500, key_dim, 64, 3));
    for_each_index(p.log_decay.view(), [&](auto b, auto t, auto h, auto key) {
      float& g = p.log_decay(b, t, h, key);
      if (h < 2) g = strengths[(key + (h == 1 ? t / 5 : 0)) % 10];
    });
    check_errors<LinearPolicy{}, in_segments, on_warps>(p);

    const DeviceGradients<TestElement, DecayKind::per_key> packed(p), spread(p);
    const auto widened = [&](float (*f)(float)) {
      Tensor<float, 4> heads_first(Index(1), Index(3), Index(500), key_dim + 6);
      for_each_index(p.log_decay.view(), [&](auto b, auto t, auto h, auto key) {
        heads_first(b, h, t, key) = f(p.log_decay(b, t, h, key));
      });
      return heads_first;
    };
    const DeviceTensor<float, 4> wide(widened([](float g) { return g; })),
        wide_gradient(widened([](float) { return std::numeric_limits<float>::quiet_NaN(); }));
    const auto narrow_view = [&](const DeviceTensor<float, 4>& x) {
      return transposed(chela::run(x.view(), 3, 0, key_dim), 1, 2);
    };
    auto args = spread.args();
    args.log_decay = narrow_view(wide), args.grad_log_decay = narrow_view(wide_gradient);
    REQUIRE(run_on_device(packed.args(), packed.stream).ok());
    REQUIRE(run_on_device(args, spread.stream).ok());
    CHECK(same_bits(packed.grad_q.host(), spread.grad_q.host()));
    CHECK(same_bits(packed.grad_k.host(), spread.grad_k.host()));
    CHECK(same_bits(packed.grad_v.host(), spread.grad_v.host()));
    const Tensor<float, 4> got = packed.grad_log_decay.host(), spread_got = wide_gradient.host();
    bool same = true;
    for_each_index(got.view(), [&](auto b, auto t, auto h, auto key) {
      same = same && got(b, t, h, key) == spread_got(b, h, t, key);
    });
    CHECK(same);
  }
}

TEST_CASE("gradients under decays that nearly keep the state") {
  for (float mean : {-1e-5f, -1e-3f, -1e-2f, -5e-2f}) {
    CAPTURE(mean);
    PerKey p(shape_of(700, 64, 64, 1)), large(shape_of(700, 128, 128, 1));
    for (PerKey* problem : {&p, &large})
      for (float& g : problem->log_decay) g *= mean / -0.15f;
    check_errors<LinearPolicy{}, on_warps>(p), check_errors<LinearPolicy{}, in_order>(large);
  }
}

TEST_CASE("layouts of log-decays that are refused for their gradients") {
  const DeviceGradients<TestElement, DecayKind::per_key> device(PerKey(shape_of(64, 64, 64)));
  for (int which : {0, 1, 2, 3}) {
    auto args = device.args();
    if (which == 0) args.log_decay.strides[3] = 2;
    if (which == 1) args.log_decay.strides[1] += 1;
    if (which == 2) args.log_decay.data += 1;
    if (which == 3) args.grad_log_decay.strides[3] = 2;
    const Status s = cuda::linear_attention_backward(args, {}, nullptr);
    CHECK(s.code == Code::bad_stride);
    CHECK(std::string(s.why).find("log_decay") != std::string::npos);
  }
}

}  // namespace chela::test
