// Linear attention on the CPU, member by member: share of the machine's matrix product rate (of its copy bandwidth for a
// step), against the plain Eigen recurrence.
#include "chela/cpu/attention/linear.hpp"

#include <optional>
#include <vector>

#include "chela/reference/linear.hpp"
#include "support/measure.hpp"
#include "support/tensors.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::bench;
using test::converted;
using test::random_tensor;

namespace {

/// Log-decays uniform in [low, 0].
struct Gates {
  double low;
};
constexpr Gates mild{-0.1};    ///< a tile keeps enough of the state to fold its decay into q and k
constexpr Gates strong{-8.0};  ///< a few tokens forget everything

template <DecayKind D, RuleKind R>
struct Problem {
  static constexpr bool decays = D != DecayKind::none, delta = R == RuleKind::delta;
  Tensor<float, 4> q, k, v, o, state;
  Tensor<float, log_decay_rank(D)> log_decay;
  Tensor<float, 3> beta;

  Problem(Index batch, Index tokens, Index heads, Index key_dim, Index value_dim, Gates gates)
      : q(random_tensor<float>(1, batch, tokens, heads, key_dim)),
        k(random_tensor<float>(2, batch, tokens, heads, key_dim)),
        v(random_tensor<float>(3, batch, tokens, heads, value_dim)),
        o(batch, tokens, heads, value_dim),
        state(batch, heads, key_dim, value_dim) {
    if constexpr (D == DecayKind::per_head) log_decay = Tensor<float, 1>(heads);
    if constexpr (D == DecayKind::per_token) log_decay = Tensor<float, 3>(batch, tokens, heads);
    if constexpr (D == DecayKind::per_key) log_decay = Tensor<float, 4>(batch, tokens, heads, key_dim);
    if constexpr (decays) test::fill_random(log_decay.view(), 4, gates.low, 0);
    if constexpr (delta) {
      beta = Tensor<float, 3>(batch, tokens, heads);
      test::fill_random(beta.view(), 5, 0, 1);
      for (float& x : k) x *= std::sqrt(3 / float(key_dim));  // keys of about unit length
    }
  }

  template <class Args>
  Args with_gates(Args args) {
    if constexpr (decays) args.log_decay = log_decay;
    if constexpr (delta) args.beta = beta;
    return args;
  }
  auto args() { return with_gates(LinearAttentionArgs<float, D, R>{.q = q, .k = k, .v = v, .o = o}); }
  auto step_args() {
    const auto first = [](auto& x) { return slice_axis<1>(x.view(), 0); };
    LinearAttentionStepArgs<float, D, R> step{
        .q = first(q), .k = first(k), .v = first(v), .o = first(o), .state = state};
    if constexpr (D == DecayKind::per_head) step.log_decay = log_decay;
    if constexpr (D == DecayKind::per_token || D == DecayKind::per_key) step.log_decay = first(log_decay);
    if constexpr (delta) step.beta = first(beta);
    return step;
  }
};

/// The gradients of a problem, and memory for them.
template <DecayKind D, RuleKind R>
struct Gradients {
  Tensor<float, 4> o, q, k, v;
  Tensor<float, log_decay_rank(D)> log_decay;
  Tensor<float, 3> beta;

  explicit Gradients(const Problem<D, R>& p)
      : o(p.o.extents()),
        q(p.q.extents()),
        k(p.k.extents()),
        v(p.v.extents()),
        log_decay(p.log_decay.extents()),
        beta(p.beta.extents()) {
    test::fill_random(o.view(), 6);
  }
  auto args(Problem<D, R>& p) {
    auto args = p.with_gates(LinearAttentionBackwardArgs<float, D, R>{
        .q = p.q, .k = p.k, .v = p.v, .grad_o = o, .grad_q = q, .grad_k = k, .grad_v = v});
    if constexpr (D != DecayKind::none) args.grad_log_decay = log_decay;
    if constexpr (R == RuleKind::delta) args.grad_beta = beta;
    return args;
  }
};

/// The recurrence as one writes it with Eigen at first, one head after the other.
template <DecayKind D, RuleKind R>
void eigen_recurrence(Problem<D, R>& p, const BenchExecutor& executor) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const LinearAttentionShape s = linear_attention_shape(p.q.view(), p.k.view(), p.v.view());
  const float scale = 1 / std::sqrt(float(s.key_dim));
  TensorView<const float, 4> g;
  if constexpr (D != DecayKind::none) g = spread_log_decay(std::as_const(p.log_decay).view(), s);
  executor.for_each(s.batch * s.key_heads, [&](Index task, int) {
    const Index b = task / s.key_heads, h = task % s.key_heads;
    Matrix state = Matrix::Zero(s.key_dim, s.value_dim);
    Eigen::VectorXf decay(s.key_dim), u(s.value_dim);
    for (Index t = 0; t < s.tokens; ++t) {
      Eigen::Map<const Eigen::VectorXf> q(&p.q(b, t, h, 0), s.key_dim), k(&p.k(b, t, h, 0), s.key_dim),
          v(&p.v(b, t, h, 0), s.value_dim);
      Eigen::Map<Eigen::VectorXf> o(&p.o(b, t, h, 0), s.value_dim);
      if constexpr (D == DecayKind::per_key) {
        decay = Eigen::Map<const Eigen::ArrayXf>(&g(b, t, h, 0), s.key_dim).exp();
        state.array().colwise() *= decay.array();
      } else if constexpr (D != DecayKind::none) {
        state *= std::exp(g(b, t, h, 0));
      }
      if constexpr (R == RuleKind::delta) {
        u.noalias() = state.transpose() * k;
        u = p.beta(b, t, h) * (v - u);
        state.noalias() += k * u.transpose();
      } else {
        state.noalias() += k * v.transpose();
      }
      o.noalias() = state.transpose() * q * scale;
    }
  });
}

/// The first tokens of one head in double, what they should give, and how far an answer is from that.
template <DecayKind D, RuleKind R>
class Reference {
 public:
  Reference(const Problem<D, R>& p, Index most_tokens)
      : tokens_(std::min(most_tokens, p.q.extents()[1])),
        q_(head(p.q.view())),
        k_(head(p.k.view())),
        v_(head(p.v.view())) {
    problem_ = {.q = q_, .k = k_, .v = v_, .scale = 1 / std::sqrt(double(q_.extents()[3]))};
    if constexpr (D != DecayKind::none) {
      const LinearAttentionShape s = linear_attention_shape(p.q.view(), p.k.view(), p.v.view());
      problem_.log_decay = log_decay_ = head(spread_log_decay(p.log_decay.view(), s));
    }
    if constexpr (R == RuleKind::delta)
      problem_.beta = beta_ = converted<double>(run(run(run(p.beta.view(), 0, 0, 1), 1, 0, tokens_), 2, 0, 1));
  }

  bool forward_is_right(const Tensor<float, 4>& o) const {
    Tensor<double, 4> want(v_.extents());
    reference::linear_attention(problem_, want);
    return close(o, want);
  }
  bool backward_is_right(const Gradients<D, R>& got) const {
    const Tensor<double, 4> grad_o = head(got.o.view());
    Tensor<double, 4> q(q_.extents()), k(k_.extents()), v(v_.extents()), state(1, 1, q_.extents()[3], v_.extents()[3]);
    Tensor<double, 4> log_decay(log_decay_.extents());
    Tensor<double, 3> beta(beta_.extents());
    reference::LinearAttentionGradients want{q, k, v, state};
    if constexpr (D != DecayKind::none) want.log_decay = log_decay;
    if constexpr (R == RuleKind::delta) want.beta = beta;
    reference::linear_attention_backward(problem_, grad_o, {}, want);
    return close(got.q, q) && close(got.k, k) && close(got.v, v);
  }

 private:
  Tensor<double, 4> head(TensorView<const float, 4> x) const {
    return converted<double>(run(run(run(x, 0, 0, 1), 1, 0, tokens_), 2, 0, 1));
  }
  bool close(const Tensor<float, 4>& got, const Tensor<double, 4>& want) const {
    const auto part = run(run(run(got.view(), 0, 0, 1), 1, 0, tokens_), 2, 0, 1);
    return test::relative_error(part, want.view()) < test::tolerance<float>(tokens_ * q_.extents()[3]);
  }

  Index tokens_;
  Tensor<double, 4> q_, k_, v_, log_decay_;
  Tensor<double, 3> beta_;
  reference::LinearAttentionProblem problem_;
};

enum class Pass { forward, backward, step };

/// Gradients depend on all later tokens, so they are checked on a short sequence of the same dims.
template <DecayKind D, RuleKind R>
bool backward_is_right(Index key_dim, Index value_dim, Gates gates, const BenchExecutor& executor) {
  Problem<D, R> p(1, 100, 2, key_dim, value_dim, gates);
  Gradients<D, R> gradients(p);
  return cpu::linear_attention_backward(gradients.args(p), executor).ok() &&
         Reference<D, R>(p, 100).backward_is_right(gradients);
}

template <Pass pass, DecayKind D, RuleKind R = RuleKind::additive, Gates gates = mild, ChunkPolicy P = ChunkPolicy{}>
void linear_attention(benchmark::State& state) {
  const Index batch = state.range(0), tokens = state.range(1), heads = state.range(2);
  const Index key_dim = state.range(3), value_dim = state.range(4);
  const int threads = int(state.range(5));
  const BenchExecutor executor = executor_of(threads);
  Problem<D, R> p(batch, tokens, heads, key_dim, value_dim, gates);
  std::optional<Gradients<D, R>> gradients;
  if constexpr (pass == Pass::backward) gradients.emplace(p);

  const auto call = [&] {
    Status status;
    if constexpr (pass == Pass::forward) status = cpu::linear_attention<P>(p.args(), executor);
    if constexpr (pass == Pass::backward) status = cpu::linear_attention_backward<P>(gradients->args(p), executor);
    if constexpr (pass == Pass::step) status = cpu::linear_attention_step(p.step_args(), executor);
    return status.ok();
  };
  bool right = call();
  if constexpr (pass == Pass::backward)
    right = right && backward_is_right<D, R>(key_dim, value_dim, gates, executor);
  else
    right = right && Reference<D, R>(p, 400).forward_is_right(p.o);
  if (!right) return state.SkipWithError("wrong answer");

  const double baseline = pass == Pass::forward ? least_seconds(3, [&] { eigen_recurrence(p, executor); }) : 0;
  const double gemm = gemm_rate(threads), copy = copy_rate(threads);
  const double seconds = time_iterations(state, call);

  // Useful work: two multiply-adds for each state element and token; three passes of that for the gradients.
  const double work =
      double(batch * tokens * heads) * 4.0 * double(key_dim * value_dim) * (pass == Pass::backward ? 3 : 1);
  if (pass != Pass::step) state.counters["share_of_gemm"] = work / seconds / gemm;
  if (pass == Pass::step)
    state.counters["share_of_copy"] = 2.0 * sizeof(float) * double(p.state.size()) / seconds / copy;
  if (pass == Pass::forward) state.counters["times_baseline"] = baseline / seconds;
  state.counters["tokens_per_second"] = double(batch * tokens) / seconds;
}

/// What forbids more: the register kernel of the recurrence alone, one packed tile and one state that stay in the cache.
void register_kernel(benchmark::State& state) {
  const Index dim = state.range(0), tokens = ChunkPolicy{}.chunk_len;
  const auto q = random_tensor<float>(1, tokens, dim), k = random_tensor<float>(2, tokens, dim),
             v = random_tensor<float>(3, tokens, dim);
  Tensor<float, 2> held(dim, dim), o(tokens, dim), partial(tokens, dim);
  const cpu::PackedTile<float> tile{.q = q.data(),
                                    .k = k.data(),
                                    .v = v.data(),
                                    .partial = partial.data(),
                                    .tokens = tokens,
                                    .keys = dim,
                                    .values = dim,
                                    .state = held.data(),
                                    .state_stride = dim,
                                    .out = o.data(),
                                    .out_stride = dim};
  constexpr int repetitions = 100;
  const double seconds = time_iterations(state, [&] {
    for (int i = 0; i < repetitions; ++i) cpu::recur_over_tile(tile, cpu::PackNothing{});
    benchmark::DoNotOptimize(o.data());
  });
  state.counters["share_of_gemm"] = 4.0 * repetitions * double(tokens * dim * dim) / seconds / gemm_rate(1);
}

void with_threads(benchmark::internal::Benchmark* b, std::initializer_list<std::vector<std::int64_t>> shapes) {
  b->ArgNames({"B", "T", "H", "K", "V", "threads"})->UseManualTime()->Unit(benchmark::kMillisecond);
  for (std::vector<std::int64_t> shape : shapes)
    for (int threads = 1; threads <= BenchExecutor{}.workers(); threads *= 2) {
      shape.resize(5);
      shape.push_back(threads);
      b->Args(shape);
    }
}
void shapes(benchmark::internal::Benchmark* b) { with_threads(b, {{1, 4096, 8, 64, 64}, {1, 4096, 8, 128, 128}}); }
/// Also dims that are no powers of two, keys unlike values, and one head shared out by its columns.
void more_shapes(benchmark::internal::Benchmark* b) {
  shapes(b);
  with_threads(b, {{1, 4096, 8, 48, 48},
                   {1, 4096, 8, 80, 80},
                   {1, 4096, 8, 96, 96},
                   {1, 4096, 8, 64, 128},
                   {1, 4096, 8, 128, 64},
                   {1, 65536, 1, 64, 64}});
}
void step_shapes(benchmark::internal::Benchmark* b) { with_threads(b, {{256, 1, 16, 128, 128}}); }

constexpr DecayKind none = DecayKind::none, per_head = DecayKind::per_head, per_token = DecayKind::per_token,
                    per_key = DecayKind::per_key;
constexpr RuleKind additive = RuleKind::additive, delta = RuleKind::delta;
constexpr ChunkPolicy chunked{.evaluation = Evaluation::chunked};
using enum Pass;

#define CHELA_BENCH_NAMED(name, shapes, ...) \
  BENCHMARK(linear_attention<__VA_ARGS__>)->Name("linear_attention/" name)->Apply(shapes)

BENCHMARK(register_kernel)
    ->Name("limit/register_kernel")
    ->ArgName("dim")
    ->Arg(64)
    ->Arg(128)
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

CHELA_BENCH_NAMED("none/forward", more_shapes, forward, none);
CHELA_BENCH_NAMED("per_head/forward", shapes, forward, per_head);
CHELA_BENCH_NAMED("per_token/forward", shapes, forward, per_token);
CHELA_BENCH_NAMED("per_key/forward", more_shapes, forward, per_key);
CHELA_BENCH_NAMED("per_key_strong/forward", shapes, forward, per_key, additive, strong);
CHELA_BENCH_NAMED("delta/forward", shapes, forward, none, delta);
CHELA_BENCH_NAMED("delta_per_token/forward", shapes, forward, per_token, delta);
// The other evaluation of the same members: its time beside theirs is why the recurrence is the rule.
CHELA_BENCH_NAMED("none_chunked/forward", shapes, forward, none, additive, mild, chunked);
CHELA_BENCH_NAMED("per_head_chunked/forward", shapes, forward, per_head, additive, mild, chunked);
CHELA_BENCH_NAMED("per_token_chunked/forward", shapes, forward, per_token, additive, mild, chunked);
CHELA_BENCH_NAMED("per_key_chunked/forward", shapes, forward, per_key, additive, mild, chunked);
CHELA_BENCH_NAMED("delta_chunked/forward", shapes, forward, none, delta, mild, chunked);
CHELA_BENCH_NAMED("delta_per_token_chunked/forward", shapes, forward, per_token, delta, mild, chunked);

CHELA_BENCH_NAMED("none/backward", shapes, backward, none);
CHELA_BENCH_NAMED("per_head/backward", shapes, backward, per_head);
CHELA_BENCH_NAMED("per_token/backward", shapes, backward, per_token);
CHELA_BENCH_NAMED("per_key/backward", shapes, backward, per_key);
CHELA_BENCH_NAMED("delta_per_token/backward", shapes, backward, per_token, delta);

CHELA_BENCH_NAMED("none/step", step_shapes, step, none);
CHELA_BENCH_NAMED("per_key/step", step_shapes, step, per_key);
CHELA_BENCH_NAMED("delta_per_token/step", step_shapes, step, per_token, delta);

}  // namespace
