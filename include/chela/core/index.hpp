#pragma once
#include <cstdint>

#include "chela/core/host_device.hpp"

namespace chela {

/// Every size, offset and stride: batch * head * token * dim passes 2^31 on ordinary inputs.
using Index = std::int64_t;

CHELA_HOST_DEVICE constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
CHELA_HOST_DEVICE constexpr Index round_up(Index a, Index multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace chela
