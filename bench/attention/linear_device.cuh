#pragma once
// What benchmarks of linear attention on a GPU share: shapes, and the call that is timed.
#include <memory>

#include "chela/cuda/attention/linear_policy.cuh"
#include "chela/cuda/workspace.cuh"
#include "support/device_arrays.cuh"

namespace chela::bench {

inline void linear_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"B", "T", "H", "K", "V"})->UseManualTime()->Unit(benchmark::kMillisecond)->Iterations(15);
  b->Args({8, 2048, 16, 64, 64})->Args({4, 4096, 32, 128, 128})->Args({1, 4096, 32, 128, 128});
  b->Args({1, 131072, 4, 128, 128})->Args({1, 256, 16, 64, 64});
}

/// Times run(args, workspace, stream) over Buffers, which need so many bytes of workspace a call, and have so many bytes of
/// least traffic for each token of a head. right(buffers) judges the results of a call.
template <class Buffers, class WorkspaceBytes, class Run, class Right>
void time_linear(benchmark::State& state, double bytes_per_token, WorkspaceBytes workspace_bytes, Run run,
                 Right right) {
  const Index batch = state.range(0), tokens = state.range(1), heads = state.range(2);
  const auto make = [&](int i) {
    return std::make_unique<Buffers>(10 * i + 1, batch, tokens, heads, state.range(3), state.range(4));
  };
  const test::DeviceMemory scratch(workspace_bytes(make(0)->args()));
  const Stream stream;
  const auto queue = [&](const Buffers& set) {
    return run(set.args(), cuda::Workspace{scratch.data(), scratch.bytes()}, stream);
  };
  const auto judge = [&](const Buffers& set) {
    const Status status = queue(set);
    stream.wait();
    return status.ok() ? require(right(set), Code::bad_value, "wrong answer") : status;
  };
  measure_share_of_copy(state, stream, double(batch * tokens * heads) * bytes_per_token, make, queue, judge);
}

}  // namespace chela::bench
