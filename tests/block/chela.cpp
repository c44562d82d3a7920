// The block's forward pass and its steps, for each memory and output policy, against the reference.
#include <doctest/doctest.h>

#include <sstream>

#include "block/problems.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

using Plain = ChelaBlock<ShortLongMemory<ExplicitKernel, 3, 2>>;
using Gated = ChelaBlock<ShortLongMemory<ExplicitKernel>, LinearAttentionMixer, UpdateGate>;
using MultiScale = ChelaBlock<ShortLongMemory<SgConvKernel, 4>, LinearAttentionMixer, UpdateGate>;
using MegaLike = ChelaBlock<EmaMemory<>, LinearAttentionMixer, UpdateGate>;
using ShortEma = ChelaBlock<EmaMemory<2>>;
using Bare = ChelaBlock<NoMemory, LinearAttentionMixer, GatedResidual>;

template <class Shape>
std::string text(const Shape& s) {
  std::ostringstream out;
  describe(out, s);
  return out.str();
}

/// Terms of the longest chain of sums an output goes through.
template <class Shape>
Index summed_terms(const Shape& s, Index tokens) {
  return 8 * (tokens * s.key_dim + s.width + s.values() + s.feed_forward.hidden);
}

}  // namespace

TEST_CASE_TEMPLATE("a block matches the reference", Block, Plain, Gated, MultiScale, MegaLike, ShortEma, Bare) {
  using Run = cpu::Compute<Block>;
  for (const auto& s : small_shapes<Block>())
    for (const Index tokens : {1, 5, 9}) {
      INFO(text(s), " tokens ", tokens);
      const auto p = random_parameters<Block, double>(s, 3);
      const auto x = random_tensor<double>(4, 2, tokens, s.width);
      auto y = nan_tensor<double>(2, tokens, s.width);
      typename Run::template Cache<double> cache;
      REQUIRE(Run::forward(s, p.read(), x, y, cache, SerialExecutor{}).ok());
      CHECK(relative_error(y, reference_block<Block>(s, p.read(), x)) <= tolerance<double>(summed_terms(s, tokens)));
    }
}

TEST_CASE("a block in float matches the reference over many rows, with the same bits for any number of workers") {
  using Run = cpu::Compute<Plain>;
  Plain::Shape s{.width = 48, .heads = 3, .key_dim = 16, .value_dim = 20};
  s.memory.kernel.length = 40, s.feed_forward.hidden = 80;
  Owned<Plain, float> p = random_parameters<Plain, float>(s, 3, 0.2);
  Owned<Plain, double> exact(s);
  exact.values = converted<double>(p.values.view());
  const auto x = random_tensor<float>(4, 3, 90, s.width);
  auto y = nan_tensor<float>(3, 90, s.width), again = y;
  Run::Cache<float> cache;
  REQUIRE(Run::forward(s, p.read(), x, y, cache, SerialExecutor{}).ok());
  CHECK(relative_error(y, reference_block<Plain>(s, exact.read(), converted<double>(x.view()))) <=
        tolerance<float>(summed_terms(s, 90)));
  REQUIRE(Run::forward(s, p.read(), x, again, cache, BackwardsExecutor{}).ok());
  CHECK(same_bits(y, again));
}

TEST_CASE_TEMPLATE("token by token a causal block gives the rows of the full pass", Block, Plain, Gated, MultiScale,
                   MegaLike, ShortEma, Bare) {
  using Run = cpu::Compute<Block>;
  for (const auto& s : small_shapes<Block>()) {
    if (s.span != Span::causal) continue;
    INFO(text(s));
    constexpr Index batch = 2, tokens = 11;
    const auto p = random_parameters<Block, double>(s, 3);
    const auto x = random_tensor<double>(4, batch, tokens, s.width);
    auto y = nan_tensor<double>(batch, tokens, s.width), stepped = y;
    typename Run::template Cache<double> cache;
    REQUIRE(Run::forward(s, p.read(), x, y, cache, SerialExecutor{}).ok());
    const auto prepared = Run::template prepare<double>(s, p.read(), SerialExecutor{});
    typename Run::template State<double> state(s, batch);
    Tensor<double, 2> in(batch, s.width), out(batch, s.width);
    for (Index t = 0; t < tokens; ++t) {
      for_each_index(in.view(), [&](Index b, Index d) { in(b, d) = x(b, t, d); });
      REQUIRE(Run::step(s, p.read(), prepared, in, out, state, SerialExecutor{}).ok());
      for_each_index(out.view(), [&](Index b, Index d) { stepped(b, t, d) = out(b, d); });
      if (t == 4) {  // a state is a value: its copy goes on from here without it
        auto copy = state;
        REQUIRE(Run::step(s, p.read(), prepared, in, out, copy, SerialExecutor{}).ok());
      }
    }
    CHECK(relative_error(stepped, y) <= tolerance<double>(summed_terms(s, tokens)));
  }
}

TEST_CASE_TEMPLATE("a later token never changes an earlier output", Block, Plain, Gated) {
  using Run = cpu::Compute<Block>;
  for (const auto& s : small_shapes<Block>()) {
    if (s.span != Span::causal) continue;
    const auto p = random_parameters<Block, double>(s, 3);
    auto x = random_tensor<double>(4, 1, 9, s.width);
    auto y = nan_tensor<double>(1, 9, s.width), changed = y;
    typename Run::template Cache<double> cache;
    REQUIRE(Run::forward(s, p.read(), x, y, cache, SerialExecutor{}).ok());
    for (Index d = 0; d < s.width; ++d) x(0, 6, d) += 1;
    REQUIRE(Run::forward(s, p.read(), x, changed, cache, SerialExecutor{}).ok());
    CHECK(relative_error(run(changed.view(), 1, 0, 6), run(y.view(), 1, 0, 6)) <= tolerance<double>(64));
    CHECK(relative_error(run(changed.view(), 1, 6, 3), run(y.view(), 1, 6, 3)) > 1e-3);
  }
}

TEST_CASE("short branches and the one kernel they fold into give the same block") {
  using Folded = ChelaBlock<ShortLongMemory<ExplicitKernel, 3>>;
  Plain::Shape s{.width = 6, .heads = 2, .key_dim = 3, .value_dim = 4};
  s.memory.kernel.length = 5, s.feed_forward.hidden = 5;
  Folded::Shape f{.width = 6, .heads = 2, .key_dim = 3, .value_dim = 4};
  f.memory.kernel.length = 5, f.feed_forward.hidden = 5;
  const auto p = random_parameters<Plain, double>(s, 3);
  Owned<Folded, double> q(f);
  // The folded block has one leaf less; all others are the same in the same order.
  const auto from = describe_parameters<Plain>(s), to = describe_parameters<Folded>(f);
  REQUIRE(from.size() == to.size() + 1);
  for (const ParameterInfo& leaf : to) {
    const auto same =
        std::find_if(from.begin(), from.end(), [&](const auto& other) { return other.name == leaf.name; });
    REQUIRE(same != from.end());
    std::copy_n(p.values.data() + same->offset, std::min(leaf.count(), same->count()), q.values.data() + leaf.offset);
  }
  ConvBranch<double> branch[2];
  for (std::size_t b = 0; b < 2; ++b) branch[b].taps = p.read().memory.short_taps[b];
  REQUIRE(
      cpu::fold_branches(FoldBranchesArgs<double>{.branches = branch, .taps = q.write().memory.short_taps[0]}).ok());
  const auto x = random_tensor<double>(4, 2, 9, s.width);
  auto branches = nan_tensor<double>(2, 9, s.width), folded = branches;
  cpu::Compute<Plain>::Cache<double> a;
  cpu::Compute<Folded>::Cache<double> b;
  REQUIRE(cpu::Compute<Plain>::forward(s, p.read(), x, branches, a, SerialExecutor{}).ok());
  REQUIRE(cpu::Compute<Folded>::forward(f, q.read(), x, folded, b, SerialExecutor{}).ok());
  CHECK(relative_error(folded, branches) <= tolerance<double>(64));
}

TEST_CASE("a block refuses what does not fit, and does nothing over no tokens") {
  using Run = cpu::Compute<Plain>;
  Plain::Shape s{.width = 6, .heads = 2, .key_dim = 3, .value_dim = 4};
  s.memory.kernel.length = 5, s.feed_forward.hidden = 5;
  const auto p = random_parameters<Plain, double>(s, 3);
  const auto x = random_tensor<double>(4, 2, 3, 6);
  auto y = nan_tensor<double>(2, 3, 6), narrow = nan_tensor<double>(2, 3, 5);
  Run::Cache<double> cache;
  const SerialExecutor executor;
  CHECK(Run::forward(s, p.read(), x, narrow, cache, executor).code == Code::bad_shape);
  CHECK(Run::forward(s, p.read(), y, y, cache, executor).code == Code::bad_value);
  CHECK(Run::forward(s, p.read(), transposed(x.view(), 0, 1), transposed(y.view(), 0, 1), cache, executor).code ==
        Code::bad_stride);
  auto bad = s;
  bad.epsilon = 0;
  CHECK(Run::forward(bad, p.read(), x, y, cache, executor).code == Code::bad_value);
  bad = s, bad.memory.kernel.length = 0;
  CHECK(Run::forward(bad, p.read(), x, y, cache, executor).code == Code::bad_shape);
  bad = s, bad.feed_forward.hidden = 0;
  CHECK(Run::forward(bad, p.read(), x, y, cache, executor).code == Code::bad_shape);
  bad = s, bad.span = Span::bidirectional;
  Run::State<double> state(s, 2);
  Tensor<double, 2> in(2, 6), out(2, 6);
  CHECK(Run::step(bad, p.read(), Run::Prepared<double>{}, in, out, state, executor).code == Code::unsupported);
  Tensor<double, 3> none(2, 0, 6), no_output(2, 0, 6);
  CHECK(Run::forward(s, p.read(), none, no_output, cache, executor).ok());
}
