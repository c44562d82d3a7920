#pragma once
// The CHELA block on the CPU: forward, backward and step for any memory, mixer and output policy. Activations are
// contiguous [batch, token, width].
#include "chela/cpu/block/chela_backward.hpp"
#include "chela/cpu/block/memory.hpp"
#include "chela/cpu/block/mixer.hpp"

namespace chela::cpu {

template <class MemoryModule, class MixerModule, class OutputPolicy>
struct Compute<ChelaBlock<MemoryModule, MixerModule, OutputPolicy>> {
  using Block = ChelaBlock<MemoryModule, MixerModule, OutputPolicy>;
  using Memory = Compute<MemoryModule>;
  using Mixer = Compute<MixerModule>;
  using Shape = typename Block::Shape;
  template <class A>
  using Parameters = typename Block::template Parameters<A>;
  template <class T>
  using Given = std::type_identity_t<T>;

  /// Activations of one pass.
  template <class A>
  struct Cache {
    Tensor<A, 1> activations;
    typename Memory::template Cache<A> memory;
    typename Mixer::template Cache<A> mixer;
  };

  /// Gradients of activations: one serves a whole stack of blocks.
  template <class A>
  struct Scratch {
    Tensor<A, 1> gradients;
  };

  template <class A>
  struct Prepared {
    typename Memory::template Prepared<A> memory;
    typename Mixer::template Prepared<A> mixer;
  };

  /// What decoding carries, for a batch of sequences that have seen no token yet.
  template <class A>
  struct State {
    typename Memory::template State<A> memory;
    typename Mixer::template State<A> mixer;
    Tensor<A, 1> activations;  ///< of the token at work; carries nothing over
    State() = default;
    State(const Shape& s, Index batch) : memory(s.memory_shape(), batch), mixer(s.mixer_shape(), batch) {}
    std::size_t bytes() const { return memory.bytes() + mixer.bytes(); }
  };

  /// y = block(x); y may not be x's memory.
  template <class A, Executor E>
  static Status forward(const Shape& s, const Given<Parameters<const A>>& p, Given<TensorView<const A, 3>> x,
                        Given<TensorView<A, 3>> y, Cache<A>& cache, const E& executor) {
    if (Status bad = check_pass(s, x, y); !bad.ok()) return bad;
    const Index batch = x.extents[0], tokens = x.extents[1];
    if (batch * tokens == 0) return {};
    const auto rows = rows_of<A>(s, p, cache.activations, x);
    const auto& a = rows.a;
    rows.enter(executor);
    const auto input = sequences(rows.input(), batch, tokens);
    if (Status bad = Memory::template forward<A>(s.memory_shape(), p.memory, input, sequences(a.z, batch, tokens),
                                                 cache.memory, executor);
        !bad.ok())
      return bad;
    rows.project(executor);
    if (Status bad =
            Mixer::template forward<A>(s.mixer_shape(), p.mixer, input, heads(s, a.q, batch), heads(s, a.k, batch),
                                       heads(s, a.v, batch), heads(s, a.o, batch), cache.mixer, executor);
        !bad.ok())
      return bad;
    rows.leave(rowwise::flat_rows(y, s.width), executor);
    return {};
  }

  /// Gradients of the pass that filled `cache` with the same parameters and x. All are overwritten; grad_x may not be
  /// grad_y's memory.
  template <class A, Executor E>
  static Status backward(const Shape& s, const Given<Parameters<const A>>& p, Cache<A>& cache,
                         Given<TensorView<const A, 3>> x, Given<TensorView<const A, 3>> grad_y,
                         Given<TensorView<A, 3>> grad_x, const Given<Parameters<A>>& grad, Scratch<A>& scratch,
                         const E& executor) {
    if (Status bad = check_pass(s, x, grad_x); !bad.ok()) return bad;
    if (Status bad = check_pass(s, grad_y, grad_x); !bad.ok()) return bad;
    const Index batch = x.extents[0], tokens = x.extents[1];
    if (batch * tokens == 0) {
      Block::visit(
          s, [](const ParameterInfo&, auto& leaf) { std::fill_n(leaf.data, leaf.size(), A(0)); }, grad);
      return {};
    }
    const auto rows = rows_of<A>(s, p, cache.activations, x);
    const auto& a = rows.a;
    const detail::BlockRowsBackward<Block, A> back{
        rows, detail::BlockGradients<Block, A>::in(scratch.gradients, s, batch * tokens, executor.workers())};
    const auto& g = back.g;
    const TensorView<const A, 2> dy = rowwise::flat_rows(grad_y, s.width);
    const TensorView<A, 2> dx = rowwise::flat_rows(grad_x, s.width);

    back.leave(dy, dx, executor);
    const auto input = sequences(rows.input(), batch, tokens);
    if (Status bad = Mixer::template backward<A>(s.mixer_shape(), p.mixer, cache.mixer, input, heads(s, a.q, batch),
                                                 heads(s, a.k, batch), heads(s, a.v, batch), heads(s, g.o, batch),
                                                 heads(s, g.q, batch), heads(s, g.k, batch), heads(s, g.v, batch),
                                                 sequences(g.n, batch, tokens), grad.mixer, executor);
        !bad.ok())
      return bad;
    back.project(Mixer::reads_input, executor);
    if (Status bad =
            Memory::template backward<A>(s.memory_shape(), p.memory, cache.memory, input, sequences(g.z, batch, tokens),
                                         sequences(g.n_of_memory, batch, tokens), grad.memory, executor);
        !bad.ok())
      return bad;
    back.enter(dx, executor);
    back.sum_over_rows(dy, grad, executor);
    return {};
  }

  /// What `step` needs of the parameters besides themselves; to be made again when they change.
  template <class A, Executor E>
  static Prepared<A> prepare(const Shape& s, const Parameters<const A>& p, const E& executor) {
    return {Memory::template prepare<A>(s.memory_shape(), p.memory, executor),
            Mixer::template prepare<A>(s.mixer_shape(), p.mixer, executor)};
  }

  /// One token per sequence, x and y [batch, width] contiguous. Causal blocks only.
  template <class A, Executor E>
  static Status step(const Shape& s, const Given<Parameters<const A>>& p, const Prepared<A>& prepared,
                     Given<TensorView<const A, 2>> x, Given<TensorView<A, 2>> y, State<A>& state, const E& executor) {
    const Index batch = x.extents[0];
    if (Status bad = check_pass(s, sequences(x, batch, 1), sequences(y, batch, 1)); !bad.ok()) return bad;
    if (s.span != Span::causal)
      return {Code::unsupported, "a bidirectional block has no step: its outputs need later tokens"};
    if (batch == 0) return {};
    const auto rows = rows_of<A>(s, p, state.activations, sequences(x, batch, 1));
    const auto& a = rows.a;
    rows.enter(executor);
    if (Status bad = Memory::template step<A>(s.memory_shape(), p.memory, prepared.memory, rows.input(), a.z,
                                              state.memory, executor);
        !bad.ok())
      return bad;
    rows.project(executor);
    const auto token = [&](auto view) { return slice_axis<1>(heads(s, view, batch), 0); };
    if (Status bad = Mixer::template step<A>(s.mixer_shape(), p.mixer, prepared.mixer, rows.input(), token(a.q),
                                             token(a.k), token(a.v), token(a.o), state.mixer, executor);
        !bad.ok())
      return bad;
    rows.leave(y, executor);
    return {};
  }

 private:
  template <class A>
  static detail::BlockRows<Block, A> rows_of(const Shape& s, const Parameters<const A>& p, Tensor<A, 1>& memory,
                                             TensorView<const A, 3> x) {
    const auto flat = rowwise::flat_rows(x, s.width);
    return {s, p, detail::BlockActivations<Block, A>::in(memory, s, flat.extents[0]), flat};
  }

  /// [row, width] as [batch, token, width].
  template <class T>
  static TensorView<T, 3> sequences(TensorView<T, 2> rows, Index batch, Index tokens) {
    return contiguous(rows.data, batch, tokens, rows.extents[1]);
  }

  /// [row, head * dim] as [batch, token, head, dim].
  template <class T>
  static TensorView<T, 4> heads(const Shape& s, TensorView<T, 2> rows, Index batch) {
    return contiguous(rows.data, batch, rows.extents[0] / batch, s.heads, rows.extents[1] / s.heads);
  }

  template <class X, class Y>
  static Status check_pass(const Shape& s, TensorView<X, 3> x, TensorView<Y, 3> y) {
    const auto packed = [&](auto v) {
      return v.extents[2] == s.width && v.strides[2] == 1 && (v.extents[1] <= 1 || v.strides[1] == s.width) &&
             (v.extents[0] <= 1 || v.strides[0] == v.extents[1] * s.width);
    };
    return first_failure(
        Block::check(s),
        require(readable(x) && writable(y), Code::bad_shape, "x and y need data and extents of zero or more"),
        require(same_extents(x, y) && x.extents[2] == s.width, Code::bad_shape,
                "x and y must both be [batch, token, width] of the block"),
        require(packed(x) && packed(y), Code::bad_stride, "activations of a block must be contiguous"),
        require(static_cast<const void*>(x.data) != y.data || x.size() == 0, Code::bad_value,
                "outputs must not be the inputs' memory"));
  }
};

}  // namespace chela::cpu
