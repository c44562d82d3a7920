// Finds the policy of linear attention on your GPU for the shape that you work with: times a list of them, each a template
// argument, and prints the best as a line to paste. Add your own to the list in main.
//
//     tune [none | per_token [batch tokens heads key_dim value_dim]]
#include <cuda_bf16.h>

#include <algorithm>
#include <chela/chela.cuh>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using chela::DecayKind;
using chela::Index;
using chela::cuda::Instructions;
using chela::cuda::LinearPolicy;
using Element = __nv_bfloat16;

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ? 77 : 1);  // 77: skipped, to CTest
}

/// Numbers uniform in [low, high).
template <class T>
__global__ void fill(T* data, Index size, unsigned seed, float low, float high) {
  for (Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += Index(gridDim.x) * blockDim.x) {
    unsigned x = (unsigned(i) + seed) * 2654435761u;
    x = (x ^ (x >> 15)) * 2246822519u;
    data[i] = T(low + (high - low) * float(x >> 8) * 0x1p-24f);
  }
}

/// A tensor [batch, token, head, dim] of the device's.
template <class T>
class DeviceTensor {
 public:
  DeviceTensor(Index batch, Index tokens, Index heads, Index dim, unsigned seed, float low = -1, float high = 1) {
    const Index size = batch * tokens * heads * dim;
    T* data = nullptr;
    require(cudaMalloc(&data, std::size_t(size) * sizeof(T)));
    memory_.reset(data);
    view_ = chela::contiguous(data, batch, tokens, heads, dim);
    fill<<<1024, 256>>>(data, size, seed, low, high);
    require(cudaGetLastError());
  }
  chela::TensorView<T, 4> view() const { return view_; }

 private:
  struct Free {
    void operator()(T* data) const { cudaFree(data); }
  };
  std::unique_ptr<T, Free> memory_;
  chela::TensorView<T, 4> view_;
};

template <DecayKind D>
struct Problem {
  DeviceTensor<Element> q, k, v, o;
  DeviceTensor<float> log_decay;

  Problem(Index batch, Index tokens, Index heads, Index key_dim, Index value_dim)
      : q(batch, tokens, heads, key_dim, 1),
        k(batch, tokens, heads, key_dim, 2),
        v(batch, tokens, heads, value_dim, 3),
        o(batch, tokens, heads, value_dim, 4),
        log_decay(batch, tokens, heads, 1, 5, -0.2f, 0) {}

  chela::LinearAttentionArgs<Element, D> args() const {
    chela::LinearAttentionArgs<Element, D> args{.q = q.view(), .k = k.view(), .v = v.view(), .o = o.view()};
    if constexpr (D == DecayKind::per_token) args.log_decay = chela::slice_axis<3>(log_decay.view(), 0);
    return args;
  }
};

template <DecayKind D>
struct Tuning {
  std::vector<Problem<D>> problems;  ///< taken in turn, so that none finds its inputs in the second-level cache
  double traffic = 0;                ///< bytes of one call
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
template <LinearPolicy policy, DecayKind D>
void measure(Tuning<D>& tuning) {
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
    for (const Problem<D>& problem : tuning.problems)
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

/// What the command line asks for, as numbers.
struct Shape {
  Index batch = 4, tokens = 4096, heads = 32, key_dim = 128, value_dim = 128;
};

template <DecayKind D>
int tune(const Shape& s, const char* decay) {
  Tuning<D> tuning;
  const double row = 2.0 * double(2 * s.key_dim + 2 * s.value_dim) + (D == DecayKind::none ? 0 : sizeof(float));
  tuning.traffic = double(s.batch * s.tokens * s.heads) * row;
  const int rotated = int(std::clamp(3e8 / tuning.traffic, 2.0, 32.0));
  for (int i = 0; i < rotated; ++i) tuning.problems.emplace_back(s.batch, s.tokens, s.heads, s.key_dim, s.value_dim);

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
  measure<LinearPolicy{.value_tile = 128, .stages = 3, .segments = 2}>(tuning);
  measure<LinearPolicy{.value_tile = 128, .stages = 3, .segments = 4}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp, .stages = 3}>(tuning);
  measure<LinearPolicy{.instructions = Instructions::warp, .stages = 4}>(tuning);

  if (tuning.best.empty()) return 1;
  std::printf("\nfor decay %s, batch %lld, tokens %lld, heads %lld, key_dim %lld, value_dim %lld:\n", decay,
              (long long)s.batch, (long long)s.tokens, (long long)s.heads, (long long)s.key_dim,
              (long long)s.value_dim);
  std::printf("  chela::cuda::linear_attention<%s>(args, workspace, stream);\n", tuning.best.c_str());
  std::printf("RESULT best_ms=%.4f\n", tuning.best_ms);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char* const decay = argc > 1 ? argv[1] : "none";
  const bool per_token = std::strcmp(decay, "per_token") == 0;
  if ((argc > 2 && argc != 7) || (!per_token && std::strcmp(decay, "none") != 0)) {
    std::fprintf(stderr, "usage: tune [none | per_token [batch tokens heads key_dim value_dim]]\n");
    return 2;
  }
  Shape shape;
  Index* const sizes[] = {&shape.batch, &shape.tokens, &shape.heads, &shape.key_dim, &shape.value_dim};
  for (int i = 2; i < argc; ++i)
    if ((*sizes[i - 2] = std::atoll(argv[i])) < 1) {
      std::fprintf(stderr, "%s: sizes are 1 or more\n", argv[i]);
      return 2;
    }
  return per_token ? tune<DecayKind::per_token>(shape, decay) : tune<DecayKind::none>(shape, decay);
}
