#pragma once
// AdamW on the CPU: a pass for the norm of the gradients, a pass for the update, both in blocks of a fixed size, so that the
// numbers depend neither on the number of workers nor on where the buffers lie.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <vector>

#include "chela/core/executor.hpp"
#include "chela/model/adamw.hpp"

namespace chela::cpu {

namespace detail {

inline constexpr Index adamw_block = 4096;  // elements; five such float buffers stay in the second-level cache

/// The numbers of one update, the same for every element.
template <class T>
struct AdamWFactors {
  T clip, keep_first, take_first, keep_second, take_second, first_correction, second_correction, epsilon, rate;
};

/// Rounded correctly in every lane, which Eigen's packet square root is not; it is also free of the compilers' warnings.
template <class T, class Packet>
CHELA_ALWAYS_INLINE Packet square_root(const Packet& x) {
  T lanes[Eigen::internal::packet_traits<T>::size];
  Eigen::internal::pstoreu(lanes, x);
  for (T& lane : lanes) lane = std::sqrt(lane);
  return Eigen::internal::ploadu<Packet>(lanes);
}

/// One packet of the update; `shrink` is rate * decay.
template <class Packet, class T>
void adamw_packet(const AdamWFactors<T>& f, T shrink, T* p, const T* g, T* m, T* v) {
  using namespace Eigen::internal;
  const Packet parameter = ploadu<Packet>(p);
  const Packet gradient = pmul(pset1<Packet>(f.clip), ploadu<Packet>(g));
  const Packet first =
      pmadd(pset1<Packet>(f.keep_first), ploadu<Packet>(m), pmul(pset1<Packet>(f.take_first), gradient));
  const Packet second = pmadd(pset1<Packet>(f.keep_second), ploadu<Packet>(v),
                              pmul(pset1<Packet>(f.take_second), pmul(gradient, gradient)));
  const Packet root = padd(square_root<T>(pmul(second, pset1<Packet>(f.second_correction))), pset1<Packet>(f.epsilon));
  const Packet direction = pdiv(pmul(first, pset1<Packet>(f.first_correction)), root);
  const Packet shrunk = psub(parameter, pmul(pset1<Packet>(shrink), parameter));
  pstoreu(p, psub(shrunk, pmul(pset1<Packet>(f.rate), direction)));
  pstoreu(m, first);
  pstoreu(v, second);
}

/// A run of elements. The tail goes through a padded packet, so that every element is rounded alike.
template <class T>
void adamw_run(const AdamWFactors<T>& f, T shrink, Index count, T* p, const T* g, T* m, T* v) {
  using Packet = typename Eigen::internal::packet_traits<T>::type;
  constexpr Index lanes = Index(Eigen::internal::packet_traits<T>::size);
  Index i = 0;
  for (; i + lanes <= count; i += lanes) adamw_packet<Packet>(f, shrink, p + i, g + i, m + i, v + i);
  if (const Index left = count - i; left > 0) {
    T padded[4][lanes] = {};
    const auto copy_in = [&](int row, const T* from) { std::copy_n(from + i, left, padded[row]); };
    copy_in(0, p), copy_in(1, g), copy_in(2, m), copy_in(3, v);
    adamw_packet<Packet>(f, shrink, padded[0], padded[1], padded[2], padded[3]);
    std::copy_n(padded[0], left, p + i);
    std::copy_n(padded[2], left, m + i);
    std::copy_n(padded[3], left, v + i);
  }
}

}  // namespace detail

/// Sum of squares over a flat buffer of unit stride, in double, always added in the same order. NaN or infinite elements
/// give a sum that is not finite.
template <Element T, Executor E>
double squared_norm(TensorView<const T, 1> values, const E& executor) {
  constexpr Index block = detail::adamw_block, lanes = 16;
  std::vector<double> partial(std::size_t(ceil_div(values.extents[0], block)));
  executor.for_each(Index(partial.size()), [&](Index task, int) {
    const T* from = values.data + task * block;
    const Index count = std::min(block, values.extents[0] - task * block);
    double sums[lanes] = {};  // lane i sums elements i, i + lanes, ...: fixed, and wide enough for any vector unit
    Index i = 0;
    for (; i + lanes <= count; i += lanes)
      for (Index lane = 0; lane < lanes; ++lane) sums[lane] += double(from[i + lane]) * double(from[i + lane]);
    for (Index lane = 0; i < count; ++i, ++lane) sums[lane] += double(from[i]) * double(from[i]);
    double sum = 0;
    for (const double lane : sums) sum += lane;
    partial[std::size_t(task)] = sum;
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

/// Scales the gradients down to settings.largest_norm, and updates parameters and moments. With gradients whose norm is not
/// finite nothing is written and bad_value is returned. `norm`, if given, receives the norm before clipping.
template <Element T, Executor E>
Status adamw(const AdamWArgs<T>& args, const E& executor, double* norm = nullptr) {
  if (Status s = check(args); !s.ok()) return s;
  const double found = std::sqrt(squared_norm(args.gradients, executor));
  if (norm) *norm = found;
  if (!std::isfinite(found))
    return {Code::bad_value, "gradients hold a number that is not finite; nothing was updated"};

  const AdamWSettings& s = args.settings;
  const double t = double(args.step);
  const detail::AdamWFactors<T> factors{.clip = T(clipping_factor(found, s.largest_norm)),
                                        .keep_first = T(s.first_decay),
                                        .take_first = T(1 - s.first_decay),
                                        .keep_second = T(s.second_decay),
                                        .take_second = T(1 - s.second_decay),
                                        .first_correction = T(1 / (1 - std::pow(s.first_decay, t))),
                                        .second_correction = T(1 / (1 - std::pow(s.second_decay, t))),
                                        .epsilon = T(s.epsilon),
                                        .rate = T(args.learning_rate)};
  const Index count = args.parameters.extents[0];
  const std::vector<DecayRange> everything{{0, count, true}};
  const std::vector<DecayRange>& ranges = args.ranges ? *args.ranges : everything;
  executor.for_each(ceil_div(count, detail::adamw_block), [&](Index task, int) {
    const Index begin = task * detail::adamw_block, end = std::min(begin + detail::adamw_block, count);
    for (const DecayRange& range : ranges) {
      const Index from = std::max(begin, range.begin), to = std::min(end, range.end);
      if (from >= to) continue;
      detail::adamw_run(factors, range.decays ? T(args.learning_rate * s.weight_decay) : T(0), to - from,
                        args.parameters.data + from, args.gradients.data + from, args.first_moment.data + from,
                        args.second_moment.data + from);
    }
  });
  return {};
}

}  // namespace chela::cpu
