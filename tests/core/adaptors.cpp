#include "chela/cpu/adaptors.hpp"

#include <doctest/doctest.h>

#include <array>
#include <utility>
#include <vector>

#include "support/tensors.hpp"

using namespace chela;
using cpu::as_eigen;
using cpu::as_view;

namespace {

using Matrix = Eigen::MatrixXf;
using RowMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class View, class Dense>
void check_same_elements(View view, const Dense& dense) {
  REQUIRE(has_extents(view, dense.rows(), dense.cols()));
  for (Index i = 0; i < dense.rows(); ++i)
    for (Index j = 0; j < dense.cols(); ++j) CHECK(view(i, j) == dense(i, j));
}

template <class V, class T, int Rank>
constexpr bool is_view = std::is_same_v<V, TensorView<T, Rank>>;

template <class D>
concept Viewable = requires(D&& dense) {
  as_view(std::forward<D>(dense));
};

}  // namespace

TEST_CASE("Eigen matrices of either storage order, blocks and transposes are viewed in place") {
  Matrix columns = Matrix::Random(5, 7);
  RowMatrix rows = RowMatrix::Random(5, 7);
  check_same_elements(as_view(columns), columns);
  check_same_elements(as_view(rows), rows);
  check_same_elements(as_view(columns.block(1, 2, 3, 4)), columns.block(1, 2, 3, 4));
  check_same_elements(as_view(rows.transpose()), rows.transpose());
  as_view(columns)(4, 6) = 42;
  CHECK(columns(4, 6) == 42);
}

TEST_CASE("maps with inner and outer strides keep them") {
  std::vector<float> memory(64);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = float(i);
  using Stride = Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>;
  Eigen::Map<Matrix, 0, Stride> map(memory.data() + 1, 3, 4, Stride(13, 3));
  const auto view = as_view(map);
  check_same_elements(view, map);
  CHECK(view.strides[0] == 3);
  CHECK(view.strides[1] == 13);
}

TEST_CASE("vectors by their type have rank one") {
  RowMatrix rows = RowMatrix::Random(4, 6);
  Eigen::VectorXd vector = Eigen::VectorXd::Random(9);
  auto whole = as_view(vector);
  auto row = as_view(rows.row(2));
  auto column = as_view(rows.col(3));
  static_assert(is_view<decltype(whole), double, 1> && is_view<decltype(column), double, 1>);
  REQUIRE(has_extents(whole, 9));
  REQUIRE(has_extents(row, 6));
  REQUIRE(has_extents(column, 4));
  CHECK(row.strides[0] == 1);
  CHECK(column.strides[0] == 6);
  for (int i = 0; i < 9; ++i) CHECK(whole(i) == vector(i));
  for (int i = 0; i < 6; ++i) CHECK(row(i) == rows(2, i));
  for (int i = 0; i < 4; ++i) CHECK(column(i) == rows(i, 3));
}

TEST_CASE("what is const stays const, and owners that are about to die are refused") {
  const Matrix fixed = Matrix::Random(2, 2);
  const std::vector<float> numbers(4);
  Eigen::Map<const Matrix> map(numbers.data(), 2, 2);
  static_assert(is_view<decltype(as_view(fixed)), const float, 2>);
  static_assert(is_view<decltype(as_view(map)), const float, 2>);
  static_assert(is_view<decltype(as_view(numbers)), const float, 1>);
  static_assert(Viewable<Matrix&> && !Viewable<Matrix>);
  static_assert(Viewable<Eigen::Map<Matrix>>);
  static_assert(Viewable<std::vector<float>&> && !Viewable<std::vector<float>>);
  static_assert(Viewable<std::span<const double>> && !Viewable<std::span<const int>>);
  static_assert(!Viewable<decltype(fixed + fixed)>, "an expression has no memory to view");
  CHECK(as_view(fixed).data == fixed.data());
}

TEST_CASE("spans, vectors and arrays become rank one or row-major rank two") {
  std::vector<Eigen::bfloat16> vector(6);
  std::array<double, 6> array{0, 1, 2, 3, 4, 5};
  static_assert(is_view<decltype(as_view(vector)), Eigen::bfloat16, 1>);
  CHECK(has_extents(as_view(vector), 6));
  const auto grid = as_view(std::span(array), 2, 3);
  CHECK(has_extents(grid, 2, 3));
  CHECK(grid(1, 2) == 5);
  CHECK(has_extents(as_view(std::span<const float>()), 0));
}

TEST_CASE("Eigen maps of views read and write the same elements, at any stride") {
  Tensor<float, 3> tensor = test::random_tensor<float>(1, 3, 4, 5);
  TensorView<float, 3> view = tensor.view();
  for (TensorView<float, 2> flat :
       {slice(view, 1), slice_axis<1>(view, 2), slice_axis<2>(view, 3), transposed(slice(view, 2), 0, 1)})
    check_same_elements(flat, as_eigen(flat));

  auto column = slice_axis<1>(slice(view, 0), 2);
  as_eigen(column).setConstant(7);
  for (Index i = 0; i < 4; ++i) CHECK(tensor(0, i, 2) == 7);

  auto read_only = as_eigen(slice(std::as_const(tensor).view(), 0));
  static_assert(std::is_same_v<decltype(read_only.data()), const float*>);
  CHECK(read_only(0, 2) == 7);
}

TEST_CASE("a broadcast axis is an Eigen map of stride zero") {
  std::vector<float> bias{1, 2, 3};
  TensorView<const float, 2> repeated{bias.data(), {4, 3}, {0, 1}};
  const Matrix expected = Eigen::Map<Eigen::RowVector3f>(bias.data()).replicate(4, 1);
  CHECK(as_eigen(repeated) == expected);
}

TEST_CASE("a round trip gives the same view") {
  Tensor<double, 2> tensor(3, 8);
  TensorView<double, 2> part = run(tensor.view(), 1, 2, 5);
  auto map = as_eigen(part);
  const auto back = as_view(map);
  CHECK(back.data == part.data);
  CHECK(same_extents(back, part));
  CHECK(back.strides[0] == 8);
  CHECK(back.strides[1] == 1);
}
