// Linear attention on threads of the caller's own: the bits of one worker, whatever their number, and no memory that
// two tasks or two calls share. The preset `tsan` runs this under the thread sanitizer, which does not understand
// OpenMP's threads.
#include <doctest/doctest.h>

#include <atomic>

#include "attention/results.hpp"
#include "chela/cpu/attention/convert_states.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "support/thread_pool.hpp"

using namespace chela;
using namespace chela::test;

namespace {

const Shape shapes[] = {
    {.batch = 3, .tokens = 40, .query_heads = 4, .key_heads = 2, .value_heads = 4, .key_dim = 8, .value_dim = 20},
    {.tokens = 70, .query_heads = 2, .key_dim = 5, .value_dim = 150},  // one state: its columns are shared out
    {.tokens = 40, .key_dim = 70, .value_dim = 9},                     // the same of its gradients
    {.tokens = 0},
};

template <class T, DecayKind D, RuleKind R>
struct Results {
  using A = Accumulator<T>;
  Tensor<T, 4> o;
  Tensor<A, 4> state;
  Tensor<A, 5> boundary, last;
  Gradients<T, D, R> grad;
  Tensor<T, 4> step_o;
  Tensor<A, 4> step_state;

  friend bool same_bits(const Results& a, const Results& b) {
    return test::same_bits(a.o, b.o) && test::same_bits(a.state, b.state) && test::same_bits(a.boundary, b.boundary) &&
           test::same_bits(a.last, b.last) && same_bits(a.grad, b.grad) && test::same_bits(a.step_o, b.step_o) &&
           test::same_bits(a.step_state, b.step_state);
  }
};

template <class T, DecayKind D, RuleKind R>
Results<T, D, R> run_all(const Problem<T, D, R>& p, const ThreadPool& executor) {
  const auto saved = [&](Index count) {
    return Tensor<Accumulator<T>, 5>(p.s.batch, count, p.s.state_heads(), p.s.key_dim, p.s.value_dim);
  };
  Results<T, D, R> r{p.output(), p.state(),      saved(p.s.tokens / 32), saved(3), Gradients<T, D, R>(p),
                     p.output(), p.initial_state};
  auto args = p.args(r.o, r.state);
  if (p.span == Span::causal) args.boundary_states = r.boundary, args.boundary_every = 32, args.last_states = r.last;
  bool ok = cpu::linear_attention(args, executor).ok();
  ok = ok && cpu::linear_attention_backward(r.grad.args(p), executor).ok();
  for (Index t = 0; t < std::min<Index>(p.s.tokens, 3); ++t)
    ok = ok && cpu::linear_attention_step(step_args(p, t, r.step_o, r.step_state), executor).ok();
  if (!ok) r.o.fill(T(std::numeric_limits<float>::quiet_NaN()));
  return r;
}

}  // namespace

TEST_CASE_TEMPLATE("any number of workers gives the bits of one", M, Member<DecayKind::none, RuleKind::additive>,
                   Member<DecayKind::per_key, RuleKind::additive>, Member<DecayKind::per_head, RuleKind::additive>,
                   Member<DecayKind::per_token, RuleKind::delta>) {
  for (const Shape& shape : shapes)
    for (Span span : {Span::causal, Span::bidirectional}) {
      if (M::rule == RuleKind::delta && span == Span::bidirectional) continue;
      CAPTURE(shape);
      Problem<float, M::decay, M::rule> p(shape, Gates::mixed_with_resets);
      p.span = span;
      const auto serial = run_all(p, ThreadPool(1));
      for (float o : serial.o) REQUIRE(o == o);
      for (int workers : {2, 3, 7}) {
        CAPTURE(workers);
        CHECK(same_bits(run_all(p, ThreadPool(workers)), serial));
      }
    }
}

TEST_CASE_TEMPLATE("one key that forgets fast does not change how the columns of another worker are rounded", M,
                   Member<DecayKind::per_key, RuleKind::additive>, Member<DecayKind::per_key, RuleKind::delta>) {
  for (Index key_dim : {64, 65, 100}) {
    CAPTURE(key_dim);
    Problem<float, M::decay, M::rule> p({.tokens = 40, .key_dim = key_dim, .value_dim = 9});
    for (Index t = 0; t < p.s.tokens; ++t) p.log_decay(0, t, 0, 0) = -50;
    CHECK(same_bits(run_all(p, ThreadPool(3)), run_all(p, ThreadPool(1))));
  }
}

TEST_CASE("calls at the same time do not disturb each other") {
  const Problem<float, DecayKind::per_key, RuleKind::delta> p(shapes[0], Gates::mixed_with_resets);
  const auto alone = run_all(p, ThreadPool(1));
  std::atomic<int> agree{0};
  constexpr int calls = 4;
  ThreadPool(calls).for_each(
      calls, [&](Index call, int) { agree += same_bits(run_all(p, ThreadPool(call % 2 ? 2 : 1)), alone); });
  CHECK(agree == calls);
}

TEST_CASE("states are converted by any number of workers") {
  const auto from = random_tensor<float>(1, 5, 3, 8, 12);
  Tensor<Eigen::bfloat16, 4> serial(5, 3, 12, 8), threaded = serial;
  const auto into = [&](auto& to) {
    return ConvertStatesArgs<float, Eigen::bfloat16>{.from = from, .to = to, .to_layout = StateLayout::value_major};
  };
  REQUIRE(cpu::convert_states(into(serial), SerialExecutor{}).ok());
  REQUIRE(cpu::convert_states(into(threaded), ThreadPool(3)).ok());
  CHECK(same_bits(serial, threaded));
}
