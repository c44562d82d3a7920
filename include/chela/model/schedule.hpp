#pragma once
// How the learning rate moves over a run: a linear warm-up, then a fall to a fraction of the peak.
#include <algorithm>
#include <cmath>
#include <numbers>

namespace chela {

/// The whole run is the interval [0, 1], whether it is measured in steps, in bytes or in seconds.
struct LearningRateSchedule {
  enum class Fall { none, linear, cosine };
  double peak = 1e-3;
  double warm_up = 0.02;        ///< share of the run in which the rate climbs to the peak, in [0, 1]
  double last_fraction = 0.02;  ///< rate at the end over the peak, in [0, 1]
  Fall fall = Fall::cosine;
};

/// The rate at `progress` in [0, 1]; values outside are taken as the nearer end. Without warm-up the run starts at the
/// peak, otherwise at zero: a run counted in steps asks for progress (step + 1) / total, so that its first step moves.
inline double learning_rate(const LearningRateSchedule& schedule, double progress) {
  progress = std::clamp(progress, 0.0, 1.0);
  if (progress < schedule.warm_up) return schedule.peak * progress / schedule.warm_up;
  if (schedule.warm_up >= 1 || schedule.fall == LearningRateSchedule::Fall::none) return schedule.peak;
  const double fallen = (progress - schedule.warm_up) / (1 - schedule.warm_up);
  const double left = schedule.fall == LearningRateSchedule::Fall::linear
                          ? 1 - fallen
                          : 0.5 * (1 + std::cos(std::numbers::pi * fallen));
  return schedule.peak * (schedule.last_fraction + (1 - schedule.last_fraction) * left);
}

}  // namespace chela
