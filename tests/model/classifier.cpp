// Sequence classifiers: gradients by finite differences, and learning.
#include <doctest/doctest.h>

#include <cstdint>

#include "block/modules.hpp"
#include "chela/cpu/model/classifier.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

using Block = ChelaBlock<ShortLongMemory<ExplicitKernel, 3>, LinearAttentionMixer, UpdateGate>;
using Model = Classifier<Block>;
using Run = cpu::Compute<Model>;

Model::Shape tiny_shape() {
  Model::Shape s;
  s.vocabulary = 7, s.layers = 2, s.classes = 3;
  s.block.width = 6, s.block.heads = 2, s.block.key_dim = 3, s.block.value_dim = 4, s.block.span = Span::bidirectional;
  s.block.memory.kernel.length = 4, s.block.feed_forward.hidden = 5;
  return s;
}

Tensor<std::uint8_t, 2> random_tokens(unsigned seed, Index batch, Index tokens) {
  Tensor<std::uint8_t, 2> out(batch, tokens);
  std::mt19937 generator(seed);
  for (auto& token : out) token = std::uint8_t(generator() % 7);
  return out;
}

}  // namespace

TEST_CASE("gradients of a classifier match finite differences, with a label not counted") {
  auto s = tiny_shape();
  s.block.epsilon = 1e-2;  // the smoother, the better differences do
  auto p = random_parameters<Model, double>(s, 2);
  const auto tokens = random_tokens(3, 4, 6);
  Tensor<std::int32_t, 1> labels(4);
  labels(0) = 2, labels(1) = 0, labels(2) = -1, labels(3) = 1;
  Run::Cache<double> cache;
  const SerialExecutor executor;
  Owned<Model, double> grad(s);
  double value = 0;
  REQUIRE(
      Run::loss_and_gradients(s, p.read(), tokens.view(), labels.view(), cache, grad.write(), value, executor).ok());
  const auto loss = [&] {
    double now = 0;
    REQUIRE(Run::loss(s, p.read(), tokens.view(), labels.view(), cache, now, executor).ok());
    return now;
  };
  CHECK(loss() == value);
  auto logits = nan_tensor<double>(4, 3);
  REQUIRE(Run::logits(s, p.read(), tokens.view(), logits, cache, executor).ok());
  double want = 0;
  for (const Index b : {0, 1, 3}) {
    double sum = 0;
    for (Index c = 0; c < 3; ++c) sum += std::exp(logits(b, c));
    want += (std::log(sum) - logits(b, labels(b))) / 3;
  }
  CHECK(std::abs(want - value) <= 1e-12 * want);
  for (const ParameterInfo& leaf : describe_parameters<Model>(s)) {
    INFO(leaf.name);
    CHECK(gradient_error<1>(loss, run(p.values.view(), 0, leaf.offset, leaf.count()),
                            run(grad.values.view(), 0, leaf.offset, leaf.count())) < gradient_tolerance);
  }
}

TEST_CASE("a classifier learns which token comes more often, with the same bits for any number of workers") {
  auto s = tiny_shape();
  s.classes = 2;
  auto p = random_parameters<Model, float>(s, 2, 0.3);
  auto tokens = random_tokens(3, 32, 20);
  Tensor<std::uint8_t, 1> labels(32);
  for (Index b = 0; b < 32; ++b) {
    labels(b) = std::uint8_t(b % 2);
    for (Index t = 0; t < 20; t += 2) tokens(b, t) = labels(b);
  }
  Run::Cache<float> cache, other_cache;
  Owned<Model, float> grad(s), other(s);
  double first = 0, loss = 0, other_loss = 0;
  for (int step = 0; step < 60; ++step) {
    REQUIRE(
        Run::loss_and_gradients(s, p.read(), tokens.view(), labels.view(), cache, grad.write(), loss, SerialExecutor{})
            .ok());
    REQUIRE(Run::loss_and_gradients(s, p.read(), tokens.view(), labels.view(), other_cache, other.write(), other_loss,
                                    BackwardsExecutor{})
                .ok());
    CHECK((loss == other_loss && same_bits(grad.values, other.values)));
    if (step == 0) first = loss;
    for (Index i = 0; i < p.values.size(); ++i) p.values(i) -= 0.2f * grad.values(i);
  }
  CHECK(loss < 0.5 * first);
}

TEST_CASE("a classifier refuses labels and tokens that do not fit") {
  const auto s = tiny_shape();
  const auto p = random_parameters<Model, float>(s, 2);
  const auto tokens = random_tokens(3, 4, 6);
  Tensor<std::uint8_t, 1> labels(4), few(3);
  Run::Cache<float> cache;
  double loss = 0;
  const auto code = [&](auto t, auto l) { return Run::loss(s, p.read(), t, l, cache, loss, SerialExecutor{}).code; };
  CHECK(code(tokens.view(), labels.view()) == Code::ok);
  CHECK(code(tokens.view(), few.view()) == Code::bad_shape);
  CHECK(code(run(tokens.view(), 1, 0, 0), labels.view()) == Code::bad_shape);
  labels(2) = 3;
  CHECK(code(tokens.view(), labels.view()) == Code::bad_value);
}
