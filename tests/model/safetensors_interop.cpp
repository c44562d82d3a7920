// The C++ half of safetensors_interop.py: `write <file>` saves tensors whose values follow a rule, `check <file>` loads the
// same tensors and compares. Exit code 0 when all is well.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>

#include "chela/model/safetensors.hpp"

namespace {
using namespace chela;

struct Tensors {
  std::vector<float> matrix = std::vector<float>(6);
  std::vector<double> vector = std::vector<double>(5);
  std::vector<std::int64_t> integers = std::vector<std::int64_t>(4);
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(3);
  float scalar = 0;

  void fill() {
    for (std::size_t i = 0; i < 6; ++i) matrix[i] = 0.5f * float(i) - 1;
    for (std::size_t i = 0; i < 5; ++i) vector[i] = double(i) / 4;
    for (std::size_t i = 0; i < 4; ++i) integers[i] = std::int64_t(i) - 2;
    std::iota(bytes.begin(), bytes.end(), std::uint8_t(253));
    scalar = 2.5f;
  }
  std::vector<TensorTarget> targets() {
    return {{"layer.0.weight", StoredType::f32, {2, 3}, matrix.data()},
            {"vector \xC3\xA9", StoredType::f64, {5}, vector.data()},
            {"integers", StoredType::i64, {2, 2}, integers.data()},
            {"bytes", StoredType::u8, {3}, bytes.data()},
            {"scalar", StoredType::f32, {}, &scalar},
            {"empty", StoredType::f32, {0, 7}, nullptr}};
  }
};
}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const std::string action = arguments[1];
  Tensors want;
  want.fill();
  const std::map<std::string, std::string> metadata{{"quote", "\"\\\n"}};
  if (action == "write") {
    std::vector<TensorSource> sources;
    for (const TensorTarget& t : want.targets()) sources.push_back({t.name, t.type, t.extents, t.data});
    const FileStatus status = save_safetensors(arguments[2], sources, metadata);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.why.c_str());
    return status.ok() ? 0 : 1;
  }
  Tensors got;
  std::map<std::string, std::string> found;
  const FileStatus status = load_safetensors(arguments[2], got.targets(), ExtraTensors::refused, &found);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.why.c_str());
  const bool same = status.ok() && got.matrix == want.matrix && got.vector == want.vector &&
                    got.integers == want.integers && got.bytes == want.bytes && got.scalar == want.scalar &&
                    found == metadata;
  return same ? 0 : 1;
}
