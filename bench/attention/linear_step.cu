// Decoding steps of linear attention on a GPU: the state read once and written once over time, as a share of a copy.
// Steps rotate among sets of buffers that together are far larger than the second-level cache.
#include "chela/cuda/attention/linear_step.cuh"

#include <memory>

#include "chela/reference/linear.hpp"
#include "support/device_arrays.cuh"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;

namespace {

using Element = __nv_bfloat16;

struct KeyMajor : LinearAttentionForm {};
struct ValueMajor : LinearAttentionForm {
  static constexpr StateLayout state_layout = StateLayout::value_major;
};
struct Bf16States : LinearAttentionForm {
  template <chela::Element>
  using StateElement = __nv_bfloat16;
};

template <class T>
using Matrix = Array<T, Index, Index>;
template <class T>
using Rows = Array<T, Index, Index, Index>;

template <DecayKind D, RuleKind R, AttentionForm F>
struct Buffers {
  static constexpr bool value_major = F::state_layout == StateLayout::value_major;
  Rows<Element> q, k, v, o;
  Array<StateOf<Element, F>, Index, Index, Index, Index> state;
  Rows<float> log_decay;
  Matrix<float> beta;

  Buffers(std::uint32_t seed, Index batch, Index heads, Index key_dim, Index value_dim)
      : q(seed, -1, 1, batch, heads, key_dim),
        k(seed + 1, -0.1f, 0.1f, batch, heads, key_dim),
        v(seed + 2, -1, 1, batch, heads, value_dim),
        o(seed + 3, 0, 0, batch, heads, value_dim),
        state(seed + 4, -1, 1, batch, heads, value_major ? value_dim : key_dim, value_major ? key_dim : value_dim),
        log_decay(seed + 5, -0.2f, 0, batch, heads, D == DecayKind::per_key ? key_dim : Index(1)),
        beta(seed + 6, 0, 1, batch, heads) {
    require_cuda(cudaMemset(o.memory.data(), 0xff, o.memory.bytes()));
  }
  LinearAttentionStepArgs<Element, D, R, F> args() const {
    LinearAttentionStepArgs<Element, D, R, F> a{
        .q = q.view, .k = k.view, .v = v.view, .o = o.view, .state = state.view};
    if constexpr (D == DecayKind::per_token) a.log_decay = slice_axis<2>(log_decay.view, 0);
    if constexpr (D == DecayKind::per_key) a.log_decay = log_decay.view;
    if constexpr (R == RuleKind::delta) a.beta = beta.view;
    return a;
  }
};

/// The first and the last sequence of x [sequence, ...], as [sequence, 1, ...] in double on the host.
template <class T, class... I>
auto ends_of(const Array<T, I...>& x) {
  auto copy = x.on_host();
  auto ends = x.view;
  ends.data = copy.data();
  ends.strides[0] *= ends.extents[0] - 1, ends.extents[0] = 2;
  return test::converted<double>(ends);
}

/// [sequence, head, dim] as [sequence, 1, head, dim].
template <int Rank>
auto one_token(const Tensor<double, Rank>& x) {
  return chela::detail::with_token_axis(TensorView<const double, Rank>(x.view()));
}

/// Takes a step, and judges its outputs and states on two sequences.
template <DecayKind D, RuleKind R, AttentionForm F>
Status judge(const Buffers<D, R, F>& b, const Stream& stream) {
  const auto q = ends_of(b.q), k = ends_of(b.k), v = ends_of(b.v), g = ends_of(b.log_decay);
  const auto beta = ends_of(b.beta);
  const auto before = ends_of(b.state);
  if (Status s = cuda::linear_attention_step(b.args(), stream); !s.ok()) return s;
  stream.wait();
  const auto o = ends_of(b.o);
  const auto after = ends_of(b.state);
  reference::LinearAttentionProblem p{.q = one_token(q),
                                      .k = one_token(k),
                                      .v = one_token(v),
                                      .initial_state = key_major<F>(before.view()),
                                      .scale = 1 / std::sqrt(double(q.extents()[2]))};
  if constexpr (D != DecayKind::none) {
    auto per_key = one_token(g);
    if (D == DecayKind::per_token) per_key.extents[3] = q.extents()[2], per_key.strides[3] = 0;
    p.log_decay = per_key;
  }
  if constexpr (R == RuleKind::delta) p.beta = one_token(beta);
  Tensor<double, 4> want(2, 1, o.extents()[1], o.extents()[2]),
      want_state(2, o.extents()[1], q.extents()[2], o.extents()[2]);
  reference::linear_attention(p, want.view(), want_state.view());
  const double error = test::relative_error(one_token(o), TensorView<const double, 4>(want.view())),
               state_error =
                   test::relative_error(key_major<F>(after.view()), TensorView<const double, 4>(want_state.view()));
  return require(error < test::tolerance<Element>(q.extents()[2]) &&
                     state_error < test::tolerance<StateOf<Element, F>>(q.extents()[2]),
                 Code::bad_value, "wrong answer");
}

template <DecayKind D, RuleKind R, AttentionForm F>
void linear_attention_step(benchmark::State& state) {
  const Index batch = state.range(0), heads = state.range(1), key_dim = state.range(2), value_dim = state.range(3);
  using Set = Buffers<D, R, F>;
  const double traffic = 2.0 * sizeof(StateOf<Element, F>) * double(batch * heads * key_dim * value_dim);
  const Stream stream;
  measure_share_of_copy(
      state, stream, traffic,
      [&](int i) { return std::make_unique<Set>(10 * i + 1, batch, heads, key_dim, value_dim); },
      [&](const Set& set) { return cuda::linear_attention_step(set.args(), stream); },
      [&](const Set& set) { return judge(set, stream); });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "H", "K", "V"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(15);
  b->Args({1, 32, 128, 128})->Args({64, 32, 128, 128})->Args({512, 16, 128, 128})->Args({512, 16, 64, 64});
}

#define CHELA_BENCH(decay, rule, form)                                     \
  BENCHMARK(linear_attention_step<DecayKind::decay, RuleKind::rule, form>) \
      ->Name("linear_attention_step/" #form "_" #decay "_" #rule "/step")  \
      ->Apply(shapes)

CHELA_BENCH(none, additive, KeyMajor);
CHELA_BENCH(per_token, additive, KeyMajor);
CHELA_BENCH(per_key, additive, KeyMajor);
CHELA_BENCH(none, delta, KeyMajor);
CHELA_BENCH(per_key, delta, KeyMajor);
CHELA_BENCH(none, additive, ValueMajor);
CHELA_BENCH(per_key, delta, ValueMajor);
CHELA_BENCH(per_key, delta, Bf16States);

}  // namespace

BENCHMARK_MAIN();
