// Prints the README's table of numerical errors: for each log-decay and member the worst relative error, in float, of outputs,
// states, decoding steps and every gradient against the double recurrence. The same problems as in numerics.cpp.
#include <algorithm>
#include <cstdio>

#include "attention/numerics.hpp"

using namespace chela;
using namespace chela::test;

namespace {

const Shape shape{
    .batch = 2, .tokens = 80, .query_heads = 4, .key_heads = 2, .value_heads = 2, .key_dim = 12, .value_dim = 20};

template <DecayKind D, RuleKind R>
double worst_error(Decays decays) {
  double worst = 0;
  for (double size : {1.0, 1e4}) {
    if (size > 1 && R == RuleKind::delta) continue;
    const auto p = extreme_problem<float, D, R>(shape, decays, size);
    for (const Errors& errors : {forward_errors<ChunkPolicy{}>(p), step_errors(p), backward_errors(p)})
      for (const Error& e : errors) worst = std::max(worst, e.error);
  }
  return worst;
}

}  // namespace

int main() {
  constexpr auto additive = RuleKind::additive, delta = RuleKind::delta;
  std::puts("| log-decay | per head | per token | per key | per head, delta | per token, delta | per key, delta |");
  std::puts("|---|---|---|---|---|---|---|");
  for (Decays decays : all_decays)
    std::printf("| %s | %.1e | %.1e | %.1e | %.1e | %.1e | %.1e |\n", name_of(decays),
                worst_error<DecayKind::per_head, additive>(decays), worst_error<DecayKind::per_token, additive>(decays),
                worst_error<DecayKind::per_key, additive>(decays), worst_error<DecayKind::per_head, delta>(decays),
                worst_error<DecayKind::per_token, delta>(decays), worst_error<DecayKind::per_key, delta>(decays));
}
