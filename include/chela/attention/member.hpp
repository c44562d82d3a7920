#pragma once
// What tells one member of the linear attention family from another: decay, rule, and the form of its inputs and states.
#include <concepts>
#include <type_traits>

#include "chela/attention/gates.hpp"
#include "chela/core/element.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// Which tokens an output sees: those up to its own, or all.
enum class Span { causal, bidirectional };

/// What a log-decay depends on: nothing (there is none), the head, also the token, or also the key dimension.
enum class DecayKind { none, per_head, per_token, per_key };

/// What a token writes: its value, or (delta) its value less what the state already answers for its key.
enum class RuleKind { additive, delta };

/// How a state lies in memory: [key_dim, value_dim] or [value_dim, key_dim].
enum class StateLayout { key_major, value_major };

/// Rank of the log-decay's tensor: [head], [batch, token, head] or [batch, token, head, key_dim]. Without decay it is absent.
constexpr int log_decay_rank(DecayKind kind) {
  return kind == DecayKind::per_key ? 4 : kind == DecayKind::per_token ? 3 : 1;
}

/// Rank of the bias of the gate that makes it: [head] or [head, key_dim].
constexpr int gate_bias_rank(DecayKind kind) { return kind == DecayKind::per_key ? 2 : 1; }

/// What else an instance of the operator may choose. To choose otherwise, derive and redeclare.
struct LinearAttentionForm {
  /// The type in which states are kept between calls. While a call runs they are in the accumulator type.
  template <Element T>
  using StateElement = Accumulator<T>;
  static constexpr StateLayout state_layout = StateLayout::key_major;

  /// What makes log-decays of `log_decay`, and betas of `beta` (attention/gates.hpp). A gate other than the given one takes
  /// logits in the element type of q, for a decay per token or per key.
  using LogDecayGate = GivenLogDecay;
  using BetaRate = GivenBeta;

  /// Whether each query and key is first brought to unit length (attention/l2_norm.hpp), before the scale.
  static constexpr bool unit_queries_and_keys = false;
};

template <class F>
concept AttentionForm =
    std::derived_from<F, LinearAttentionForm> && DecayGate<typename F::LogDecayGate> && BetaGate<typename F::BetaRate>;

/// Element of the states of an instance, of its log-decays and of its betas.
template <Element T, AttentionForm F>
using StateOf = typename F::template StateElement<T>;
template <Element T, AttentionForm F>
using LogDecayOf = std::conditional_t<std::is_same_v<typename F::LogDecayGate, GivenLogDecay>, Accumulator<T>, T>;
template <Element T, AttentionForm F>
using BetaOf = std::conditional_t<std::is_same_v<typename F::BetaRate, GivenBeta>, Accumulator<T>, T>;

/// Whether log-decays, betas, queries and keys are used as they are.
template <AttentionForm F>
inline constexpr bool takes_inputs_as_given =
    std::is_same_v<typename F::LogDecayGate, GivenLogDecay>&& std::is_same_v<typename F::BetaRate, GivenBeta> &&
    !F::unit_queries_and_keys;

/// The same states, and inputs as they are.
template <AttentionForm F>
struct FormOfStates : LinearAttentionForm {
  template <Element T>
  using StateElement = StateOf<T, F>;
  static constexpr StateLayout state_layout = F::state_layout;
};

/// States of either layout, seen as [..., key_dim, value_dim]; the same exchange leads back.
template <class S, int Rank>
constexpr TensorView<S, Rank> key_major(TensorView<S, Rank> states, StateLayout layout) {
  return layout == StateLayout::key_major ? states : transposed(states, Rank - 2, Rank - 1);
}
template <AttentionForm F, class S, int Rank>
constexpr TensorView<S, Rank> key_major(TensorView<S, Rank> states) {
  return key_major(states, F::state_layout);
}

}  // namespace chela
