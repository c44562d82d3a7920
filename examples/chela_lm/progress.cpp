#include "chela_lm/progress.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "chela_lm/output.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace chela_lm {

namespace {

bool standard_error_is_a_terminal() {
#if defined(__unix__) || defined(__APPLE__)
  return ::isatty(STDERR_FILENO) == 1;
#else
  return false;
#endif
}

std::string duration(double seconds) {
  const long whole = std::lround(std::clamp(seconds, 0.0, 3.6e6));
  return whole < 3600 ? format("%ld:%02ld", whole / 60, whole % 60)
                      : format("%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
}

std::string bits(double value) { return std::isnan(value) ? "-" : format("%.3f", value); }

std::string steps(const ProgressReport& r) {
  return r.steps > 0 ? format("%ld/%ld", long(r.step), long(r.steps)) : format("%ld", long(r.step));
}

/// Fits a terminal of 80 columns.
std::string bar_line(const ProgressReport& r) {
  constexpr int width = 12;
  const int filled = int(std::lround(width * std::clamp(r.share, 0.0, 1.0)));
  return "[" + std::string(std::size_t(filled), '#') + std::string(std::size_t(width - filled), '.') + "] " + steps(r) +
         format(" %.1fk tok/s", r.tokens_per_second / 1000) + " train " + bits(r.training_bits) + " held-out " +
         bits(r.held_out_bits) + " ETA " + duration(r.seconds_left);
}

std::string plain_line(const ProgressReport& r) {
  return "step " + steps(r) + format(", %.0f tokens/s", r.tokens_per_second) + ", bits per byte: training " +
         bits(r.training_bits) + ", held-out " + bits(r.held_out_bits) + ", " + duration(r.seconds_left) + " left";
}

}  // namespace

Progress::Progress() : on_terminal_(standard_error_is_a_terminal()) {}

Progress::~Progress() {
  if (line_is_open_) std::fputc('\n', stderr);
}

void Progress::show(const ProgressReport& report, bool last) {
  const double interval = on_terminal_ ? 0.2 : 10;
  if (shown_ && !last && since_shown_.seconds() < interval) return;
  since_shown_ = {};
  shown_ = true;
  if (on_terminal_) {
    std::fprintf(stderr, "\r\x1b[K%s", bar_line(report).c_str());  // to the start of the line, and clear it
    line_is_open_ = true;
  } else {
    std::fprintf(stderr, "%s\n", plain_line(report).c_str());
  }
  std::fflush(stderr);
}

}  // namespace chela_lm
