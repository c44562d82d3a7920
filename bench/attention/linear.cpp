// Linear attention on the CPU: share of the machine's matrix product rate, against the plain Eigen recurrence.
#include "chela/cpu/attention/linear.hpp"

#include <vector>

#include "chela/reference/linear.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using test::random_tensor;

namespace {

struct Problem {
  Tensor<float, 4> q, k, v, o, grad_o, grad_q, grad_k, grad_v, state;

  Problem(Index batch, Index tokens, Index heads, Index key_dim, Index value_dim)
      : q(random_tensor<float>(1, batch, tokens, heads, key_dim)),
        k(random_tensor<float>(2, batch, tokens, heads, key_dim)),
        v(random_tensor<float>(3, batch, tokens, heads, value_dim)),
        o(batch, tokens, heads, value_dim),
        grad_o(random_tensor<float>(4, batch, tokens, heads, value_dim)),
        grad_q(q.extents()),
        grad_k(k.extents()),
        grad_v(v.extents()),
        state(batch, heads, key_dim, value_dim) {}

  LinearAttentionArgs<float> args() { return {.q = q, .k = k, .v = v, .o = o}; }
  LinearAttentionBackwardArgs<float> backward_args() {
    return {.q = q, .k = k, .v = v, .grad_o = grad_o, .grad_q = grad_q, .grad_k = grad_k, .grad_v = grad_v};
  }
  LinearAttentionStepArgs<float> step_args() {
    return {.q = slice_axis<1>(q.view(), 0),
            .k = slice_axis<1>(k.view(), 0),
            .v = slice_axis<1>(v.view(), 0),
            .o = slice_axis<1>(o.view(), 0),
            .state = state};
  }
};

/// The recurrence as one writes it with Eigen at first, one head after the other.
void eigen_recurrence(Problem& p, const BenchExecutor& executor) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto [batch, tokens, heads, key_dim] = p.q.extents();
  const Index value_dim = p.v.extents()[3];
  executor.for_each(batch * heads, [&, tokens = tokens, heads = heads, key_dim = key_dim](Index task, int) {
    const Index b = task / heads, h = task % heads;
    Matrix s = Matrix::Zero(key_dim, value_dim);
    for (Index t = 0; t < tokens; ++t) {
      Eigen::Map<const Eigen::VectorXf> q(&p.q(b, t, h, 0), key_dim), k(&p.k(b, t, h, 0), key_dim),
          v(&p.v(b, t, h, 0), value_dim);
      Eigen::Map<Eigen::VectorXf> o(&p.o(b, t, h, 0), value_dim);
      s.noalias() += k * v.transpose();
      o.noalias() = s.transpose() * q / std::sqrt(float(key_dim));
    }
  });
}

/// Whether the last answer in p.o is right, judged on its first batch entry and head.
bool right(Problem& p) {
  const auto head = [](auto x) { return test::converted<double>(run(run(x, 0, 0, 1), 2, 0, 1)); };
  const auto q = head(std::as_const(p.q).view()), k = head(std::as_const(p.k).view()),
             v = head(std::as_const(p.v).view());
  Tensor<double, 4> want(v.extents());
  reference::linear_attention({.q = q, .k = k, .v = v, .scale = 1 / std::sqrt(double(q.extents()[3]))}, want);
  return test::relative_error(run(run(p.o.view(), 0, 0, 1), 2, 0, 1), want.view()) <
         test::tolerance<float>(p.q.extents()[1] * p.q.extents()[3]);
}

enum class Pass { forward, backward, step };

template <ChunkPolicy P, Pass pass>
void linear_attention(benchmark::State& state) {
  const Index batch = state.range(0), tokens = pass == Pass::step ? 1 : state.range(1), heads = state.range(2);
  const Index key_dim = state.range(3), value_dim = state.range(4);
  const int threads = int(state.range(5));
  const BenchExecutor executor = executor_of(threads);
  Problem p(batch, tokens, heads, key_dim, value_dim);

  if (!cpu::linear_attention<P>(p.args(), executor).ok() || !right(p)) return state.SkipWithError("wrong answer");
  const double baseline = pass == Pass::forward ? least_seconds(3, [&] { eigen_recurrence(p, executor); }) : 0;
  const double gemm = gemm_rate(threads), copy = copy_rate(threads);

  const double seconds = time_iterations(state, [&] {
    Status status;
    if constexpr (pass == Pass::forward) status = cpu::linear_attention<P>(p.args(), executor);
    if constexpr (pass == Pass::backward) status = cpu::linear_attention_backward<P>(p.backward_args(), executor);
    if constexpr (pass == Pass::step) status = cpu::linear_attention_step(p.step_args(), executor);
    if (!status.ok()) state.SkipWithError(status.why);
  });

  // Useful work: two multiply-adds for each state element and token; three passes of that for the gradients.
  const double work =
      double(batch * tokens * heads) * 4.0 * double(key_dim * value_dim) * (pass == Pass::backward ? 3 : 1);
  state.counters["share_of_gemm"] = work / seconds / gemm;
  if (pass == Pass::step)
    state.counters["share_of_copy"] = 2.0 * sizeof(float) * double(p.state.size()) / seconds / copy;
  if (pass == Pass::forward) state.counters["times_baseline"] = baseline / seconds;
  state.counters["tokens_per_second"] = double(batch * tokens) / seconds;
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  const int most = BenchExecutor{}.workers();
  for (int threads = 1; threads <= most; threads *= 2) {
    b->Args({1, 4096, 8, 64, 64, threads});
    b->Args({1, 4096, 8, 128, 128, threads});
  }
}
void step_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) b->Args({256, 1, 16, 128, 128, threads});
}

constexpr ChunkPolicy recurrent{};
constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked};

BENCHMARK(linear_attention<recurrent, Pass::forward>)->Name("linear_attention/recurrent/forward")->Apply(shapes);
BENCHMARK(linear_attention<chunked, Pass::forward>)->Name("linear_attention/chunked/forward")->Apply(shapes);
BENCHMARK(linear_attention<recurrent, Pass::backward>)->Name("linear_attention/recurrent/backward")->Apply(shapes);
BENCHMARK(linear_attention<recurrent, Pass::step>)->Name("linear_attention/recurrent/step")->Apply(step_shapes);

}  // namespace
