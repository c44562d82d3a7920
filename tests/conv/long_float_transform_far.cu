// Transforms in float that pass through memory on a GPU, up to 2^20 tokens, against sums in double at sampled places.
#include "conv/long_cuda.cuh"

namespace chela::test {

constexpr LongConvPolicy in_floats{.method = LongConvMethod::transform, .arithmetic = TransformArithmetic::accumulator};

/// Root mean square of the differences over that of the sums, at places near both ends and between.
template <class Got, class Want>
double sampled_error(Index size, Index rows, const Got& got, const Want& want) {
  double difference = 0, norm = 0;
  for (Index i = 0; i < 40; ++i) {
    const Index t = i < 8 ? i : i < 16 ? size - 1 - (i - 8) : (i * 104729) % size;
    for (Index r = 0; r < rows; ++r) {
      const double w = want(t, r), g = double(got(t, r));
      difference += (g - w) * (g - w), norm += w * w;
    }
  }
  return std::sqrt(difference / norm);
}

template <class T>
void check_far(const LongCase& c) {
  CAPTURE(c);
  const LongInputs<T> in(c);
  const LongProblem<double> p = in.p.in_double();
  const LongOutputs<T> got = long_conv_on_device<in_floats>(in);
  const LongGradientOutputs<T> gradient = long_conv_backward_on_device<in_floats>(in),
                               again = long_conv_backward_on_device<in_floats>(in);
  CHECK(same_bits(got.y, long_conv_on_device<in_floats>(in).y));
  CHECK(same_bits(gradient.x, again.x));
  CHECK(same_bits(gradient.taps, again.taps));
  const double bound = long_conv_tolerance<T>();
  const Index history = c.taps - 1, last = c.batch - 1;
  const auto input = [&](Index b, Index t, Index d) {
    return t >= 0 ? p.x(b, t, d) : c.state && t + history >= 0 ? p.state(b, t + history, d) : 0.0;
  };
  const auto kernel = [&](Index d, Index lag) { return lag >= 0 ? p.taps(d, lag) : p.back_taps(d, -lag - 1); };
  const auto output = [&](Index t, Index d) {
    double sum = c.skip ? p.skip(d) * input(last, t, d) : 0.0;
    for (Index lag = -std::min(c.back_taps, c.tokens - 1 - t); lag < std::min(c.taps, t + 1 + (c.state ? history : 0));
         ++lag)
      sum += kernel(d, lag) * input(last, t - lag, d);
    return sum;
  };
  const auto grad_input = [&](Index t, Index d) {
    double sum = c.skip && t >= 0 ? p.skip(d) * p.grad_y(last, t, d) : 0.0;
    for (Index lag = -c.back_taps; lag < c.taps; ++lag)
      if (t + lag >= 0 && t + lag < c.tokens) sum += kernel(d, lag) * p.grad_y(last, t + lag, d);
    return sum;
  };
  const auto grad_kernel = [&](Index lag, Index d) {
    double sum = 0;
    for (Index b = 0; b < c.batch; ++b)
      for (Index t = 0; t < c.tokens; ++t)
        if (t - lag < c.tokens) sum += p.grad_y(b, t, d) * input(b, t - lag, d);
    return sum;
  };
  CHECK(sampled_error(
            c.tokens, c.channels, [&](Index t, Index d) { return float(got.y(last, t, d)); }, output) < bound);
  CHECK(sampled_error(
            c.taps, c.channels, [&](Index j, Index d) { return gradient.taps(d, j); }, grad_kernel) < bound);
  if (c.back_taps > 0)
    CHECK(sampled_error(
              c.back_taps, c.channels, [&](Index j, Index d) { return gradient.back_taps(d, j); },
              [&](Index j, Index d) { return grad_kernel(-1 - j, d); }) < bound);
  if (c.state) {
    CHECK(sampled_error(
              history, c.channels, [&](Index r, Index d) { return float(gradient.state(last, r, d)); },
              [&](Index r, Index d) {
                const Index from = r - c.tokens;  // of what flows into the final state
                return grad_input(r - history, d) + (from >= 0 ? double(in.grad_final_state(last, from, d)) : 0.0);
              }) < bound);
    return;
  }
  CHECK(sampled_error(
            c.tokens, c.channels, [&](Index t, Index d) { return float(gradient.x(last, t, d)); }, grad_input) < bound);
}

TEST_CASE_TEMPLATE("sequences longer than a thread block's rows", T, float, __nv_bfloat16, __half) {
  for (Index tokens : {16385, 24576, 24577, 32749, 32768, 40000, 65536, 65537, 98304, 131071, 131072, 190000})
    check_far<T>({.batch = 2,
                  .tokens = tokens,
                  .channels = tokens == 32749 || tokens == 131071 ? 9 : 2,
                  .taps = tokens,
                  .skip = true,
                  .layout = tokens % 4 == 0 ? Layout::tokens_last : Layout::channels_last});
}

TEST_CASE_TEMPLATE("two sides and states", T, float, __nv_bfloat16) {
  check_far<T>({.batch = 1, .tokens = 20011, .channels = 2, .taps = 9001, .back_taps = 20010, .skip = true});
  check_far<T>({.batch = 2, .tokens = 9001, .channels = 9, .taps = 30011, .state = true});
  check_far<T>({.batch = 1,
                .tokens = 33000,
                .channels = 2,
                .taps = 31000,
                .back_taps = 777,
                .state = true,
                .layout = Layout::tokens_last});
}

TEST_CASE_TEMPLATE("up to 2^20 tokens", T, float, __nv_bfloat16) {
  for (Index tokens : {262144, 262147, 500009, 786432, 1 << 20})
    check_far<T>({.batch = 1, .tokens = tokens, .channels = 1, .taps = tokens, .layout = Layout::tokens_last});
}

/// Points of 16-bit data lie in halves, with scales that are powers of two: what is a power of two larger has the same
/// bits but for the exponent, far outside of a half's range.
TEST_CASE("scales of the data change no bits") {
  for (Layout layout : {Layout::channels_last, Layout::tokens_last}) {
    const LongCase c{.batch = 1, .tokens = 20000, .channels = 9, .taps = 20000, .skip = true, .layout = layout};
    LongInputs<__nv_bfloat16> in(c);
    const LongOutputs<__nv_bfloat16> once = long_conv_on_device<in_floats>(in);
    for (float scale : {0x1p60f, 0x1p-60f}) {
      LongInputs<__nv_bfloat16> scaled(c);
      for_each_index(scaled.p.x.view(), [&](Index b, Index t, Index d) {
        scaled.p.x(b, t, d) = __nv_bfloat16(float(in.p.x(b, t, d)) * scale);
      });
      const LongOutputs<__nv_bfloat16> got = long_conv_on_device<in_floats>(scaled);
      Tensor<float, 3> want(1, c.tokens, c.channels), found(1, c.tokens, c.channels);
      for_each_index(want.view(), [&](Index b, Index t, Index d) {
        want(b, t, d) = float(once.y(b, t, d)) * scale, found(b, t, d) = float(got.y(b, t, d));
      });
      CHECK(same_bits(found, want));
    }
  }
}

/// The offsets leave room for many short sequences and for one that takes columns.
TEST_CASE_TEMPLATE("packed sequences, one of them long", T, float, __nv_bfloat16) {
  std::vector<Index> lengths(40, 3);
  lengths[7] = 17000, lengths[20] = 300, lengths[30] = 18000;
  const LongCase c = packed({.channels = 2, .taps = 50, .skip = true}, lengths);
  check_forward<in_floats, T>(c);
  check_backward<in_floats, T>(c);
}

}  // namespace chela::test
