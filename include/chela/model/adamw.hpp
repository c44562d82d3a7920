#pragma once
// Adam with decoupled weight decay (Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101) on
// flat buffers, at step t = 1, 2, ... with learning rate r and gradients s g, s the clipping factor:
//
//   m <- b1 m + (1 - b1) s g        v <- b2 v + (1 - b2) (s g)^2
//   p <- p - r [ (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay p ]
//
// The term `decay p` applies to the parameters that say so (ParameterInfo::decays).
#include <algorithm>
#include <cmath>
#include <vector>

#include "chela/block/parameters.hpp"
#include "chela/core/element.hpp"
#include "chela/core/status.hpp"
#include "chela/core/tensor_view.hpp"

namespace chela {

struct AdamWSettings {
  double first_decay = 0.9;    ///< b1, in [0, 1)
  double second_decay = 0.98;  ///< b2, in [0, 1)
  double epsilon = 1e-8;       ///< eps > 0
  double weight_decay = 0.1;   ///< decay >= 0, times the learning rate
  double largest_norm = 1;     ///< gradients of a larger Euclidean norm are scaled down to it; infinity switches it off
};

/// A run of the flat buffer in which all parameters are treated alike by weight decay.
struct DecayRange {
  Index begin = 0, end = 0;
  bool decays = false;
  friend bool operator==(const DecayRange&, const DecayRange&) = default;
};

/// The fewest ranges that cover parameters laid out as by describe_parameters.
inline std::vector<DecayRange> decay_ranges(const std::vector<ParameterInfo>& infos) {
  std::vector<DecayRange> ranges;
  for (const ParameterInfo& info : infos) {
    if (info.count() == 0) continue;
    if (!ranges.empty() && ranges.back().decays == info.decays && ranges.back().end == info.offset)
      ranges.back().end += info.count();
    else
      ranges.push_back({info.offset, info.offset + info.count(), info.decays});
  }
  return ranges;
}

/// One update. The four buffers are [parameters], unit stride, laid out alike.
template <Element T>
struct AdamWArgs {
  TensorView<T, 1> parameters;
  TensorView<const T, 1> gradients;
  TensorView<T, 1> first_moment, second_moment;     ///< zero before the first step
  const std::vector<DecayRange>* ranges = nullptr;  ///< cover the buffer in order; null: everything decays
  Index step = 1;                                   ///< t, from 1
  double learning_rate = 1e-3;
  AdamWSettings settings = {};
};

/// The factor that brings gradients of this norm down to the largest one allowed; 1 for smaller ones.
inline double clipping_factor(double norm, double largest_norm) {
  return norm > largest_norm ? largest_norm / norm : 1;
}

namespace detail {
inline bool cover(const std::vector<DecayRange>& ranges, Index count) {
  Index reached = 0;
  for (const DecayRange& range : ranges) {
    if (range.begin != reached || range.end < range.begin) return false;
    reached = range.end;
  }
  return reached == count;
}
}  // namespace detail

template <Element T>
Status check(const AdamWArgs<T>& args) {
  const Index count = args.parameters.extents[0];
  const AdamWSettings& s = args.settings;
  const auto is_share = [](double x) { return x >= 0 && x < 1; };
  return first_failure(require(args.gradients.extents[0] == count && args.first_moment.extents[0] == count &&
                                   args.second_moment.extents[0] == count,
                               Code::bad_shape, "gradients and both moments must be as long as parameters"),
                       require(count <= 1 || (args.parameters.strides[0] == 1 && args.gradients.strides[0] == 1 &&
                                              args.first_moment.strides[0] == 1 && args.second_moment.strides[0] == 1),
                               Code::bad_stride, "parameters, gradients and moments must have stride 1"),
                       require(args.ranges == nullptr || detail::cover(*args.ranges, count), Code::bad_value,
                               "ranges must cover the parameters in order, without gaps; take them from decay_ranges"),
                       require(args.step >= 1, Code::bad_value, "step counts from 1"),
                       require(is_share(s.first_decay) && is_share(s.second_decay), Code::bad_value,
                               "first_decay and second_decay must lie in [0, 1)"),
                       require(s.epsilon > 0 && s.weight_decay >= 0 && s.largest_norm > 0, Code::bad_value,
                               "epsilon and largest_norm must be positive, weight_decay not negative"),
                       require(args.learning_rate >= 0 && std::isfinite(args.learning_rate), Code::bad_value,
                               "learning_rate must be finite and not negative"));
}

}  // namespace chela
