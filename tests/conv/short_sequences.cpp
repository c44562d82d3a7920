// The short convolution over sequences: states passed on, steps on a ring, pools of states, ragged batches.
#include <doctest/doctest.h>

#include <vector>

#include "short_problem.hpp"
#include "support/gradients.hpp"

using namespace chela;
using namespace chela::test;

namespace {

constexpr Activation silu = Activation::silu;
const SerialExecutor serial;

/// Lengths of packed sequences: empty ones, shorter than the state, across runs of 256 and 512 tokens.
const std::vector<Index> lengths = {0, 3, 1, 0, 0, 250, 7, 2, 300, 12, 40, 0};

template <class I>
std::vector<I> offsets_of(const std::vector<Index>& counts) {
  std::vector<I> offsets = {0};
  for (Index count : counts) offsets.push_back(I(offsets.back() + count));
  return offsets;
}

template <class I>
IndexView index_view(const std::vector<I>& values) {
  return IndexView(values.data(), Index(values.size()));
}

/// A ring whose oldest row is `steps` % rows, from a state that is oldest first.
template <class T>
Tensor<T, 3> rotated(const Tensor<T, 3>& state, Index steps) {
  Tensor<T, 3> ring(state.extents());
  const Index rows = state.extents()[1];
  for_each_index(state.view(), [&](Index i, Index s, Index d) { ring(i, (s + steps) % rows, d) = state(i, s, d); });
  return ring;
}

}  // namespace

TEST_CASE("calls that pass the state on equal one call, bit for bit") {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    for (bool by_channel : {false, true}) {
      CAPTURE(Width);
      CAPTURE(by_channel);
      Problem<float, Width> p({2, 53, 18});
      ByChannel<float> x(p.x.view());
      REQUIRE(cpu::short_conv<Width, silu>(p.args(), serial).ok());
      auto state = p.initial_state;
      auto y = nan_tensor<float>(2, 53, 18);
      Index begin = 0;
      for (Index count : {1, 0, 2, 3, 7, 10, 30}) {  // some shorter than the state, which then shifts in place
        auto piece = p.args();
        if (by_channel) piece.x = x.view();
        piece.x = run(piece.x, 1, begin, count), piece.y = run(y.view(), 1, begin, count);
        piece.initial_state = state, piece.final_state = state;
        REQUIRE(cpu::short_conv<Width, silu>(piece, serial).ok());
        begin += count;
      }
      CHECK(same_bits(y, p.y));
      CHECK(same_bits(state, p.final_state));
    }
  };
  check_width(std::integral_constant<int, 5>{});
  check_width(std::integral_constant<int, 12>{});
}

TEST_CASE_TEMPLATE("steps equal one call, bit for bit, in place", T, float, Eigen::bfloat16) {
  constexpr int width = 4;
  for (Index channels : {1, 16, 37}) {
    CAPTURE(channels);
    Problem<T, width> p({3, 10, channels});
    REQUIRE(cpu::short_conv<width, silu>(p.args(), serial).ok());
    auto state = p.initial_state;
    auto x = p.x;
    for (Index t = 0; t < 10; ++t) {
      const auto token = slice_axis<1>(x.view(), t);
      REQUIRE(cpu::short_conv_step<width, silu>(
                  ShortConvStepArgs<T>{
                      .x = token, .taps = p.taps, .bias = p.bias, .y = token, .state = state, .position = t},
                  serial)
                  .ok());
    }
    CHECK(same_bits(x, p.y));
    CHECK(same_bits(state, rotated(p.final_state, 10)));
  }
}

TEST_CASE("a wide step, one of width 1, and one on strided views") {
  Problem<float, 31> wide({2, 40, 20});
  REQUIRE(cpu::short_conv<31>(wide.args(), serial).ok());
  auto ring = wide.initial_state;
  auto y = nan_tensor<float>(2, 40, 20);
  for (Index t = 0; t < 40; ++t)
    REQUIRE(cpu::short_conv_step<31>(ShortConvStepArgs<float>{.x = slice_axis<1>(wide.x.view(), t),
                                                              .taps = wide.taps,
                                                              .bias = wide.bias,
                                                              .y = slice_axis<1>(y.view(), t),
                                                              .state = ring,
                                                              .position = t},
                                     serial)
                .ok());
  CHECK(same_bits(y, wide.y));

  Problem<float, 4> p({2, 5, 19});
  Strided<float> state(p.initial_state.view()), x(p.x.view()), y_memory(p.y.view());
  REQUIRE(cpu::short_conv<4>(p.args(), serial).ok());
  for (Index t = 0; t < 5; ++t)
    REQUIRE(cpu::short_conv_step<4>(ShortConvStepArgs<float>{.x = slice_axis<1>(x.view, t),
                                                             .taps = p.taps,
                                                             .bias = p.bias,
                                                             .y = slice_axis<1>(y_memory.view, t),
                                                             .state = state.view,
                                                             .position = t},
                                    serial)
                .ok());
  CHECK(relative_error(y_memory.view, p.y.view()) == 0);

  Problem<float, 1> pointwise({2, 1, 20});
  REQUIRE(cpu::short_conv<1>(pointwise.args(), serial).ok());
  auto y1 = nan_tensor<float>(2, 1, 20);
  REQUIRE(cpu::short_conv_step<1>(ShortConvStepArgs<float>{.x = slice_axis<1>(pointwise.x.view(), 0),
                                                           .taps = pointwise.taps,
                                                           .bias = pointwise.bias,
                                                           .y = slice_axis<1>(y1.view(), 0),
                                                           .state = pointwise.initial_state},
                                  serial)
              .ok());
  CHECK(same_bits(y1, pointwise.y));
}

TEST_CASE("sequences of a pool, each at a position of its own") {
  constexpr int width = 4;
  const std::vector<std::int32_t> slots = {5, 0, 3};
  const std::vector<std::int64_t> positions = {7, 0, 2};
  Problem<float, width> p({3, 2, 33});
  auto pool = random_tensor<float>(11, 6, width - 1, 33);
  const auto untouched = pool;
  for (Index i = 0; i < 3; ++i) {
    const auto ring = rotated(p.initial_state, positions[std::size_t(i)]);
    for (Index s = 0; s < width - 1; ++s)
      for (Index d = 0; d < 33; ++d) pool(slots[std::size_t(i)], s, d) = ring(i, s, d);
  }
  const auto as_pooled = [&](Tensor<float, 3>& states) {
    auto args = p.args();
    args.initial_state = states, args.final_state = states;
    args.state_slots = index_view(slots), args.positions = index_view(positions);
    return args;
  };
  REQUIRE(cpu::short_conv<width, silu>(p.args(), serial).ok());
  const auto y = p.y;
  p.y.fill(0);
  auto after_pass = pool;
  REQUIRE(cpu::short_conv<width, silu>(as_pooled(after_pass), serial).ok());
  CHECK(same_bits(y, p.y));

  auto after_steps = pool;
  p.y.fill(0);
  for (Index t = 0; t < 2; ++t) {
    std::vector<std::int64_t> at = positions;
    for (auto& position : at) position += t;
    REQUIRE(cpu::short_conv_step<width, silu>(ShortConvStepArgs<float>{.x = slice_axis<1>(p.x.view(), t),
                                                                       .taps = p.taps,
                                                                       .bias = p.bias,
                                                                       .y = slice_axis<1>(p.y.view(), t),
                                                                       .state = after_steps,
                                                                       .positions = index_view(at),
                                                                       .state_slots = index_view(slots)},
                                              serial)
                .ok());
  }
  CHECK(same_bits(y, p.y));
  for (Index i = 0; i < 3; ++i) {
    const Index slot = slots[std::size_t(i)], steps = positions[std::size_t(i)] + 2;
    for (Index s = 0; s < width - 1; ++s)
      for (Index d = 0; d < 33; ++d) {
        CHECK(after_pass(slot, s, d) == p.final_state(i, s, d));
        CHECK(after_steps(slot, (s + steps) % (width - 1), d) == p.final_state(i, s, d));
      }
  }
  for (Index slot : {1, 2, 4})
    for (Index s = 0; s < width - 1; ++s)
      for (Index d = 0; d < 33; ++d) {
        CHECK(after_pass(slot, s, d) == untouched(slot, s, d));
        CHECK(after_steps(slot, s, d) == untouched(slot, s, d));
      }
}

TEST_CASE_TEMPLATE("ragged sequences equal separate calls, bit for bit", I, std::int32_t, std::int64_t) {
  const auto check_width = []<int Width>(std::integral_constant<int, Width>) {
    const auto offsets = offsets_of<I>(lengths);
    const Index total = offsets.back(), sequences = Index(lengths.size());
    for (bool by_channel : {false, true}) {
      CAPTURE(Width);
      CAPTURE(by_channel);
      Problem<float, Width> p({1, total, 21}, sequences), q({1, total, 21}, sequences);
      ByChannel<float> x(p.x.view());
      const auto inputs = [&](auto args) {
        if (by_channel) args.x = x.view();
        return args;
      };
      auto packed = inputs(p.args());
      auto packed_backward = inputs(p.backward_args());
      packed.cu_seqlens = packed_backward.cu_seqlens = index_view(offsets);
      REQUIRE(cpu::short_conv<Width, silu>(packed, serial).ok());
      REQUIRE(cpu::short_conv_backward<Width, silu>(packed_backward, serial).ok());

      Tensor<double, 2> taps(21, Width);
      Tensor<double, 1> bias(21);
      for (Index i = 0; i < sequences; ++i) {
        const Index begin = offsets[std::size_t(i)], count = lengths[std::size_t(i)];
        const auto cut = [&](auto& view) { view = run(view, 1, begin, count); };
        const auto own = [&](auto& view) { view = run(view, 0, i, 1); };
        auto args = inputs(q.args());
        cut(args.x), cut(args.y), own(args.initial_state), own(args.final_state);
        REQUIRE(cpu::short_conv<Width, silu>(args, serial).ok());
        auto backward = inputs(q.backward_args());
        cut(backward.x), cut(backward.grad_y), cut(backward.grad_x), own(backward.initial_state);
        own(backward.grad_final_state), own(backward.grad_initial_state);
        REQUIRE(cpu::short_conv_backward<Width, silu>(backward, serial).ok());
        for_each_index(taps.view(), [&](Index d, Index j) { taps(d, j) += double(q.grad_taps(d, j)); });
        for_each_index(bias.view(), [&](Index d) { bias(d) += double(q.grad_bias(d)); });
      }
      CHECK(same_bits(p.y, q.y));
      CHECK(same_bits(p.final_state, q.final_state));
      CHECK(same_bits(p.grad_x, q.grad_x));
      CHECK(same_bits(p.grad_initial_state, q.grad_initial_state));
      CHECK(relative_error(p.grad_taps, taps) < tolerance<float>(total));
      CHECK(relative_error(p.grad_bias, bias) < tolerance<float>(total));
    }
  };
  check_width(std::integral_constant<int, 4>{});
  if constexpr (sizeof(I) == 8) check_width(std::integral_constant<int, 17>{});
}

TEST_CASE("gradients of ragged sequences and their states match finite differences") {
  constexpr int width = 4;
  const auto offsets = offsets_of<std::int32_t>({2, 0, 5, 1});
  Problem<double, width> p({1, 8, 3}, 4);
  auto args = p.args();
  auto backward = p.backward_args();
  args.cu_seqlens = backward.cu_seqlens = index_view(offsets);
  const auto loss = [&] {
    REQUIRE(cpu::short_conv<width, silu>(args, serial).ok());
    return weighted_sum<3>(p.y, p.grad_y) + weighted_sum<3>(p.final_state, p.grad_final_state);
  };
  REQUIRE(cpu::short_conv_backward<width, silu>(backward, serial).ok());
  CHECK(gradient_error<3>(loss, p.x, p.grad_x) < gradient_tolerance);
  CHECK(gradient_error<2>(loss, p.taps, p.grad_taps) < gradient_tolerance);
  CHECK(gradient_error<1>(loss, p.bias, p.grad_bias) < gradient_tolerance);
  CHECK(gradient_error<3>(loss, p.initial_state, p.grad_initial_state) < gradient_tolerance);
}

TEST_CASE("without tokens the state passes through") {
  Problem<float, 4> p({2, 0, 5});
  REQUIRE(cpu::short_conv<4>(p.args(), serial).ok());
  CHECK(same_bits(p.final_state, p.initial_state));
  REQUIRE(cpu::short_conv_backward<4>(p.backward_args(), serial).ok());
  CHECK(same_bits(p.grad_initial_state, p.grad_final_state));
  for (float g : p.grad_taps) CHECK(g == 0);
  for (float g : p.grad_bias) CHECK(g == 0);
}

TEST_CASE("offsets, slots and positions that do not fit are refused before anything is written") {
  using Indices = std::vector<std::int64_t>;
  Problem<float, 4> p({1, 9, 5}, 3);
  const auto refuses = [&](Status s, Code code, const char* argument) {
    CHECK(names(s, argument));
    CHECK(s.code == code);
    for (float y : p.y) CHECK(std::isnan(y));
    for (float g : p.grad_x) CHECK(std::isnan(g));
  };
  for (const Indices& offsets : {Indices{1, 3, 5, 9}, {0, 5, 3, 9}, {0, 3, 5, 8}, {0, 3, 5, 10}, {0, -1, 5, 9}}) {
    auto args = p.args();
    auto backward = p.backward_args();
    args.cu_seqlens = backward.cu_seqlens = index_view(offsets);
    refuses(cpu::short_conv<4>(args, serial), Code::bad_value, "cu_seqlens");
    refuses(cpu::short_conv_backward<4>(backward, serial), Code::bad_value, "cu_seqlens");
  }
  const Indices offsets = {0, 3, 3, 9}, fewer = {0, 9}, none = {};
  auto args = p.args();
  args.cu_seqlens = index_view(fewer);
  refuses(cpu::short_conv<4>(args, serial), Code::bad_shape, "initial_state");
  auto backward = p.backward_args();
  backward.cu_seqlens = index_view(fewer);
  refuses(cpu::short_conv_backward<4>(backward, serial), Code::bad_shape, "initial_state");
  args.cu_seqlens = IndexView(fewer.data(), 0);
  refuses(cpu::short_conv<4>(args, serial), Code::bad_shape, "cu_seqlens");
  Problem<float, 4> two({2, 9, 5}, 3);
  auto batched = two.args();
  batched.cu_seqlens = index_view(offsets);
  refuses(cpu::short_conv<4>(batched, serial), Code::bad_shape, "cu_seqlens");

  args = p.args(), args.cu_seqlens = index_view(offsets);
  for (const Indices& slots : {Indices{0, 1, 3}, {0, -1, 2}, {1, 0, 1}}) {
    auto pooled = args;
    pooled.state_slots = index_view(slots);
    refuses(cpu::short_conv<4>(pooled, serial), Code::bad_value, "state_slots");
  }
  args.state_slots = index_view(fewer);
  refuses(cpu::short_conv<4>(args, serial), Code::bad_shape, "state_slots");
  args.state_slots = {}, args.positions = index_view(fewer);
  refuses(cpu::short_conv<4>(args, serial), Code::bad_shape, "positions");
  const Indices negative = {0, 1, -1};
  args.positions = index_view(negative);
  refuses(cpu::short_conv<4>(args, serial), Code::bad_value, "position");

  const auto token = slice_axis<1>(two.x.view(), 0);
  ShortConvStepArgs<float> step{.x = token, .taps = two.taps, .bias = two.bias, .y = token};
  CHECK(names(cpu::short_conv_step<4>(step, serial), "state"));
  step.state = two.initial_state;
  CHECK(names(cpu::short_conv_step<4>(step, serial), "state"));  // three for two sequences
  const Indices slots = {0, 3};
  step.state_slots = index_view(slots);
  CHECK(names(cpu::short_conv_step<4>(step, serial), "state_slots"));
  step.state_slots = {}, step.state = run(two.initial_state.view(), 0, 0, 2), step.position = -1;
  CHECK(names(cpu::short_conv_step<4>(step, serial), "position"));
}
