#pragma once
// Named tensors in a file that Python's `safetensors` and many other programs read and write. Loading is all or
// nothing: the file is judged as a whole, read into fresh memory, and only then copied to where it was wanted.
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "chela/model/atomic_file.hpp"
#include "chela/model/file_status.hpp"
#include "chela/model/safetensors_header.hpp"

namespace chela {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian, and so must the host be");

/// Row-major elements in memory, to be saved under a name.
struct TensorSource {
  std::string name;
  StoredType type = StoredType::f32;
  std::vector<Index> extents = {};
  const void* data = nullptr;
};

/// Row-major memory to be filled with the tensor of that name, whose type and extents must be exactly these.
struct TensorTarget {
  std::string name;
  StoredType type = StoredType::f32;
  std::vector<Index> extents = {};
  void* data = nullptr;
};

/// What to make of tensors in a file that nobody asked for.
enum class ExtraTensors { refused, ignored };

namespace detail {

inline constexpr std::uint64_t largest_header = 100'000'000;  // the limit of the public implementation

/// A regular file opened for reading, or the reason.
class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path) : path_(path) {
    std::error_code error;
    if (const auto kind = std::filesystem::status(path, error);
        std::filesystem::exists(kind) && !std::filesystem::is_regular_file(kind)) {
      status_ = {FileCode::cannot_read, path.string() + ": not a regular file"};
      return;
    }
    file_.reset(std::fopen(path.string().c_str(), "rb"));
    if (!file_) {
      fail("open");
      return;
    }
    size_ = std::filesystem::file_size(path, error);
    if (error) {
      errno = error.value();
      fail("find the size");
    }
  }

  const FileStatus& status() const { return status_; }
  std::uint64_t size() const { return size_; }

  const FileStatus& read(std::uint64_t offset, void* to, std::size_t bytes) {
    if (!status_.ok() || bytes == 0) return status_;
    errno = 0;
    if (std::fseek(file_.get(), long(offset), SEEK_SET) != 0 || std::fread(to, 1, bytes, file_.get()) != bytes)
      fail("read");
    return status_;
  }

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  void fail(const char* action) {
    const std::string reason = errno ? std::strerror(errno) : "it became shorter";
    status_ = {FileCode::cannot_read, path_.string() + ": cannot " + action + ": " + reason};
  }

  std::filesystem::path path_;
  std::unique_ptr<std::FILE, Close> file_;
  std::uint64_t size_ = 0;
  FileStatus status_;
};

/// Reads and judges everything in front of the data, which begin at byte `data_offset` of the file.
inline FileStatus read_header(InputFile& file, const std::string& name, SafetensorsHeader& header,
                              std::uint64_t& data_offset) {
  const auto malformed = [&](const std::string& why) { return FileStatus{FileCode::malformed, name + ": " + why}; };
  if (!file.status().ok()) return file.status();
  if (file.size() < 8) return malformed("not a safetensors file: shorter than 8 bytes");
  std::uint64_t length = 0;
  if (!file.read(0, &length, 8).ok()) return file.status();
  if (length > largest_header || length > file.size() - 8) {
    return malformed("the header's length is given as " + std::to_string(length) + " bytes, in a file of " +
                     std::to_string(file.size()) + ": cut short, damaged, or not a safetensors file");
  }
  std::string text(std::size_t(length), '\0');
  if (!file.read(8, text.data(), text.size()).ok()) return file.status();
  data_offset = 8 + length;
  const std::string why = parse_safetensors_header(text, file.size() - data_offset, header);
  return why.empty() ? FileStatus{} : malformed(why);
}

/// The tensors of the file in the order of the targets, or the reason why the two do not fit each other.
inline FileStatus match(const std::string& name, const SafetensorsHeader& header, std::span<const TensorTarget> targets,
                        ExtraTensors extras, std::vector<const StoredTensor*>& matched) {
  const auto mismatch = [&](const std::string& why) { return FileStatus{FileCode::mismatch, name + ": " + why}; };
  std::map<std::string_view, const StoredTensor*> unclaimed;
  for (const StoredTensor& tensor : header.tensors) unclaimed.emplace(tensor.name, &tensor);
  for (const TensorTarget& target : targets) {
    const auto found = unclaimed.find(target.name);
    if (found == unclaimed.end()) return mismatch("tensor \"" + target.name + "\" is missing");
    const StoredTensor& tensor = *found->second;
    if (tensor.type != target.type || tensor.extents != target.extents) {
      return mismatch("tensor \"" + target.name + "\" is " + describe(tensor.type, tensor.extents) + ", expected " +
                      describe(target.type, target.extents));
    }
    matched.push_back(&tensor);
    unclaimed.erase(found);
  }
  if (extras == ExtraTensors::refused && !unclaimed.empty())
    return mismatch("tensor \"" + std::string(unclaimed.begin()->first) + "\" was not expected");
  return {};
}

}  // namespace detail

/// What a file holds, without its data. `header` is written only on success.
inline FileStatus read_safetensors_header(const std::filesystem::path& path, SafetensorsHeader& header) {
  detail::InputFile file(path);
  std::uint64_t data_offset = 0;
  return detail::read_header(file, path.string(), header, data_offset);
}

/// Fills every target, and `metadata` if given, or changes nothing and says why. Each target's name must be different.
inline FileStatus load_safetensors(const std::filesystem::path& path, std::span<const TensorTarget> targets,
                                   ExtraTensors extras = ExtraTensors::refused,
                                   std::map<std::string, std::string>* metadata = nullptr) {
  detail::InputFile file(path);
  SafetensorsHeader header;
  std::uint64_t data_offset = 0;
  if (FileStatus s = detail::read_header(file, path.string(), header, data_offset); !s.ok()) return s;
  std::vector<const StoredTensor*> matched;
  if (FileStatus s = detail::match(path.string(), header, targets, extras, matched); !s.ok()) return s;

  std::uint64_t total = 0;
  for (const StoredTensor* tensor : matched) total += tensor->end - tensor->begin;
  const auto fresh = std::make_unique_for_overwrite<char[]>(std::size_t(total));
  char* memory = fresh.get();
  for (const StoredTensor* tensor : matched) {
    const auto bytes = std::size_t(tensor->end - tensor->begin);
    if (!file.read(data_offset + tensor->begin, memory, bytes).ok()) return file.status();
    memory += bytes;
  }

  memory = fresh.get();
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const auto bytes = std::size_t(matched[i]->end - matched[i]->begin);
    if (bytes > 0) std::memcpy(targets[i].data, memory, bytes);
    memory += bytes;
  }
  if (metadata) *metadata = std::move(header.metadata);
  return {};
}

/// Replaces the file at `path` in one moment, after the data have reached the device. On failure the old file is still
/// there. Tensors are laid out by falling element size, so that each is aligned for its type.
inline FileStatus save_safetensors(const std::filesystem::path& path, std::span<const TensorSource> sources,
                                   const std::map<std::string, std::string>& metadata = {}) {
  const auto refused = [&](const std::string& why) {
    return FileStatus{FileCode::bad_value, path.string() + ": not saved: " + why};
  };
  for (const auto& [key, value] : metadata)
    if (!is_utf8(key) || !is_utf8(value)) return refused("metadata must be UTF-8");
  std::vector<const TensorSource*> order;
  for (const TensorSource& source : sources) order.push_back(&source);
  std::stable_sort(order.begin(), order.end(), [](const TensorSource* a, const TensorSource* b) {
    return info_of(a->type).bytes > info_of(b->type).bytes;
  });

  SafetensorsHeader header{.tensors = {}, .metadata = metadata};
  std::set<std::string_view> names;
  std::uint64_t reached = 0;
  for (const TensorSource* source : order) {
    const std::string name = "tensor \"" + source->name + "\"";
    if (!is_utf8(source->name)) return refused("names must be UTF-8");
    if (source->name == "__metadata__" || !names.insert(source->name).second) return refused(name + ": name taken");
    std::uint64_t bytes = 0;
    if (!stored_bytes(source->type, source->extents, bytes)) return refused(name + ": extents out of range");
    if (bytes > 0 && !source->data) return refused(name + ": no data");
    header.tensors.push_back({source->name, source->type, source->extents, reached, reached + bytes});
    reached += bytes;
  }
  const std::string text = format_safetensors_header(header);
  if (text.size() > detail::largest_header) return refused("names and metadata are longer than the format allows");

  AtomicFile file(path);
  const std::uint64_t length = text.size();
  file.write(&length, 8);
  file.write(text.data(), text.size());
  for (std::size_t i = 0; i < order.size(); ++i)
    file.write(order[i]->data, std::size_t(header.tensors[i].end - header.tensors[i].begin));
  return file.commit();
}

}  // namespace chela
