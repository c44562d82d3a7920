#pragma once
#include <cstddef>

#include "chela/core/index.hpp"
#include "chela/core/status.hpp"

namespace chela::cuda {

/// Device memory that an operator may write while it runs: the caller's, at least as large as the operator's
/// `workspace_bytes` says and 16-byte aligned. Two calls that may overlap in time need two.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

inline Status check_workspace(Workspace workspace, std::size_t needed) {
  return require(needed == 0 || (workspace.data && workspace.bytes >= needed), Code::bad_shape,
                 "workspace is smaller than workspace_bytes(args) says for the current device");
}

namespace detail {

/// Memory cut into parts that begin at multiples of 256 bytes.
class Parts {
 public:
  explicit Parts(void* memory) : at_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(Index count) {
    T* const part = reinterpret_cast<T*>(at_ + used_);
    used_ += std::size_t(round_up(count * Index(sizeof(T)), 256));
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  char* at_;
  std::size_t used_ = 0;
};

}  // namespace detail
}  // namespace chela::cuda
