// Gradients of linear attention on a GPU: least possible traffic (q, k, v, the output's gradient and log-decays read once,
// their gradients written once) over time, as a share of a copy. Launches rotate among buffers that together are far
// larger than the second-level cache.
#include "chela/cuda/attention/linear_backward.cuh"

#include "attention/linear_device.cuh"
#include "chela/reference/linear.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using cuda::LinearPolicy;

namespace {

using Element = __nv_bfloat16;
using Rows = Array<Element, Index, Index, Index, Index>;
using Gates = Array<float, Index, Index, Index, Index>;

template <DecayKind D>
struct Buffers {
  static constexpr bool per_key = D == DecayKind::per_key;
  Rows q, k, v, grad_o, grad_q, grad_k, grad_v;
  Gates log_decay, grad_log_decay;

  Buffers(std::uint32_t seed, Index batch, Index tokens, Index heads, Index key_dim, Index value_dim)
      : q(seed, -1, 1, batch, tokens, heads, key_dim),
        k(seed + 1, -1, 1, batch, tokens, heads, key_dim),
        v(seed + 2, -1, 1, batch, tokens, heads, value_dim),
        grad_o(seed + 3, -1, 1, batch, tokens, heads, value_dim),
        grad_q(seed, 0, 0, batch, tokens, heads, key_dim),
        grad_k(seed, 0, 0, batch, tokens, heads, key_dim),
        grad_v(seed, 0, 0, batch, tokens, heads, value_dim),
        log_decay(seed + 4, -0.2f, 0, batch, tokens, heads, per_key ? key_dim : 1),
        grad_log_decay(seed, 0, 0, batch, tokens, heads, per_key ? key_dim : 1) {
    for (const DeviceMemory* memory : {&grad_q.memory, &grad_k.memory, &grad_v.memory, &grad_log_decay.memory})
      require_cuda(cudaMemset(memory->data(), 0xff, memory->bytes()));
  }
  LinearAttentionBackwardArgs<Element, D> args() const {
    LinearAttentionBackwardArgs<Element, D> a{.q = q.view,
                                              .k = k.view,
                                              .v = v.view,
                                              .grad_o = grad_o.view,
                                              .grad_q = grad_q.view,
                                              .grad_k = grad_k.view,
                                              .grad_v = grad_v.view};
    const auto given = [](TensorView<float, 4> all) {
      if constexpr (per_key)
        return all;
      else if constexpr (D == DecayKind::per_token)
        return slice_axis<3>(all, 0);
      else
        return slice(slice(slice_axis<3>(all, 0), 0), 0);
    };
    if constexpr (D != DecayKind::none)
      a.log_decay = given(log_decay.view), a.grad_log_decay = given(grad_log_decay.view);
    return a;
  }
};

/// Whether some columns of one gradient are those of attention with other roles, by the recurrence.
bool right(const Tensor<double, 4>& got, TensorView<const double, 4> q, TensorView<const double, 4> k,
           TensorView<const double, 4> v, TensorView<const double, 4> log_decay, double scale, bool back) {
  const Index tokens = q.extents[1], piece = 4096;
  Tensor<double, 4> want(got.extents()), state(1, 1, k.extents[3], v.extents[3]);
  const auto walked = [&](auto view) { return back ? reversed(view, 1) : view; };
  for (Index begin = 0; begin < tokens; begin += piece) {
    const auto part = [&](auto view) { return run(view, 1, begin, std::min(piece, tokens - begin)); };
    const Tensor<double, 4> before = state;
    const reference::LinearAttentionProblem p{.q = part(walked(q)),
                                              .k = part(walked(k)),
                                              .v = part(walked(v)),
                                              .initial_state = before,
                                              .scale = scale,
                                              .log_decay = part(log_decay)};
    reference::linear_attention(p, part(walked(want.view())), state);
  }
  return test::relative_error(got, want) < test::tensor_core_gradient_tolerance<Element>();
}

/// Whether the gradients of q, k and v are right, judged on the first and last heads; the tests judge the log-decays'.
template <DecayKind D>
bool right(const Buffers<D>& b) {
  const auto q = b.q.on_host(), k = b.k.on_host(), v = b.v.on_host(), grad_o = b.grad_o.on_host();
  const auto grad_q = b.grad_q.on_host(), grad_k = b.grad_k.on_host(), grad_v = b.grad_v.on_host();
  const auto g = b.log_decay.on_host();
  const auto [batch, tokens, heads, key_dim] = b.q.view.extents;
  const Index value_dim = b.v.view.extents[3], decays = b.log_decay.view.extents[3];
  const Index columns = Buffers<D>::per_key ? 1 : 2;  // that share their decay
  const double scale = 1 / std::sqrt(double(key_dim));
  for (const auto& [entry, head, first] : {std::array<Index, 3>{0, 0, 0}, {batch - 1, heads - 1, 62}}) {
    // Back in time a token's decay acts one step later.
    Tensor<double, 4> forth(1, tokens, 1, decays), back(1, tokens, 1, decays);
    for (Index i = 0; i < decays; ++i) {
      for (Index t = 0; t < tokens && D != DecayKind::none; ++t)
        forth(0, t, 0, i) = double(
            g[std::size_t((D == DecayKind::per_head ? head : (entry * tokens + t) * heads + head) * decays + i)]);
      for (Index t = 1; t < tokens; ++t) back(0, t, 0, i) = forth(0, tokens - t, 0, i);
    }
    const auto spread = [decays](TensorView<const double, 4> view, Index dim, Index column) {
      if (decays > 1) view = run(view, 3, column, 1);
      view.extents[3] = dim, view.strides[3] = 0;
      return view;
    };
    const auto all = [&](const auto& x, const Rows& rows) {
      return head_of(x, rows.view, entry, head, 0, rows.view.extents[3]);
    };
    const auto some = [&](const auto& x, const Rows& rows) {
      return head_of(x, rows.view, entry, head, first, columns);
    };
    const Tensor<double, 4> all_q = all(q, b.q), all_k = all(k, b.k), all_v = all(v, b.v),
                            all_o = all(grad_o, b.grad_o);
    const Tensor<double, 4> some_q = some(q, b.q), some_k = some(k, b.k), some_o = some(grad_o, b.grad_o);
    const TensorView<const double, 4> of_keys = decays > 1 ? back.view() : spread(back, key_dim, 0);
    if (!right(some(grad_q, b.grad_q), all_o, all_v, some_k, spread(forth, value_dim, first), scale, false) ||
        !right(some(grad_k, b.grad_k), all_v, all_o, some_q, spread(back, value_dim, first), scale, true) ||
        !right(some(grad_v, b.grad_v), all_k, all_q, some_o, of_keys, scale, true))
      return false;
  }
  return true;
}

template <LinearPolicy P, DecayKind D>
void linear_attention(benchmark::State& state) {
  const Index key_dim = state.range(3), value_dim = state.range(4);
  const Index decays = D == DecayKind::per_key ? key_dim : D == DecayKind::per_token ? 1 : 0;
  time_linear<Buffers<D>>(
      state, double(2 * (4 * key_dim + 3 * value_dim) + 8 * decays),
      [](const auto& args) { return cuda::workspace_bytes<P>(args); },
      [](const auto& args, cuda::Workspace workspace, cudaStream_t stream) {
        return cuda::linear_attention_backward<P>(args, workspace, stream);
      },
      [](const Buffers<D>& set) { return right(set); });
}

constexpr LinearPolicy tuned{};

#define CHELA_BENCH(policy, decay)                               \
  BENCHMARK(linear_attention<policy, DecayKind::decay>)          \
      ->Name("linear_attention/" #policy "_" #decay "/backward") \
      ->Apply(linear_shapes)

CHELA_BENCH(tuned, none);
CHELA_BENCH(tuned, per_head);
CHELA_BENCH(tuned, per_token);
CHELA_BENCH(tuned, per_key);

}  // namespace

BENCHMARK_MAIN();
