#include "chela/cpu/element.hpp"

#include <doctest/doctest.h>

#include <cstdint>

#include "chela/attention/linear.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;

namespace {

template <class T>
concept HasContract = requires {
  typename LinearAttentionArgs<T>;
};

static_assert(Element<float> && Element<double> && Element<Eigen::bfloat16> && Element<Eigen::half>);
static_assert(Element<const Eigen::half> && Element<const float>);
static_assert(!Element<int> && !Element<std::int64_t> && !Element<long double> && !Element<bool>);

static_assert(std::is_same_v<Accumulator<float>, float>);
static_assert(std::is_same_v<Accumulator<double>, double>);
static_assert(std::is_same_v<Accumulator<const double>, double>);
static_assert(std::is_same_v<Accumulator<Eigen::bfloat16>, float>);
static_assert(std::is_same_v<Accumulator<const Eigen::half>, float>);

static_assert(HasContract<Eigen::bfloat16> && !HasContract<int>);

}  // namespace

TEST_CASE("16-bit types keep the digits that they have") {
  CHECK(test::unit_roundoff<Eigen::bfloat16>() == 0x1p-8);
  CHECK(test::unit_roundoff<Eigen::half>() == 0x1p-11);
  CHECK(test::unit_roundoff<float>() == 0x1p-24);
  CHECK(test::tolerance<Eigen::bfloat16>(64) > test::tolerance<Eigen::half>(64));
  CHECK(test::tolerance<Eigen::half>(64) > test::tolerance<float>(64));
}

TEST_CASE_TEMPLATE("tensors hold every element type", T, float, double, Eigen::bfloat16, Eigen::half) {
  const Tensor<T, 2> numbers = test::random_tensor<T>(3, 4, 5);
  const Tensor<double, 2> wide = test::converted<double>(numbers.view());
  CHECK(test::relative_error(numbers, wide) == 0);
  const Tensor<T, 2> missing = test::nan_tensor<T>(4, 5);
  CHECK_FALSE(test::relative_error(missing, wide) <= 1e30);
}
