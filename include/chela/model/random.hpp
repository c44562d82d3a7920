#pragma once
// Random numbers without a history: number i of a stream is a hash of (seed, stream, i). Any number can be had in any
// order, so a program that resumes needs to remember nothing but the seed. Integer arithmetic until the last step: the
// numbers are the same with every compiler and library, which the distributions of <random> are not. The mixing
// function is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA
// 2014).
#include <cstdint>
#include <string_view>

namespace chela {

/// A bijection of 64-bit words that changes about half of the bits when one is flipped.
constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// A stream number from a name (FNV-1a), so that what is drawn for one name does not depend on which others exist.
constexpr std::uint64_t stream_of(std::string_view name) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

/// Random access to one stream of random numbers.
class CounterRandom {
 public:
  constexpr CounterRandom(std::uint64_t seed, std::uint64_t stream)
      : key_(mix_bits(mix_bits(seed + step) ^ (stream * step + 1))) {}

  /// 64 random bits.
  constexpr std::uint64_t bits(std::uint64_t i) const { return mix_bits(key_ + step * (i + 1)); }

  /// Uniform in [0, 1), a multiple of 2^-53.
  constexpr double uniform(std::uint64_t i) const { return double(bits(i) >> 11) * 0x1p-53; }

  /// Uniform in [0, bound), bound > 0. The bias is below bound / 2^64.
  constexpr std::uint64_t below(std::uint64_t i, std::uint64_t bound) const {
    const std::uint64_t word = bits(i), low = word & 0xffffffffu, high = word >> 32;
    const std::uint64_t bound_low = bound & 0xffffffffu, bound_high = bound >> 32;
    const std::uint64_t middle = high * bound_low + ((low * bound_low) >> 32);
    const std::uint64_t cross = low * bound_high + (middle & 0xffffffffu);
    return high * bound_high + (middle >> 32) + (cross >> 32);  // the upper word of word * bound
  }

  /// Mean 0, variance 1, bounded by 6: the sum of twelve uniform numbers, which needs no logarithm or cosine of a
  /// library.
  constexpr double normal(std::uint64_t i) const {
    std::int64_t sum = 0;
    for (std::uint64_t j = 0; j < 6; ++j) {
      const std::uint64_t word = bits(6 * i + j);
      sum += std::int64_t(word & 0xffffffffu) + std::int64_t(word >> 32);
    }
    constexpr std::int64_t expected = 6 * ((std::int64_t(1) << 32) - 1);
    return double(sum - expected) * 0x1p-32;
  }

 private:
  static constexpr std::uint64_t step = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio
  std::uint64_t key_;
};

}  // namespace chela
