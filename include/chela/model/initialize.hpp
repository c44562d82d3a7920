#pragma once
// First values of a flat parameter buffer, from what each parameter says of itself.
#include <cstdint>
#include <vector>

#include "chela/block/parameters.hpp"
#include "chela/core/element.hpp"
#include "chela/model/random.hpp"

namespace chela {

/// Fills `memory`, laid out by `infos` as from describe_parameters. A parameter's values depend on the seed, its name
/// and its own initializer only: adding a layer leaves the others as they were. The same numbers with every compiler.
template <Element T>
void initialize_parameters(const std::vector<ParameterInfo>& infos, std::uint64_t seed, T* memory) {
  for (const ParameterInfo& info : infos) {
    const CounterRandom random(seed, stream_of(info.name));
    const auto [kind, a, b] = info.initial;
    T* values = memory + info.offset;
    const Index count = info.count();
    for (Index i = 0; i < count; ++i) {
      // The spread is rounded to T before the sum, so that a compiler which fuses products and sums changes nothing.
      switch (kind) {
        case Initializer::Kind::constant:
          values[i] = T(a);
          break;
        case Initializer::Kind::normal:
          values[i] = T(a) + T(b * random.normal(std::uint64_t(i)));
          break;
        case Initializer::Kind::uniform:
          values[i] = T(a) + T((b - a) * random.uniform(std::uint64_t(i)));
          break;
      }
    }
  }
}

}  // namespace chela
