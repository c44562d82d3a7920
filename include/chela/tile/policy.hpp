#pragma once
// Sizes as values: a policy is a small literal struct given as a template argument, and judged in one place.

namespace chela {

/// How a sequence is walked. All give the same answer to rounding.
enum class Evaluation {
  automatic,         ///< the backend's measured default for the operator
  token_recurrence,  ///< token by token over short tiles, the state held in registers
  chunked,           ///< dense products inside a chunk, a carried state between chunks
};

/// How a sequence is cut for one pass. All sizes are in elements.
struct ChunkPolicy {
  Evaluation evaluation = Evaluation::automatic;
  int chunk_len = 32;  ///< tokens per chunk (chunked) or per packed tile (token_recurrence)
  int value_tile =
      64;  ///< columns of v, and of the carried state, one task holds when a single head must be shared out

  friend bool operator==(const ChunkPolicy&, const ChunkPolicy&) = default;
};

/// Carries a policy as a type, and is the one place where a policy is judged.
template <ChunkPolicy P>
struct PolicyConstant {
  static constexpr ChunkPolicy value = P;
  static_assert(P.chunk_len >= 1 && P.chunk_len <= 1024,
                "ChunkPolicy::chunk_len must be 1 to 1024; 16 to 64 keep a tile in the first-level cache");
  static_assert(P.value_tile >= 1, "ChunkPolicy::value_tile must be at least 1; 32 to 64 columns fill the registers");
};

}  // namespace chela
