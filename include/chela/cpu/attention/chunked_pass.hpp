#pragma once
// Chunked evaluation of a causal pass, any member: dense products inside each chunk, a carried state between chunks
// (chunk/step.hpp). Where every token sees all there are two sweeps of products.
#include <algorithm>

#include "chela/attention/linear.hpp"
#include "chela/chunk/step.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"
#include "chela/cpu/attention/pass.hpp"
#include "chela/cpu/tile/eigen_tile_ops.hpp"
#include "chela/tile/policy.hpp"

namespace chela::cpu::detail {

/// Tiles one after the other in the memory of a worker, each at the beginning of a cache line of its own.
template <class Ops>
class TileMemory {
 public:
  using S = typename Ops::Scalar;
  explicit TileMemory(S* memory) : next_(memory) {}

  typename Ops::Tile take(Index rows, Index columns) {
    S* const begin = next_;
    next_ += size(rows, columns);
    return Ops::tile(begin, rows, columns);
  }
  static constexpr Index size(Index rows, Index columns) { return round_up(rows * columns, Index(64 / sizeof(S))); }

 private:
  S* next_;
};

/// One chunk of one head: its tiles in a worker's memory, and the state that the walk carries.
template <bool Decays, RuleKind R, class Q, class K, class V, class O, class S>
class ChunkOfHead {
 public:
  using A = Accumulator<O>;
  using Pass = LinearPass<Q, K, V, O, S>;
  using Ops = EigenTileOps<A>;
  using Tile = typename Ops::Tile;
  using Memory = TileMemory<Ops>;

  /// Elements of memory: those of the longest chunk, and a packet that a product may read beyond them.
  static Index memory_size(const Pass& pass, Index chunk_len) {
    const Index keys = Memory::size(chunk_len, pass.key_dim()), column = Memory::size(chunk_len, 1);
    const Index values = Memory::size(chunk_len, pass.value_dim()), scores = Memory::size(chunk_len, chunk_len);
    const Index decays = !Decays ? 0 : one_decay_for_all_keys(pass) ? 2 * column + scores : 3 * keys;
    const Index rule = R == RuleKind::delta ? 2 * keys + column : 0;
    return 2 * keys + 2 * values + scores + decays + rule + Memory::size(1, 1);
  }

  ChunkOfHead(const Pass& pass, TensorView<const A, 3> beta, const TileAt<A>& at, const TileAt<A>* next, A* memory)
      : pass_(pass),
        beta_(beta),
        at_(at),
        next_(next),
        memory_(memory),
        state_t_(at.state, pass.value_dim(), pass.key_dim(), Eigen::OuterStride<>(at.padded)),
        tiles_{memory_.take(at.count, pass.key_dim()), memory_.take(at.count, pass.key_dim()),
               memory_.take(at.count, pass.value_dim()), memory_.take(at.count, at.count),
               memory_.take(pass.value_dim(), at.count)} {}

  void step() {
    load_queries();
    load_keys_and_values();
    with_decay([&](const auto& decay) { chunk_step(ops_, tiles_, state_t_, decay, rule()); });
    store_output();
  }
  void write() {
    load_keys_and_values();
    write_state(ops_, tiles_, state_t_);
  }
  void read() {
    load_queries();
    read_state(ops_, tiles_, state_t_);
    store_output();
  }

 private:
  template <class T>
  TensorView<T, 2> rows(TensorView<T, 4> x) const {
    return at_.rows(x, pass_.heads());
  }
  template <class T>
  void fetch_next(TensorView<T, 4> x) {
    if (next_) ops_.fetch_ahead.add(next_->rows(x, pass_.heads()));
  }
  void load_queries() {
    ops_.load_scaled(tiles_.queries, rows(pass_.q), pass_.factor_of(Everything::over_queries, at_.sequence));
    fetch_next(pass_.q), fetch_next(pass_.o);
  }
  void load_keys_and_values() {
    ops_.load_scaled(tiles_.keys, rows(pass_.k), pass_.factor_of(Everything::over_keys, at_.sequence));
    ops_.load(tiles_.values, rows(pass_.v));
    fetch_next(pass_.k), fetch_next(pass_.v);
  }
  void store_output() { ops_.store_transposed(tiles_.output_t, rows(pass_.o)); }

  template <class F>
  void with_decay(const F& f) {
    if constexpr (!Decays) {
      f(NoDecay{});
    } else {
      const Index count = at_.count, key_dim = pass_.key_dim();
      const auto prepared = [&](auto decay) {
        ops_.load(decay.decays, run(rows(pass_.decay.log_decay), 1, 0, decay.decays.cols()));
        decay.prepare(ops_);
        return decay;
      };
      if (one_decay_for_all_keys(pass_))
        f(prepared(ScalarDecay<Ops>{memory_.take(count, 1), memory_.take(count, 1), memory_.take(count, count)}));
      else
        f(prepared(KeyDecay<Ops>{memory_.take(count, key_dim), memory_.take(count, key_dim),
                                 memory_.take(KeyDecay<Ops>::blocks(count), key_dim)}));
    }
  }

  auto rule() {
    if constexpr (R == RuleKind::additive) {
      return AdditiveRule{};
    } else {
      const Index count = at_.count, key_dim = pass_.key_dim();
      DeltaRule<Ops> rule{memory_.take(count, 1), memory_.take(count, key_dim), memory_.take(count, key_dim)};
      const auto& [data, extents, strides] = beta_;
      ops_.load(rule.beta,
                rows(TensorView<const A, 4>{
                    data, {extents[0], extents[1], extents[2], 1}, {strides[0], strides[1], strides[2], 0}}));
      return rule;
    }
  }

  static bool one_decay_for_all_keys(const Pass& pass) {
    return pass.decay.log_decay.strides[3] == 0 || pass.key_dim() == 1;
  }

  const Pass& pass_;
  TensorView<const A, 3> beta_;  ///< [batch, token, heads / any divisor]; delta rule only
  const TileAt<A>& at_;
  const TileAt<A>* next_;  ///< null after the last
  Ops ops_;
  Memory memory_;
  Tile state_t_;  ///< [value_dim, key_dim]
  ChunkTiles<Ops> tiles_;
};

/// States of a walk, transposed.
template <class S>
WalkStates<S> transposed_states(WalkStates<S> states) {
  states.initial = transposed(states.initial, 2, 3), states.final = transposed(states.final, 2, 3);
  states.boundary = transposed(states.boundary, 3, 4), states.last = transposed(states.last, 3, 4);
  return states;
}

template <bool Decays, RuleKind R, class Q, class K, class V, class O, class S, Executor E>
void chunked_pass(const LinearPass<Q, K, V, O, S>& pass, TensorView<const Accumulator<O>, 3> beta, Index most_tokens,
                  const E& executor) {
  using A = Accumulator<O>;
  using Chunk = ChunkOfHead<Decays, R, Q, K, V, O, S>;
  const Index heads = pass.heads(), sequences = pass.sequences.size();
  const Index chunk_len = std::clamp<Index>(pass.sequences.tokens, 1, most_tokens);
  // The walk carries the transposed state, whole: its rows are values, its columns keys.
  const auto walk = [&]<class Kept>(const WalkStates<Kept>& states_t, const auto& visit) {
    walk_states(
        StateWalk<A, Kept>{.sequences = pass.sequences,
                           .heads = heads,
                           .key_dim = pass.value_dim(),
                           .value_dim = pass.key_dim(),
                           .states = states_t,
                           .tile_len = chunk_len,
                           .column_grain = round_up(pass.key_dim(), RegisterBlock<A>::columns)},
        [&](Index, Index) { return Chunk::memory_size(pass, chunk_len); },
        [&](Index, Index, A* memory) {
          return [&, memory](const TileInTurn<A>& in_turn) {
            Chunk chunk(pass, beta, in_turn.tile, in_turn.next, memory);
            visit(chunk);
          };
        },
        executor);
  };
  const WalkStates<S> states_t = transposed_states(pass.states);
  if (pass.everything == Everything::no) return walk(states_t, [](Chunk& chunk) { chunk.step(); });
  if constexpr (!Decays && R == RuleKind::additive) {
    // Two sweeps. All heads have read their initial state before any final one is stored, perhaps in the same memory.
    Tensor<A, 4> before(sequences, heads, pass.value_dim(), pass.key_dim()), after = before;
    for (Index i = 0; i < sequences && states_t.initial.present(); ++i)
      for (Index head = 0; head < heads; ++head)
        pack_rows(state_matrix(states_t.initial, states_t.entry(i), head, heads), A(1), &before(i, head, 0, 0),
                  pass.key_dim());
    walk(WalkStates<A>{.initial = before, .final = after}, [](Chunk& chunk) { chunk.write(); });
    walk(WalkStates<A>{.initial = after}, [](Chunk& chunk) { chunk.read(); });
    for (Index i = 0; i < sequences; ++i)
      for (Index head = 0; head < heads; ++head)
        if (stores_state(states_t.final, head, heads))
          unpack_rows(&after(i, head, 0, 0), pass.key_dim(),
                      state_matrix(states_t.final, states_t.entry(i), head, heads));
  }
}

}  // namespace chela::cpu::detail
