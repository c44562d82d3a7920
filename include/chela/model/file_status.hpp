#pragma once
#include <string>
#include <utility>

namespace chela {

/// What kind of thing went wrong with a file.
enum class FileCode {
  ok,
  cannot_read,   ///< missing, no permission, not a regular file, or an error of the device
  cannot_write,  ///< the same while saving; the file that was there before is untouched
  malformed,     ///< not what the format allows
  mismatch,      ///< well-formed, but not what was asked for
  bad_value      ///< an argument of the call is at fault, not the file
};

/// The answer of functions that read and write files. Unlike Status it owns its text, which names the file and, where
/// there is one, the tensor, what was expected and what was found.
struct [[nodiscard]] FileStatus {
  FileCode code = FileCode::ok;
  std::string why = {};

  bool ok() const { return code == FileCode::ok; }
};

}  // namespace chela
