#pragma once

namespace chela::cuda::arch {
inline constexpr bool has_warpgroups = false;
}
