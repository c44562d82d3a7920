#pragma once
// Random arrays on the device, and parts of them in double on the host.
#include <cmath>
#include <vector>

#include "support/device.cuh"
#include "support/measure_device.cuh"

namespace chela::bench {

template <class T, class... I>
struct Array {
  DeviceMemory memory;
  TensorView<T, sizeof...(I)> view;

  Array(std::uint32_t seed, float low, float high, I... extents)
      : memory(std::size_t((Index(1) * ... * extents)) * sizeof(T)),
        view(contiguous(static_cast<T*>(memory.data()), extents...)) {
    fill_uniform<<<1024, 256>>>(view.data, view.size(), seed, low, high);
    require_cuda(cudaGetLastError());
  }
  std::vector<T> on_host() const {
    std::vector<T> copy(memory.bytes() / sizeof(T));
    require_cuda(cudaMemcpy(copy.data(), memory.data(), memory.bytes(), cudaMemcpyDeviceToHost));
    return copy;
  }
};

/// Some columns of one batch entry and head.
template <class T>
Tensor<double, 4> head_of(const std::vector<T>& all, TensorView<T, 4> view, Index batch, Index head, Index column,
                          Index columns) {
  view.data = const_cast<T*>(all.data());
  return test::converted<double>(run(run(run(view, 0, batch, 1), 2, head, 1), 3, column, columns));
}

}  // namespace chela::bench
