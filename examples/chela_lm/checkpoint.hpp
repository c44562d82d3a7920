#pragma once
// A run as a file: settings, parameters, the optimiser's moments and how far it got. There is no state of a random
// generator to keep: windows are drawn by (seed, step, row).
#include <filesystem>
#include <memory>
#include <string>

#include "chela/core/tensor.hpp"
#include "chela_lm/model.hpp"
#include "chela_lm/settings.hpp"

namespace chela_lm {

struct Checkpoint {
  ModelSettings model;
  TrainingSettings training;
  Index step = 0;      ///< steps done
  double seconds = 0;  ///< time trained, kept for runs that are limited by time
  std::string text;    ///< fingerprint of the text
  chela::Tensor<float, 1> parameters, first_moment, second_moment;  ///< moments are empty if they were not loaded
};

/// A checkpoint and the model it belongs to.
struct Run {
  Checkpoint checkpoint;
  std::unique_ptr<Model> model;
};

/// Throws Error for settings that no run can have.
void check(const TrainingSettings& settings);

/// Step 0, with parameters drawn from the seed.
Run new_run(const ModelSettings& model, const TrainingSettings& training, const chela::DefaultExecutor& executor);

void save(const Run& run, const std::filesystem::path& path);

/// Throws Error, before anything long begins, where `save` could not.
void require_writable(const std::filesystem::path& path);

enum class Contents { all, parameters_only };
Run load(const std::filesystem::path& path, Contents contents, const chela::DefaultExecutor& executor);

}  // namespace chela_lm
