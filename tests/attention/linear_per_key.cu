// Linear attention on a GPU with a decay per key and bfloat16 data.
#include <cuda_bf16.h>

#include "chela/attention/member.hpp"

#define CHELA_MEMBERS Member<DecayKind::per_key, RuleKind::additive>

namespace chela::test {
using TestElement = __nv_bfloat16;
inline constexpr DecayKind plain_decay = DecayKind::per_key, test_decay = DecayKind::per_key;
}  // namespace chela::test

#include "attention/linear_cuda.cuh"

namespace chela::test {

using PerKey = Problem<TestElement, DecayKind::per_key, RuleKind::additive>;

TEST_CASE("log-decays of any strength in each key, and of any layout") {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  constexpr float strengths[] = {0, -1e-12f, -1e-3f, -0.05f, -0.7f, -3, -20, -88, -1000, minus_infinity};
  for (Index key_dim : {64, 128, 192}) {
    CAPTURE(key_dim);
    PerKey p(shape_of(500, key_dim, 64, 3));
    for_each_index(p.log_decay.view(), [&](auto b, auto t, auto h, auto key) {
      float& g = p.log_decay(b, t, h, key);
      if (h < 2) g = strengths[(key + (h == 1 ? t / 5 : 0)) % 10];
    });
    CHECK(error_of<LinearPolicy{}>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<in_segments>(p) < tensor_core_tolerance<TestElement>());
    CHECK(error_of<on_warps>(p) < tensor_core_tolerance<TestElement>());

    const DeviceProblem<TestElement, DecayKind::per_key> packed(p), spread(p);
    Tensor<float, 4> heads_first(Index(1), Index(3), Index(500), key_dim + 6);
    for_each_index(p.log_decay.view(),
                   [&](auto b, auto t, auto h, auto key) { heads_first(b, h, t, key) = p.log_decay(b, t, h, key); });
    const DeviceTensor<float, 4> wide(heads_first);
    auto args = spread.args();
    args.log_decay = transposed(chela::run(wide.view(), 3, 0, key_dim), 1, 2);
    REQUIRE(run_on_device(packed.args(), packed.stream).ok());
    REQUIRE(run_on_device(args, spread.stream).ok());
    CHECK(same_bits(packed.o.host(), spread.o.host()));
  }
}

TEST_CASE("decays that nearly keep the state") {
  // The hardest for rounding: nearly all of an output comes through decayed queries, decayed keys and the state.
  for (float mean : {-1e-5f, -1e-3f, -1e-2f, -5e-2f}) {
    CAPTURE(mean);
    PerKey p(shape_of(700, 64, 64, 1)), large(shape_of(700, 128, 128, 1));
    for (PerKey* problem : {&p, &large})
      for (float& g : problem->log_decay) g *= mean / -0.15f;
    const double bound = tensor_core_tolerance<TestElement>();
    const double errors[] = {error_of<LinearPolicy{}>(p), error_of<LinearPolicy{}>(large), error_of<in_order>(large),
                             error_of<on_warps>(p), error_of<on_warps>(large)};
    for (double error : errors) CHECK(error < bound);
  }
}

TEST_CASE("layouts of log-decays that are refused") {
  const DeviceProblem<TestElement, DecayKind::per_key> device(PerKey(shape_of(64, 64, 64)));
  for (int which : {0, 1, 2}) {
    auto args = device.args();
    if (which == 0) args.log_decay.strides[3] = 2;
    if (which == 1) args.log_decay.strides[1] += 1;
    if (which == 2) args.log_decay.data += 1;
    const Status s = cuda::linear_attention(args, {}, nullptr);
    CHECK(s.code == Code::bad_stride);
    CHECK(std::string(s.why).find("log_decay") != std::string::npos);
  }
}

}  // namespace chela::test
