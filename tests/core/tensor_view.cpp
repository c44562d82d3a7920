#include "chela/core/tensor_view.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "chela/core/tensor.hpp"

using namespace chela;

namespace {

/// Element (i, j, k) of a 3 x 4 x 5 row-major array holds 100 i + 10 j + k, so a value tells where it was read.
Tensor<int, 3> labelled() {
  Tensor<int, 3> tensor(3, 4, 5);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 5; ++k) tensor(i, j, k) = 100 * i + 10 * j + k;
  return tensor;
}

constexpr int letters[] = {0, 1, 2, 3, 4, 5};
constexpr TensorView<const int, 2> grid = contiguous(letters, 2, 3);
static_assert(grid(1, 2) == 5 && grid.size() == 6 && grid.strides[0] == 3 && grid.strides[1] == 1);
static_assert(transposed(grid, 0, 1)(2, 1) == 5);
static_assert(slice(grid, 1)(0) == 3);
static_assert(reversed(grid, 1)(0, 0) == 2);

static_assert(std::is_convertible_v<TensorView<float, 2>, TensorView<const float, 2>>);
static_assert(!std::is_convertible_v<TensorView<const float, 2>, TensorView<float, 2>>);
static_assert(std::is_trivially_copyable_v<TensorView<float, 5>>, "views are passed to kernels by value");

template <class V, class... I>
concept Indexable = requires(V view, I... i) {
  view(i...);
};
static_assert(Indexable<TensorView<int, 2>, int, long> && !Indexable<TensorView<int, 2>, int>);
static_assert(!Indexable<TensorView<int, 1>, const char*>);

}  // namespace

TEST_CASE("indices meet strides") {
  std::vector<int> memory(100);
  std::iota(memory.begin(), memory.end(), 0);
  const TensorView<int, 3> view{memory.data(), {2, 3, 4}, {50, 10, 2}};
  CHECK(view(0, 0, 0) == 0);
  CHECK(view(1, 2, 3) == 76);
  view(1, 0, 1) = -1;
  CHECK(memory[52] == -1);
  CHECK(view.size() == 24);
  const TensorView<int, 1> one = contiguous(memory.data(), 7);
  CHECK(one(6) == 6);
}

TEST_CASE("offsets beyond 2^31 elements are not cut short") {
  const TensorView<char, 2> view{nullptr, {Index(1) << 20, Index(1) << 20}, {Index(1) << 20, 1}};
  CHECK(view.size() == Index(1) << 40);
  const TensorView<const char, 3> packed = contiguous(static_cast<const char*>(nullptr), 1 << 20, 1 << 20, 4);
  CHECK(packed.strides[0] == Index(1) << 22);
  CHECK(packed.size() == Index(1) << 42);
}

TEST_CASE("slices drop an axis") {
  Tensor<int, 3> tensor = labelled();
  const TensorView<int, 3> view = tensor;
  CHECK(slice(view, 2)(3, 4) == 234);
  CHECK(slice_axis<0>(view, 2)(3, 4) == 234);
  CHECK(slice_axis<1>(view, 1)(2, 4) == 214);
  CHECK(slice_axis<2>(view, 3)(2, 1) == 213);
  CHECK(slice(slice(view, 1), 2)(0) == 120);
  CHECK(has_extents(slice_axis<1>(view, 0), 3, 5));
}

TEST_CASE("runs narrow an axis, also to nothing") {
  Tensor<int, 3> tensor = labelled();
  const auto part = run(run(tensor.view(), 1, 1, 2), 2, 3, 2);
  CHECK(has_extents(part, 3, 2, 2));
  CHECK(part(0, 0, 0) == 13);
  CHECK(part(2, 1, 1) == 224);
  CHECK(run(tensor.view(), 0, 3, 0).size() == 0);
}

TEST_CASE("a reversed axis is walked from its end, and twice reversed is itself") {
  Tensor<int, 3> tensor = labelled();
  const auto back = reversed(tensor.view(), 1);
  for (int j = 0; j < 4; ++j) CHECK(back(1, j, 2) == 100 + 10 * (3 - j) + 2);
  const auto again = reversed(back, 1);
  CHECK(again.data == tensor.data());
  CHECK(again.strides[1] == 5);
  CHECK(run(back, 1, 1, 2)(0, 0, 0) == 20);
  const TensorView<int, 1> empty{tensor.data(), {0}, {1}};
  CHECK(reversed(empty, 0).data == tensor.data());
}

TEST_CASE("transposing exchanges two axes") {
  Tensor<int, 3> tensor = labelled();
  const auto turned = transposed(tensor.view(), 0, 2);
  CHECK(has_extents(turned, 5, 4, 3));
  CHECK(turned(4, 1, 2) == 214);
  CHECK_FALSE(unit_last_stride(turned));
  CHECK(unit_last_stride(tensor.view()));
}

TEST_CASE("stride zero repeats an element and is no place to write") {
  int number = 9;
  const TensorView<int, 2> repeated{&number, {3, 4}, {0, 0}};
  CHECK(repeated(2, 3) == 9);
  CHECK(readable(repeated));
  CHECK_FALSE(writable(repeated));
  CHECK(writable(TensorView<int, 2>{&number, {1, 1}, {0, 0}}));
}

TEST_CASE("absent, empty and negative extents are told apart") {
  int number = 0;
  CHECK_FALSE(TensorView<int, 2>{}.present());
  CHECK(readable(TensorView<int, 2>{}));
  CHECK(readable(TensorView<int, 2>{nullptr, {0, 5}, {5, 1}}));
  CHECK_FALSE(readable(TensorView<int, 2>{nullptr, {1, 5}, {5, 1}}));
  CHECK_FALSE(readable(TensorView<int, 1>{&number, {-1}, {1}}));
  CHECK(readable(TensorView<int, 1>{&number, {1}, {1}}));
}

TEST_CASE("a last axis of one entry needs no unit stride") {
  int number = 0;
  CHECK(unit_last_stride(TensorView<int, 2>{&number, {1, 1}, {1, 77}}));
  CHECK_FALSE(unit_last_stride(TensorView<int, 2>{&number, {1, 2}, {1, 77}}));
}

TEST_CASE("extents compare across element types") {
  Tensor<int, 2> a(2, 3);
  Tensor<double, 2> b(2, 3), c(3, 2);
  CHECK(same_extents(a.view(), b.view()));
  CHECK_FALSE(same_extents(a.view(), c.view()));
  CHECK(has_extents(a.view(), 2, 3));
  CHECK_FALSE(has_extents(a.view(), 2, 4));
}

TEST_CASE("a read-only view sees the same elements") {
  Tensor<int, 3> tensor = labelled();
  const TensorView<int, 3> view = transposed(tensor.view(), 0, 1);
  const TensorView<const int, 3> fixed = view;
  CHECK(same_extents(view, fixed));
  CHECK(&fixed(3, 2, 1) == &view(3, 2, 1));
}

TEST_CASE("tensors own their memory: copies are deep, moves leave nothing behind") {
  Tensor<int, 3> tensor = labelled();
  Tensor<int, 3> copy = tensor;
  copy(0, 0, 0) = -1;
  CHECK(tensor(0, 0, 0) == 0);
  CHECK(copy(2, 3, 4) == 234);
  const int* memory = copy.data();
  Tensor<int, 3> moved = std::move(copy);
  CHECK(moved.data() == memory);
  CHECK(reinterpret_cast<std::uintptr_t>(memory) % 64 == 0);
  tensor = std::move(moved);
  CHECK(tensor.data() == memory);
  CHECK(Tensor<float, 2>(0, 4).size() == 0);
  CHECK(Tensor<float, 2>({2, 2}, 3.f)(1, 1) == 3);
}
