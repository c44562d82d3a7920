#pragma once
// How far a run has come: one line redrawn in place on a terminal, now and then a plain line elsewhere. On standard
// error.
#include <chrono>
#include <limits>
#include <string>

#include "chela/core/index.hpp"

namespace chela_lm {

/// A stopwatch, in seconds.
class Timer {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - begin_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin_ = Clock::now();
};

struct ProgressReport {
  chela::Index step = 0, steps = 0;  ///< steps is 0 when time decides
  double share = 0;                  ///< of the run that is done
  double tokens_per_second = 0;
  double training_bits = std::numeric_limits<double>::quiet_NaN();  ///< per byte, smoothed; NaN while not known
  double held_out_bits = std::numeric_limits<double>::quiet_NaN();  ///< per byte, on a sample
  double seconds_left = 0;
};

class Progress {
 public:
  Progress();
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Shows the report if the last one is old enough, or if it is the `last`.
  void show(const ProgressReport& report, bool last = false);

 private:
  bool on_terminal_;
  bool line_is_open_ = false;
  bool shown_ = false;
  Timer since_shown_;
};

}  // namespace chela_lm
