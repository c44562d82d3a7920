#include "chela/cpu/model/adamw.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "support/tensors.hpp"
#include "support/tolerance.hpp"

namespace {
using namespace chela;
using namespace chela::test;

template <class T>
struct Problem {
  Tensor<T, 1> parameters, gradients, first, second;
  explicit Problem(Index count)
      : parameters(random_tensor<T>(1, count)),
        gradients(random_tensor<T>(2, count)),
        first(random_tensor<T>(3, count)),
        second(random_tensor<T>(4, count)) {
    for (T& v : second) v = v * v;
  }
  AdamWArgs<T> args() { return {parameters, gradients, first, second}; }
};

/// The equations of chela/model/adamw.hpp, one element after another in double.
template <class T>
Problem<double> updated(const Problem<T>& start, const std::vector<DecayRange>& ranges, Index step, double rate,
                        const AdamWSettings& s) {
  const Index count = start.parameters.size();
  Problem<double> p(count);
  p.parameters = converted<double>(start.parameters.view());
  p.gradients = converted<double>(start.gradients.view());
  p.first = converted<double>(start.first.view());
  p.second = converted<double>(start.second.view());
  double norm = 0;
  for (const double g : p.gradients) norm += g * g;
  norm = std::sqrt(norm);
  const double clip = norm > s.largest_norm ? s.largest_norm / norm : 1;
  for (const DecayRange& range : ranges) {
    for (Index i = range.begin; i < range.end; ++i) {
      const double g = clip * p.gradients(i);
      p.first(i) = s.first_decay * p.first(i) + (1 - s.first_decay) * g;
      p.second(i) = s.second_decay * p.second(i) + (1 - s.second_decay) * g * g;
      const double first = p.first(i) / (1 - std::pow(s.first_decay, double(step)));
      const double second = p.second(i) / (1 - std::pow(s.second_decay, double(step)));
      p.parameters(i) -=
          rate * (first / (std::sqrt(second) + s.epsilon) + (range.decays ? s.weight_decay : 0.0) * p.parameters(i));
    }
  }
  return p;
}

constexpr Index counts[] = {0, 1, 7, 16, 17, 4095, 4096, 4097, 10'001};

struct NaiveGroups {
  std::vector<DecayRange> operator()(Index count) const {
    return {
        {0, count / 3, true}, {count / 3, count / 3, true}, {count / 3, count / 2, false}, {count / 2, count, true}};
  }
};
}  // namespace

TEST_CASE_TEMPLATE("adamw matches a plain loop, with decay only where asked", T, float, double) {
  for (const Index count : counts) {
    for (const double largest_norm : {0.5, std::numeric_limits<double>::infinity()}) {
      for (const Index step : {1, 1000}) {
        CAPTURE(count);
        CAPTURE(step);
        Problem<T> p(count);
        const std::vector<DecayRange> ranges = NaiveGroups{}(count);
        const AdamWSettings settings{.weight_decay = 0.3, .largest_norm = largest_norm};
        const Problem<double> want = updated(p, ranges, step, 0.02, settings);
        AdamWArgs<T> args = p.args();
        args.ranges = &ranges;
        args.step = step;
        args.learning_rate = 0.02;
        args.settings = settings;
        REQUIRE(cpu::adamw(args, SerialExecutor{}).ok());
        CHECK(relative_error(p.parameters.view(), want.parameters.view()) <= tolerance<T>(count + 8));
        CHECK(relative_error(p.first.view(), want.first.view()) <= tolerance<T>(count + 8));
        CHECK(relative_error(p.second.view(), want.second.view()) <= tolerance<T>(count + 8));
      }
    }
  }
}

TEST_CASE("without weight decay a zero gradient with zero moments moves nothing; with it, parameters shrink") {
  Problem<float> p(100);
  p.gradients.fill(0), p.first.fill(0), p.second.fill(0);
  const Tensor<float, 1> before = p.parameters;
  const std::vector<DecayRange> ranges{{0, 50, false}, {50, 100, true}};
  AdamWArgs<float> args = p.args();
  args.ranges = &ranges;
  args.learning_rate = 0.5;
  args.settings.weight_decay = 0.5;
  REQUIRE(cpu::adamw(args, SerialExecutor{}).ok());
  for (Index i = 0; i < 100; ++i) CHECK(p.parameters(i) == (i < 50 ? before(i) : 0.75f * before(i)));
}

TEST_CASE("the norm is that of all gradients, and the numbers do not depend on workers or on where buffers lie") {
  constexpr Index count = 50'003;
  Problem<float> one(count), two(count);
  double norm_one = 0, norm_two = 0;
  AdamWArgs<float> args = one.args();
  REQUIRE(cpu::adamw(args, SerialExecutor{}, &norm_one).ok());
#if defined(_OPENMP)
  const OpenMpExecutor several(3);
#else
  const SerialExecutor several;
#endif
  Tensor<float, 1> moved(count + 1);  // the same gradients at an odd address
  std::copy(two.gradients.begin(), two.gradients.end(), moved.begin() + 1);
  args = two.args();
  args.gradients = contiguous(static_cast<const float*>(moved.data() + 1), count);
  REQUIRE(cpu::adamw(args, several, &norm_two).ok());
  CHECK(norm_one == norm_two);
  CHECK(std::equal(one.parameters.begin(), one.parameters.end(), two.parameters.begin()));
  CHECK(std::equal(one.second.begin(), one.second.end(), two.second.begin()));

  double sum = 0;
  for (const float g : one.gradients) sum += double(g) * g;
  CHECK(norm_one == doctest::Approx(std::sqrt(sum)).epsilon(1e-12));
  CHECK(clipping_factor(2, 0.5) == 0.25);
  CHECK(clipping_factor(0.25, 0.5) == 1);
}

TEST_CASE("gradients that are not finite change nothing") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem<float> p(5000);
    const Tensor<float, 1> parameters = p.parameters, first = p.first;
    p.gradients(4999) = bad;
    CHECK(cpu::adamw(p.args(), SerialExecutor{}).code == Code::bad_value);
    CHECK(std::equal(parameters.begin(), parameters.end(), p.parameters.begin()));
    CHECK(std::equal(first.begin(), first.end(), p.first.begin()));
  }
}

TEST_CASE("decay ranges join neighbours that are treated alike") {
  std::vector<ParameterInfo> infos(5);
  const Index counts_of[] = {4, 2, 0, 3, 1};
  const bool decays[] = {true, true, false, true, false};
  Index offset = 0;
  for (std::size_t i = 0; i < 5; ++i) {
    infos[i].extents = {counts_of[i]};
    infos[i].decays = decays[i];
    infos[i].offset = offset;
    offset += counts_of[i];
  }
  CHECK(decay_ranges(infos) == std::vector<DecayRange>{{0, 9, true}, {9, 10, false}});
  CHECK(decay_ranges({}).empty());
}

TEST_CASE("adamw refuses what it cannot do, and says why") {
  Problem<float> p(10);
  Tensor<float, 1> longer(11);
  const auto refused = [&](Code code, auto change) {
    AdamWArgs<float> args = p.args();
    change(args);
    const Status status = cpu::adamw(args, SerialExecutor{});
    CHECK(status.code == code);
    CHECK(status.why[0] != 0);
  };
  const std::vector<DecayRange> gap{{0, 4, true}, {5, 10, true}}, overlong{{0, 12, true}},
      back{{0, 12, true}, {12, 10, true}};
  refused(Code::bad_shape, [&](auto& a) { a.gradients = longer; });
  refused(Code::bad_shape, [&](auto& a) { a.first_moment = longer; });
  refused(Code::bad_shape, [&](auto& a) { a.second_moment = longer; });
  refused(Code::bad_stride, [&](auto& a) { a.parameters.strides[0] = 2; });
  refused(Code::bad_stride, [&](auto& a) { a.gradients.strides[0] = 0; });
  refused(Code::bad_value, [&](auto& a) { a.ranges = &gap; });
  refused(Code::bad_value, [&](auto& a) { a.ranges = &overlong; });
  refused(Code::bad_value, [&](auto& a) { a.ranges = &back; });
  refused(Code::bad_value, [&](auto& a) { a.step = 0; });
  refused(Code::bad_value, [&](auto& a) { a.settings.first_decay = 1; });
  refused(Code::bad_value, [&](auto& a) { a.settings.second_decay = -0.1; });
  refused(Code::bad_value, [&](auto& a) { a.settings.epsilon = 0; });
  refused(Code::bad_value, [&](auto& a) { a.settings.weight_decay = -1; });
  refused(Code::bad_value, [&](auto& a) { a.settings.largest_norm = 0; });
  refused(Code::bad_value, [&](auto& a) { a.learning_rate = std::numeric_limits<double>::quiet_NaN(); });
}
