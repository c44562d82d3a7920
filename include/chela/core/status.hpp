#pragma once
#include "chela/core/host_device.hpp"

namespace chela {

/// What kind of thing went wrong; `Status::why` says which argument and how to mend it.
enum class Code { ok, bad_shape, bad_stride, bad_value, unsupported, cuda_error };

/// The answer of every operator. The library never prints, never exits and never falls back to something slower or less
/// exact without being told to: it returns one of these.
struct [[nodiscard]] Status {
  Code code = Code::ok;
  const char* why = "";  ///< static text that names the argument at fault, the limit and the way out

  CHELA_HOST_DEVICE constexpr bool ok() const { return code == Code::ok; }
};

/// `condition`, or the refusal that a reader of the log needs. Chained by `check` functions with `first_failure`.
CHELA_HOST_DEVICE constexpr Status require(bool condition, Code code, const char* why) {
  return condition ? Status{} : Status{code, why};
}

/// The first status that is not ok, or ok. Conditions are all evaluated, so each must be safe on its own.
template <class... S>
CHELA_HOST_DEVICE constexpr Status first_failure(S... statuses) {
  Status first;
  ((first = first.ok() ? statuses : first), ...);
  return first;
}

}  // namespace chela
