#pragma once
// Mixers on the CPU. Compute<Mixer> has, besides Cache, Prepared and State of block/compute.hpp,
//
//   reads_input   whether it reads the block's normed input x
//   forward, backward, step as below; `grad_x` is written only by a mixer that reads its input
#include "chela/block/mixer.hpp"
#include "chela/cpu/attention/linear.hpp"
#include "chela/cpu/block/compute.hpp"

namespace chela::cpu {

template <>
struct Compute<LinearAttentionMixer> {
  using Shape = LinearAttentionMixer::Shape;
  template <class A>
  using Parameters = LinearAttentionMixer::Parameters<A>;

  static constexpr bool reads_input = false;

  template <class A>
  struct Cache {};
  template <class A>
  struct Prepared {};

  /// One S in R^{key_dim x value_dim} per sequence and head.
  template <class A>
  struct State {
    Tensor<A, 4> sums;
    State() = default;
    State(const Shape& s, Index batch) : sums(batch, s.heads, s.key_dim, s.value_dim) {}
    std::size_t bytes() const { return std::size_t(sums.size()) * sizeof(A); }
  };

  template <class A, Executor E>
  static Prepared<A> prepare(const Shape&, const Parameters<const A>&, const E&) {
    return {};
  }

  /// q, k [batch, token, head, key_dim], v and o [batch, token, head, value_dim], x [batch, token, width].
  template <class A, Executor E>
  static Status forward(const Shape& s, const Parameters<const A>&, TensorView<const A, 3>, TensorView<const A, 4> q,
                        TensorView<const A, 4> k, TensorView<const A, 4> v, TensorView<A, 4> o, Cache<A>&,
                        const E& executor) {
    return linear_attention(LinearAttentionArgs<A>{.q = q, .k = k, .v = v, .o = o, .span = s.span}, executor);
  }

  template <class A, Executor E>
  static Status backward(const Shape& s, const Parameters<const A>&, Cache<A>&, TensorView<const A, 3>,
                         TensorView<const A, 4> q, TensorView<const A, 4> k, TensorView<const A, 4> v,
                         TensorView<const A, 4> grad_o, TensorView<A, 4> grad_q, TensorView<A, 4> grad_k,
                         TensorView<A, 4> grad_v, TensorView<A, 3>, const Parameters<A>&, const E& executor) {
    return linear_attention_backward(LinearAttentionBackwardArgs<A>{.q = q,
                                                                    .k = k,
                                                                    .v = v,
                                                                    .grad_o = grad_o,
                                                                    .grad_q = grad_q,
                                                                    .grad_k = grad_k,
                                                                    .grad_v = grad_v,
                                                                    .span = s.span},
                                     executor);
  }

  /// One token per sequence: as in forward without the token axis.
  template <class A, Executor E>
  static Status step(const Shape&, const Parameters<const A>&, const Prepared<A>&, TensorView<const A, 2>,
                     TensorView<const A, 3> q, TensorView<const A, 3> k, TensorView<const A, 3> v, TensorView<A, 3> o,
                     State<A>& state, const E& executor) {
    return linear_attention_step(LinearAttentionStepArgs<A>{.q = q, .k = k, .v = v, .o = o, .state = state.sums},
                                 executor);
  }
};

}  // namespace chela::cpu
