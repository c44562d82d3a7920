#pragma once
// Results go to standard output, where scripts read them; progress and errors go to standard error.
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "chela_lm/error.hpp"

namespace chela_lm {

/// Throws Error where a write is lost, as at a closed pipe or a full disk.
inline void write_output(const char* data, std::size_t bytes) {
  if (std::fwrite(data, 1, bytes, stdout) != bytes || std::fflush(stdout) != 0)
    throw Error(std::string("cannot write to standard output: ") + std::strerror(errno));
}

/// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
  char line[1024];
  std::va_list values;
  va_start(values, pattern);
  std::vsnprintf(line, sizeof line, pattern, values);
  va_end(values);
  return line;
}

inline void print_line(const std::string& line) { write_output((line + "\n").data(), line.size() + 1); }

}  // namespace chela_lm
