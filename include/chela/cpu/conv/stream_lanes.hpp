#pragma once
// Stores that go past the caches, for results larger than they are: a line that is written whole need not be read first,
// which is a third of a copy's traffic.
#include <cstdint>

#include "chela/core/tensor_view.hpp"
#include "chela/cpu/conv/lanes.hpp"

#if defined(__x86_64__) && defined(__SSE2__)
#include <immintrin.h>
#define CHELA_STREAMS 1
#else
#define CHELA_STREAMS 0
#endif

namespace chela::cpu::detail {

inline constexpr Index line_bytes = 64;

/// From this size on a result will not be found in a cache by whoever reads it.
inline constexpr Index least_streamed_bytes = Index(1) << 25;

/// Like store_lanes, past the caches where the machine can. `to` must be aligned to the packet, neighbouring packets of a
/// line stored one after the other, and finish_streams called before another thread reads.
template <class P, class T>
CHELA_ALWAYS_INLINE void stream_lanes(T* to, const P& value) {
#if CHELA_STREAMS
  constexpr int bytes = lane_count<P> * int(sizeof(T));
  alignas(64) T stored[lane_count<P>];
  store_lanes(stored, value);
  if constexpr (bytes == 64) {
#if defined(__AVX512F__)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(stored));
#endif
  } else if constexpr (bytes == 32) {
#if defined(__AVX__)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(stored)));
#endif
  } else if constexpr (bytes == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(stored)));
  }
#endif
  store_lanes(to, value);
}

inline void finish_streams() {
#if CHELA_STREAMS
  _mm_sfence();
#endif
}

/// Whether a result has this size at least and its rows begin with a cache line.
template <class T>
bool worth_streaming(TensorView<T, 3> result, Index least_bytes = least_streamed_bytes) {
  const auto aligned = [](Index stride) { return stride * Index(sizeof(T)) % line_bytes == 0; };
  return CHELA_STREAMS && result.size() * Index(sizeof(T)) >= least_bytes && result.strides[2] == 1 &&
         aligned(result.strides[0]) && aligned(result.strides[1]) &&
         reinterpret_cast<std::uintptr_t>(result.data) % line_bytes == 0;
}

}  // namespace chela::cpu::detail
