#pragma once
// How the CPU backend computes a module (see block/parameters.hpp): a specialisation of Compute beside each module,
// with static functions forward, backward and step, and the value types these need:
//
//   Cache<A>     what the forward pass leaves for the backward pass; reused from call to call, it never shrinks
//   Scratch<A>   memory of one call, which modules of the same kind may share
//   State<A>     what decoding carries from token to token, for a batch of sequences
//   Prepared<A>  what decoding needs of the parameters besides themselves, made once
//
// A is float or double. Memories and mixers of your own enter a block by specialising this template.
#include <array>
#include <utility>

#include "chela/core/executor.hpp"
#include "chela/core/tensor.hpp"

namespace chela::cpu {

template <class Module>
struct Compute;

template <class Module, class A>
using Cache = typename Compute<Module>::template Cache<A>;
template <class Module, class A>
using State = typename Compute<Module>::template State<A>;
template <class Module, class A>
using Prepared = typename Compute<Module>::template Prepared<A>;

namespace detail {

/// A view of the leading elements of `memory` with these extents; the memory is replaced by a larger one if it is too
/// small. What it held before is lost only then.
template <class A, class... I>
TensorView<A, sizeof...(I)> reserve(Tensor<A, 1>& memory, I... extents) {
  const Index count = (Index(1) * ... * Index(extents));
  if (memory.size() < count) memory = Tensor<A, 1>(std::array<Index, 1>{count});
  return contiguous(memory.data(), extents...);
}

/// Many arrays in one piece of memory. `f(take)` calls take(extents...) for each array and returns a struct of the
/// views; it is called twice, first to count. The same sizes give the same places, so a later call finds what an
/// earlier one wrote.
template <class A, class F>
auto lay_out(Tensor<A, 1>& memory, F&& f) {
  constexpr Index aligned = 64 / Index(sizeof(A));
  Index used = 0;
  const auto take = [&](auto... extents) {
    const auto view = contiguous(memory.data() + used, extents...);
    used += round_up((Index(1) * ... * Index(extents)), aligned);
    return view;
  };
  const auto count = [&](auto... extents) {
    used += round_up((Index(1) * ... * Index(extents)), aligned);
    return TensorView<A, sizeof...(extents)>{};
  };
  f(count);
  reserve(memory, used);
  used = 0;
  return f(take);
}

}  // namespace detail

}  // namespace chela::cpu
