#pragma once
// What tells one member of the linear attention family from another: decay, rule, and the form of its states.
#include <concepts>

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

/// What else an instance of the operator may choose. To choose otherwise, derive and redeclare.
struct LinearAttentionForm {
  /// The type in which states are kept between calls. While a call runs they are in the accumulator type.
  template <Element T>
  using StateElement = Accumulator<T>;
  static constexpr StateLayout state_layout = StateLayout::key_major;
};

template <class F>
concept AttentionForm = std::derived_from<F, LinearAttentionForm>;

/// Element of the states of an instance.
template <Element T, AttentionForm F>
using StateOf = typename F::template StateElement<T>;

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
