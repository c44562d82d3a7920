#pragma once
// Rows of 16-bit tokens on their way between global memory and the registers of a transform: through shared memory, so
// that memory sees neighbours, whatever the transform's order; scaled by powers of two, exactly, so that rows of any
// amplitude use the range of __half.
#include <cstdint>
#include <type_traits>

#include "chela/core/tensor_view.hpp"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_parts.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

/// Rows [batch, channel, token] with neighbouring tokens.
template <class T>
struct TokenRows {
  T* data = nullptr;
  Index batch_stride = 0, channel_stride = 0;
  int tokens = 0;
  bool in_units = false;  ///< every row begins at a multiple of 16 bytes
  bool in_runs = false;   ///< every row begins at a multiple of R elements, R = 2, 4 or 8, and ends there

  __device__ T* row(int batch, int channel) const { return data + batch * batch_stride + channel * channel_stride; }
};

/// Where the points n = R (16 a + b) + c lie in shared memory: runs of one a, in units of 16 bytes, with padding after
/// each run or, where R is a multiple of 16 and a power of two, units exchanged with their neighbours, so that a warp
/// that has points of several a and b finds them in different banks. Lanes read inputs at 4 a and 8 b, and write
/// results at 8 a and 4 b.
template <int R, bool Results>
struct StagedRow {
  static constexpr bool exchanged = R >= 16 && (R & (R - 1)) == 0;
  static constexpr int pad = exchanged ? 0 : Results && R <= 8 ? (8 * R + 15) / 16 * 16 : 16;
  static constexpr int units = 32 * R, run_bytes = 32 * R + pad, bytes = 16 * run_bytes;

  __device__ static int unit(int u) {
    if constexpr (exchanged)
      return 16 * (u ^ exchange(u / (2 * R), 8 * u / R % 16));
    else
      return 16 * u + pad * (u / (2 * R));
  }
  __device__ static int point(int n) { return unit(n / 8) + 2 * (n % 8); }
  /// Of the unit that has residue c.
  __device__ static int point(int a, int b, int c) {
    const int offset = a * run_bytes + b * (2 * R) + 2 * c;
    return exchanged ? offset ^ 16 * exchange(a, b) : offset;
  }

 private:
  __device__ static constexpr int exchange(int a, int b) {
    if (Results) return R == 16 ? a & 1 : R == 32 ? (b >> 1 & 1) + 2 * (a & 1) : (b & 3) + 4 * (a & 1);
    return R == 16 ? a >> 1 & 1 : R == 32 ? a >> 1 & 3 : (a >> 1 & 3) + 4 * (b & 1);
  }
};
template <int R>
using StagedInput = StagedRow<R, false>;
template <int R>
using StagedOutput = StagedRow<R, true>;

/// The widest words that `Elements` neighbours can be moved in, where such runs lie R elements apart.
template <int Elements, int R>
using RunWords = std::conditional_t<
    Elements % 8 == 0 && R % 8 == 0, uint4,
    std::conditional_t<Elements % 4 == 0 && R % 4 == 0, uint2,
                       std::conditional_t<Elements % 2 == 0 && R % 2 == 0, std::uint32_t, unsigned short>>>;

/// Elements neighbours, two in a word; of an odd number the last is alone. `at(e)` is the address of the e-th.
template <int Elements, int R, class At>
__device__ __forceinline__ void read_run(const At& at, std::uint32_t (&words)[(Elements + 1) / 2]) {
  using Wide = RunWords<Elements, R>;
  constexpr int each = int(sizeof(Wide)) / 2;
#pragma unroll
  for (int e = 0; e < Elements; e += each) {
    const Wide x = *reinterpret_cast<const Wide*>(at(e));
    if constexpr (each == 1)
      words[e / 2] = e % 2 ? words[e / 2] | std::uint32_t(x) << 16 : x;
    else
      reinterpret_cast<Wide*>(words)[e / each] = x;
  }
}

template <int Elements, int R, class At>
__device__ __forceinline__ void write_run(const At& at, const std::uint32_t (&words)[(Elements + 1) / 2]) {
  using Wide = RunWords<Elements, R>;
  constexpr int each = int(sizeof(Wide)) / 2;
#pragma unroll
  for (int e = 0; e < Elements; e += each) {
    if constexpr (each == 1)
      *reinterpret_cast<Wide*>(at(e)) = static_cast<Wide>(words[e / 2] >> (e % 2 ? 16 : 0));
    else
      *reinterpret_cast<Wide*>(at(e)) = reinterpret_cast<const Wide*>(words)[e / each];
  }
}

/// Brings a row to shared memory, with zeros after its last token: after `wait_copies<0>` and a barrier, if in units. By
/// the `Threads` threads of the row.
template <int R, int Threads, class T>
__device__ __forceinline__ void fetch_row(char* staged, const T* row, int tokens, bool in_units, int thread) {
  using Layout = StagedInput<R>;
  constexpr int each = Layout::units / Threads;
  const auto address = [&](int i) { return arch::shared_address(staged + Layout::unit(thread + i * Threads)); };
  if (in_units && tokens == 256 * R) {
    const T* const from = row + 8 * thread;
#pragma unroll
    for (int i = 0; i < each; ++i) arch::copy_async_16(address(i), from + 8 * i * Threads, true);
  } else if (in_units) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int n = 8 * (thread + i * Threads), bytes = max(0, min(16, 2 * (tokens - n)));
      arch::copy_async_first_bytes(address(i), row + (bytes > 0 ? n : 0), bytes);
    }
  } else {
    // Words of two neighbours; where the row begins between two words, of two halves. Pairs at the row's ends, which
    // have neighbours in their words that are no tokens, come as single elements.
    const bool between = reinterpret_cast<std::uintptr_t>(row) % 4 != 0;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(row - (between ? 1 : 0));
    const int first = between ? 1 : 0, last = (between ? tokens - 1 : tokens) / 2;  // of the whole pairs
    constexpr int at_once = 128 * R / Threads < 8 ? 128 * R / Threads : 8;
    for (int begin = thread; begin < 128 * R; begin += at_once * Threads) {
      std::uint32_t pair[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int m = begin + i * Threads;
        pair[i] = 0;
        if (m >= first && m < last) pair[i] = between ? __byte_perm(words[m], words[m + 1], 0x5432) : words[m];
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const int m = begin + i * Threads;
        if (m < 128 * R) *reinterpret_cast<std::uint32_t*>(staged + Layout::point(2 * m)) = pair[i];
      }
    }
    const auto single = [&](int n) {
      if (n < tokens && thread == (n / 2) % Threads) *reinterpret_cast<T*>(staged + Layout::point(n)) = row[n];
    };
    if (between) single(0), single(1);
    for (int n = 2 * max(first, last); n < tokens; ++n) single(n);
  }
  arch::commit_copies();
}

/// The reverse, without what lies after the last token.
template <int R, int Threads, class T>
__device__ __forceinline__ void send_row(T* row, const char* staged, int tokens, bool in_units, int thread) {
  using Layout = StagedOutput<R>;
  const int whole = in_units ? tokens / 8 : 0;
#pragma unroll
  for (int i = 0; i < Layout::units / Threads; ++i) {
    const int u = thread + i * Threads;
    if (u < whole) __stcs(reinterpret_cast<uint4*>(row) + u, *reinterpret_cast<const uint4*>(staged + Layout::unit(u)));
  }
  const int first = 8 * whole;
  const int before = reinterpret_cast<std::uintptr_t>(row) / 2 % 2;  // the words begin one element earlier
  auto* const words = reinterpret_cast<std::uint32_t*>(row - before);
  const auto element = [&](int n) {
    return std::uint32_t(*reinterpret_cast<const unsigned short*>(staged + Layout::point(n)));
  };
#pragma unroll 4
  for (int m = first / 2 + before + thread; 2 * m - before + 1 < tokens; m += Threads) {
    const int n = 2 * m - before;
    words[m] = element(n) | element(n + 1) << 16;
  }
  const auto single = [&](int n) {
    if (n < tokens) *reinterpret_cast<unsigned short*>(row + n) = static_cast<unsigned short>(element(n));
  };
  if (thread == 0 && before && first < tokens) single(first);
  if (thread == Threads - 1 && (tokens - first - before) % 2 != 0) single(tokens - 1);
}

/// What lies before a row's first token, oldest first, and enters as the last points' imaginary parts, or its gradient.
template <class T>
struct HistoryRows {
  TensorView<T, 3> rows = {};  ///< [batch, row, channel]
  __device__ int count() const { return int(rows.extents[1]); }
};

template <int R, int Threads, class T>
__device__ __forceinline__ void fetch_history(char* staged, const HistoryRows<const T>& history, int batch, int channel,
                                              int thread) {
  const int before = 256 * R - history.count();
  for (int n = thread; n < 256 * R; n += Threads)
    *reinterpret_cast<T*>(staged + StagedInput<R>::point(n)) =
        n < before ? T(0.f) : T(-static_cast<float>(history.rows(batch, n - before, channel)));
}
template <int R, int Threads, class T>
__device__ __forceinline__ void send_history(const HistoryRows<T>& history, const char* staged, int batch, int channel,
                                             int thread) {
  const int before = 256 * R - history.count();
  for (int n = before + thread; n < 256 * R; n += Threads)
    history.rows(batch, n - before, channel) = *reinterpret_cast<const T*>(staged + StagedOutput<R>::point(n));
}

/// A lane's points of `Own` neighbouring residues: of a = 2 column + (i & 1) + 8 (i >> 1) and b = group + 8 q, i and q
/// from words[2 i + q].
template <int Own>
using RowWords = std::uint32_t[8][(Own + 1) / 2];

/// Calls f(i, a, b) for the eight runs of a lane. Relative to run 0 they lie at the same places for every lane.
template <class F>
__device__ __forceinline__ void for_input_runs(int lane, const F& f) {
  const LanePlace p(lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) f(i, 2 * p.column + (i >> 1 & 1) + 8 * (i >> 2), p.group + 8 * (i & 1));
}
template <class F>
__device__ __forceinline__ void for_result_runs(int lane, const F& f) {
  const LanePlace p(lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) f(i, p.group + 8 * (i >> 1 & 1), p.column + 4 * (i & 1) + 8 * (i >> 2));
}

template <int R, int Own>
__device__ __forceinline__ void read_staged_row(RowWords<Own>& words, const char* staged, int first_residue, int lane) {
  for_input_runs(lane, [&](int i, int a, int b) {
    read_run<Own, R>([&](int e) { return staged + StagedInput<R>::point(a, b, first_residue + e); }, words[i]);
  });
}

/// The same from global memory, where whole runs are tokens or none is, and aligned to their size.
template <int R, class T>
__device__ __forceinline__ void read_row(RowWords<R>& words, const T* row, int tokens, int lane) {
  const LanePlace p(lane);
  const int first = R * (32 * p.column + p.group);
  const T* const from = arch::made_anew(row + first);
  for_input_runs(lane, [&](int i, int, int) {
    const int n = R * (16 * (i >> 1 & 1) + 128 * (i >> 2) + 8 * (i & 1));
    using Wide = RunWords<R, R>;
    const Wide run = first + n < tokens ? __ldcs(reinterpret_cast<const Wide*>(from + n)) : Wide{};
    reinterpret_cast<Wide&>(words[i]) = run;
  });
}

/// Two elements' magnitudes, or where one of `most` is larger that one.
template <class T>
__device__ inline std::uint32_t larger_magnitudes(std::uint32_t most, std::uint32_t word) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  word &= 0x7fff7fffu;
  const Pair larger = __hmax2(reinterpret_cast<const Pair&>(most), reinterpret_cast<const Pair&>(word));
  return reinterpret_cast<const std::uint32_t&>(larger);
}

/// The power of two that brings magnitudes up to `most` under 1 and its inverse, both of them normal numbers.
struct PowerOfTwo {
  float factor, inverse;
  __device__ explicit PowerOfTwo(float most, int least_exponent = 1) {
    const int exponent = min(max(int(__float_as_uint(most) >> 23 & 0xff), least_exponent), 252);
    factor = __uint_as_float(std::uint32_t(253 - exponent) << 23);
    inverse = __uint_as_float(std::uint32_t(exponent + 1) << 23);
  }
};

/// Of elements T: a factor of __half is 2^15 at most.
template <class T>
__device__ inline PowerOfTwo row_scale(float most) {
  return PowerOfTwo(most, std::is_same_v<T, __half> ? 126 - 15 : 1);
}

template <class T>
__device__ inline std::uint32_t scaled_word(std::uint32_t word, std::uint32_t factors) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair product = __hmul2(reinterpret_cast<const Pair&>(word), reinterpret_cast<const Pair&>(factors));
  return reinterpret_cast<const std::uint32_t&>(product);
}

/// The low or the high elements of two words, as a pair of halves.
template <class T>
__device__ inline std::uint32_t pair_of(std::uint32_t first, std::uint32_t second, bool high) {
  if constexpr (std::is_same_v<T, __half>) {
    return __byte_perm(first, second, high ? 0x7632 : 0x5410);
  } else {
    const float2 x = arch::unpack<T>(first), y = arch::unpack<T>(second);
    return arch::pack<__half>(high ? x.y : x.x, high ? y.y : y.x);
  }
}

/// A row's results of `Own` neighbouring residues, rounded to T. words[c][2 d + i] has those of residue c at
/// a = group + 8 i and b = column + 8 d and column + 4 + 8 d.
template <class T, int Own>
struct RowResults {
  std::uint32_t words[Own][4];

  __device__ __forceinline__ void take(int c, const float (&out)[2][4], float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[c][i] = arch::pack<T>(factor * out[i >> 1][2 * (i & 1)], factor * out[i >> 1][2 * (i & 1) + 1]);
  }
  /// The i-th run.
  __device__ __forceinline__ void run(int i, std::uint32_t (&run)[(Own + 1) / 2]) const {
#pragma unroll
    for (int j = 0; j < (Own + 1) / 2; ++j)
      run[j] = __byte_perm(words[2 * j][i >> 1], words[2 * j + 1 < Own ? 2 * j + 1 : 2 * j][i >> 1],
                           i & 1 ? 0x7632 : 0x5410);
  }
  template <int R>
  __device__ __forceinline__ void write_staged(char* staged, int first_residue, int lane) const {
    for_result_runs(lane, [&](int i, int a, int b) {
      std::uint32_t words_of_run[(Own + 1) / 2];
      run(i, words_of_run);
      write_run<Own, R>([&](int e) { return staged + StagedOutput<R>::point(a, b, first_residue + e); }, words_of_run);
    });
  }
  /// The reverse of read_row.
  __device__ __forceinline__ void write(T* row, int tokens, int lane) const {
    const LanePlace p(lane);
    const int first = Own * (16 * p.group + p.column);
    T* const to = arch::made_anew(row + first);
    for_result_runs(lane, [&](int i, int, int) {
      const int n = Own * (128 * (i >> 1 & 1) + 4 * (i & 1) + 8 * (i >> 2));
      using Wide = RunWords<Own, Own>;
      std::uint32_t words_of_run[(Own + 1) / 2];
      run(i, words_of_run);
      if (first + n < tokens) __stcs(reinterpret_cast<Wide*>(to + n), reinterpret_cast<const Wide&>(words_of_run));
    });
  }
};

}  // namespace chela::cuda::detail
