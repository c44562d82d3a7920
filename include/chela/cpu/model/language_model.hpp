#pragma once
// Training and decoding of a language model on the CPU. With
//
//   using Model = chela::LanguageModel<chela::ChelaBlock<>>;
//   using Run = chela::cpu::Compute<Model>;
//
// the parameters live in a flat buffer of parameter_count<Model>(shape) elements, seen through bind_parameters<Model>.
#include "chela/cpu/block/compute.hpp"
#include "chela/model/language_model.hpp"

namespace chela::cpu {

template <class Block>
struct Compute<LanguageModel<Block>> {
  using Model = LanguageModel<Block>;
  using Shape = typename Model::Shape;
  template <class A>
  using Parameters = typename Model::template Parameters<A>;

  template <class A>
  struct Cache;
  template <class A>
  struct Prepared;
  template <class A>
  struct State;

  /// The mean cross-entropy of `targets` [batch, token], in nats, and its gradients, which are overwritten. Tokens are of any
  /// integer type. The cache is reused by later calls; nothing is allocated while the sizes stay the same.
  template <class A, class Token, Executor E>
  static Status loss_and_gradients(const Shape& shape, const Parameters<const A>& parameters,
                                   TensorView<Token, 2> tokens, TensorView<Token, 2> targets, Cache<A>& cache,
                                   const Parameters<A>& gradients, double& loss, const E& executor);

  /// The loss alone, with the activations of one block at a time.
  template <class A, class Token, Executor E>
  static Status loss(const Shape& shape, const Parameters<const A>& parameters, TensorView<Token, 2> tokens,
                     TensorView<Token, 2> targets, Cache<A>& cache, double& loss, const E& executor);

  /// What decoding needs of the parameters besides themselves; to be made again when they change.
  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& shape, const Parameters<const A>& parameters, const E& executor);

  /// One token per sequence: `tokens` [batch], `logits` [batch, vocabulary] of the next. `state` = State<A>(shape, batch) at
  /// the start.
  template <class A, class Token, Executor E>
  static Status step(const Shape& shape, const Parameters<const A>& parameters, const Prepared<A>& prepared,
                     TensorView<Token, 1> tokens, std::type_identity_t<TensorView<A, 2>> logits, State<A>& state,
                     const E& executor);
};

}  // namespace chela::cpu
