#pragma once
// Everything for NVIDIA GPUs: the contracts, and the CUDA backend in chela::cuda. For files that nvcc compiles; no
// Eigen.

#include "chela/attention/linear.hpp"
#include "chela/conv/kernels.hpp"
#include "chela/conv/long.hpp"
#include "chela/core/element.hpp"
#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/core/index_view.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cuda/attention/linear.cuh"
#include "chela/cuda/attention/linear_backward.cuh"
#include "chela/cuda/attention/linear_step.cuh"
#include "chela/cuda/conv/kernels.cuh"
#include "chela/cuda/conv/long.cuh"
#include "chela/cuda/conv/long_backward.cuh"
#include "chela/cuda/element.cuh"
#include "chela/cuda/status.cuh"
#include "chela/cuda/workspace.cuh"
