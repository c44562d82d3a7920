// What holds for linear attention whatever the sizes: tried on random ones. CHELA_TEST_SEED=n in the environment tries
// the sizes of seed n alone.
#include <doctest/doctest.h>

#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "attention/results.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "support/tolerance.hpp"

using namespace chela;
using namespace chela::test;

namespace {

using Additive = Member<DecayKind::none, RuleKind::additive>;
using PerKey = Member<DecayKind::per_key, RuleKind::additive>;
using Delta = Member<DecayKind::per_token, RuleKind::delta>;

constexpr unsigned first_seed = 1, seeds = 40;
constexpr Index tile_len = ChunkPolicy{}.chunk_len;

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  /// Any whole number from low to high.
  Index operator()(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random_); }
  Index any_of(std::initializer_list<Index> choices) { return choices.begin()[(*this)(0, Index(choices.size()) - 1)]; }
  Index divisor_of(Index n) {
    for (;;)
      if (const Index d = (*this)(1, n); n % d == 0) return d;
  }

 private:
  std::mt19937 random_;
};

Shape random_shape(Draw& draw) {
  Shape s{.batch = draw(1, 3), .tokens = draw(0, 90), .key_dim = draw(2, 20), .value_dim = draw(1, 40)};
  const Index states = draw.any_of({1, 2, 3, 4}), fewer = draw.divisor_of(states);
  const bool shared_keys = draw(0, 1);
  s.key_heads = shared_keys ? fewer : states, s.value_heads = shared_keys ? states : fewer;
  s.query_heads = draw(0, 1) ? states * draw(1, 3) : draw.divisor_of(states);
  return s;
}

template <class T, class M>
Problem<T, M::decay, M::rule> random_problem(unsigned seed, const Shape& shape, Draw& draw) {
  Problem<T, M::decay, M::rule> p(shape, std::array{Gates::mild, Gates::strong, Gates::mixed_with_resets}[draw(0, 2)]);
  fill_random(p.q.view(), 100 * seed), fill_random(p.v.view(), 100 * seed + 1);
  fill_random(p.initial_state.view(), 100 * seed + 2), fill_random(p.grad_o.view(), 100 * seed + 3);
  return p;
}

/// Calls f(problem, draw) for problems of random sizes; a failure names the seed.
template <class T, class M, class F>
void for_random_problems(const F& f) {
  const auto try_seed = [&](unsigned seed) {
    Draw draw(seed);
    const Shape shape = random_shape(draw);
    CAPTURE(seed);
    CAPTURE(shape);
    f(random_problem<T, M>(seed, shape, draw), draw);
  };
  if (const char* one = std::getenv("CHELA_TEST_SEED")) return try_seed(unsigned(std::strtoul(one, nullptr, 10)));
  for (unsigned seed = first_seed; seed < first_seed + seeds; ++seed) try_seed(seed);
}

template <class T, DecayKind D, RuleKind R>
struct Outcome {
  Tensor<T, 4> o;
  Tensor<Accumulator<T>, 4> state;
};

template <ChunkPolicy P = ChunkPolicy{}, class T, DecayKind D, RuleKind R>
Outcome<T, D, R> forward(const Problem<T, D, R>& p) {
  Outcome<T, D, R> out{p.output(), p.state()};
  REQUIRE(cpu::linear_attention<P>(p.args(out.o, out.state), SerialExecutor{}).ok());
  return out;
}
template <class T, DecayKind D, RuleKind R>
Gradients<T, D, R> backward(const Problem<T, D, R>& p) {
  Gradients<T, D, R> grad(p);
  REQUIRE(cpu::linear_attention_backward(grad.args(p), SerialExecutor{}).ok());
  return grad;
}

template <class T, DecayKind D, RuleKind R>
void check_close(const Outcome<T, D, R>& a, const Outcome<T, D, R>& b, const Shape& shape) {
  CHECK(relative_error(a.o, b.o) < tolerance<T>(terms(shape)));
  CHECK(relative_error(a.state, b.state) < tolerance<T>(terms(shape)));
}
template <class T, DecayKind D, RuleKind R>
bool same_bits(const Outcome<T, D, R>& a, const Outcome<T, D, R>& b) {
  return test::same_bits(a.o, b.o) && test::same_bits(a.state, b.state);
}

template <class T, int Rank>
Tensor<T, Rank> sum_of(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  Tensor<T, Rank> sum = a;
  for (Index i = 0; i < sum.size(); ++i) sum.data()[i] += b.data()[i];
  return sum;
}
double dot(const Tensor<double, 4>& a, const Tensor<double, 4>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}
double norm(const Tensor<double, 4>& a) { return std::sqrt(dot(a, a)); }

/// Each head `times` times over, along `axis`.
template <class T, int Rank>
Tensor<T, Rank> repeated(const Tensor<T, Rank>& x, int axis, Index times) {
  auto extents = x.extents();
  extents[std::size_t(axis)] *= times;
  Tensor<T, Rank> out(extents);
  for_each_index(out.view(), [&](auto... index) {
    std::array<Index, Rank> i{index...};
    i[std::size_t(axis)] /= times;
    out(index...) = std::apply([&](auto... from) { return x(from...); }, i);
  });
  return out;
}

template <class Args>
void cut_tokens(Args& args, Index begin, Index count) {
  const auto cut = [&](auto& x) {
    if (x.present()) x = run(x, 1, begin, count);
  };
  cut(args.q), cut(args.k), cut(args.v), cut(args.beta);
  if constexpr (decltype(args.log_decay)::rank > 1) cut(args.log_decay);
  if constexpr (requires { args.o; }) cut(args.o);
  if constexpr (requires { args.grad_o; }) {
    cut(args.grad_o), cut(args.grad_q), cut(args.grad_k), cut(args.grad_v), cut(args.grad_beta);
    if constexpr (decltype(args.grad_log_decay)::rank > 1) cut(args.grad_log_decay);
  }
}

}  // namespace

TEST_CASE("from a zero state, outputs and final state are linear in v") {
  for_random_problems<double, Delta>([](auto p, Draw&) {
    p.initial_state.fill(0);
    auto other = p, both = p;
    fill_random(other.v.view(), 99);
    both.v = sum_of(p.v, other.v);
    const auto a = forward(p), b = forward(other), sum = forward(both);
    CHECK(relative_error(sum.o, sum_of(a.o, b.o)) < tolerance<double>(terms(p.shape)));
    CHECK(relative_error(sum.state, sum_of(a.state, b.state)) < tolerance<double>(terms(p.shape)));
  });
}

TEST_CASE("from a zero state, the gradient of v is the adjoint of the map from v") {
  for_random_problems<double, Delta>([](auto p, Draw&) {
    p.initial_state.fill(0);
    const auto out = forward(p);
    const auto grad = backward(p);
    const double forwards = dot(p.grad_o, out.o) + dot(p.grad_final_state, out.state), back = dot(grad.v, p.v);
    CHECK(std::abs(forwards - back) <=
          1e-12 * (norm(p.grad_o) * norm(out.o) + norm(p.grad_final_state) * norm(out.state)));
  });
}

TEST_CASE_TEMPLATE("a later token changes no bit of an earlier output", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](auto p, Draw& draw) {
    if (p.shape.tokens == 0) return;
    const auto before = forward(p);
    const Index token = draw(0, p.shape.tokens - 1);
    CAPTURE(token);
    const auto change = [&](auto& x, float factor) {
      auto later = run(x.view(), 1, token, p.shape.tokens - token);
      for_each_index(later, [&](auto... i) { later(i...) *= factor; });
    };
    const auto earlier_outputs_agree = [&](Index tokens) {
      return test::same_bits(run(before.o.view(), 1, 0, tokens), run(forward(p).o.view(), 1, 0, tokens));
    };
    change(p.q, 3), change(p.k, M::rule == RuleKind::delta ? 0.5f : 3.0f), change(p.v, -2);
    if (p.delta) change(p.beta, 0.5f);
    CHECK(earlier_outputs_agree(token));
    if constexpr (M::decay != DecayKind::none) {  // how strongly a tile decays decides how it is walked, and so rounded
      change(p.log_decay, 40);
      CHECK(earlier_outputs_agree(token / tile_len * tile_len));
    }
  });
}

TEST_CASE_TEMPLATE("the answer does not depend on the tile length", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](const auto& p, Draw&) {
    const auto usual = forward(p), other = forward<ChunkPolicy{.chunk_len = 5}>(p);
    check_close(other, usual, p.shape);
    if (!p.decays) CHECK(same_bits(usual, other));
  });
}

TEST_CASE_TEMPLATE("a sequence in pieces is the whole", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](const auto& p, Draw& draw) {
    const auto whole = forward(p);
    for (bool between_tiles : {true, false}) {
      const Index cut = between_tiles ? draw(0, p.shape.tokens / tile_len) * tile_len : draw(0, p.shape.tokens);
      CAPTURE(cut);
      auto pieces = forward(p);
      pieces.o.fill(0);
      auto first = p.args(pieces.o, pieces.state), second = first;
      cut_tokens(first, 0, cut), cut_tokens(second, cut, p.shape.tokens - cut);
      REQUIRE(cpu::linear_attention(first, SerialExecutor{}).ok());
      second.initial_state = pieces.state;
      REQUIRE(cpu::linear_attention(second, SerialExecutor{}).ok());
      check_close(pieces, whole, p.shape);
      if (between_tiles || !(p.decays || p.delta)) CHECK(same_bits(pieces, whole));
    }
  });
}

TEST_CASE_TEMPLATE("token by token is the pass", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](const auto& p, Draw&) {
    const auto pass = forward(p);
    auto steps = pass;
    steps.o.fill(0), steps.state = p.initial_state;
    for (Index t = 0; t < p.shape.tokens; ++t)
      REQUIRE(cpu::linear_attention_step(step_args(p, t, steps.o, steps.state), SerialExecutor{}).ok());
    check_close(steps, pass, p.shape);
    if (!p.decays && !p.delta) CHECK(same_bits(steps, pass));
  });
}

TEST_CASE_TEMPLATE("batch entries and heads in another order give the same bits in that order", M, Additive, PerKey,
                   Delta) {
  for_random_problems<float, M>([](const auto& p, Draw&) {
    const auto straight = forward(p);
    auto turned = straight;
    turned.o.fill(0), turned.state.fill(0);
    const auto turn = [](auto& x, int head_axis) {
      if (x.present()) x = reversed(reversed(x, 0), head_axis);
    };
    auto args = p.args(turned.o, turned.state);
    turn(args.q, 2), turn(args.k, 2), turn(args.v, 2), turn(args.o, 2);
    turn(args.initial_state, 1), turn(args.final_state, 1), turn(args.beta, 2);
    if constexpr (M::decay != DecayKind::none) turn(args.log_decay, 2);
    REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
    CHECK(same_bits(straight, turned));

    const auto grad = backward(p);
    auto turned_grad = grad;
    for (auto* x : {&turned_grad.q, &turned_grad.k, &turned_grad.v, &turned_grad.state}) x->fill(0);
    turned_grad.log_decay.fill(0), turned_grad.beta.fill(0);
    auto back = turned_grad.args(p);
    const bool sums =
        p.s.query_heads != p.s.key_heads || p.s.key_heads != p.s.value_heads;  // of shared heads, in order
    const auto turn_back = [&](auto& x, int head_axis) {
      if (x.present()) x = sums ? reversed(x, 0) : reversed(reversed(x, 0), head_axis);
    };
    turn_back(back.q, 2), turn_back(back.k, 2), turn_back(back.v, 2), turn_back(back.grad_o, 2);
    turn_back(back.grad_q, 2), turn_back(back.grad_k, 2), turn_back(back.grad_v, 2);
    turn_back(back.initial_state, 1), turn_back(back.grad_final_state, 1), turn_back(back.grad_initial_state, 1);
    turn_back(back.beta, 2), turn_back(back.grad_beta, 2);
    if constexpr (M::decay != DecayKind::none) turn_back(back.log_decay, 2), turn_back(back.grad_log_decay, 2);
    REQUIRE(cpu::linear_attention_backward(back, SerialExecutor{}).ok());
    CHECK(same_bits(grad, turned_grad));
  });
}

TEST_CASE_TEMPLATE("shared heads are heads repeated", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](const auto& p, Draw&) {
    const Index heads = p.s.output_heads(), states = p.s.state_heads();
    auto wide = p;
    wide.shape.query_heads = wide.shape.key_heads = wide.shape.value_heads = heads;
    wide.s = wide.shape.sizes();
    const auto spread = [&](const auto& x) { return repeated(x, 2, heads / x.extents()[2]); };
    wide.q = spread(p.q), wide.k = spread(p.k), wide.v = spread(p.v);
    wide.initial_state = repeated(p.initial_state, 1, heads / states);
    if (p.delta) wide.beta = spread(p.beta);
    if constexpr (M::decay != DecayKind::none) wide.log_decay = spread(p.log_decay);
    const auto shared = forward(p), alone = forward(wide);
    CHECK(test::same_bits(shared.o, alone.o));
    CHECK(test::same_bits(repeated(shared.state, 1, heads / states), alone.state));

    wide.grad_final_state = Tensor<float, 4>(wide.initial_state.extents());
    auto without = p;
    without.grad_final_state.fill(0);
    const auto grad = backward(without), grad_alone = backward(wide);
    const auto check_sum = [&](const Tensor<float, 4>& of_shared, const Tensor<float, 4>& of_each, int axis) {
      Tensor<double, 4> sum(of_shared.extents());
      const Index run_length = of_each.extents()[std::size_t(axis)] / of_shared.extents()[std::size_t(axis)];
      for_each_index(of_each.view(), [&](auto... index) {
        std::array<Index, 4> i{index...};
        i[std::size_t(axis)] /= run_length;
        sum(i[0], i[1], i[2], i[3]) += double(of_each(index...));
      });
      CHECK(relative_error(of_shared, sum) < tolerance<float>(terms(p.shape)));
    };
    check_sum(grad.q, grad_alone.q, 2), check_sum(grad.k, grad_alone.k, 2), check_sum(grad.v, grad_alone.v, 2);
    check_sum(grad.state, grad_alone.state, 1);
  });
}

TEST_CASE_TEMPLATE("sequences packed together are sequences apart", M, Additive, PerKey, Delta) {
  for_random_problems<float, M>([](auto p, Draw& draw) {
    auto first_entry = p.shape;
    first_entry.batch = 1;
    p = random_problem<float, M>(7, first_entry, draw);
    std::vector<std::int32_t> offsets{0};
    for (Index i = draw(0, 4); i > 0; --i) offsets.push_back(std::int32_t(draw(0, p.shape.tokens)));
    offsets.push_back(std::int32_t(p.shape.tokens));
    std::sort(offsets.begin(), offsets.end());
    const Index sequences = Index(offsets.size()) - 1;
    p.initial_state = random_tensor<float>(5, sequences, p.s.state_heads(), p.s.key_dim, p.s.value_dim);
    p.grad_final_state = random_tensor<float>(6, sequences, p.s.state_heads(), p.s.key_dim, p.s.value_dim);

    Outcome<float, M::decay, M::rule> packed{p.output(), p.initial_state}, apart = packed;
    Gradients<float, M::decay, M::rule> packed_grad(p), apart_grad(p);
    auto args = p.args(packed.o, packed.state);
    auto back = packed_grad.args(p);
    args.cu_seqlens = back.cu_seqlens = IndexView(offsets.data(), sequences + 1);
    REQUIRE(cpu::linear_attention(args, SerialExecutor{}).ok());
    REQUIRE(cpu::linear_attention_backward(back, SerialExecutor{}).ok());
    for (Index i = 0; i < sequences; ++i) {
      const Index begin = offsets[std::size_t(i)], count = offsets[std::size_t(i + 1)] - begin;
      auto one = p.args(apart.o, apart.state);
      auto one_back = apart_grad.args(p);
      cut_tokens(one, begin, count), cut_tokens(one_back, begin, count);
      const auto own = [&](auto& states) { states = run(states, 0, i, 1); };
      own(one.initial_state), own(one.final_state);
      own(one_back.initial_state), own(one_back.grad_final_state), own(one_back.grad_initial_state);
      REQUIRE(cpu::linear_attention(one, SerialExecutor{}).ok());
      REQUIRE(cpu::linear_attention_backward(one_back, SerialExecutor{}).ok());
    }
    CHECK(same_bits(packed, apart));
    CHECK(same_bits(packed_grad, apart_grad));
  });
}
