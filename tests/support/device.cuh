#pragma once
// Tensors in device memory, between guard zones that show a write outside of them.
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "chela/cuda/element.cuh"
#include "support/tensors.hpp"

namespace chela::test {

inline void require_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

/// Device memory, released at the end.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) { require_cuda(cudaMalloc(&data_, bytes ? bytes : 1)); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(data_); }

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

/// A copy of a host tensor on the device.
template <class T, int Rank>
class DeviceTensor {
 public:
  explicit DeviceTensor(const Tensor<T, Rank>& host)
      : extents_(host.extents()), bytes_(std::size_t(host.size()) * sizeof(T)), memory_(bytes_ + 2 * guard) {
    std::vector<char> filled(bytes_ + 2 * guard, pattern);
    if (bytes_) std::memcpy(filled.data() + guard, host.data(), bytes_);
    require_cuda(cudaMemcpy(memory_.data(), filled.data(), filled.size(), cudaMemcpyHostToDevice));
    require_cuda(cudaDeviceSynchronize());  // a small copy may return while it is still under way
  }

  TensorView<T, Rank> view() const {
    TensorView<T, Rank> view{reinterpret_cast<T*>(static_cast<char*>(memory_.data()) + guard)};
    Index stride = 1;
    for (int a = Rank - 1; a >= 0; --a) {
      view.extents[a] = extents_[std::size_t(a)], view.strides[a] = stride;
      stride *= view.extents[a];
    }
    return view;
  }
  operator TensorView<T, Rank>() const { return view(); }
  operator TensorView<const T, Rank>() const { return view(); }

  /// Waits for the device.
  Tensor<T, Rank> host() const {
    Tensor<T, Rank> copy(extents_);
    const std::vector<char> all = bytes();
    if (bytes_) std::memcpy(static_cast<void*>(copy.data()), all.data() + guard, bytes_);
    return copy;
  }
  bool guards_intact() const {
    const std::vector<char> all = bytes();
    for (std::size_t i = 0; i < guard; ++i)
      if (all[i] != pattern || all[guard + bytes_ + i] != pattern) return false;
    return true;
  }

 private:
  static constexpr std::size_t guard = 4096;
  static constexpr char pattern = 0x5a;
  std::vector<char> bytes() const {
    std::vector<char> all(bytes_ + 2 * guard);
    require_cuda(cudaMemcpy(all.data(), memory_.data(), all.size(), cudaMemcpyDeviceToHost));
    return all;
  }

  std::array<Index, Rank> extents_;
  std::size_t bytes_;
  DeviceMemory memory_;
};

/// Bit for bit, NaN included: what was left unwritten in both is the same.
template <class T, int Rank>
bool same_bits(const Tensor<T, Rank>& a, const Tensor<T, Rank>& b) {
  return a.extents() == b.extents() && std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T)) == 0;
}

/// A stream, destroyed at the end.
class Stream {
 public:
  Stream() { require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }

  operator cudaStream_t() const { return stream_; }
  void wait() const { require_cuda(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What queue() queues on a stream, as a graph.
class Graph {
 public:
  template <class F>
  Graph(const Stream& stream, const F& queue) : stream_(stream) {
    require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    queue();
    cudaGraph_t graph = nullptr;
    require_cuda(cudaStreamEndCapture(stream, &graph));
    require_cuda(cudaGraphInstantiate(&executable_, graph, 0));
    cudaGraphDestroy(graph);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(executable_); }

  void launch() const { require_cuda(cudaGraphLaunch(executable_, stream_)); }

 private:
  const Stream& stream_;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace chela::test
