// Gradients of the block with respect to its input and every parameter, by central differences.
#include <doctest/doctest.h>

#include <sstream>

#include "block/problems.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

using Plain = ChelaBlock<ShortLongMemory<ExplicitKernel, 3, 2>>;
using Gated = ChelaBlock<ShortLongMemory<ExplicitKernel, 2>, LinearAttentionMixer, UpdateGate>;
using MultiScale = ChelaBlock<ShortLongMemory<SgConvKernel, 4>>;
using MegaLike = ChelaBlock<EmaMemory<>, LinearAttentionMixer, UpdateGate>;
using ShortEma = ChelaBlock<EmaMemory<2>>;
using Bare = ChelaBlock<NoMemory, LinearAttentionMixer, UpdateGate>;

}  // namespace

TEST_CASE_TEMPLATE("gradients of a block match finite differences", Block, Plain, Gated, MultiScale, MegaLike, ShortEma,
                   Bare) {
  using Run = cpu::Compute<Block>;
  for (const auto& s : small_shapes<Block>())
    for (const Index tokens : {5, 8}) {
      std::ostringstream text;
      describe(text, s);
      INFO(text.str(), " tokens ", tokens);
      const SerialExecutor executor;
      auto p = random_parameters<Block, double>(s, 3);
      Owned<Block, double> grad(s);
      auto x = random_tensor<double>(4, 2, tokens, s.width);
      const auto weight = random_tensor<double>(5, 2, tokens, s.width);
      auto y = nan_tensor<double>(2, tokens, s.width), dx = y;
      typename Run::template Cache<double> cache;
      typename Run::template Scratch<double> scratch;
      const auto loss = [&] {
        REQUIRE(Run::forward(s, p.read(), x, y, cache, executor).ok());
        return weighted_sum<3>(y, weight);
      };
      loss();
      REQUIRE(Run::backward(s, p.read(), cache, x, weight, dx, grad.write(), scratch, executor).ok());
      CHECK(gradient_error<3>(loss, x, dx) < gradient_tolerance);
      for (const ParameterInfo& leaf : describe_parameters<Block>(s)) {
        INFO(leaf.name);
        CHECK(gradient_error<1>(loss, run(p.values.view(), 0, leaf.offset, leaf.count()),
                                run(grad.values.view(), 0, leaf.offset, leaf.count()), 6e-5) < gradient_tolerance);
      }
    }
}

TEST_CASE("gradients of a block over many rows are the same bits for any number of workers") {
  using Run = cpu::Compute<Gated>;
  Gated::Shape s{.width = 40, .heads = 3, .key_dim = 8, .value_dim = 12};
  s.memory.kernel.length = 30, s.feed_forward.hidden = 70;
  const auto p = random_parameters<Gated, double>(s, 3);
  const auto x = random_tensor<double>(4, 3, 100, s.width), dy = random_tensor<double>(5, 3, 100, s.width);
  const auto run_with = [&](const auto& executor, auto& dx, auto& grad) {
    Run::Cache<double> cache;
    Run::Scratch<double> scratch;
    auto y = nan_tensor<double>(3, 100, s.width);
    REQUIRE(Run::forward(s, p.read(), x, y, cache, executor).ok());
    REQUIRE(Run::backward(s, p.read(), cache, x, dy, dx, grad.write(), scratch, executor).ok());
  };
  Owned<Gated, double> a(s), b(s);
  auto dx_a = nan_tensor<double>(3, 100, s.width), dx_b = dx_a;
  run_with(SerialExecutor{}, dx_a, a);
  run_with(BackwardsExecutor{}, dx_b, b);
  CHECK((same_bits(dx_a, dx_b) && same_bits(a.values, b.values)));
}
