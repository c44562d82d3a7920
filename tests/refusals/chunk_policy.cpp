// expect: ChunkPolicy::chunk_len must be 1 to 1024
#include "chela/tile/policy.hpp"

#if defined(WITHIN_LIMITS)
inline constexpr int chunk_len = 1024;
#else
inline constexpr int chunk_len = 1025;
#endif

static_assert(chela::PolicyConstant<chela::ChunkPolicy{.chunk_len = chunk_len}>::value.chunk_len == chunk_len);
