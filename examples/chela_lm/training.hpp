#pragma once
// A training run: windows drawn from the training part, AdamW, a schedule, checkpoints.
#include <filesystem>

#include "chela_lm/checkpoint.hpp"
#include "chela_lm/text.hpp"

namespace chela_lm {

struct TrainingResult {
  bool interrupted = false;  ///< stopped by a signal; the checkpoint is saved
  double seconds = 0;        ///< of this call
  double tokens_per_second = 0;
  double training_bits = 0;  ///< per byte, smoothed over the last steps
};

/// Trains from the run's step to its end, saving the run to `path` each `save_seconds` and at the end. The numbers
/// depend on the run's settings and the text only: neither on the number of threads nor on interruptions (unless the
/// run is limited by time). Throws Error if the text is too short, if a save fails, or if the loss is no longer a
/// finite number; the file at `path` then still holds the last good state.
TrainingResult train(Run& run, const SplitText& text, const std::filesystem::path& path, double save_seconds,
                     const chela::DefaultExecutor& executor);

}  // namespace chela_lm
