#pragma once
#include <stdexcept>
#include <string>

#include "chela/core/status.hpp"
#include "chela/model/file_status.hpp"

namespace chela_lm {

/// Ends the program with one line, "chela_lm: what".
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require_ok(const chela::Status& status, const std::string& action) {
  if (!status.ok()) throw Error(action + ": " + status.why);
}

inline void require_ok(const chela::FileStatus& status) {
  if (!status.ok()) throw Error(status.why);
}

}  // namespace chela_lm
