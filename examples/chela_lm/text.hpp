#pragma once
// Text as bytes: where it comes from, and which part of it is never trained on.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace chela_lm {

using Bytes = std::vector<std::uint8_t>;

/// Every byte of a file, or of all regular files below a folder in the order of their paths. Throws Error when there is
/// none.
Bytes read_text(const std::filesystem::path& path);

/// The folder of Perl's manual, several megabytes of English and code that come with a Debian or Ubuntu package.
std::filesystem::path default_text();

struct SplitText {
  Bytes training, held_out;
};

/// One sixteenth is held out. The text is cut into blocks of 64 KiB, or of a sixteenth of a short text, and each
/// sixteenth block is held out: from all over the text, so that it is like the rest, yet in pieces long enough to share
/// few sentences with their neighbours. Each part is joined to one stream. Depends on the bytes alone.
SplitText split_text(const Bytes& text);

/// A short name of the content, to notice that a run is continued on another text.
std::string fingerprint(const Bytes& text);

}  // namespace chela_lm
