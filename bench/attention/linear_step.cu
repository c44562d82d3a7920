// One token of linear attention on a GPU: the state read once and written once, over time, as a share of a copy. Calls
// rotate among state pools that together are far larger than the second-level cache.
#include "chela/cuda/attention/linear_step.cuh"

#include <memory>

#include "support/device_arrays.cuh"

using namespace chela;
using namespace chela::bench;

namespace {

using Element = __nv_bfloat16;

template <StateLayout L>
struct Form : LinearAttentionForm {
  static constexpr StateLayout state_layout = L;
};

template <DecayKind D, RuleKind R, StateLayout L>
struct Buffers {
  Array<Element, Index, Index, Index> q, k, v, o;
  Array<float, Index, Index, Index, Index> state;
  Array<float, Index, Index, Index> log_decay;
  Array<float, Index, Index> beta;

  Buffers(std::uint32_t seed, Index batch, Index heads, Index dim)
      : q(seed, -1, 1, batch, heads, dim),
        k(seed + 1, -0.1f, 0.1f, batch, heads, dim),
        v(seed + 2, -1, 1, batch, heads, dim),
        o(seed + 3, 0, 0, batch, heads, dim),
        state(seed + 4, -1, 1, batch, heads, dim, dim),
        log_decay(seed + 5, -0.2f, 0, batch, heads, dim),
        beta(seed + 6, 0, 1, batch, heads) {}

  auto args() const {
    LinearAttentionStepArgs<Element, D, R, Form<L>> a{
        .q = q.view, .k = k.view, .v = v.view, .o = o.view, .state = state.view};
    if constexpr (D == DecayKind::per_token) a.log_decay = slice_axis<2>(log_decay.view, 0);
    if constexpr (D == DecayKind::per_key) a.log_decay = log_decay.view;
    if constexpr (R == RuleKind::delta) a.beta = beta.view;
    return a;
  }
};

/// What one element of the output of the last sequence and head should be, by its definition, from what is in memory.
template <DecayKind D, RuleKind R, StateLayout L>
bool right(const Buffers<D, R, L>& b, const Stream& stream) {
  const Index batch = b.q.view.extents[0], heads = b.q.view.extents[1], dim = b.q.view.extents[2];
  const auto row = [&](auto view) {
    std::vector<double> on_host(std::size_t(view.size()));
    using T = std::remove_const_t<typename decltype(view)::Value>;
    std::vector<T> raw(on_host.size());
    require_cuda(cudaMemcpy(raw.data(), view.data, raw.size() * sizeof(T), cudaMemcpyDeviceToHost));
    for (std::size_t i = 0; i < raw.size(); ++i) on_host[i] = double(float(raw[i]));
    return on_host;
  };
  const auto last = [&](auto view) { return row(slice(slice(view, batch - 1), heads - 1)); };
  const auto q = last(b.q.view), k = last(b.k.view), v = last(b.v.view), g = last(b.log_decay.view);
  const auto before = last(b.state.view);
  const double beta = row(b.beta.view).back();
  if (!cuda::linear_attention_step(b.args(), stream).ok()) return false;
  stream.wait();
  const auto got = last(b.o.view);
  double off = 0, size = 0;
  for (Index j = 0; j < dim; ++j) {
    const auto held = [&](Index i) {
      const Index at = L == StateLayout::key_major ? i * dim + j : j * dim + i;
      const double keep = D == DecayKind::none ? 0 : D == DecayKind::per_key ? g[std::size_t(i)] : g[0];
      return before[std::size_t(at)] * std::exp(keep);
    };
    double known = 0, want = 0;
    for (Index i = 0; i < dim; ++i) known += k[std::size_t(i)] * held(i);
    const double written = R == RuleKind::delta ? beta * (v[std::size_t(j)] - known) : v[std::size_t(j)];
    for (Index i = 0; i < dim; ++i)
      want += q[std::size_t(i)] / std::sqrt(double(dim)) * (held(i) + k[std::size_t(i)] * written);
    off += (got[std::size_t(j)] - want) * (got[std::size_t(j)] - want), size += want * want;
  }
  return off < 1e-4 * size;
}

template <DecayKind D, RuleKind R, StateLayout L>
void linear_attention_step(benchmark::State& state) {
  const Index batch = state.range(0), heads = state.range(1), dim = state.range(2);
  const double traffic = 2 * sizeof(float) * double(batch * heads * dim * dim);
  const int sets = int(std::clamp(4e8 / traffic, 2.0, 64.0)), launches = std::max(8, sets);
  std::vector<std::unique_ptr<Buffers<D, R, L>>> buffers;
  for (int i = 0; i < sets; ++i)
    buffers.push_back(std::make_unique<Buffers<D, R, L>>(std::uint32_t(10 * i + 1), batch, heads, dim));
  require_cuda(cudaDeviceSynchronize());
  const Stream stream;
  if (!right(*buffers[0], stream)) return state.SkipWithError("wrong answer");
  const double copy = device_copy_rate();
  TimedGraph graph(stream, launches,
                   [&](int i) { (void)cuda::linear_attention_step(buffers[std::size_t(i % sets)]->args(), stream); });
  const double seconds = time_launches(state, graph);
  state.counters["share_of_copy"] = traffic / seconds / copy;
  state.counters["copy_GB_per_s"] = copy * 1e-9;
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "H", "dim"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(15);
  b->Args({1, 32, 128})->Args({64, 32, 128})->Args({512, 16, 128})->Args({256, 16, 64});
}

#define CHELA_BENCH(decay, rule, layout)                                                  \
  BENCHMARK(linear_attention_step<DecayKind::decay, RuleKind::rule, StateLayout::layout>) \
      ->Name("linear_attention_step/" #decay "_" #rule "_" #layout)                       \
      ->Apply(shapes)

CHELA_BENCH(none, additive, key_major);
CHELA_BENCH(per_token, additive, key_major);
CHELA_BENCH(per_token, additive, value_major);
CHELA_BENCH(per_key, additive, key_major);
CHELA_BENCH(per_token, delta, key_major);
CHELA_BENCH(per_key, delta, value_major);

}  // namespace

BENCHMARK_MAIN();
