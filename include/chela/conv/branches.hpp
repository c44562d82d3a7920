#pragma once
// Structural reparameterisation (CHELA, arXiv 2406.08128, section 3.1): parallel depthwise convolutions of one input,
// each optionally followed by a batch norm whose statistics are fixed, are one convolution. With r_b = gain_b /
// sqrt(variance_b + eps), and r_b = 1, mean_b = offset_b = 0 for a branch without a norm:
//
//   y = sum_b [ r_b (k_b * x - mean_b) + offset_b ] = (sum_b r_b pad(k_b)) * x + sum_b (offset_b - r_b mean_b)
//
// Training may run the branches or fold on each step and run the folded kernel; inference folds once. All branches are
// aligned at the newest input: shorter kernels are padded with zeros at the far end. Only linear stages fold: fold each
// side of an activation by itself.
#include <span>

#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

/// One branch. A is the type of parameters: float, or double for a double convolution. The norm's statistics come in
/// pairs; without them there is no norm and no offset.
template <Element A>
struct ConvBranch {
  TensorView<const A, 2> taps = {};      ///< [channel, length]; taps[d, 0] meets the newest input
  TensorView<const A, 1> mean = {};      ///< [channel], or absent together with `variance`
  TensorView<const A, 1> variance = {};  ///< [channel], zero or more
  TensorView<const A, 1> gain = {};      ///< [channel], or absent for 1
  TensorView<const A, 1> offset = {};    ///< [channel], or absent for 0
  A eps = A(1e-5);                       ///< added to the variance
};

template <Element A>
struct FoldBranchesArgs {
  std::span<const ConvBranch<A>> branches = {};
  TensorView<A, 2> taps = {};  ///< [channel, length], as long as the longest branch or longer; every element is written
  TensorView<A, 1> bias = {};  ///< [channel], or absent if no branch has a norm
};

/// Where the gradients of one branch go. Absent outputs are skipped; the statistics are constants.
template <Element A>
struct ConvBranchGradients {
  TensorView<A, 2> taps = {};    ///< like the branch's taps; overwritten
  TensorView<A, 1> gain = {};    ///< [channel], for a branch with a norm
  TensorView<A, 1> offset = {};  ///< [channel], for a branch with a norm
};

template <Element A>
struct FoldBranchesBackwardArgs {
  std::span<const ConvBranch<A>> branches = {};        ///< as in the forward pass
  TensorView<const A, 2> grad_taps = {};               ///< gradient of the folded taps
  TensorView<const A, 1> grad_bias = {};               ///< gradient of the folded bias, or absent for zero
  std::span<const ConvBranchGradients<A>> grads = {};  ///< one for each branch
};

namespace detail {

template <Element A>
constexpr Status check_branch(const ConvBranch<A>& b, Index channels, Index length) {
  const auto fits = [&](TensorView<const A, 1> v) { return !v.present() || has_extents(v, channels); };
  return first_failure(
      require(b.taps.extents[0] == channels && b.taps.extents[1] <= length && readable(b.taps), Code::bad_shape,
              "a branch's taps must be [channel, length] with data and no longer than the folded taps"),
      require(b.mean.present() == b.variance.present(), Code::bad_value,
              "a branch's norm needs mean and variance; give both, or neither for a branch without a norm"),
      require(b.mean.present() || (!b.gain.present() && !b.offset.present()), Code::bad_value,
              "a branch's gain and offset belong to its norm; give mean and variance too"),
      require(fits(b.mean) && fits(b.variance) && fits(b.gain) && fits(b.offset), Code::bad_shape,
              "a branch's mean, variance, gain and offset must be [channel]"));
}

}  // namespace detail

/// Refuses arguments that do not fit together.
template <Element A>
constexpr Status check(const FoldBranchesArgs<A>& a) {
  const Index channels = a.taps.extents[0];
  Status status = first_failure(require(writable(a.taps), Code::bad_shape, "taps needs data and no broadcast axes"),
                                require(!a.bias.present() || (has_extents(a.bias, channels) && writable(a.bias)),
                                        Code::bad_shape, "bias must be [channel] without a broadcast axis, or absent"));
  for (const ConvBranch<A>& b : a.branches)
    status = first_failure(status, detail::check_branch(b, channels, a.taps.extents[1]),
                           require(a.bias.present() || !b.mean.present(), Code::bad_shape,
                                   "bias must be given: a branch with a norm adds to it"));
  return status;
}

template <Element A>
constexpr Status check(const FoldBranchesBackwardArgs<A>& a) {
  const Index channels = a.grad_taps.extents[0];
  Status status = first_failure(
      require(readable(a.grad_taps), Code::bad_shape, "grad_taps needs data and extents of zero or more"),
      require(!a.grad_bias.present() || has_extents(a.grad_bias, channels), Code::bad_shape,
              "grad_bias must be [channel], or absent for zero"),
      require(a.grads.size() == a.branches.size(), Code::bad_shape, "grads must have one entry for each branch"));
  for (std::size_t i = 0; status.ok() && i < a.branches.size(); ++i) {
    const ConvBranch<A>& b = a.branches[i];
    const ConvBranchGradients<A>& g = a.grads[i];
    const auto fits = [&](TensorView<A, 1> v) {
      return !v.present() || (b.mean.present() && has_extents(v, channels) && writable(v));
    };
    status =
        first_failure(detail::check_branch(b, channels, a.grad_taps.extents[1]),
                      require(!g.taps.present() || (same_extents(g.taps, b.taps) && writable(g.taps)), Code::bad_shape,
                              "a branch's taps gradient must have the extents of its taps, without broadcast axes"),
                      require(fits(g.gain) && fits(g.offset), Code::bad_shape,
                              "gradients of gain and offset must be [channel], and only of a branch with a norm"));
  }
  return status;
}

}  // namespace chela
