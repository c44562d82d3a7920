#pragma once
// A case of linear attention drawn from a fuzzer's bytes: shape, sequences, slots and inputs, sound for the most part,
// and what the double recurrence makes of it.
#include "chela/attention/linear.hpp"
#include "chela/reference/linear.hpp"
#include "fuzz/case.hpp"
#include "support/attention.hpp"

namespace chela::test {

template <DecayKind D, RuleKind R, class F>
struct LinearAttentionCase : DrawnCase {
  static constexpr bool decays = D != DecayKind::none, delta = R == RuleKind::delta;

  LinearAttentionShape shape;
  Placed<float, 4> q, k, v;
  Placed<float, log_decay_rank(D)> log_decay;
  Placed<float, 3> beta;

  /// For a step, of one token.
  LinearAttentionCase(Bytes& b, bool step) : DrawnCase(b) {
    const bool ragged = !step && bytes.once_in(3);
    shape.batch = bytes.once_in(20) ? 0 : 1 + bytes.upto(2), shape.tokens = step                ? 1
                                                                            : bytes.once_in(12) ? 0
                                                                                                : 1 + bytes.upto(13);
    if (ragged && !bytes.once_in(20)) shape.batch = 1;
    shape.query_heads = bytes.once_in(40) ? 0 : 1 + bytes.upto(3), shape.key_heads = 1 + bytes.upto(3);
    shape.value_heads = bytes.once_in(3) ? 1 + bytes.upto(3) : shape.key_heads;
    shape.key_dim = bytes.once_in(40) ? 0 : 1 + bytes.upto(5);
    shape.value_dim = 1 + bytes.upto(9) + (bytes.once_in(4) ? 30 : 0);
    const Index states = shape.state_heads(), outputs = shape.output_heads();
    sound = shape.key_dim > 0 && shape.query_heads > 0 && states % shape.key_heads == 0 &&
            states % shape.value_heads == 0 && outputs % states == 0 && outputs % shape.query_heads == 0;
    terms = (shape.tokens + 1) * (shape.key_dim + 1) * (shape.value_dim + 1);
    magnitude = double(terms);
    sequences = shape.batch;
    if (ragged) draw_offsets(shape.batch, shape.tokens);
    draw_inputs(step);
  }

  std::array<Index, 4> token_extents(Index heads, Index dim) const { return {shape.batch, shape.tokens, heads, dim}; }
  std::array<Index, 3> gate_extents() const { return {shape.batch, shape.tokens, shape.state_heads()}; }
  std::array<Index, log_decay_rank(D)> decay_extents() const {
    if constexpr (D == DecayKind::per_key)
      return token_extents(shape.state_heads(), shape.key_dim);
    else if constexpr (D == DecayKind::per_token)
      return gate_extents();
    else
      return {shape.state_heads()};
  }
  std::array<Index, 4> state_extents(Index entries) const {
    if (F::state_layout == StateLayout::value_major)
      return {entries, shape.state_heads(), shape.value_dim, shape.key_dim};
    return {entries, shape.state_heads(), shape.key_dim, shape.value_dim};
  }
  std::array<Index, 5> saved_extents(Index count) const {
    const auto each = state_extents(sequences);
    return {sequences, count, each[1], each[2], each[3]};
  }

  void draw_inputs(bool step) {
    const std::size_t odd_from = step ? 2 : 0;  // a step has no token axis
    const bool mild = bytes.upto(1);
    q = input(token_extents(shape.query_heads, shape.key_dim));
    k = input(token_extents(shape.key_heads, shape.key_dim));
    v = input(token_extents(shape.value_heads, shape.value_dim));
    if constexpr (delta) {
      const double unit = 1 / std::sqrt(double(std::max<Index>(shape.key_dim, 1)));
      k.fill([&] { return unit * uniform(-1, 1); });
      beta = input(extents(gate_extents(), odd_from));
      beta.fill([&] { return uniform(0, 0.9); });
    }
    if constexpr (decays) {
      log_decay = input(extents(decay_extents(), D == DecayKind::per_head ? 0 : odd_from));
      log_decay.fill([&] {
        constexpr double some[] = {0, -1e-12, -1, -20, -88, -1000, -std::numeric_limits<double>::infinity()};
        return mild || bytes.upto(3) ? uniform(-0.5, 0) : some[std::uniform_int_distribution<int>(0, 6)(random)];
      });
    }
  }

  Sequence sequence(Index i) const { return sequence_of(shape.batch, shape.tokens, i); }
  /// The tokens of one sequence, of [batch, token, ...].
  template <class T, int Rank>
  TensorView<T, Rank> tokens_of(TensorView<T, Rank> x, Index i) const {
    const Sequence s = sequence(i);
    return run(run(x, 0, s.batch, 1), 1, s.begin, s.count);
  }

  /// The first tokens of a sequence in double, from a state of `states`, [entry, head, key, value].
  struct Doubles {
    Tensor<double, 4> q, k, v, log_decay, state;
    Tensor<double, 3> beta;
    reference::LinearAttentionProblem problem;

    Doubles(const LinearAttentionCase& c, Index i, const Tensor<double, 4>& states, Index tokens) {
      const auto first = [&](auto x) { return converted<double>(run(c.tokens_of(x, i), 1, 0, tokens)); };
      q = first(c.q.view()), k = first(c.k.view()), v = first(c.v.view());
      problem = {.q = q, .k = k, .v = v, .scale = 1 / std::sqrt(double(c.shape.key_dim))};
      if (states.size() > 0) {
        state = converted<double>(run(states.view(), 0, c.entry(i), 1));
        problem.initial_state = state;
      }
      if constexpr (decays) {
        log_decay = first(spread_log_decay(c.log_decay.view(), c.shape));
        problem.log_decay = log_decay;
      }
      if constexpr (delta) {
        beta = first(c.beta.view());
        problem.beta = beta;
      }
    }
  };

  struct Answer {
    Tensor<double, 4> o, state;
  };
  Answer answer(Index i, const Tensor<double, 4>& states, Index tokens, Span span) const {
    Doubles d(*this, i, states, tokens);
    d.problem.bidirectional = span == Span::bidirectional;
    Answer a{Tensor<double, 4>(1, tokens, shape.output_heads(), shape.value_dim),
             Tensor<double, 4>(1, shape.state_heads(), shape.key_dim, shape.value_dim)};
    reference::linear_attention(d.problem, a.o, a.state);
    return a;
  }
};

}  // namespace chela::test
