#include "chela_lm/ngram.hpp"

#include <doctest/doctest.h>

#include <string>

#include "chela_lm/text.hpp"

using namespace chela_lm;

namespace {
Bytes bytes(const std::string& text) { return {text.begin(), text.end()}; }
}  // namespace

TEST_CASE("each history's probabilities sum to one, seen or not") {
  const ByteCounts counts(bytes("abracadabra, abracadabra"), 2);
  for (const std::string history : {"", "a", "z", "ab", "zz", "za", "bz"}) {
    Bytes text = bytes(history + "?");
    double sum = 0;
    for (int next = 0; next < 256; ++next) {
      text.back() = std::uint8_t(next);
      const double p = counts.probability(text, text.size() - 1);
      CHECK(p > 0);
      sum += p;
    }
    CHECK(sum == doctest::Approx(1));
  }
}

TEST_CASE("probabilities by hand") {
  const Bytes text = bytes("aab");
  const double a = (2 + 2.0 / 256) / (3 + 2), b = (1 + 2.0 / 256) / (3 + 2);
  CHECK(ByteCounts(text, 0).probability(text, 0) == doctest::Approx(a));
  CHECK(ByteCounts(text, 0).bits_per_byte(text) == doctest::Approx(-(std::log2(a) + std::log2(b)) / 2));
  const double b_after_a = (1 + 2 * b) / (2 + 2);
  CHECK(ByteCounts(text, 1).probability(text, 2) == doctest::Approx(b_after_a));
  const double b_after_aa = (1 + 1 * b_after_a) / (1 + 1);
  CHECK(ByteCounts(text, 2).probability(text, 2) == doctest::Approx(b_after_aa));
  CHECK(ByteCounts(text, 2).probability(bytes("xab"), 2) == doctest::Approx(b_after_a));  // "xa" was never seen
}

TEST_CASE("one sixteenth of the text is held out, and nothing is lost") {
  for (const std::size_t size : {0, 1, 15, 16, 17, 1000, 1 << 20, (5 << 20) + 12345}) {
    Bytes text(size);
    for (std::size_t i = 0; i < size; ++i) text[i] = std::uint8_t(i * 2654435761u >> 13);
    const SplitText split = split_text(text);
    CHECK(split.training.size() + split.held_out.size() == size);
    if (size >= 1000) {
      CHECK(double(split.held_out.size()) / double(size) > 0.05);
      CHECK(double(split.held_out.size()) / double(size) < 0.07);
    }
  }
  const SplitText split = split_text(bytes("0123456789abcdef"));
  CHECK(split.training == bytes("0123456789abcde"));
  CHECK(split.held_out == bytes("f"));
}
