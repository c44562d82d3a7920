// Finds the policy of linear attention on your GPU for the shape that you work with: times a list of them, each a template
// argument, and prints the best as a line to paste. Add your own to the list in main.
//
//     tune [batch tokens heads key_dim value_dim]
#include <cuda_bf16.h>

#include <algorithm>
#include <chela/chela.cuh>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace {

using chela::Index;
using chela::cuda::Instructions;
using chela::cuda::LinearPolicy;
using Element = __nv_bfloat16;

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ? 77 : 1);  // 77: skipped, to CTest
}

__global__ void fill(Element* data, Index size, unsigned seed) {
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += Index(gridDim.x) * blockDim.x) {
    unsigned x = (unsigned(i) + seed) * 2654435761u;
    x = (x ^ (x >> 15)) * 2246822519u;
    data[i] = __float2bfloat16(float(x >> 8) * 0x1p-23f - 1.f);
  }
}

/// A tensor [batch, token, head, dim] of the device's.
class DeviceTensor {
 public:
  DeviceTensor(Index batch, Index tokens, Index heads, Index dim, unsigned seed) {
    const Index size = batch * tokens * heads * dim;
    Element* data = nullptr;
    require(cudaMalloc(&data, std::size_t(size) * sizeof(Element)));
    memory_.reset(data);
    view_ = chela::contiguous(data, batch, tokens, heads, dim);
    fill<<<1024, 256>>>(data, size, seed);
    require(cudaGetLastError());
  }
  chela::TensorView<Element, 4> view() const { return view_; }

 private:
  struct Free {
    void operator()(Element* data) const { cudaFree(data); }
  };
  std::unique_ptr<Element, Free> memory_;
  chela::TensorView<Element, 4> view_;
};

struct Problem {
  DeviceTensor q, k, v, o;
  chela::LinearAttentionArgs<Element> args() const {
    return {.q = q.view(), .k = k.view(), .v = v.view(), .o = o.view()};
  }
};

struct Tuning {
  std::vector<Problem> problems;  ///< taken in turn, so that none finds its inputs in the second-level cache
  double traffic = 0;             ///< bytes of one call
  double best_ms = 1e9;
  std::string best;
};

/// As one writes it in a program.
std::string text_of(LinearPolicy policy) {
  std::string fields;
  const auto add = [&](const char* name, const std::string& value) {
    fields += std::string(fields.empty() ? "." : ", .") + name + " = " + value;
  };
  if (policy.instructions == Instructions::warp) add("instructions", "chela::cuda::Instructions::warp");
  if (policy.instructions == Instructions::warpgroup) add("instructions", "chela::cuda::Instructions::warpgroup");
  if (policy.value_tile) add("value_tile", std::to_string(policy.value_tile));
  if (policy.stages) add("stages", std::to_string(policy.stages));
  if (policy.segments) add("segments", std::to_string(policy.segments));
  return "chela::cuda::LinearPolicy{" + fields + "}";
}

/// Times one policy, or says why it cannot run here.
template <LinearPolicy policy>
void measure(Tuning& tuning) {
  const std::string line = text_of(policy);
  const std::size_t bytes = chela::cuda::workspace_bytes<policy>(tuning.problems[0].args());
  void* scratch = nullptr;
  require(cudaMalloc(&scratch, std::max<std::size_t>(bytes, 1)));
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin)), require(cudaEventCreate(&end));
  chela::Status status;
  std::vector<float> times;
  for (int round = 0; round < 12 && status.ok(); ++round) {
    require(cudaEventRecord(begin));
    for (const Problem& problem : tuning.problems)
      if (status.ok()) status = chela::cuda::linear_attention<policy>(problem.args(), {scratch, bytes}, nullptr);
    require(cudaEventRecord(end));
    require(cudaEventSynchronize(end));
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end));
    if (round > 1) times.push_back(ms / float(tuning.problems.size()));
  }
  cudaEventDestroy(begin), cudaEventDestroy(end), cudaFree(scratch);
  if (!status.ok()) return (void)std::printf("      -           -  %s: %s\n", line.c_str(), status.why);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const double ms = times[times.size() / 2];
  std::printf("%8.4f ms %6.0f GB/s  %s\n", ms, tuning.traffic / ms * 1e-6, line.c_str());
  if (ms < tuning.best_ms) tuning.best_ms = ms, tuning.best = line;
}

}  // namespace

int main(int argc, char** argv) {
  Index shape[] = {4, 4096, 32, 128, 128};
  if (argc != 1 && argc != 6)
    return (void)std::fprintf(stderr, "usage: tune [batch tokens heads key_dim value_dim]\n"), 2;
  for (int i = 1; i < argc; ++i)
    if ((shape[i - 1] = std::atoll(argv[i])) < 1)
      return (void)std::fprintf(stderr, "%s: must be 1 or more\n", argv[i]), 2;
  const auto [batch, tokens, heads, key_dim, value_dim] = shape;

  Tuning tuning;
  tuning.traffic = 2.0 * double(batch * tokens * heads) * double(2 * key_dim + 2 * value_dim);
  const int rotated = int(std::clamp(3e8 / tuning.traffic, 2.0, 32.0));
  for (int i = 0; i < rotated; ++i)
    tuning.problems.push_back({{batch, tokens, heads, key_dim, 1u},
                               {batch, tokens, heads, key_dim, 2u},
                               {batch, tokens, heads, value_dim, 3u},
                               {batch, tokens, heads, value_dim, 4u}});

  measure<LinearPolicy{}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 2}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 3}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 4}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 4, .segments = 2}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 4, .segments = 4}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 4, .segments = 8}>(tuning);
  measure<LinearPolicy{.value_tile = 64, .stages = 4, .segments = 16}>(tuning);
  measure<LinearPolicy{.value_tile = 128, .stages = 2}>(tuning);
  measure<LinearPolicy{.value_tile = 128, .stages = 3}>(tuning);
  measure<LinearPolicy{.value_tile = 128, .stages = 4}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp, .stages = 3}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp, .stages = 4}>(tuning);

  if (tuning.best.empty()) return 1;
  std::printf(
      "\nfor batch %lld, tokens %lld, heads %lld, key_dim %lld, value_dim %lld:\n  "
      "chela::cuda::linear_attention<%s>(args, workspace, stream);\n",
      (long long)batch, (long long)tokens, (long long)heads, (long long)key_dim, (long long)value_dim,
      tuning.best.c_str());
  std::printf("RESULT best_ms=%.4f\n", tuning.best_ms);
}
