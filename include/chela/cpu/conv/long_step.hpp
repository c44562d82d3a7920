#pragma once
// One token of the long convolution per sequence: the sum over the ring of earlier inputs, L multiply-adds per channel.
#include "chela/conv/long.hpp"
#include "chela/core/executor.hpp"
#include "chela/cpu/conv/channel_group.hpp"

namespace chela::cpu {

namespace detail {

/// Taps that are held as packets of channels while the sequences of the batch meet them.
inline constexpr Index step_taps = 64;

/// sum += taps[j] * ring row of the token j before `position`, for `count` taps from `begin` on. `row(slot)` is one
/// packet of the ring. Four sums, as each multiply-add waits for the one before.
template <class A, class Row>
LanePacket<A> step_dot(const A* taps, Index begin, Index count, Index position, Index ring, const Row& row,
                       const LanePacket<A>& start) {
  using namespace Eigen::internal;
  const LanePacket<A> zero = pset1<LanePacket<A>>(A(0));
  LanePacket<A> sums[4] = {start, zero, zero, zero};
  Index slot = (position - begin) % ring;
  const auto add = [&](LanePacket<A>& sum, Index j) {
    sum = pmadd(ploadu<LanePacket<A>>(taps + j * lanes_of<A>), row(slot), sum);
    slot = slot == 0 ? ring - 1 : slot - 1;
  };
  Index j = 0;
  for (; j + 4 <= count; j += 4) {
    CHELA_UNROLL
    for (int i = 0; i < 4; ++i) add(sums[i], j + i);
  }
  for (; j < count; ++j) add(sums[0], j);
  return padd(padd(sums[0], sums[1]), padd(sums[2], sums[3]));
}

template <class T>
void long_conv_step_group(const LongConvStepArgs<T>& a, ChannelGroup group) {
  using A = Accumulator<T>;
  constexpr int lanes = lanes_of<A>;
  constexpr Index sequences = 8;  // whose sums are kept while the taps go by
  const Index batch = a.x.extents[0], ring = a.ring.extents[1];
  const Index met = std::min(a.taps.extents[1], a.position + 1);
  const bool packets = group.lanes == lanes && a.ring.strides[2] == 1;
  A taps[step_taps * lanes], sums[sequences * lanes];
  for (Index b0 = 0; b0 < batch; b0 += sequences) {
    const Index b1 = std::min(batch, b0 + sequences);
    for (Index b = b0; b < b1; ++b)
      for (int lane = 0; lane < lanes; ++lane) {
        const Index d = group.first + lane;
        const bool used = lane < group.lanes;
        if (used) a.ring(b, a.position % ring, d) = a.x(b, d);
        sums[(b - b0) * lanes + lane] = used && a.skip.present() ? a.skip(d) * static_cast<A>(a.x(b, d)) : A(0);
      }
    for (Index begin = 0; begin < met; begin += step_taps) {
      const Index count = std::min(step_taps, met - begin);
      gather_group<A>(run(transposed(a.taps, 0, 1), 0, begin, count), group, taps, lanes);
      for (Index b = b0; b < b1; ++b) {
        const T* rows = a.ring.data + b * a.ring.strides[0] + group.first * a.ring.strides[2];
        A* sum = sums + (b - b0) * lanes;
        const auto start = Eigen::internal::ploadu<LanePacket<A>>(sum);
        const auto contiguous_row = [&](Index slot) {
          return load_lanes<LanePacket<A>>(rows + slot * a.ring.strides[1]);
        };
        const auto any_row = [&](Index slot) {
          A values[lanes] = {};
          for (int lane = 0; lane < group.lanes; ++lane)
            values[lane] = static_cast<A>(rows[slot * a.ring.strides[1] + lane * a.ring.strides[2]]);
          return Eigen::internal::ploadu<LanePacket<A>>(values);
        };
        const LanePacket<A> total = packets ? step_dot(taps, begin, count, a.position, ring, contiguous_row, start)
                                            : step_dot(taps, begin, count, a.position, ring, any_row, start);
        Eigen::internal::pstoreu(sum, total);
      }
    }
    for (Index b = b0; b < b1; ++b)
      for (int lane = 0; lane < group.lanes; ++lane)
        a.y(b, group.first + lane) = static_cast<T>(sums[(b - b0) * lanes + lane]);
  }
}

}  // namespace detail

/// y for one token per sequence; the token enters the ring. The caller counts `position` on.
template <Element T, Executor E = DefaultExecutor>
Status long_conv_step(const LongConvStepArgs<T>& a, const E& executor = {}) {
  if (Status s = check(a); !s.ok()) return s;
  const Index channels = a.x.extents[1];
  executor.for_each(detail::channel_groups<Accumulator<T>>(channels), [&](Index g, int) {
    detail::long_conv_step_group(a, detail::channel_group<Accumulator<T>>(g, channels));
  });
  return {};
}

}  // namespace chela::cpu
