// Linear attention on a GPU: least possible traffic (q, k, v and log-decays read once, o written once) over time, as a
// share of a copy. Launches rotate among buffers that together are far larger than the second-level cache.
#include "chela/cuda/attention/linear.cuh"

#include "attention/linear_device.cuh"
#include "chela/reference/linear.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using cuda::Instructions;
using cuda::LinearPolicy;

namespace {

using Element = __nv_bfloat16;

using Rows = Array<Element, Index, Index, Index, Index>;

template <DecayKind D, Span S>
struct Buffers {
  static constexpr bool per_key = D == DecayKind::per_key;
  Rows q, k, v, o;
  Array<float, Index, Index, Index, Index> log_decay;

  Buffers(std::uint32_t seed, Index batch, Index tokens, Index heads, Index key_dim, Index value_dim)
      : q(seed, -1, 1, batch, tokens, heads, key_dim),
        k(seed + 1, -1, 1, batch, tokens, heads, key_dim),
        v(seed + 2, -1, 1, batch, tokens, heads, value_dim),
        o(seed + 3, 0, 0, batch, tokens, heads, value_dim),
        log_decay(seed + 4, -0.2f, 0, batch, tokens, heads, per_key ? key_dim : 1) {
    require_cuda(cudaMemset(o.memory.data(), 0xff, o.memory.bytes()));
  }
  LinearAttentionArgs<Element, D> args() const {
    LinearAttentionArgs<Element, D> a{.q = q.view, .k = k.view, .v = v.view, .o = o.view, .span = S};
    if constexpr (per_key) a.log_decay = log_decay.view;
    if constexpr (D == DecayKind::per_token) a.log_decay = slice_axis<3>(log_decay.view, 0);
    if constexpr (D == DecayKind::per_head) a.log_decay = slice(slice(slice_axis<3>(log_decay.view, 0), 0), 0);
    return a;
  }
};

/// Outputs of a head by the recurrence, a few thousand tokens at a time; and its final state.
void recur(const reference::LinearAttentionProblem& head, TensorView<double, 4> o, Tensor<double, 4>& state) {
  constexpr Index piece = 4096;
  for (Index begin = 0, tokens = head.q.extents[1]; begin < tokens; begin += piece) {
    const auto part = [&](auto view) {
      return view.present() ? run(view, 1, begin, std::min(piece, tokens - begin)) : view;
    };
    const Tensor<double, 4> before = state;
    reference::LinearAttentionProblem p = head;
    p.q = part(head.q), p.k = part(head.k), p.v = part(head.v), p.log_decay = part(head.log_decay);
    p.initial_state = before;
    reference::linear_attention(p, part(o), state);
  }
}

/// From the outputs of the walk in time and its final state to those of the bidirectional span.
void join_walk_back(const reference::LinearAttentionProblem& head, TensorView<double, 4> o,
                    const Tensor<double, 4>& state) {
  const auto [one, tokens, alone, columns] = o.extents;
  if (!head.log_decay.present()) {
    for (Index t = 0; t < tokens; ++t)
      for (Index j = 0; j < columns; ++j) {
        double sum = 0;
        for (Index i = 0; i < head.q.extents[3]; ++i) sum += head.q(0, t, 0, i) * state(0, 0, i, j);
        o(0, t, 0, j) = head.scale / double(tokens) * sum;
      }
    return;
  }
  Tensor<double, 4> after(1, tokens, 1, columns), last(1, 1, head.q.extents[3], columns);
  recur(reference::detail::turned(head), reversed(after.view(), 1), last);
  for (Index t = 0; t < tokens; ++t)
    for (Index j = 0; j < columns; ++j)
      o(0, t, 0, j) += after(0, t, 0, j) - reference::detail::own_weight(head, 0, t, 0, 1) * head.v(0, t, 0, j);
}

/// Whether the answer is right, judged on the first and last heads.
template <DecayKind D, Span S>
bool right(const Buffers<D, S>& b) {
  const auto q = b.q.on_host(), k = b.k.on_host(), v = b.v.on_host(), o = b.o.on_host();
  const auto g = b.log_decay.on_host();
  const Index batch = b.q.view.extents[0], tokens = b.q.view.extents[1], heads = b.q.view.extents[2];
  const Index key_dim = b.q.view.extents[3], value_dim = b.v.view.extents[3], columns = 2;
  const Index decays = b.log_decay.view.extents[3];
  for (const auto& [entry, head, column] :
       {std::array<Index, 3>{0, 0, 0}, std::array<Index, 3>{batch - 1, heads - 1, value_dim - columns}}) {
    const auto hq = head_of(q, b.q.view, entry, head, 0, key_dim), hk = head_of(k, b.k.view, entry, head, 0, key_dim),
               hv = head_of(v, b.v.view, entry, head, column, columns),
               got = head_of(o, b.o.view, entry, head, column, columns);
    Tensor<double, 4> want(got.extents()), state(1, 1, key_dim, columns), hg(1, tokens, 1, decays);
    for (Index t = 0; t < tokens; ++t)
      for (Index i = 0; i < decays; ++i)
        hg(0, t, 0, i) = double(
            g[std::size_t((D == DecayKind::per_head ? head : (entry * tokens + t) * heads + head) * decays + i)]);
    auto keys_g = hg.view();
    if (decays == 1) keys_g.extents[3] = key_dim, keys_g.strides[3] = 0;
    reference::LinearAttentionProblem p{.q = hq, .k = hk, .v = hv, .scale = 1 / std::sqrt(double(key_dim))};
    if constexpr (D != DecayKind::none) p.log_decay = keys_g;
    recur(p, want, state);
    if constexpr (S == Span::bidirectional) join_walk_back(p, want, state);
    if (!(test::relative_error(got, want) < test::tensor_core_tolerance<Element>())) return false;
  }
  return true;
}

template <LinearPolicy P, DecayKind D, Span S = Span::causal>
void linear_attention(benchmark::State& state) {
  const Index key_dim = state.range(3), value_dim = state.range(4);
  const Index decays = D == DecayKind::per_key ? key_dim : D == DecayKind::per_token ? 1 : 0;
  time_linear<Buffers<D, S>>(
      state, double(2 * 2 * (key_dim + value_dim) + 4 * decays),
      [](const auto& args) { return cuda::workspace_bytes<P>(args); },
      [](const auto& args, cuda::Workspace workspace, cudaStream_t stream) {
        return cuda::linear_attention<P>(args, workspace, stream);
      },
      [](const Buffers<D, S>& set) { return right(set); });
}

constexpr LinearPolicy tuned{};
constexpr LinearPolicy on_warps{.instructions = Instructions::warp};

#define CHELA_BENCH(policy, decay)                              \
  BENCHMARK(linear_attention<policy, DecayKind::decay>)         \
      ->Name("linear_attention/" #policy "_" #decay "/forward") \
      ->Apply(linear_shapes)

#define CHELA_BENCH_BOTH_WAYS(policy, decay)                                 \
  BENCHMARK(linear_attention<policy, DecayKind::decay, Span::bidirectional>) \
      ->Name("linear_attention/" #policy "_" #decay "/bidirectional")        \
      ->Apply(linear_shapes)

CHELA_BENCH(tuned, none);
CHELA_BENCH(tuned, per_head);
CHELA_BENCH(tuned, per_token);
CHELA_BENCH(tuned, per_key);
CHELA_BENCH(on_warps, none);
CHELA_BENCH(on_warps, per_token);
CHELA_BENCH(on_warps, per_key);
CHELA_BENCH_BOTH_WAYS(tuned, none);
CHELA_BENCH_BOTH_WAYS(tuned, per_token);
CHELA_BENCH_BOTH_WAYS(tuned, per_key);

}  // namespace

BENCHMARK_MAIN();
