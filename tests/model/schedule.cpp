#include "chela/model/schedule.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "chela/model/initialize.hpp"
#include "chela/model/random.hpp"

using namespace chela;

TEST_CASE("the learning rate climbs, peaks and falls") {
  using Fall = LearningRateSchedule::Fall;
  for (const Fall fall : {Fall::none, Fall::linear, Fall::cosine}) {
    const LearningRateSchedule s{.peak = 2, .warm_up = 0.2, .last_fraction = 0.1, .fall = fall};
    const double half_way = fall == Fall::none ? 2 : 1.1;  // between 2 and 0.2, for both falls
    const double end = fall == Fall::none ? 2 : 0.2;
    CHECK(learning_rate(s, 0) == 0);
    CHECK(learning_rate(s, 0.1) == doctest::Approx(1));
    CHECK(learning_rate(s, 0.2) == doctest::Approx(2));
    CHECK(learning_rate(s, 0.6) == doctest::Approx(half_way));
    CHECK(learning_rate(s, 1) == doctest::Approx(end));
    CHECK(learning_rate(s, 7) == learning_rate(s, 1));
    CHECK(learning_rate(s, -1) == 0);
    for (double x = 0.2; x < 1; x += 0.01) CHECK(learning_rate(s, x + 0.01) <= learning_rate(s, x));
  }
  CHECK(learning_rate({.peak = 3, .warm_up = 0}, 0) == 3);
  CHECK(learning_rate({.peak = 3, .warm_up = 1}, 1) == 3);
}

TEST_CASE("random numbers are the same everywhere") {
  // From an independent implementation of the published mixing function.
  CHECK(mix_bits(0) == 0);
  CHECK(mix_bits(0x9e3779b97f4a7c15u) == 0xe220a8397b1dcdafu);      // SplitMix64 of seed 0, first word
  CHECK(mix_bits(2 * 0x9e3779b97f4a7c15u) == 0x6e789e6aa1b965f4u);  // second word
  CHECK(stream_of("") == 0xcbf29ce484222325u);
  CHECK(stream_of("a") == 0xaf63dc4c8601ec8cu);
}

TEST_CASE("streams are uniform or normal, and unlike one another") {
  constexpr int count = 200'000;
  const CounterRandom one(7, 0), other_stream(7, 1), other_seed(8, 0);
  double mean = 0, square = 0, normal_mean = 0, normal_square = 0, product_stream = 0, product_seed = 0;
  std::vector<int> histogram(10);
  for (std::uint64_t i = 0; i < count; ++i) {
    const double u = one.uniform(i), z = one.normal(i);
    CHECK_UNARY(u >= 0 && u < 1);
    mean += u / count, square += u * u / count;
    normal_mean += z / count, normal_square += z * z / count;
    product_stream += (u - 0.5) * (other_stream.uniform(i) - 0.5) / count;
    product_seed += (u - 0.5) * (other_seed.uniform(i) - 0.5) / count;
    ++histogram[one.below(i, 10)];
  }
  // Five standard errors each.
  CHECK(std::abs(mean - 0.5) < 5 * 0.2887 / std::sqrt(count));
  CHECK(std::abs(square - 1.0 / 3) < 5 * 0.2981 / std::sqrt(count));
  CHECK(std::abs(normal_mean) < 5 / std::sqrt(count));
  CHECK(std::abs(normal_square - 1) < 5 * 1.42 / std::sqrt(count));
  CHECK(std::abs(product_stream) < 5.0 / 12 / std::sqrt(count));
  CHECK(std::abs(product_seed) < 5.0 / 12 / std::sqrt(count));
  for (const int hits : histogram) CHECK(std::abs(hits - count / 10) < 5 * std::sqrt(count * 0.09));
}

TEST_CASE("below covers bounds of any size") {
  const CounterRandom random(1, 2);
  for (const std::uint64_t bound : {1ull, 2ull, 3ull, 1ull << 32, (1ull << 63) + 12345, ~0ull}) {
    std::uint64_t largest = 0;
    for (std::uint64_t i = 0; i < 1000; ++i) largest = std::max(largest, random.below(i, bound));
    CHECK(largest < bound);
    CHECK(double(largest) >= 0.95 * (double(bound) - 1));
  }
}

TEST_CASE("initial values follow each parameter's own wish and name") {
  std::vector<ParameterInfo> infos{{.name = "gain", .extents = {8}, .initial = constant_init(1.5)},
                                   {.name = "weight", .extents = {100, 200}, .initial = normal_init(0.25, 0.5)},
                                   {.name = "taps", .extents = {64}, .initial = uniform_init(-2, 1)}};
  Index total = 0;
  for (ParameterInfo& info : infos) info.offset = total, total += info.count();
  std::vector<float> values(std::size_t(total), -9), alone(64, -9);
  initialize_parameters(infos, 11, values.data());
  for (int i = 0; i < 8; ++i) CHECK(values[std::size_t(i)] == 1.5f);
  double mean = 0, square = 0;
  for (std::size_t i = 8; i < 8 + 20'000; ++i) mean += values[i] / 20'000, square += values[i] * values[i] / 20'000;
  CHECK(mean == doctest::Approx(0.25).epsilon(0.1));
  CHECK(square - mean * mean == doctest::Approx(0.25).epsilon(0.1));
  for (std::size_t i = 8 + 20'000; i < values.size(); ++i) CHECK_UNARY(values[i] >= -2 && values[i] < 1);

  infos[2].offset = 0;
  initialize_parameters(std::vector<ParameterInfo>{infos[2]}, 11, alone.data());
  CHECK(std::equal(alone.begin(), alone.end(), values.end() - 64));
  initialize_parameters(std::vector<ParameterInfo>{infos[2]}, 12, alone.data());
  CHECK_FALSE(std::equal(alone.begin(), alone.end(), values.end() - 64));
}
