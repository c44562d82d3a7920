#pragma once
// All that decides the numbers of a run. Checkpoints carry both structs, so a run can be continued without repeating
// flags.
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "chela/core/index.hpp"

namespace chela_lm {

using chela::Index;

struct ModelSettings {
  Index layers = 3;
  Index width = 128;
  Index heads = 4;
  Index key_dim = 16;        ///< per head
  Index value_dim = 32;      ///< per head
  Index hidden = 256;        ///< of the feed-forward layer
  Index kernel_length = 64;  ///< tokens that the long convolution looks back
  friend bool operator==(const ModelSettings&, const ModelSettings&) = default;
};

struct TrainingSettings {
  Index batch = 8;      ///< windows per step
  Index context = 128;  ///< bytes per window
  Index steps = 5000;
  double seconds = 0;  ///< if positive, the run ends after this time, and its schedule follows the clock
  double learning_rate = 4e-3;
  double warm_up = 0.05;        ///< share of the run
  double last_fraction = 0.02;  ///< of the learning rate, at the end
  double weight_decay = 0.05;
  double largest_norm = 1;
  std::uint64_t seed = 1;
  friend bool operator==(const TrainingSettings&, const TrainingSettings&) = default;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ModelSettings, layers, width, heads, key_dim, value_dim, hidden, kernel_length)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TrainingSettings, batch, context, steps, seconds, learning_rate, warm_up,
                                   last_fraction, weight_decay, largest_norm, seed)

}  // namespace chela_lm
