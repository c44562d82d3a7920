#pragma once
// Everything for the CPU: the contracts, and the Eigen backend in chela::cpu.

#include "chela/attention/linear.hpp"
#include "chela/block/parameters.hpp"
#include "chela/conv/long.hpp"
#include "chela/conv/short.hpp"
#include "chela/core/element.hpp"
#include "chela/core/executor.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cpu/adaptors.hpp"
#include "chela/cpu/element.hpp"
