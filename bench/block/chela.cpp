// The CHELA block on the CPU: tokens per second, and the share of the machine's matrix product rate that its products
// reach. The convolutions count for nothing in that share, so it says what the whole block costs next to its products
// alone.
#include "chela/cpu/block/chela.hpp"

#include <vector>

#include "chela/model/initialize.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using test::random_tensor;

namespace {

using Plain = ChelaBlock<ShortLongMemory<ExplicitKernel, 4>>;
using MegaLike = ChelaBlock<EmaMemory<4>, LinearAttentionMixer, UpdateGate>;

template <class Block>
struct Problem {
  using Run = cpu::Compute<Block>;
  typename Block::Shape shape;
  std::vector<float> values, gradients;
  Tensor<float, 3> x, y, grad_y, grad_x;
  typename Run::template Cache<float> cache;
  typename Run::template Scratch<float> scratch;

  Problem(Index batch, Index tokens, Index width, Index heads) {
    shape.width = width, shape.heads = heads, shape.key_dim = shape.value_dim = width / heads;
    shape.feed_forward.hidden = 2 * width;
    if constexpr (requires { shape.memory.kernel.length; }) shape.memory.kernel.length = 128;
    values.resize(std::size_t(parameter_count<Block>(shape)));
    gradients.resize(values.size());
    initialize_parameters(describe_parameters<Block>(shape), 1, values.data());
    x = random_tensor<float>(2, batch, tokens, width), grad_y = random_tensor<float>(3, batch, tokens, width);
    y = grad_x = Tensor<float, 3>(batch, tokens, width);
  }
  auto parameters() const { return bind_parameters<Block, const float>(shape, values.data()); }
  Status forward(const BenchExecutor& executor) { return Run::forward(shape, parameters(), x, y, cache, executor); }
  Status backward(const BenchExecutor& executor) {
    return Run::backward(shape, parameters(), cache, x, grad_y, grad_x, bind_parameters<Block>(shape, gradients.data()),
                         scratch, executor);
  }

  /// Whether the last answer in y is that of the same block in double, on its first sequence.
  bool right() const {
    const auto exact = test::converted<double>(contiguous(values.data(), Index(values.size())));
    const auto first = run(x.view(), 0, 0, 1);
    const auto in = test::converted<double>(first);
    Tensor<double, 3> want(in.extents());
    typename Run::template Cache<double> exact_cache;
    const auto p = bind_parameters<Block, const double>(shape, exact.data());
    return Run::forward(shape, p, in, want, exact_cache, SerialExecutor{}).ok() &&
           test::relative_error(run(y.view(), 0, 0, 1), std::as_const(want).view()) <
               test::tolerance<float>(8 * x.extents()[1] * shape.key_dim);
  }

  /// Floating point operations of the products of one token.
  double work() const {
    const auto in_and_out = [](const Projection::Shape& p) { return double(p.in * p.out); };
    return 2 * (in_and_out(shape.from_memory_shape()) + in_and_out(shape.value_shape()) +
                in_and_out(shape.output_shape()) + in_and_out(shape.feed_forward_shape().expand()) +
                in_and_out(shape.feed_forward_shape().contract())) +
           4.0 * double(shape.heads * shape.key_dim * shape.value_dim);
  }
};

enum class Pass { forward, training, step };

template <class Block, Pass pass>
void chela_block(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1);
  const int threads = int(state.range(4));
  const BenchExecutor executor = executor_of(threads);
  Problem<Block> p(batch, tokens, state.range(2), state.range(3));
  if (!p.forward(executor).ok() || !p.right()) return state.SkipWithError("wrong answer");
  const double gemm = gemm_rate(threads);

  using Run = cpu::Compute<Block>;
  const auto prepared = Run::template prepare<float>(p.shape, p.parameters(), executor);
  typename Run::template State<float> carried(p.shape, batch);
  Tensor<float, 2> in(batch, p.shape.width), out(batch, p.shape.width);
  const double seconds = time_iterations(state, [&] {
    Status status;
    if constexpr (pass == Pass::step)
      status = Run::step(p.shape, p.parameters(), prepared, in, out, carried, executor);
    else
      status = p.forward(executor);
    if constexpr (pass == Pass::training) status = first_failure(status, p.backward(executor));
    if (!status.ok()) state.SkipWithError(status.why);
  });
  const double count = double(pass == Pass::step ? batch : batch * tokens);
  state.counters["share_of_gemm"] = p.work() * count * (pass == Pass::training ? 3 : 1) / seconds / gemm;
  state.counters["tokens_per_second"] = count / seconds;
  if (pass == Pass::step) state.counters["state_bytes"] = double(carried.bytes());
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "D", "H", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) {
    b->Args({8, 512, 128, 4, threads});
    b->Args({4, 2048, 512, 8, threads});
  }
}
void step_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "D", "H", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  b->Args({1, 64, 128, 4, 1});
  b->Args({32, 64, 512, 8, 1});
}

BENCHMARK(chela_block<Plain, Pass::forward>)->Name("chela_block/short_long/forward")->Apply(shapes);
BENCHMARK(chela_block<Plain, Pass::training>)->Name("chela_block/short_long/training")->Apply(shapes);
BENCHMARK(chela_block<MegaLike, Pass::training>)->Name("chela_block/ema_update_gate/training")->Apply(shapes);
BENCHMARK(chela_block<Plain, Pass::step>)->Name("chela_block/short_long/step")->Apply(step_shapes);
BENCHMARK(chela_block<MegaLike, Pass::step>)->Name("chela_block/ema_update_gate/step")->Apply(step_shapes);

}  // namespace
