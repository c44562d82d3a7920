#pragma once
// Long convolutions too long for sums over all of it, at sampled places.
#include "conv/long_cuda.cuh"

namespace chela::test {

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

template <LongConvPolicy P, class T>
void check_far(const LongCase& c) {
  CAPTURE(c);
  const LongInputs<T> in(c);
  const LongProblem<double> p = in.p.in_double();
  const LongOutputs<T> got = long_conv_on_device<P>(in);
  const LongGradientOutputs<T> gradient = long_conv_backward_on_device<P>(in),
                               again = long_conv_backward_on_device<P>(in);
  CHECK(same_bits(got.y, long_conv_on_device<P>(in).y));
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

}  // namespace chela::test
