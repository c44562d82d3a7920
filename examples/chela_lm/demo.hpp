#pragma once
#include <filesystem>

#include "chela_lm/checkpoint.hpp"
#include "chela_lm/generation.hpp"
#include "chela_lm/text.hpp"

namespace chela_lm {

/// Trains from nothing within the time of the run's settings, compares the model with counted baselines on the held-out
/// part, writes a sample, and prints the RESULT line. Returns the program's exit code.
int demonstrate(const ModelSettings& model, const TrainingSettings& training, const Bytes& text,
                const std::filesystem::path& checkpoint, const GenerationSettings& sample,
                const chela::DefaultExecutor& executor);

}  // namespace chela_lm
