#pragma once
// A case of linear attention drawn from a fuzzer's bytes: shape, sequences, slots and inputs, sound for the most part,
// and what the double recurrence makes of it.
#include <cmath>
#include <limits>
#include <random>

#include "chela/attention/linear.hpp"
#include "chela/reference/linear.hpp"
#include "fuzz/draw.hpp"
#include "support/attention.hpp"
#include "support/tolerance.hpp"

namespace chela::test {

/// Several workers on one thread, tasks in either order.
struct FuzzExecutor {
  int count = 1;
  bool backwards = false;
  int workers() const { return count; }
  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index i = 0; i < tasks; ++i) f(backwards ? tasks - 1 - i : i, int(i % count));
  }
};

/// Indices of either width, with a stride.
struct DrawnIndices {
  std::vector<Index> values;
  std::vector<std::int32_t> narrow;
  std::vector<std::int64_t> wide;
  IndexView view = {};

  void place(Bytes& bytes) {
    const Index stride = 1 + bytes.upto(1), size = Index(values.size());
    for (Index x : values)
      for (Index i = 0; i < stride; ++i)
        narrow.push_back(std::int32_t(i == 0 ? x : -5)), wide.push_back(std::int64_t(i == 0 ? x : -5));
    narrow.push_back(-5), wide.push_back(-5);  // no index is no reason for no memory
    view = bytes.upto(1) ? IndexView(wide.data(), size, stride) : IndexView(narrow.data(), size, stride);
  }
  /// Rarely puts in a number that leads out of every tensor here; whether it did.
  bool spoil(Bytes& bytes) {
    if (!bytes.once_in(12) || values.empty()) return false;
    constexpr Index wrong[] = {-1, 1000, std::numeric_limits<std::int32_t>::min(),
                               std::numeric_limits<std::int32_t>::max()};
    values[std::size_t(bytes.upto(Index(values.size()) - 1))] = wrong[bytes.upto(3)];
    return true;
  }
};

template <DecayKind D, RuleKind R, class F>
struct LinearAttentionCase {
  static constexpr bool decays = D != DecayKind::none, delta = R == RuleKind::delta;
  static constexpr Index rarely = 16, very_rarely = 120;

  Bytes& bytes;
  std::mt19937 random;
  FuzzExecutor executor;
  bool sound = true;  ///< whether the call must be accepted
  LinearAttentionShape shape;
  Index sequences = 0, terms = 1;
  DrawnIndices offsets, slots;
  Placed<float, 4> q, k, v;
  Placed<float, log_decay_rank(D)> log_decay;
  Placed<float, 3> beta;

  /// For a step, of one token.
  LinearAttentionCase(Bytes& b, bool step) : bytes(b), random(b.byte()), executor{int(1 + b.upto(2)), b.once_in(2)} {
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
    sequences = shape.batch;
    if (ragged) draw_offsets();
    draw_inputs(step);
  }

  /// An extent that is not as it must be, rarely.
  template <std::size_t Rank>
  std::array<Index, Rank> extents(std::array<Index, Rank> good, std::size_t first_axis = 0) {
    if (!bytes.once_in(very_rarely)) return good;
    good[first_axis + std::size_t(bytes.upto(Index(Rank - first_axis) - 1))] += bytes.upto(1) ? 1 : -1 - bytes.upto(1);
    sound = false;
    return good;
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

  /// A tensor to write to. If elements share their place the call must be refused.
  template <std::size_t Rank>
  Placed<float, int(Rank)> output(const std::array<Index, Rank>& of) {
    Placed<float, int(Rank)> x(of, bytes, very_rarely);
    sound = sound && !x.broadcast();
    return x;
  }
  template <std::size_t Rank>
  Placed<float, int(Rank)> input(const std::array<Index, Rank>& of) {
    Placed<float, int(Rank)> x(of, bytes, rarely);
    x.fill([&] { return uniform(-1, 1); });
    return x;
  }

  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random); }

  void draw_offsets() {
    offsets.values = {0, shape.tokens};
    for (Index n = bytes.upto(3); n > 0; --n) offsets.values.push_back(bytes.upto(shape.tokens));
    std::sort(offsets.values.begin(), offsets.values.end());
    sequences = Index(offsets.values.size()) - 1;
    if (offsets.spoil(bytes) || shape.batch != 1) sound = false;
    offsets.place(bytes);
  }

  /// Perhaps slots in a pool of states with two entries to spare; how many entries the states have then. Whether wrong
  /// ones are refused depends on whether there are states at all, so that is left to `wrong_slots`.
  Index draw_slots(bool& wrong_slots) {
    if (!bytes.once_in(3)) return sequences;
    slots.values.resize(std::size_t(sequences + 2));
    std::iota(slots.values.begin(), slots.values.end(), Index(0));
    std::shuffle(slots.values.begin(), slots.values.end(), random);
    slots.values.resize(std::size_t(sequences));
    wrong_slots = slots.spoil(bytes);
    if (sequences > 1 && bytes.once_in(20)) slots.values[0] = slots.values[1], wrong_slots = true;
    slots.place(bytes);
    return sequences + 2;
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

  Sequence sequence(Index i) const { return SequenceBatch{shape.batch, shape.tokens, offsets.view}[i]; }
  Index entry(Index i) const { return slots.view.present() ? slots.view[i] : i; }
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

  /// Close for sums of products of numbers of about 1, however much of them cancels.
  template <int Rank>
  void demand_close(TensorView<float, Rank> got, const Tensor<double, Rank>& want, const char* what) const {
    double difference = 0, norm = 0;
    for_each_index(got, [&](auto... i) {
      difference += std::pow(double(got(i...)) - want(i...), 2), norm += std::pow(want(i...), 2);
    });
    const double floor = double(terms) * std::sqrt(double(got.size()));
    demand(std::sqrt(difference) <= tolerance<float>(terms) * (std::sqrt(norm) + floor), what);
  }
};

}  // namespace chela::test
