#pragma once
// Counted baselines: how well bytes are predicted by the two before them, without any learning. With c(h x) the times
// that x followed the history h, c(h) their sum and d(h) the number of different bytes that did,
//
//   p(x | h) = (c(h x) + d(h) p(x | shorter h)) / (c(h) + d(h))          Witten-Bell interpolation
//
// down to the uniform distribution, so that every byte has a probability. (Witten, Bell: The zero-frequency problem,
// IEEE Transactions on Information Theory 37, 1991; in the interpolated form of Chen and Goodman, 1998.)
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace chela_lm {

class ByteCounts {
 public:
  /// `longest` preceding bytes are looked at: 0 is a unigram, 2 a trigram.
  ByteCounts(std::span<const std::uint8_t> text, int longest) : longest_(longest) {
    for (int order = 0; order <= longest_; ++order) {
      Table& table = tables_[std::size_t(order)];
      table.follows.resize(std::size_t(256) << (8 * order));
      table.total.resize(std::size_t(1) << (8 * order));
      table.different.resize(table.total.size());
      for (std::size_t i = std::size_t(order); i < text.size(); ++i) {
        const std::size_t history = history_before(text, i, order);
        table.different[history] += table.follows[256 * history + text[i]]++ == 0;
        ++table.total[history];
      }
    }
  }

  /// Of text[i], given what precedes it in `text`.
  double probability(std::span<const std::uint8_t> text, std::size_t i) const {
    double p = 1.0 / 256;
    for (int order = 0; order <= std::min<int>(longest_, int(i)); ++order) {
      const Table& table = tables_[std::size_t(order)];
      const std::size_t history = history_before(text, i, order);
      const double different = table.different[history];
      if (different == 0) break;  // longer histories were not seen either
      p = (table.follows[256 * history + text[i]] + different * p) / (table.total[history] + different);
    }
    return p;
  }

  /// Mean over all bytes but the first, which a model of successors does not predict either. At least two bytes.
  double bits_per_byte(std::span<const std::uint8_t> text) const {
    double bits = 0;
    for (std::size_t i = 1; i < text.size(); ++i) bits -= std::log2(probability(text, i));
    return bits / double(text.size() - 1);
  }

 private:
  struct Table {
    std::vector<std::uint32_t> follows, total, different;
  };

  static std::size_t history_before(std::span<const std::uint8_t> text, std::size_t i, int order) {
    std::size_t history = 0;
    for (int back = order; back >= 1; --back) history = 256 * history + text[i - std::size_t(back)];
    return history;
  }

  int longest_;
  std::array<Table, 3> tables_;
};

}  // namespace chela_lm
