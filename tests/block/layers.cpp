// Projections, norms and feed-forward layers: against plain loops, by finite differences, and for any number of
// workers.
#include <doctest/doctest.h>

#include "block/modules.hpp"
#include "chela/cpu/block/feed_forward.hpp"
#include "chela/cpu/block/norm.hpp"
#include "chela/cpu/block/projection.hpp"
#include "chela/reference/block.hpp"
#include "support/gradients.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

struct RowsCase {
  Index rows, in, out;
};
// Around the row block of 128, the weight blocks of 64 and 256, and packets of 4 to 16.
constexpr RowsCase projections[] = {{0, 3, 4},      {1, 1, 1},      {3, 5, 17},   {127, 63, 16},
                                    {128, 64, 256}, {129, 65, 257}, {300, 16, 33}};

constexpr NormKind kinds[] = {NormKind::none, NormKind::layer, NormKind::rms, NormKind::scale};

reference::NormKind reference_kind(NormKind kind) {
  return kind == NormKind::layer  ? reference::NormKind::layer
         : kind == NormKind::none ? reference::NormKind::none
                                  : reference::NormKind::rms;
}

}  // namespace

TEST_CASE_TEMPLATE("a projection matches plain loops", T, float, double) {
  for (const RowsCase c : projections)
    for (const Activation activation : {Activation::none, Activation::silu}) {
      INFO("rows ", c.rows, " in ", c.in, " out ", c.out, " activation ", int(activation));
      const auto x = random_tensor<T>(1, c.rows, c.in), w = random_tensor<T>(2, c.in, c.out);
      const auto bias = random_tensor<T>(3, c.out);
      auto y = nan_tensor<T>(c.rows, c.out), before = nan_tensor<T>(c.rows, c.out);
      REQUIRE(cpu::projection(ProjectionArgs<T>{x, w, bias, y, before, activation}, DefaultExecutor{}).ok());
      auto want = nan_tensor<double>(c.rows, c.out);
      reference::projection(converted<double>(x.view()), converted<double>(w.view()), converted<double>(bias.view()),
                            activation == Activation::silu, want);
      CHECK(relative_error(y, want) <= tolerance<T>(c.in));
    }
}

TEST_CASE("gradients of a projection match finite differences") {
  for (const Activation activation : {Activation::none, Activation::silu}) {
    auto x = random_tensor<double>(1, 5, 4), w = random_tensor<double>(2, 4, 7);
    auto bias = random_tensor<double>(3, 7);
    const auto weight = random_tensor<double>(4, 5, 7);
    auto y = nan_tensor<double>(5, 7), before = y;
    const auto loss = [&] {
      REQUIRE(cpu::projection(ProjectionArgs<double>{x, w, bias, y, before, activation}, SerialExecutor{}).ok());
      return weighted_sum<2>(y, weight);
    };
    loss();
    auto dx = nan_tensor<double>(5, 4), dw = nan_tensor<double>(4, 7), dbefore = y;
    auto dbias = nan_tensor<double>(7);
    REQUIRE(
        cpu::projection_backward(
            ProjectionBackwardArgs<double>{x, w, before, weight, dbefore, dx, dw, dbias, activation}, SerialExecutor{})
            .ok());
    CHECK(gradient_error<2>(loss, x, dx) < gradient_tolerance);
    CHECK(gradient_error<2>(loss, w, dw) < gradient_tolerance);
    CHECK(gradient_error<1>(loss, bias, dbias) < gradient_tolerance);
  }
}

TEST_CASE("a projection gives the same bits for any number of workers") {
  const auto x = random_tensor<float>(1, 700, 70), w = random_tensor<float>(2, 70, 270),
             dy = random_tensor<float>(3, 700, 270);
  auto y1 = nan_tensor<float>(700, 270), y3 = y1, dx1 = nan_tensor<float>(700, 70), dx3 = dx1;
  auto dw1 = nan_tensor<float>(70, 270), dw3 = dw1;
  const auto run = [&](auto& y, auto& dx, auto& dw, const auto& executor) {
    REQUIRE(cpu::projection(ProjectionArgs<float>{.x = x, .weight = w, .y = y}, executor).ok());
    REQUIRE(
        cpu::projection_backward(
            ProjectionBackwardArgs<float>{.x = x, .weight = w, .grad_y = dy, .grad_x = dx, .grad_weight = dw}, executor)
            .ok());
  };
  run(y1, dx1, dw1, SerialExecutor{}), run(y3, dx3, dw3, BackwardsExecutor{});
  CHECK((same_bits(y1, y3) && same_bits(dx1, dx3) && same_bits(dw1, dw3)));
}

TEST_CASE("a projection reads and writes parts of wider rows, and refuses what does not fit") {
  const auto wide = random_tensor<float>(1, 9, 40), w = random_tensor<float>(2, 8, 6);
  auto out = nan_tensor<float>(9, 30), want = nan_tensor<float>(9, 6);
  Tensor<float, 2> narrow(9, 8);
  const auto part = run(wide.view(), 1, 11, 8);
  for_each_index(part, [&](auto... i) { narrow(i...) = part(i...); });
  const auto place = run(out.view(), 1, 7, 6);
  REQUIRE(cpu::projection(ProjectionArgs<float>{.x = part, .weight = w, .y = place}, SerialExecutor{}).ok());
  REQUIRE(cpu::projection(ProjectionArgs<float>{.x = narrow, .weight = w, .y = want}, SerialExecutor{}).ok());
  CHECK(relative_error(place, want.view()) == 0);
  CHECK(std::isnan(out(0, 6)));
  CHECK(std::isnan(out(0, 13)));

  ProjectionArgs<float> bad{.x = narrow, .weight = w, .y = want};
  bad.x = part, bad.x.extents[1] = 9;
  CHECK(check(bad).code == Code::bad_shape);
  bad = {.x = transposed(wide.view(), 0, 1), .weight = w, .y = want};
  CHECK(!check(bad).ok());
  bad = {.x = narrow, .weight = w, .y = TensorView<float, 2>{}};
  CHECK(check(bad).code == Code::bad_shape);
}

TEST_CASE_TEMPLATE("norms match plain loops", T, float, double) {
  for (const NormKind kind : kinds)
    for (const Index width : {1, 3, 16, 33})
      for (const Index groups : {1, 3}) {
        INFO("kind ", int(kind), " width ", width, " groups ", groups);
        const Norm::Shape s{kind, width, groups};
        auto p = Owned<Norm, T>::random(s, 5);
        const auto x = random_tensor<T>(6, 130, s.row());
        auto y = nan_tensor<T>(130, s.row());
        REQUIRE(cpu::norm(NormArgs<T>{.shape = s, .x = x, .parameters = p.read(), .y = y}, DefaultExecutor{}).ok());
        Tensor<double, 1> gain({s.row()}, 1.0), bias(s.row());
        for (Index i = 0; i < s.row() && kind != NormKind::none; ++i) {
          gain(i) = double(p.values(kind == NormKind::scale ? i / width : i));
          if (kind == NormKind::layer) bias(i) = double(p.values(s.row() + i));
        }
        auto want = nan_tensor<double>(130, s.row());
        reference::norm(reference_kind(kind), width, s.epsilon, converted<double>(x.view()), gain, bias, want);
        CHECK(relative_error(y, want) <= tolerance<T>(width));
      }
}

TEST_CASE("gradients of norms match finite differences, and layer norm keeps its accuracy far from zero") {
  for (const NormKind kind : kinds)
    for (const Index groups : {1, 2}) {
      const Norm::Shape s{kind, 5, groups};
      auto p = Owned<Norm, double>::random(s, 5);
      Owned<Norm, double> grad(s);
      auto x = random_tensor<double>(6, 4, s.row());
      const auto weight = random_tensor<double>(7, 4, s.row());
      auto y = nan_tensor<double>(4, s.row()), dx = y;
      auto statistics = nan_tensor<double>(4, groups, 2);
      const auto loss = [&] {
        REQUIRE(cpu::norm(NormArgs<double>{s, x, p.read(), y, statistics}, SerialExecutor{}).ok());
        return weighted_sum<2>(y, weight);
      };
      loss();
      REQUIRE(cpu::norm_backward(NormBackwardArgs<double>{s, x, p.read(), statistics, weight, dx, grad.write()},
                                 SerialExecutor{})
                  .ok());
      CHECK(gradient_error<2>(loss, x, dx) < gradient_tolerance);
      CHECK(gradient_error<1>(loss, p.values, grad.values) < gradient_tolerance);
    }
  const Norm::Shape s{NormKind::layer, 19};
  Owned<Norm, float> p(s, 1.0f);
  auto x = random_tensor<float>(6, 2, 19);
  for (float& value : x) value += 100;
  auto y = nan_tensor<float>(2, 19);
  REQUIRE(cpu::norm(NormArgs<float>{.shape = s, .x = x, .parameters = p.read(), .y = y}, SerialExecutor{}).ok());
  auto want = nan_tensor<double>(2, 19);
  reference::norm(reference::NormKind::layer, 19, s.epsilon, converted<double>(x.view()),
                  Tensor<double, 1>(std::array<Index, 1>{19}, 1.0), Tensor<double, 1>(std::array<Index, 1>{19}, 1.0),
                  want);
  CHECK(relative_error(y, want) <= 100 * tolerance<float>(19));  // the mean is 100 times the deviation
}

TEST_CASE("norms refuse what does not fit") {
  const auto x = random_tensor<float>(6, 2, 8);
  auto y = nan_tensor<float>(2, 8);
  auto p = Owned<Norm, float>::random({NormKind::layer, 8}, 1);
  NormArgs<float> args{.shape = {NormKind::layer, 8}, .x = x, .parameters = p.read(), .y = y};
  CHECK(check(args).ok());
  args.shape.width = 4;
  CHECK(check(args).code == Code::bad_shape);
  args.shape.width = 8, args.shape.epsilon = 0;
  CHECK(check(args).code == Code::bad_value);
}

TEST_CASE("feed-forward layers match plain loops and finite differences") {
  for (const FeedForwardKind kind : {FeedForwardKind::none, FeedForwardKind::silu, FeedForwardKind::swiglu})
    for (const bool bias : {true, false}) {
      INFO("kind ", int(kind), " bias ", bias);
      FeedForward::Shape s{.kind = kind, .width = 5, .hidden = 7, .bias = bias};
      auto p = Owned<FeedForward, double>::random(s, 5);
      Owned<FeedForward, double> grad(s);
      auto x = random_tensor<double>(6, 4, 5);
      const auto weight = random_tensor<double>(7, 4, 5);
      auto y = nan_tensor<double>(4, 5), dx = y, want = y;
      using Run = cpu::Compute<FeedForward>;
      Run::Cache<double> cache;
      const auto loss = [&] {
        REQUIRE(Run::forward(s, p.read(), x, y, cache, SerialExecutor{}).ok());
        return weighted_sum<2>(y, weight);
      };
      loss();
      const auto q = p.read();
      reference::feed_forward(x.view(), x.view(), {q.expand.weight, q.expand.bias, q.contract.weight, q.contract.bias},
                              want);
      CHECK(relative_error(y, want) <= tolerance<double>(7));
      REQUIRE(Run::backward(s, p.read(), cache, x, weight, dx, grad.write(), SerialExecutor{}).ok());
      CHECK(gradient_error<2>(loss, x, dx) < gradient_tolerance);
      CHECK(gradient_error<1>(loss, p.values, grad.values) < gradient_tolerance);
    }
}
