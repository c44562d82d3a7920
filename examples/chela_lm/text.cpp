#include "chela_lm/text.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "chela/model/random.hpp"
#include "chela_lm/error.hpp"

namespace chela_lm {

namespace {

namespace fs = std::filesystem;

void append_file(const fs::path& path, Bytes& text) {
  errno = 0;
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const auto size = file ? std::streamoff(file.tellg()) : -1;
  if (size >= 0) {
    const std::size_t before = text.size();
    text.resize(before + std::size_t(size));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(text.data() + before), size);
  }
  if (!file) throw Error(path.string() + ": cannot read: " + (errno ? std::strerror(errno) : "unknown reason"));
}

std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

Bytes read_text(const fs::path& path) {
  Bytes text;
  try {
    const fs::file_status kind = fs::status(path);
    if (!fs::exists(kind)) throw Error(path.string() + ": no such file or folder");
    if (fs::is_directory(kind)) {
      for (const fs::path& file : files_below(path)) append_file(file, text);
      if (text.empty()) throw Error(path.string() + ": no text in this folder");
    } else if (fs::is_regular_file(kind)) {
      append_file(path, text);
      if (text.empty()) throw Error(path.string() + ": the file is empty");
    } else {
      throw Error(path.string() + ": neither a file nor a folder");
    }
  } catch (const fs::filesystem_error& error) {
    throw Error(path.string() + ": " + error.code().message());
  }
  return text;
}

fs::path default_text() {
  std::vector<fs::path> candidates;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator("/usr/share/perl", error))
    if (fs::exists(entry.path() / "pod" / "perlfunc.pod")) candidates.push_back(entry.path() / "pod");
  if (candidates.empty()) {
    throw Error(
        "no text: the default is Perl's manual (/usr/share/perl/*/pod), which is not installed; run "
        "cmake/bootstrap.sh to install it, or name a file or folder with --text");
  }
  return *std::max_element(candidates.begin(), candidates.end());
}

SplitText split_text(const Bytes& text) {
  constexpr std::size_t parts = 16, largest_block = 65536;
  const std::size_t block = std::clamp<std::size_t>((text.size() + parts - 1) / parts, 1, largest_block);
  SplitText split;
  for (std::size_t begin = 0, number = 0; begin < text.size(); begin += block, ++number) {
    Bytes& part = number % parts == parts - 1 ? split.held_out : split.training;
    const auto first = text.begin() + std::ptrdiff_t(begin);
    part.insert(part.end(), first, first + std::ptrdiff_t(std::min(block, text.size() - begin)));
  }
  return split;
}

std::string fingerprint(const Bytes& text) {
  const std::string_view bytes(reinterpret_cast<const char*>(text.data()), text.size());
  return std::to_string(text.size()) + " bytes, hash " + std::to_string(chela::stream_of(bytes));
}

}  // namespace chela_lm
