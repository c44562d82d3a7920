// Language models: loss against its definition, gradients by finite differences, training and decoding.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include "block/modules.hpp"
#include "chela/cpu/model/language_model.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

using Block = ChelaBlock<ShortLongMemory<ExplicitKernel, 3>>;
using Model = LanguageModel<Block>;
using Run = cpu::Compute<Model>;

Model::Shape tiny_shape(bool tied) {
  Model::Shape s;
  s.vocabulary = 11, s.layers = 2, s.tied = tied;
  s.block.width = 6, s.block.heads = 2, s.block.key_dim = 3, s.block.value_dim = 4;
  s.block.memory.kernel.length = 5, s.block.feed_forward.hidden = 7;
  return s;
}

template <class Token>
Tensor<Token, 2> random_tokens(unsigned seed, Index batch, Index tokens, int vocabulary) {
  Tensor<Token, 2> out(batch, tokens);
  std::mt19937 generator(seed);
  for (Token& token : out) token = Token(generator() % unsigned(vocabulary));
  return out;
}

}  // namespace

TEST_CASE("the loss is the mean cross-entropy of the logits, and stays exact for logits of any size") {
  for (const bool tied : {true, false})
    for (const double size : {0.6, 300.0}) {
      const auto s = tiny_shape(tied);
      const auto p = random_parameters<Model, double>(s, 2, size);
      const auto tokens = random_tokens<std::uint8_t>(3, 2, 9, 11), targets = random_tokens<std::uint8_t>(4, 2, 9, 11);
      auto logits = nan_tensor<double>(2, 9, 11);
      Run::Cache<double> cache;
      const DefaultExecutor executor;
      REQUIRE(Run::logits(s, p.read(), tokens.view(), logits, cache, executor).ok());
      double want = 0;
      for_each_index(targets.view(), [&](Index b, Index t) {
        double highest = logits(b, t, 0), sum = 0;
        for (Index v = 0; v < 11; ++v) highest = std::max(highest, logits(b, t, v));
        for (Index v = 0; v < 11; ++v) sum += std::exp(logits(b, t, v) - highest);
        want += (highest + std::log(sum) - logits(b, t, targets(b, t))) / 18;
      });
      double loss = 0;
      REQUIRE(Run::loss(s, p.read(), tokens.view(), targets.view(), cache, loss, executor).ok());
      CHECK(std::abs(loss - want) <= 1e-12 * std::abs(want));
      Owned<Model, double> grad(s);
      double again = 0;
      REQUIRE(Run::loss_and_gradients(s, p.read(), tokens.view(), targets.view(), cache, grad.write(), again, executor)
                  .ok());
      CHECK(again == loss);
    }
}

TEST_CASE("gradients of a model match finite differences, with some targets not counted") {
  for (const bool tied : {true, false})
    for (const bool pre_norm : {true, false}) {
      INFO("tied ", tied, " pre-norm ", pre_norm);
      auto s = tiny_shape(tied);
      s.block.pre_norm = pre_norm, s.block.epsilon = 1e-2;  // the smoother, the better differences do
      auto p = random_parameters<Model, double>(s, 2, 0.6);
      const auto tokens = random_tokens<std::int32_t>(3, 2, 6, 11);
      auto targets = random_tokens<std::int32_t>(4, 2, 6, 11);
      targets(0, 2) = -1, targets(1, 5) = -100;
      Run::Cache<double> cache;
      const SerialExecutor executor;
      Owned<Model, double> grad(s);
      double value = 0;
      REQUIRE(Run::loss_and_gradients(s, p.read(), tokens.view(), targets.view(), cache, grad.write(), value, executor)
                  .ok());
      const auto loss = [&] {
        double now = 0;
        REQUIRE(Run::loss(s, p.read(), tokens.view(), targets.view(), cache, now, executor).ok());
        return now;
      };
      CHECK(loss() == value);
      for (const ParameterInfo& leaf : describe_parameters<Model>(s)) {
        INFO(leaf.name);
        CHECK(gradient_error<1>(loss, run(p.values.view(), 0, leaf.offset, leaf.count()),
                                run(grad.values.view(), 0, leaf.offset, leaf.count())) < gradient_tolerance);
      }
    }
}

TEST_CASE("plain gradient steps reduce the loss, with the same bits for any number of workers") {
  const auto s = tiny_shape(true);
  auto p = random_parameters<Model, float>(s, 2, 0.3);
  const auto tokens = random_tokens<std::uint8_t>(3, 3, 90, 11);
  auto targets = tokens;  // predict the token at hand: easy to learn
  Run::Cache<float> cache, other_cache;
  Owned<Model, float> grad(s), other(s);
  double first = 0, loss = 0, other_loss = 0;
  for (int step = 0; step < 40; ++step) {
    REQUIRE(
        Run::loss_and_gradients(s, p.read(), tokens.view(), targets.view(), cache, grad.write(), loss, SerialExecutor{})
            .ok());
    REQUIRE(Run::loss_and_gradients(s, p.read(), tokens.view(), targets.view(), other_cache, other.write(), other_loss,
                                    BackwardsExecutor{})
                .ok());
    CHECK(loss == other_loss);
    CHECK(same_bits(grad.values, other.values));
    if (step == 0) first = loss;
    for (Index i = 0; i < p.values.size(); ++i) p.values(i) -= 0.5f * grad.values(i);
  }
  CHECK(loss < 0.7 * first);
}

TEST_CASE("decoding token by token gives the logits of the full pass") {
  for (const bool tied : {true, false}) {
    const auto s = tiny_shape(tied);
    const auto p = random_parameters<Model, double>(s, 2, 0.6);
    constexpr Index batch = 3, length = 12;
    const auto tokens = random_tokens<std::uint8_t>(3, batch, length, 11);
    auto logits = nan_tensor<double>(batch, length, 11), stepped = logits;
    Run::Cache<double> cache;
    const SerialExecutor executor;
    REQUIRE(Run::logits(s, p.read(), tokens.view(), logits, cache, executor).ok());
    const auto prepared = Run::prepare<double>(s, p.read(), executor);
    Run::State<double> state(s, batch);
    Tensor<double, 2> now(batch, Index(11));
    for (Index t = 0; t < length; ++t) {
      REQUIRE(Run::step(s, p.read(), prepared, slice_axis<1>(tokens.view(), t), now, state, executor).ok());
      for_each_index(now.view(), [&](Index b, Index v) { stepped(b, t, v) = now(b, v); });
    }
    CHECK(relative_error(stepped, logits) <= tolerance<double>(1000));
  }
}

TEST_CASE("a model refuses tokens, targets and outputs that do not fit") {
  const auto s = tiny_shape(true);
  const auto p = random_parameters<Model, float>(s, 2, 0.3);
  auto tokens = random_tokens<std::int32_t>(3, 2, 4, 11), targets = tokens;
  Run::Cache<float> cache;
  const SerialExecutor executor;
  double loss = 0;
  const auto code = [&](auto t, auto u) { return Run::loss(s, p.read(), t, u, cache, loss, executor).code; };
  CHECK(code(tokens.view(), targets.view()) == Code::ok);
  CHECK(code(tokens.view(), run(targets.view(), 1, 0, 3)) == Code::bad_shape);
  targets(1, 1) = 11;
  CHECK(code(tokens.view(), targets.view()) == Code::bad_value);
  tokens(0, 3) = -1;
  CHECK(code(tokens.view(), tokens.view()) == Code::bad_value);
  auto bad = s;
  bad.vocabulary = 0;
  CHECK(!Run::loss(bad, p.read(), tokens.view(), tokens.view(), cache, loss, executor).ok());
  Run::State<float> state(s, 2);
  Tensor<float, 2> logits(2, 10);
  CHECK(Run::step(s, p.read(), {}, slice_axis<1>(targets.view(), 0), logits, state, executor).code == Code::bad_shape);
}
