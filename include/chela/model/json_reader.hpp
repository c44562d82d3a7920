#pragma once
// The part of JSON (RFC 8259) that file headers are made of: objects, arrays, strings and unsigned integers. The caller
// says what it expects next, so nothing is ever skipped, depth is bounded by the caller's grammar, and there is no tree
// to build.
#include <cstdint>
#include <string>
#include <string_view>

namespace chela {

/// Length of the well-formed UTF-8 sequence at the start of `text`, or 0: overlong forms, surrogates and values above
/// 10FFFF are not well-formed.
inline std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  const auto follows = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xBF) {
    return byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (text.empty()) return 0;
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return follows(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF)
    return follows(1, first == 0xE0 ? 0xA0 : 0x80, first == 0xED ? 0x9F : 0xBF) && follows(2) ? 3 : 0;
  if (first >= 0xF0 && first <= 0xF4)
    return follows(1, first == 0xF0 ? 0x90 : 0x80, first == 0xF4 ? 0x8F : 0xBF) && follows(2) && follows(3) ? 4 : 0;
  return 0;
}

inline bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const std::size_t length = utf8_length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

/// Reads a text from front to back. Every member returns false after the first error, which `error()` describes.
class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  const std::string& error() const { return error_; }

  /// Stops reading with a reason of the caller's. Always false.
  bool fail(const std::string& what) {
    if (error_.empty()) error_ = "at byte " + std::to_string(at_) + ": " + what;
    return false;
  }

  /// {"key": value, ...}: calls value(key) in front of each value; it must read the value and return whether it could.
  template <class F>
  bool object(F value) {
    return sequence('{', '}', [&] {
      std::string key;
      return string(key) && take(':') && value(key);
    });
  }

  /// [item, ...]: calls item() in front of each.
  template <class F>
  bool array(F item) {
    return sequence('[', ']', item);
  }

  bool string(std::string& out) {
    if (!take('"')) return false;
    out.clear();
    while (at_ < text_.size() && text_[at_] != '"') {
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c < 0x20) return fail("control characters in a string must be escaped");
      if (c == '\\') {
        if (!escape(out)) return false;
      } else {
        const std::size_t length = utf8_length(text_.substr(at_));
        if (length == 0) return fail("a string is not valid UTF-8");
        out.append(text_.substr(at_, length));
        at_ += length;
      }
    }
    return take('"');
  }

  /// Digits without sign, fraction, exponent or leading zero, below 2^64.
  bool unsigned_integer(std::uint64_t& out) {
    skip_space();
    const std::size_t begin = at_;
    out = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const auto digit = std::uint64_t(text_[at_] - '0');
      if (out > (UINT64_MAX - digit) / 10) return fail("a number does not fit 64 bits");
      out = 10 * out + digit;
      ++at_;
    }
    if (at_ == begin) return fail("expected an unsigned integer");
    if (text_[begin] == '0' && at_ > begin + 1) return fail("a number has leading zeros");
    return true;
  }

  /// Whether only spaces follow.
  bool end() {
    skip_space();
    return at_ == text_.size() || fail("unexpected text after the end");
  }

 private:
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
      ++at_;
  }

  bool next_is(char c) {
    skip_space();
    return at_ < text_.size() && text_[at_] == c;
  }

  bool take(char c) {
    if (!error_.empty()) return false;
    if (!next_is(c)) return fail(std::string("expected '") + c + "'" + (at_ < text_.size() ? "" : " before the end"));
    ++at_;
    return true;
  }

  template <class F>
  bool sequence(char open, char close, F element) {
    if (!take(open)) return false;
    if (next_is(close)) return take(close);
    while (true) {
      if (!element()) return false;
      if (next_is(close)) return take(close);
      if (!take(',')) return false;
    }
  }

  bool hexadecimal(unsigned& out) {
    out = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ < text_.size() ? text_[at_] : ' ';
      if (c >= '0' && c <= '9') {
        out = 16 * out + unsigned(c - '0');
      } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
        out = 16 * out + unsigned((c | 0x20) - 'a') + 10;
      } else {
        return fail("\\u must be followed by four hexadecimal digits");
      }
    }
    return true;
  }

  /// One escape, with the backslash at the reading position.
  bool escape(std::string& out) {
    constexpr std::string_view letters = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
    const char letter = at_ + 1 < text_.size() ? text_[at_ + 1] : ' ';
    if (const std::size_t which = letters.find(letter); which != letters.npos) {
      out += meanings[which];
      at_ += 2;
      return true;
    }
    if (letter != 'u') return fail("unknown escape in a string");
    at_ += 2;
    unsigned code = 0, low = 0;
    if (!hexadecimal(code)) return false;
    if (code >= 0xD800 && code <= 0xDFFF) {  // half of a pair that stands for one character above FFFF
      if (code >= 0xDC00 || text_.substr(at_, 2) != "\\u") return fail("half of a surrogate pair");
      at_ += 2;
      if (!hexadecimal(low)) return false;
      if (low < 0xDC00 || low > 0xDFFF) return fail("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
    return true;
  }

  static void append_utf8(std::string& out, unsigned code) {
    const auto tail = [&](int shift) { out += char(0x80 | ((code >> shift) & 0x3F)); };
    if (code < 0x80) {
      out += char(code);
    } else if (code < 0x800) {
      out += char(0xC0 | (code >> 6)), tail(0);
    } else if (code < 0x10000) {
      out += char(0xE0 | (code >> 12)), tail(6), tail(0);
    } else {
      out += char(0xF0 | (code >> 18)), tail(12), tail(6), tail(0);
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
  std::string error_;
};

/// `text` as a JSON string, quotes included. The text must be UTF-8.
inline std::string json_string(std::string_view text) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\', out += c;
    } else if (code < 0x20) {
      out += "\\u00", out += digits[code >> 4], out += digits[code & 15];
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace chela
