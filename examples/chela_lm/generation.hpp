#pragma once
// Writing with a model: each byte is drawn from what the model expects next, and read by it in turn. The model carries
// its state from byte to byte; nothing that was written is ever read again.
#include <cstdint>
#include <string>

#include "chela_lm/model.hpp"

namespace chela_lm {

struct GenerationSettings {
  std::string prompt = "\n";  ///< read, and written, first; not empty
  Index bytes = 400;          ///< to write after the prompt
  double temperature = 0.7;   ///< divides the logits; 0 takes the likeliest byte
  std::uint64_t seed = 1;
};

/// Writes to standard output, byte by byte. Returns bytes per second of decoding. Throws Interrupted when asked to
/// stop.
double generate(Model& model, const float* parameters, const GenerationSettings& settings);

}  // namespace chela_lm
