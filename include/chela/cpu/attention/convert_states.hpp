#pragma once
#include "chela/attention/convert_states.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/element.hpp"

namespace chela::cpu {

/// Copies states between forms; contract in attention/convert_states.hpp.
template <Element From, Element To, Executor E>
Status convert_states(const ConvertStatesArgs<From, To>& args, const E& executor) {
  if (Status s = check(args); !s.ok()) return s;
  const auto from = key_major(args.from, args.from_layout);
  const auto to = key_major(args.to, args.to_layout);
  const Index heads = to.extents[1];
  executor.for_each(to.extents[0] * heads, [&](Index task, int) {
    const auto source = slice(slice(from, task / heads), task % heads);
    const auto target = slice(slice(to, task / heads), task % heads);
    for (Index i = 0; i < target.extents[0]; ++i)
      for (Index j = 0; j < target.extents[1]; ++j)
        target(i, j) = static_cast<To>(static_cast<Accumulator<From>>(source(i, j)));
  });
  return {};
}

}  // namespace chela::cpu
