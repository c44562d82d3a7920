#pragma once
// Replacing a file in one moment: readers, and a program that is killed, see the old file or the new one, never a part.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "chela/model/file_status.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#define CHELA_HAS_FSYNC 1
#endif

namespace chela {

/// Writes to a temporary file beside the target. `commit` puts it in the target's place; without it nothing is left
/// behind.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target) : target_(std::move(target)) {
    // A name of our own: mode x refuses files that exist, such as another program's temporary file.
    for (int attempt = 0; attempt < 100 && !file_; ++attempt) {
      temporary_ = target_;
      temporary_ += ".tmp" + std::to_string(attempt);
      file_ = std::fopen(temporary_.string().c_str(), "wbx");
      if (!file_ && errno != EEXIST) break;
    }
    if (!file_) {
      temporary_.clear();
      fail("create a temporary file beside it");
    }
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() { discard(); }

  const FileStatus& status() const { return status_; }

  /// Appends. After a failure this does nothing, so that only `commit` needs to be asked.
  void write(const void* data, std::size_t bytes) {
    if (status_.ok() && bytes > 0 && std::fwrite(data, 1, bytes, file_) != bytes) fail("write");
  }

  /// Hands the data to the device and renames. Call once, last.
  const FileStatus& commit() {
    if (!status_.ok()) return status_;
    if (std::fflush(file_) != 0 || !reached_device()) return fail("write"), status_;
    if (std::fclose(std::exchange(file_, nullptr)) != 0) return fail("write"), status_;
    std::error_code error;
    std::filesystem::rename(temporary_, target_, error);
    if (error) {
      errno = error.value();
      return fail("replace the file"), status_;
    }
    temporary_.clear();
    sync_folder();
    return status_;
  }

 private:
  void fail(const char* action) {
    const int reason = errno;
    status_ = {FileCode::cannot_write, target_.string() + ": cannot " + action + ": " + std::strerror(reason)};
    discard();
  }

  void discard() {
    if (file_) std::fclose(std::exchange(file_, nullptr));
    std::error_code ignored;
    if (!temporary_.empty()) std::filesystem::remove(temporary_, ignored);
    temporary_.clear();
  }

  bool reached_device() const {
#if defined(CHELA_HAS_FSYNC)
    return ::fsync(::fileno(file_)) == 0 || errno == EINVAL;  // EINVAL: a special file that needs no flushing
#else
    return true;
#endif
  }

  /// Makes the new name last through a loss of power. A file system that cannot do this has still renamed.
  void sync_folder() const {
#if defined(CHELA_HAS_FSYNC)
    const std::filesystem::path folder = target_.has_parent_path() ? target_.parent_path() : ".";
    if (const int descriptor = ::open(folder.c_str(), O_RDONLY); descriptor >= 0) {
      (void)::fsync(descriptor);
      ::close(descriptor);
    }
#endif
  }

  std::filesystem::path target_;
  std::filesystem::path temporary_;  // empty unless there is one, and it is ours
  std::FILE* file_ = nullptr;
  FileStatus status_;
};

}  // namespace chela

#undef CHELA_HAS_FSYNC
