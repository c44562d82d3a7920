#pragma once
// Constant log-decays, one per head, for DecayKind::per_head. All are <= 0. With h = 0 .. heads - 1:
//
//   retnet      log(1 - 2^(-5-h))                                   RetNet (arXiv 2307.08621, section 3.1)
//   alibi       -2^(-8 (h + 1) / heads), heads a power of two       ALiBi (2108.12409, section 3)
//               otherwise with p the largest power of two below it: the slopes of p heads, then every second one, from
//               the first on, of those of 2 p heads
//   lightning   alibi * (1 - layer / (layers - 1) + 1e-5)           TransNormerLLM (2307.14995), Lightning (2401.04658)
#include <cassert>
#include <cmath>

#include "chela/core/element.hpp"
#include "chela/core/tensor.hpp"

namespace chela {

/// [head]; the decays themselves are 1 - 1/32, 1 - 1/64, ...
template <Element A = float>
Tensor<A, 1> retnet_slopes(Index heads) {
  assert(heads >= 0);
  Tensor<A, 1> log_decay(heads);
  for (Index h = 0; h < heads; ++h) log_decay(h) = A(std::log1p(-std::exp2(double(-5 - h))));
  return log_decay;
}

/// [head]; the negated slopes of ALiBi, for a decay of exp(-slope) per token.
template <Element A = float>
Tensor<A, 1> alibi_slopes(Index heads) {
  assert(heads >= 0);
  Tensor<A, 1> log_decay(heads);
  Index power = 1;
  while (2 * power <= heads) power *= 2;
  for (Index h = 0; h < heads; ++h) {
    const double place = h < power ? double(h + 1) / double(power) : double(2 * (h - power) + 1) / double(2 * power);
    log_decay(h) = A(-std::exp2(-8 * place));
  }
  return log_decay;
}

/// [head]; later layers remember longer. `layer` counts from 0 to layers - 1; a single layer is the first.
template <Element A = float>
Tensor<A, 1> lightning_slopes(Index heads, Index layer, Index layers) {
  assert(layer >= 0 && layer < layers);
  const double depth = layers > 1 ? double(layer) / double(layers - 1) : 0.0;
  const Tensor<double, 1> slopes = alibi_slopes<double>(heads);
  Tensor<A, 1> log_decay(heads);
  for (Index h = 0; h < heads; ++h) log_decay(h) = A(slopes(h) * (1 - depth + 1e-5));
  return log_decay;
}

}  // namespace chela
