#pragma once
// Every reference: one plain loop per operator, in double, to compare other implementations with.

#include "chela/reference/block.hpp"
#include "chela/reference/branches.hpp"
#include "chela/reference/gates.hpp"
#include "chela/reference/kernels.hpp"
#include "chela/reference/l2_norm.hpp"
#include "chela/reference/linear.hpp"
#include "chela/reference/long.hpp"
#include "chela/reference/short.hpp"
#include "chela/reference/short_long.hpp"
