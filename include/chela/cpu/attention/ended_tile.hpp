#pragma once
// A tile of a walk whose outputs are computed but not yet stored, for those who do more with them while they are in the cache.
#include "chela/cpu/attention/state_walk.hpp"
#include "chela/cpu/tile/register_rows.hpp"

namespace chela::cpu::detail {

template <class A>
struct EndedTile {
  const TileAt<A>& at;
  Index heads;
  TensorView<A, 2> out;  ///< where the outputs go
  A* rows;               ///< the outputs, [tokens, padded]
  Index padded;
  const A* own;    ///< for each token q . k, factors included
  bool may_reset;  ///< whether a log-decay of the tile may be so low that it keeps nothing
  A* copies;       ///< memory of [copy, tokens, padded]

  /// The outputs' own place, or the rows that they are in: then `finish` stores them.
  RegisterRows<A> outputs() const {
    return whole_registers<A>(out, padded) ? place(out) : RegisterRows<A>{rows, padded};
  }
  template <class T>
  RegisterRows<const A> read(TensorView<const T, 2> from, Index copy) const {
    if constexpr (std::is_same_v<T, A>)
      if (whole_registers<A>(from, padded)) return {from.data, from.strides[0]};
    pack_rows(from, A(1), copy_of(copy), padded);
    return {copy_of(copy), padded};
  }
  /// Rows that `finish` stores to the same place, with what that holds now if they are `added` to it.
  RegisterRows<A> write(TensorView<A, 2> to, Index copy, bool added = false) const {
    if (whole_registers<A>(to, padded)) return place(to);
    if (added) pack_rows(TensorView<const A, 2>(to), A(1), copy_of(copy), padded);
    return {copy_of(copy), padded};
  }
  void finish(RegisterRows<A> from, TensorView<A, 2> to) const {
    if (from.data != to.data) unpack_rows(from.data, padded, to);
  }

 private:
  static RegisterRows<A> place(TensorView<A, 2> x) { return {x.data, x.strides[0]}; }
  A* copy_of(Index copy) const { return copies + copy * at.count * padded; }
};

}  // namespace chela::cpu::detail
