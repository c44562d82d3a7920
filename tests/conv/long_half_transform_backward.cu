// Gradients of long convolutions of 16-bit data by transforms on tensor cores.
#include <cmath>

#include "conv/compiled_once.cuh"
#include "conv/long_cuda.cuh"

namespace chela::test {

inline std::vector<LongCase> half_transform_gradients() {
  std::vector<LongCase> cases;
  for (Index tokens : {1, 255, 257, 513, 700, 1024, 1025, 1537, 2047, 2049, 3073, 4097, 6145, 8193, 12289}) {
    const Index channels = tokens > 4096 ? 1 : 3;
    cases.push_back({.batch = tokens > 2048 ? Index(2) : Index(5),
                     .tokens = tokens,
                     .channels = channels,
                     .taps = tokens,
                     .skip = true,
                     .layout = Layout::tokens_last});
  }
  for (Index tokens : {1, 8, 255, 700})
    cases.push_back({.batch = 2, .tokens = tokens, .channels = tokens == 255 ? 72 : 16, .taps = tokens});
  cases.push_back({.batch = 40, .tokens = 100, .channels = 3, .taps = 100, .layout = Layout::tokens_last});
  cases.push_back(
      {.batch = 2, .tokens = 9000, .channels = 1, .taps = 9000, .back_taps = 8999, .layout = Layout::tokens_last});
  for (Layout layout : {Layout::tokens_last, Layout::channels_last}) {
    cases.push_back({.batch = 19, .tokens = 300, .channels = 70, .taps = 280, .back_taps = 299, .layout = layout});
    cases.push_back({.batch = 9, .tokens = 2100, .channels = 2, .taps = 17, .back_taps = 2000, .layout = layout});
    for (Index tokens : {1, 130, 700, 2100})
      for (Index taps : {2, 200, 1024, 4097})
        for (Index back_taps : {0, 50})
          cases.push_back({.batch = 1,
                           .tokens = tokens,
                           .channels = 3,
                           .taps = taps,
                           .back_taps = back_taps,
                           .state = true,
                           .skip = true,
                           .layout = layout});
  }
  return cases;
}

TEST_CASE_TEMPLATE("gradients", T, __nv_bfloat16, __half) {
  for (const LongCase& c : half_transform_gradients()) check_backward<in_halves, T>(c);
}

/// Sum of the products of all elements.
template <class T>
double inner(const Tensor<T, 3>& a, const Tensor<T, 3>& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i)
    sum += double(static_cast<float>(a.data()[i])) * double(static_cast<float>(b.data()[i]));
  return sum;
}

TEST_CASE("the input gradient is the adjoint") {
  using T = __nv_bfloat16;
  for (Index tokens : {500, 1000, 5000}) {
    const LongInputs<T> in(
        {.batch = 2, .tokens = tokens, .channels = 3, .taps = tokens, .back_taps = 40, .layout = Layout::tokens_last});
    const Tensor<T, 3> y = long_conv_on_device<in_halves>(in).y, grad_x = long_conv_backward_on_device<in_halves>(in).x;
    const double off = inner(y, in.p.grad_y) - inner(in.p.x, grad_x);
    CHECK(std::abs(off) < long_conv_tolerance<T>() * std::sqrt(inner(y, y) * inner(in.p.grad_y, in.p.grad_y)));
  }
}

}  // namespace chela::test
