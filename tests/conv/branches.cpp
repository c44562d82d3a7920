// Folding branches: the folded kernel gives what the branches give together, and the fold's gradients are right.
#include "chela/cpu/conv/branches.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "chela/cpu/conv/long.hpp"
#include "chela/cpu/conv/short.hpp"
#include "chela/reference/branches.hpp"
#include "support/gradients.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

constexpr Index channels = 19, longest = 40;

/// Kernels of 1, 7 and 40 taps: the first two with norms, of which the second has neither gain nor offset.
template <class A>
struct Problem {
  Tensor<A, 2> k1 = random_tensor<A>(1, channels, 1), k7 = random_tensor<A>(2, channels, 7),
               k40 = random_tensor<A>(3, channels, longest);
  Tensor<A, 1> mean1 = random_tensor<A>(4, channels), mean7 = random_tensor<A>(5, channels), variance1{channels},
               variance7{channels}, gain = random_tensor<A>(6, channels), offset = random_tensor<A>(7, channels);
  Tensor<A, 2> taps = nan_tensor<A>(channels, longest);
  Tensor<A, 1> bias = nan_tensor<A>(channels);
  std::vector<ConvBranch<A>> branches;

  Problem() {
    fill_random(variance1.view(), 8, 0.1, 2);
    fill_random(variance7.view(), 9, 0.1, 2);
    branches = {{.taps = k1, .mean = mean1, .variance = variance1, .gain = gain, .offset = offset},
                {.taps = k7, .mean = mean7, .variance = variance7, .eps = A(1e-3)},
                {.taps = k40}};
  }
  FoldBranchesArgs<A> args() { return {.branches = branches, .taps = taps, .bias = bias}; }
};

template <class A, int Rank>
Tensor<double, Rank> as_double(TensorView<const A, Rank> view) {
  return view.present() ? converted<double>(view) : Tensor<double, Rank>();
}

/// The branches of a problem run one by one in double.
template <class A>
Tensor<double, 3> run_branches(const std::vector<ConvBranch<A>>& branches, TensorView<const A, 3> x) {
  Tensor<double, 3> y(x.extents[0], x.extents[1], x.extents[2]);
  for (const ConvBranch<A>& b : branches)
    reference::add_branch(as_double(x), as_double(b.taps), as_double(b.mean), as_double(b.variance), as_double(b.gain),
                          as_double(b.offset), double(b.eps), y);
  return y;
}

}  // namespace

TEST_CASE_TEMPLATE("the folded kernel gives what the branches give", A, float, double) {
  Problem<A> p;
  REQUIRE(cpu::fold_branches(p.args(), SerialExecutor{}).ok());
  const auto x = random_tensor<A>(10, 2, 90, channels);
  const Tensor<double, 3> want = run_branches<A>(p.branches, x);
  auto y = nan_tensor<A>(2, 90, channels);

  REQUIRE(
      cpu::short_conv<int(longest)>(ShortConvArgs<A>{.x = x, .taps = p.taps, .bias = p.bias, .y = y}, SerialExecutor{})
          .ok());
  CHECK(relative_error(y, want) < tolerance<A>(longest + 2 * 3));

  REQUIRE(cpu::long_conv(LongConvArgs<A>{.x = x, .taps = p.taps, .y = y}, SerialExecutor{}).ok());
  for_each_index(y.view(), [&](Index b, Index t, Index d) { y(b, t, d) += p.bias(d); });
  CHECK(relative_error(y, want) < tolerance<A>(90 + longest));
}

TEST_CASE_TEMPLATE("the operator run on each branch gives the folded kernel's output", A, float, double) {
  Problem<A> p;
  p.branches.pop_back();  // kernels of 1 and 7 taps
  auto args = p.args();
  auto taps = nan_tensor<A>(channels, 7);
  args.taps = taps;
  REQUIRE(cpu::fold_branches(args, SerialExecutor{}).ok());

  const auto x = random_tensor<A>(11, 2, 30, channels);
  auto y1 = nan_tensor<A>(2, 30, channels), y7 = y1, folded = y1;
  REQUIRE(cpu::short_conv<1>(ShortConvArgs<A>{.x = x, .taps = p.k1, .y = y1}, SerialExecutor{}).ok());
  REQUIRE(cpu::short_conv<7>(ShortConvArgs<A>{.x = x, .taps = p.k7, .y = y7}, SerialExecutor{}).ok());
  REQUIRE(
      cpu::short_conv<7>(ShortConvArgs<A>{.x = x, .taps = taps, .bias = p.bias, .y = folded}, SerialExecutor{}).ok());
  for_each_index(y1.view(), [&](Index b, Index t, Index d) {
    y1(b, t, d) = p.gain(d) * (y1(b, t, d) - p.mean1(d)) / std::sqrt(p.variance1(d) + A(1e-5)) + p.offset(d) +
                  (y7(b, t, d) - p.mean7(d)) / std::sqrt(p.variance7(d) + A(1e-3));
  });
  CHECK(relative_error(folded, y1) < tolerance<A>(7 + 2 * 3));
}

TEST_CASE("no branch folds to zero, and a lone plain branch to itself") {
  Problem<float> p;
  p.branches.clear();
  REQUIRE(cpu::fold_branches(p.args(), SerialExecutor{}).ok());
  for (float tap : p.taps) CHECK(tap == 0);
  for (float bias : p.bias) CHECK(bias == 0);
  p.branches = {{.taps = p.k40}};
  auto args = p.args();
  args.bias = {};
  REQUIRE(cpu::fold_branches(args, SerialExecutor{}).ok());
  CHECK(relative_error(p.taps, p.k40) == 0);
}

TEST_CASE("gradients of the fold match finite differences") {
  Problem<double> p;
  const auto grad_taps = random_tensor<double>(20, channels, longest);
  const auto grad_bias = random_tensor<double>(21, channels);
  auto d1 = nan_tensor<double>(channels, 1), d7 = nan_tensor<double>(channels, 7),
       d40 = nan_tensor<double>(channels, longest);
  auto d_gain = nan_tensor<double>(channels), d_offset = nan_tensor<double>(channels);
  const std::vector<ConvBranchGradients<double>> grads = {
      {.taps = d1, .gain = d_gain, .offset = d_offset}, {.taps = d7}, {.taps = d40}};
  REQUIRE(cpu::fold_branches_backward(
              FoldBranchesBackwardArgs<double>{
                  .branches = p.branches, .grad_taps = grad_taps, .grad_bias = grad_bias, .grads = grads},
              SerialExecutor{})
              .ok());
  const auto loss = [&] {
    REQUIRE(cpu::fold_branches(p.args(), SerialExecutor{}).ok());
    return weighted_sum<2>(p.taps, grad_taps) + weighted_sum<1>(p.bias, grad_bias);
  };
  CHECK(gradient_error<2>(loss, p.k1, d1) < gradient_tolerance);
  CHECK(gradient_error<2>(loss, p.k7, d7) < gradient_tolerance);
  CHECK(gradient_error<2>(loss, p.k40, d40) < gradient_tolerance);
  CHECK(gradient_error<1>(loss, p.gain, d_gain) < gradient_tolerance);
  CHECK(gradient_error<1>(loss, p.offset, d_offset) < gradient_tolerance);
}

TEST_CASE("arguments that do not fit are refused by name") {
  Problem<float> p;
  const auto names = [](Status s, const char* argument) {
    return !s.ok() && std::string(s.why).find(argument) != std::string::npos;
  };
  auto args = p.args();
  args.taps.extents[1] = longest - 1;
  CHECK(names(cpu::fold_branches(args, SerialExecutor{}), "longer"));
  args = p.args(), args.bias = {};
  CHECK(names(cpu::fold_branches(args, SerialExecutor{}), "bias"));
  args = p.args(), args.taps.data = nullptr;
  CHECK(names(cpu::fold_branches(args, SerialExecutor{}), "taps"));
  p.branches[0].variance = {};
  CHECK(names(cpu::fold_branches(p.args(), SerialExecutor{}), "variance"));
  p.branches[0] = {.taps = p.k1, .gain = p.gain};
  CHECK(names(cpu::fold_branches(p.args(), SerialExecutor{}), "gain"));
  p.branches[0] = {.taps = p.k1, .mean = run(p.mean1.view(), 0, 0, 3), .variance = p.variance1};
  CHECK(names(cpu::fold_branches(p.args(), SerialExecutor{}), "mean"));

  Problem<float> q;
  FoldBranchesBackwardArgs<float> backward{.branches = q.branches, .grad_taps = q.taps};
  CHECK(names(cpu::fold_branches_backward(backward, SerialExecutor{}), "grads"));
  std::vector<ConvBranchGradients<float>> grads(3);
  backward.grads = grads;
  CHECK(cpu::fold_branches_backward(backward, SerialExecutor{}).ok());
  grads[2].gain = q.gain;  // of a branch without a norm
  CHECK(names(cpu::fold_branches_backward(backward, SerialExecutor{}), "gain"));
}
