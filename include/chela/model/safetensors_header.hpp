#pragma once
// The safetensors format (github.com/huggingface/safetensors, "Format"):
//
//   8 bytes      n, little-endian
//   n bytes      JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
//                      "__metadata__": {"key": "text", ...}}, spaces allowed after it
//   the rest     data, little-endian, row-major; offsets count from its start, and cover it without gap or overlap
//
// Here: what a header says, reading it strictly, and writing it.
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "chela/core/index.hpp"
#include "chela/model/json_reader.hpp"

namespace chela {

/// Element types a file may hold.
enum class StoredType { boolean, u8, i8, u16, i16, u32, i32, u64, i64, f16, bf16, f32, f64 };

struct StoredTypeInfo {
  StoredType type;
  std::string_view name;  ///< as in the file
  std::size_t bytes;      ///< of one element
};

inline constexpr std::array<StoredTypeInfo, 13> stored_types{{{StoredType::boolean, "BOOL", 1},
                                                              {StoredType::u8, "U8", 1},
                                                              {StoredType::i8, "I8", 1},
                                                              {StoredType::u16, "U16", 2},
                                                              {StoredType::i16, "I16", 2},
                                                              {StoredType::u32, "U32", 4},
                                                              {StoredType::i32, "I32", 4},
                                                              {StoredType::u64, "U64", 8},
                                                              {StoredType::i64, "I64", 8},
                                                              {StoredType::f16, "F16", 2},
                                                              {StoredType::bf16, "BF16", 2},
                                                              {StoredType::f32, "F32", 4},
                                                              {StoredType::f64, "F64", 8}}};

constexpr const StoredTypeInfo& info_of(StoredType type) { return stored_types[std::size_t(type)]; }

/// The stored type of a C++ type; 16-bit floats are named by hand, as this header knows none.
template <class T>
inline constexpr StoredType stored_type_of = [] {
  static_assert(sizeof(T) == 0,
                "stored_type_of knows float, double, int32, int64 and uint8; name a StoredType instead");
  return StoredType::u8;
}();
template <>
inline constexpr StoredType stored_type_of<float> = StoredType::f32;
template <>
inline constexpr StoredType stored_type_of<double> = StoredType::f64;
template <>
inline constexpr StoredType stored_type_of<std::int32_t> = StoredType::i32;
template <>
inline constexpr StoredType stored_type_of<std::int64_t> = StoredType::i64;
template <>
inline constexpr StoredType stored_type_of<std::uint8_t> = StoredType::u8;

/// One tensor as a header describes it.
struct StoredTensor {
  std::string name;
  StoredType type = StoredType::f32;
  std::vector<Index> extents;        ///< none for a scalar
  std::uint64_t begin = 0, end = 0;  ///< bytes, from the start of the data
};

struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  ///< in the order of their data
  std::map<std::string, std::string> metadata;
};

/// "F32 [2, 3]"
inline std::string describe(StoredType type, const std::vector<Index>& extents) {
  std::string text = std::string(info_of(type).name) + " [";
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(extents[i]);
  }
  return text + "]";
}

/// Bytes of a tensor, or false where the product of extents leaves 63 bits or an extent is negative.
inline bool stored_bytes(StoredType type, const std::vector<Index>& extents, std::uint64_t& bytes) {
  bytes = info_of(type).bytes;
  if (std::any_of(extents.begin(), extents.end(), [](Index extent) { return extent < 0; })) return false;
  if (std::find(extents.begin(), extents.end(), 0) != extents.end()) {
    bytes = 0;
    return true;
  }
  for (const Index extent : extents) {
    if (bytes > std::uint64_t(INT64_MAX) / std::uint64_t(extent)) return false;
    bytes *= std::uint64_t(extent);
  }
  return true;
}

namespace detail {

/// The object that describes one tensor, every field once.
inline bool read_tensor(JsonReader& json, StoredTensor& tensor) {
  std::set<std::string> seen;
  std::vector<std::uint64_t> offsets;
  const bool read = json.object([&](const std::string& field) {
    if (!seen.insert(field).second) return json.fail("tensor \"" + tensor.name + "\": field \"" + field + "\" twice");
    if (field == "dtype") {
      std::string name;
      if (!json.string(name)) return false;
      const auto* known =
          std::find_if(stored_types.begin(), stored_types.end(), [&](const auto& info) { return info.name == name; });
      if (known == stored_types.end())
        return json.fail("tensor \"" + tensor.name + "\": unknown dtype \"" + name + "\"");
      tensor.type = known->type;
      return true;
    }
    if (field == "shape") {
      return json.array([&] {
        std::uint64_t extent = 0;
        if (!json.unsigned_integer(extent)) return false;
        if (extent > std::uint64_t(INT64_MAX)) return json.fail("tensor \"" + tensor.name + "\": shape out of range");
        tensor.extents.push_back(Index(extent));
        return true;
      });
    }
    if (field == "data_offsets") {
      return json.array([&] {
        std::uint64_t offset = 0;
        if (!json.unsigned_integer(offset)) return false;
        offsets.push_back(offset);
        return true;
      });
    }
    return json.fail("tensor \"" + tensor.name + "\": unknown field \"" + field + "\"");
  });
  if (!read) return false;
  for (const char* field : {"dtype", "shape", "data_offsets"})
    if (!seen.contains(field)) return json.fail("tensor \"" + tensor.name + "\": field \"" + field + "\" is missing");
  if (offsets.size() != 2) return json.fail("tensor \"" + tensor.name + "\": data_offsets must be two numbers");
  tensor.begin = offsets[0];
  tensor.end = offsets[1];
  return true;
}

/// Whether the tensors' data fill [0, data_bytes) one after the other. The reason otherwise.
inline std::string placement_error(const std::vector<StoredTensor>& tensors, std::uint64_t data_bytes) {
  std::uint64_t reached = 0;
  for (const StoredTensor& tensor : tensors) {
    const std::string name = "tensor \"" + tensor.name + "\": ";
    std::uint64_t bytes = 0;
    if (!stored_bytes(tensor.type, tensor.extents, bytes)) return name + "shape out of range";
    if (tensor.end < tensor.begin || tensor.end - tensor.begin != bytes) {
      return name + describe(tensor.type, tensor.extents) + " takes " + std::to_string(bytes) +
             " bytes, data_offsets say [" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + "]";
    }
    if (tensor.end > data_bytes) {
      return name + "data ends at byte " + std::to_string(tensor.end) + " of " + std::to_string(data_bytes) +
             ": the file is cut short or damaged";
    }
    if (tensor.begin != reached) {
      return name + "data begins at byte " + std::to_string(tensor.begin) + ", expected " + std::to_string(reached) +
             (tensor.begin < reached ? ": overlap" : ": gap");
    }
    reached = tensor.end;
  }
  return reached == data_bytes ? ""
                               : std::to_string(data_bytes - reached) + " bytes after the last tensor belong to none";
}

}  // namespace detail

/// Reads the JSON of a header in front of `data_bytes` of data. Returns the reason for refusing it, or an empty string;
/// `header` is written only in that case.
inline std::string parse_safetensors_header(std::string_view text, std::uint64_t data_bytes,
                                            SafetensorsHeader& header) {
  if (text.empty() || text.front() != '{') return "the header must begin with '{'";
  SafetensorsHeader found;
  std::set<std::string> names;
  JsonReader json(text);
  const bool read = json.object([&](const std::string& name) {
    if (!names.insert(name).second) return json.fail("\"" + name + "\" appears twice");
    if (name == "__metadata__") {
      return json.object([&](const std::string& key) {
        std::string value;
        if (!json.string(value)) return false;
        return found.metadata.emplace(key, value).second || json.fail("metadata \"" + key + "\" appears twice");
      });
    }
    found.tensors.push_back({.name = name, .extents = {}});
    return detail::read_tensor(json, found.tensors.back());
  });
  if (!read || !json.end()) return "header " + json.error();
  std::stable_sort(found.tensors.begin(), found.tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  if (std::string why = detail::placement_error(found.tensors, data_bytes); !why.empty()) return why;
  header = std::move(found);
  return "";
}

/// The JSON of a header, padded with spaces so that the data that follow it and its length begin at a multiple of 8
/// bytes.
inline std::string format_safetensors_header(const SafetensorsHeader& header) {
  std::string text = "{";
  const auto list = [&](const auto& values, auto write) {
    for (bool first = true; const auto& value : values) {
      if (!first) text += ',';
      first = false;
      write(value);
    }
  };
  const auto number = [&](auto value) { text += std::to_string(value); };
  if (!header.metadata.empty()) {
    text += "\"__metadata__\":{";
    list(header.metadata, [&](const auto& pair) {
      text += json_string(pair.first);
      text += ':';
      text += json_string(pair.second);
    });
    text += header.tensors.empty() ? "}" : "},";
  }
  list(header.tensors, [&](const StoredTensor& tensor) {
    text += json_string(tensor.name);
    text += ":{\"dtype\":\"";
    text += info_of(tensor.type).name;
    text += "\",\"shape\":[";
    list(tensor.extents, number);
    text += "],\"data_offsets\":[";
    list(std::array{tensor.begin, tensor.end}, number);
    text += "]}";
  });
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace chela
