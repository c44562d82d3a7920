#pragma once
// Problems of linear attention at the edges of what a log-decay may be, and how far each answer is from the double
// recurrence.
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "attention/results.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "support/attention.hpp"
#include "support/tolerance.hpp"

namespace chela::test {

enum class Decays {
  none,
  tiny,
  one,
  twenty,
  eighty_eight,
  thousand,
  reset,
  every_other_reset,
  every_other_88,
  mixture,
  resets_at_edges
};
inline constexpr std::array all_decays{Decays::none,
                                       Decays::tiny,
                                       Decays::one,
                                       Decays::twenty,
                                       Decays::eighty_eight,
                                       Decays::thousand,
                                       Decays::reset,
                                       Decays::every_other_reset,
                                       Decays::every_other_88,
                                       Decays::mixture,
                                       Decays::resets_at_edges};

inline const char* name_of(Decays decays) {
  constexpr const char* names[] = {"0",
                                   "-1e-12",
                                   "-1",
                                   "-20",
                                   "-88",
                                   "-1000",
                                   "-inf",
                                   "0 and -inf in turn",
                                   "0 and -88 in turn",
                                   "random mixture",
                                   "-inf at the edges of tiles and blocks"};
  return names[int(decays)];
}

/// The log-decay of a token (per head: of a head) and a key.
template <class Random>
double log_decay_of(Decays decays, Index token, Index key, Random& random) {
  constexpr double reset = -std::numeric_limits<double>::infinity();
  constexpr double constants[] = {0, -1e-12, -1, -20, -88, -1000, reset};
  const bool odd = (token + key) % 2 == 1;
  switch (decays) {
    case Decays::every_other_reset:
      return odd ? reset : 0;
    case Decays::every_other_88:
      return odd ? -88 : 0;
    case Decays::mixture:
      return constants[std::uniform_int_distribution<int>(0, 6)(random)];
    case Decays::resets_at_edges:
      for (Index t : {5, 17, 31, 33, 40})  // of some keys only
        if (token == t) return key % 2 == 0 ? reset : -0.1;
      return token == 32 || token == 64 ? reset : -0.1;
    default:
      return constants[int(decays)];
  }
}

/// A problem of the given decays with q, k and v (delta rule: q and v) up to `size`.
template <class T, DecayKind D, RuleKind R>
Problem<T, D, R> extreme_problem(const Shape& shape, Decays decays, double size) {
  Problem<T, D, R> p(shape);
  using A = Accumulator<T>;
  const auto enlarge = [&](auto& x) {
    for (auto& value : x) value = T(float(size * double(static_cast<A>(value))));
  };
  enlarge(p.q), enlarge(p.v);
  if (R == RuleKind::additive) enlarge(p.k);
  std::mt19937 random(17);
  for_each_index(p.log_decay.view(), [&](auto... index) {
    const std::array<Index, sizeof...(index)> i{index...};
    const Index token = i.size() == 1 ? i[0] : i[1], key = i.size() == 4 ? i[3] : 0;
    p.log_decay(index...) = A(log_decay_of(decays, token, key, random));
  });
  return p;
}

/// The largest finite value of a storage type, and the distance of neighbours below its least normal value.
template <class T>
double largest_value() {
  return double(static_cast<Accumulator<T>>(std::numeric_limits<T>::max()));
}
template <class T>
double least_distance() {
  return double(static_cast<Accumulator<T>>(std::numeric_limits<T>::denorm_min()));
}

/// |got - want| / |want| over all elements that T can hold, infinite if one of them is not finite in `got`. Below its
/// least normal value a type has no relative precision left: each of the `summed` terms may be off by half its least
/// distance.
template <class T, int Rank>
double error_where_finite(const Tensor<T, Rank>& got, const Tensor<double, Rank>& want, Index summed) {
  double difference = 0, norm = 0;
  Index count = 0;
  for (Index i = 0; i < got.size(); ++i) {
    const double g = double(static_cast<Accumulator<T>>(got.data()[i])), w = want.data()[i];
    if (!(std::abs(w) <= largest_value<T>())) continue;
    if (!std::isfinite(g)) return std::numeric_limits<double>::infinity();
    difference += (g - w) * (g - w), norm += w * w, ++count;
  }
  difference = std::max(0.0, std::sqrt(difference) - least_distance<T>() * std::sqrt(double(count * summed)));
  return norm > 0 ? difference / std::sqrt(norm) : difference;
}

struct Error {
  const char* of;
  double error, allowed;
};
using Errors = std::vector<Error>;

template <ChunkPolicy P, class T, DecayKind D, RuleKind R>
Errors forward_errors(const Problem<T, D, R>& p) {
  const DoubleProblem d(p);
  const Index n = terms(p.shape);
  auto o = p.output();
  auto state = p.state();
  if (!cpu::linear_attention<P>(p.args(o, state), SerialExecutor{}).ok()) return {{"refused", 1, 0}};
  auto want = converted<double>(o.view()), want_state = converted<double>(state.view());
  reference::linear_attention(d.problem, want, want_state);
  return {{"o", error_where_finite(o, want, n), tolerance<T>(n)},
          {"final state", error_where_finite(state, want_state, n), tolerance<Accumulator<T>>(n)}};
}

template <class T, DecayKind D, RuleKind R>
Errors step_errors(const Problem<T, D, R>& p) {
  const DoubleProblem d(p);
  const Index n = terms(p.shape);
  auto o = p.output();
  auto state = p.initial_state;
  for (Index t = 0; t < p.shape.tokens; ++t)
    if (!cpu::linear_attention_step(step_args(p, t, o, state), SerialExecutor{}).ok()) return {{"refused", 1, 0}};
  auto want = converted<double>(o.view()), want_state = converted<double>(state.view());
  reference::linear_attention(d.problem, want, want_state);
  return {{"o of steps", error_where_finite(o, want, n), tolerance<T>(n)},
          {"state of steps", error_where_finite(state, want_state, n), tolerance<Accumulator<T>>(n)}};
}

template <class T, DecayKind D, RuleKind R>
Errors backward_errors(const Problem<T, D, R>& p) {
  using A = Accumulator<T>;
  const DoubleProblem d(p);
  const Index n = terms(p.shape);
  Gradients<T, D, R> got(p);
  if (!cpu::linear_attention_backward(got.args(p), SerialExecutor{}).ok()) return {{"refused", 1, 0}};
  Tensor<double, 4> q(d.q.extents()), k(d.k.extents()), v(d.v.extents()), state(d.initial_state.extents()),
      spread(d.log_decay.extents());
  Tensor<double, 3> beta(d.beta.extents());
  reference::LinearAttentionGradients want{q, k, v, state};
  if (p.decays) want.log_decay = spread;
  if (p.delta) want.beta = beta;
  reference::linear_attention_backward(d.problem, d.grad_o, d.grad_final_state, want);

  const double allowed = tolerance<T>(n), allowed_sum = tolerance<A>(n);
  Errors errors{{"grad_q", error_where_finite(got.q, q, n), allowed},
                {"grad_k", error_where_finite(got.k, k, n), allowed},
                {"grad_v", error_where_finite(got.v, v, n), allowed},
                {"grad_initial_state", error_where_finite(got.state, state, n), allowed_sum}};
  if (p.delta) errors.push_back({"grad_beta", error_where_finite(got.beta, beta, n), allowed_sum});
  if constexpr (D != DecayKind::none) {
    // Summed over the axes that the log-decay lacks. A sum is as exact as its terms, not as what is left of them.
    Tensor<double, log_decay_rank(D)> sum(got.log_decay.extents());
    double magnitude = 0;
    for_each_index(spread.view(), [&](Index b, Index t, Index h, Index i) {
      magnitude += spread(b, t, h, i) * spread(b, t, h, i);
      if constexpr (D == DecayKind::per_head) sum(h) += spread(b, t, h, i);
      if constexpr (D == DecayKind::per_token) sum(b, t, h) += spread(b, t, h, i);
      if constexpr (D == DecayKind::per_key) sum(b, t, h, i) = spread(b, t, h, i);
    });
    double norm = 0;
    for (double x : sum) norm += x * x;
    const Index summed = p.s.key_dim * p.s.value_dim * (p.s.tokens + 1);
    // Terms come from two walks, or four for the delta rule or two directions, of each output head of the state. The
    // sum runs on, so that a term's error reaches every later token: per head it counts as often.
    const Index walks = (p.delta || p.span == Span::bidirectional ? 4 : 2) * (p.s.output_heads() / p.s.state_heads());
    const Index times = D == DecayKind::per_head ? p.s.batch * p.s.tokens * p.s.tokens : 1;
    const double error = error_where_finite(got.log_decay, sum, walks * times * summed);
    errors.push_back({"grad_log_decay", norm > 0 ? error * std::sqrt(norm / std::max(norm, magnitude)) : error,
                      tolerance<A>(summed)});
  }
  return errors;
}

}  // namespace chela::test
