#include "chela/model/safetensors.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <numeric>

#include "model/temporary_folder.hpp"

#if defined(__linux__)
#include <sys/resource.h>
#include <csignal>
#endif

namespace {
using namespace chela;
using namespace chela::test;

/// A file by hand: header length, header, data.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  bytes += header;
  for (std::size_t i = 0; i < data_bytes; ++i) bytes += char(i + 1);
  return bytes;
}

/// What every malformed file below is asked for, and what the memory held before.
struct Wanted {
  std::vector<float> a = std::vector<float>(6, -1.0f);
  std::vector<std::uint8_t> b = std::vector<std::uint8_t>(3, 77);
  std::map<std::string, std::string> metadata{{"before", "kept"}};

  std::vector<TensorTarget> targets() {
    return {{"a", StoredType::f32, {2, 3}, a.data()}, {"b", StoredType::u8, {3}, b.data()}};
  }
  FileStatus load(const std::filesystem::path& path, ExtraTensors extras = ExtraTensors::refused) {
    return load_safetensors(path, targets(), extras, &metadata);
  }
  bool untouched() const { return a == Wanted{}.a && b == Wanted{}.b && metadata == Wanted{}.metadata; }
};

const std::string tensor_a = R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]})";
const std::string tensor_b = R"("b":{"dtype":"U8","shape":[3],"data_offsets":[24,27]})";
const std::string good_header = "{" + tensor_a + "," + tensor_b + "}";

std::string replaced(std::string text, const std::string& what, const std::string& with) {
  const std::size_t at = text.find(what);
  REQUIRE(at != text.npos);
  return text.replace(at, what.size(), with);
}
}  // namespace

TEST_CASE("tensors and metadata come back as they were saved") {
  const TemporaryFolder folder;
  const std::vector<std::uint8_t> bytes{1, 2, 3};
  const std::vector<float> floats{0.5f, -0.0f, std::numeric_limits<float>::infinity(), 1e-45f, 3, 4};
  const std::vector<double> doubles{1.0 / 3};
  const std::vector<std::int64_t> integers{-1, INT64_MIN, INT64_MAX, 7};
  const std::vector<std::uint16_t> halves{0x3f80, 0x4000};
  const std::string odd_name = "\"quoted\"\\ \n\t\x01 \xC3\xA9 \xF0\x9F\x99\x82";
  const std::map<std::string, std::string> metadata{{"format", "chela"}, {odd_name, odd_name}, {"", ""}};
  const std::vector<TensorSource> sources{
      {"bytes", StoredType::u8, {3}, bytes.data()},       {odd_name, StoredType::f32, {2, 3}, floats.data()},
      {"scalar", StoredType::f64, {}, doubles.data()},    {"integers", StoredType::i64, {2, 1, 2}, integers.data()},
      {"bfloat16", StoredType::bf16, {2}, halves.data()}, {"empty", StoredType::f32, {4, 0}, nullptr}};
  const auto path = folder / "file.safetensors";
  REQUIRE(save_safetensors(path, sources, metadata).ok());
  CHECK(folder.entries() == 1);

  std::vector<std::uint8_t> bytes_back(3);
  std::vector<float> floats_back(6);
  std::vector<double> doubles_back(1);
  std::vector<std::int64_t> integers_back(4);
  std::vector<std::uint16_t> halves_back(2);
  const std::vector<TensorTarget> targets{{"empty", StoredType::f32, {4, 0}, nullptr},
                                          {odd_name, StoredType::f32, {2, 3}, floats_back.data()},
                                          {"bytes", StoredType::u8, {3}, bytes_back.data()},
                                          {"scalar", StoredType::f64, {}, doubles_back.data()},
                                          {"integers", StoredType::i64, {2, 1, 2}, integers_back.data()},
                                          {"bfloat16", StoredType::bf16, {2}, halves_back.data()}};
  std::map<std::string, std::string> metadata_back;
  const FileStatus loaded = load_safetensors(path, targets, ExtraTensors::refused, &metadata_back);
  CAPTURE(loaded.why);
  REQUIRE(loaded.ok());
  CHECK(bytes_back == bytes);
  CHECK(std::memcmp(floats_back.data(), floats.data(), 24) == 0);
  CHECK(doubles_back == doubles);
  CHECK(integers_back == integers);
  CHECK(halves_back == halves);
  CHECK(metadata_back == metadata);

  SafetensorsHeader header;
  REQUIRE(read_safetensors_header(path, header).ok());
  CHECK(header.tensors.size() == sources.size());
  const std::string raw = read_file(path);
  std::uint64_t length = 0;
  std::memcpy(&length, raw.data(), 8);
  CHECK(length % 8 == 0);
  for (const StoredTensor& tensor : header.tensors) CHECK(tensor.begin % info_of(tensor.type).bytes == 0);
}

TEST_CASE("a file without tensors, and foreign but legal spelling") {
  const TemporaryFolder folder;
  const auto path = folder / "file";
  REQUIRE(save_safetensors(path, {}, {}).ok());
  CHECK(load_safetensors(path, {}).ok());

  const std::string spaced =
      "{ \"b\" : { \"data_offsets\":[24 ,27 ] ,\t\"shape\":[ 3],\n\"dtype\":\"\\u0055\\u0038\"} , "
      "\"__metadata__\":{\"pair\":\"\\ud83d\\ude42\\/\"},\"\\u0061\":{\"dtype\":\"F32\",\"shape\":"
      "[2,3],\"data_offsets\":[0,24]}}   ";
  write_file(path, file_of(spaced, 27));
  Wanted wanted;
  const FileStatus status = wanted.load(path);
  CAPTURE(status.why);
  REQUIRE(status.ok());
  CHECK(wanted.b == std::vector<std::uint8_t>{25, 26, 27});
  CHECK(wanted.metadata == std::map<std::string, std::string>{{"pair", "\xF0\x9F\x99\x82/"}});
}

TEST_CASE("malformed files are refused with a reason that names the file, and nothing is touched") {
  const auto a_with = [](const char* what, const char* with) {
    return file_of("{" + replaced(tensor_a, what, with) + "," + tensor_b + "}", 27);
  };
  const std::string nested(100'000, '[');
  struct Case {
    std::string bytes, says;
  };
  const std::vector<Case> cases{
      {"", "shorter than 8"},
      {"1234567", "shorter than 8"},
      {std::string(8, '\0'), "begin with '{'"},
      {std::string(8, '\xff'), "header's length"},
      {std::string("\x09\0\0\0\0\0\0\0{}", 10), "header's length"},
      {file_of("", 27), "begin with '{'"},
      {file_of(" " + good_header, 27), "begin with '{'"},
      {file_of("[]", 27), "begin with '{'"},
      {file_of(good_header.substr(0, good_header.size() - 1), 27), "before the end"},
      {file_of(good_header + "x", 27), "after the end"},
      {file_of(good_header + "{}", 27), "after the end"},
      {file_of(good_header, 26), "cut short"},
      {file_of(good_header, 28), "belong to none"},
      {file_of(good_header, 0), "cut short"},
      {file_of("{" + tensor_a + "," + tensor_a + "," + tensor_b + "}", 27), "twice"},
      {file_of("{" + tensor_a + "," + tensor_b + ",}", 27), "expected '\"'"},
      {file_of("{" + tensor_a + " " + tensor_b + "}", 27), "expected ','"},
      {file_of("{\"__metadata__\":{\"k\":1}," + tensor_a + "," + tensor_b + "}", 27), "expected '\"'"},
      {file_of("{\"__metadata__\":{\"k\":\"\",\"k\":\"\"}," + tensor_a + "," + tensor_b + "}", 27), "twice"},
      {file_of("{\"__metadata__\":{},\"__metadata__\":{}," + tensor_a + "," + tensor_b + "}", 27), "twice"},
      {file_of("{\"a\":" + nested, 27), "expected '{'"},
      {file_of("{\"a\":{\"shape\":" + nested, 27), "unsigned integer"},
      {a_with("F32", "F33"), "unknown dtype \"F33\""},
      {a_with("\"F32\"", "32"), "expected '\"'"},
      {a_with("\"dtype\":\"F32\",", ""), "\"dtype\" is missing"},
      {a_with("\"dtype\":\"F32\",", "\"dtype\":\"F32\",\"dtype\":\"F32\","), "twice"},
      {a_with("\"dtype\":\"F32\",", "\"dtype\":\"F32\",\"extra\":0,"), "unknown field"},
      {a_with("[2,3]", "[2,4]"), "takes 32 bytes"},
      {a_with("[2,3]", "[2,-3]"), "unsigned integer"},
      {a_with("[2,3]", "[2,3.0]"), "expected ','"},
      {a_with("[2,3]", "[2,3e0]"), "expected ','"},
      {a_with("[2,3]", "[02,3]"), "leading zeros"},
      {a_with("[2,3]", "[2,18446744073709551616]"), "64 bits"},
      {a_with("[2,3]", "[2,9223372036854775808]"), "out of range"},
      {a_with("[2,3]", "[4294967296,4294967296]"), "out of range"},
      {a_with("[2,3]", "null"), "expected '['"},
      {a_with("[0,24]", "[0,24,27]"), "two numbers"},
      {a_with("[0,24]", "[0]"), "two numbers"},
      {a_with("[0,24]", "[24,0]"), "takes 24 bytes"},
      {file_of("{" + tensor_a + "," + replaced(tensor_b, "[24,27]", "[23,26]") + "}", 26), "expected 24: overlap"},
      {a_with("[0,24]", "[1,25]"), "expected 0: gap"},
      {a_with("[0,24]", "[4,28]"), "cut short"},
      {a_with("[0,24]", "[18446744073709551591,18446744073709551615]"), "expected 0: gap"},
      {a_with("\"a\"", "\"\xff\""), "UTF-8"},
      {a_with("\"a\"", "\"\xC0\x80\""), "UTF-8"},
      {a_with("\"a\"", "\"\xED\xA0\x80\""), "UTF-8"},
      {a_with("\"a\"", "\"\n\""), "control"},
      {a_with("\"a\"", "\"\\x\""), "escape"},
      {a_with("\"a\"", "\"\\u12G4\""), "hexadecimal"},
      {a_with("\"a\"", "\"\\ud800\""), "surrogate"},
      {a_with("\"a\"", "\"\\ud800\\u0041\""), "surrogate"},
      {a_with("\"a\"", "\"\\udc00\""), "surrogate"},
      {a_with("\"a\":", "\"a\" "), "expected ':'"},
  };
  const TemporaryFolder folder;
  const auto path = folder / "bad.safetensors";
  for (const Case& c : cases) {
    write_file(path, c.bytes);
    Wanted wanted;
    const FileStatus status = wanted.load(path);
    CAPTURE(c.says);
    CAPTURE(status.why);
    CHECK(status.code == FileCode::malformed);
    CHECK(status.why.find(path.string()) == 0);
    CHECK(status.why.find(c.says) != std::string::npos);
    CHECK(wanted.untouched());
  }
}

TEST_CASE("well-formed files that hold something else are refused") {
  const TemporaryFolder folder;
  const auto path = folder / "other.safetensors";
  const auto a_with = [](const char* what, const char* with) {
    return "{" + replaced(tensor_a, what, with) + "," + tensor_b + "}";
  };
  struct Case {
    std::string header, says;
  };
  const std::vector<Case> cases = {
      {a_with("\"a\"", "\"c\""), "\"a\" is missing"},
      {a_with("F32", "I32"), "\"a\" is I32 [2, 3], expected F32 [2, 3]"},
      {a_with("[2,3]", "[3,2]"), "\"a\" is F32 [3, 2], expected F32 [2, 3]"},
      {a_with("[2,3]", "[6]"), "expected F32 [2, 3]"},
      {"{" + tensor_a + "," +
           replaced(tensor_b, "\"b\"",
                    "\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[24,24]},"
                    "\"extra\"") +
           "}",
       "\"b\" is U8 [0], expected U8 [3]"},
      {"{" + tensor_a + "," + tensor_b + ",\"extra\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[27,27]}}",
       "\"extra\" was not expected"}};
  for (const Case& c : cases) {
    write_file(path, file_of(c.header, 27));
    Wanted wanted;
    const FileStatus status = wanted.load(path);
    CAPTURE(c.says);
    CAPTURE(status.why);
    CHECK(status.code == FileCode::mismatch);
    CHECK(status.why.find(c.says) != std::string::npos);
    CHECK(wanted.untouched());
  }
  Wanted wanted;  // the file is still the last case, with one tensor too many
  CHECK(wanted.load(path, ExtraTensors::ignored).ok());
  CHECK(wanted.b == std::vector<std::uint8_t>{25, 26, 27});
}

TEST_CASE("no damage to a file can do worse than be refused") {
  const TemporaryFolder folder;
  const auto path = folder / "damaged.safetensors";
  const std::string good = file_of(replaced(good_header, "{", "{\"__metadata__\":{\"k\":\"\\u00e9\"},"), 27);
  for (std::size_t length = 0; length < good.size(); ++length) {
    write_file(path, good.substr(0, length));
    Wanted wanted;
    CHECK_FALSE(wanted.load(path).ok());
    CHECK(wanted.untouched());
  }
  for (std::size_t at = 0; at < good.size() - 27; ++at) {
    for (const unsigned flip : {1u, 2u, 4u, 8u, 16u, 32u, 64u, 128u, 255u}) {
      std::string damaged = good;
      damaged[at] = char(static_cast<unsigned char>(damaged[at]) ^ flip);
      write_file(path, damaged);
      Wanted wanted;
      const FileStatus status = wanted.load(path);
      CHECK_UNARY(status.ok() || wanted.untouched());  // a changed letter of the metadata is still a legal file
    }
  }
}

TEST_CASE("what cannot be read is reported") {
  const TemporaryFolder folder;
  Wanted wanted;
  const FileStatus missing = wanted.load(folder / "missing");
  CHECK(missing.code == FileCode::cannot_read);
  CHECK(missing.why.find("No such file") != std::string::npos);
  CHECK(wanted.load(folder.path()).code == FileCode::cannot_read);
  CHECK(wanted.untouched());
}

TEST_CASE("what cannot be saved is reported, the old file stays, and nothing is left beside it") {
  const TemporaryFolder folder;
  const auto path = folder / "file";
  const std::vector<float> data(100'000, 1.0f);
  const auto save = [&](const std::filesystem::path& where, std::vector<TensorSource> sources,
                        std::map<std::string, std::string> metadata = {}) {
    return save_safetensors(where, sources, metadata);
  };
  const TensorSource good{"a", StoredType::f32, {100'000}, data.data()};
  write_file(path, "old");

  CHECK(save(path, {good, good}).code == FileCode::bad_value);
  CHECK(save(path, {{"__metadata__", StoredType::f32, {1}, data.data()}}).code == FileCode::bad_value);
  CHECK(save(path, {{"\xff", StoredType::f32, {1}, data.data()}}).code == FileCode::bad_value);
  CHECK(save(path, {{"a", StoredType::f32, {-1}, data.data()}}).code == FileCode::bad_value);
  CHECK(save(path, {{"a", StoredType::f32, {INT64_MAX, 2}, data.data()}}).code == FileCode::bad_value);
  CHECK(save(path, {{"a", StoredType::f32, {1}, nullptr}}).code == FileCode::bad_value);
  CHECK(save(path, {good}, {{"k", "\xff"}}).code == FileCode::bad_value);
  CHECK(save(folder / "no" / "folder", {good}).code == FileCode::cannot_write);
  CHECK(save(path / "below a file", {good}).code == FileCode::cannot_write);

  std::filesystem::create_directory(folder / "taken");
  write_file(folder / "taken" / "inside", "");
  CHECK(save(folder / "taken", {good}).code == FileCode::cannot_write);

#if defined(__linux__)
  // A limit on file sizes stands in for a full disk.
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{20'000, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  const FileStatus full = save(path, {good});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK(full.code == FileCode::cannot_write);
  CHECK(full.why.find(path.string()) == 0);
#endif

  CHECK(read_file(path) == "old");
  CHECK(folder.entries() == 2);
  CHECK(save(path, {good}).ok());
  CHECK(folder.entries() == 2);
}
