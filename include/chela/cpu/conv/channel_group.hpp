#pragma once
// Moves one packet of channels between the caller's arrays, of any element type and strides, and points of the transform.
#include <algorithm>
#include <memory>
#include <new>

#include "chela/core/tensor_view.hpp"
#include "chela/cpu/conv/complex_lanes.hpp"

namespace chela::cpu::detail {

/// Uninitialised memory, aligned to a cache line.
template <class A>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(Index size)
      : memory_(size > 0 ? static_cast<A*>(::operator new(sizeof(A) * std::size_t(size), alignment)) : nullptr) {}

  A* data() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(A* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<A, Free> memory_;
};

/// Neighbouring channels that share a packet; the last group of a row may have fewer than a packet's.
struct ChannelGroup {
  Index first = 0;
  int lanes = 0;
};

template <class A>
constexpr Index channel_groups(Index channels) {
  return ceil_div(channels, lanes_of<A>);
}

template <class A>
constexpr ChannelGroup channel_group(Index group, Index channels) {
  const Index first = group * lanes_of<A>;
  return {first, int(std::min<Index>(lanes_of<A>, channels - first))};
}

/// Whether the transform can read or write these rows, [row, channel], where they are.
template <class A, class T>
constexpr bool rows_are_packets(TensorView<T, 2> rows, ChannelGroup group) {
  return std::is_same_v<std::remove_const_t<T>, A> && group.lanes == lanes_of<A> && rows.strides[1] == 1 &&
         rows.present();
}

/// A square of packets P whose rows are `from_stride` apart, transposed into rows `to_stride` apart.
template <class P>
CHELA_ALWAYS_INLINE void transpose_square(const LaneScalar<P>* from, Index from_stride, LaneScalar<P>* to,
                                          Index to_stride) {
  constexpr int lanes = lane_count<P>;
  Eigen::internal::PacketBlock<P, lanes> square;
  CHELA_UNROLL
  for (int i = 0; i < lanes; ++i) square.packet[i] = Eigen::internal::ploadu<P>(from + i * from_stride);
  Eigen::internal::ptranspose(square);
  CHELA_UNROLL
  for (int i = 0; i < lanes; ++i) Eigen::internal::pstoreu(to + i * to_stride, square.packet[i]);
}

/// Elements of a cache line. Runs are often a power of two apart and share a few places of the nearest cache, so a line is used
/// up before the next one is asked for.
template <class A>
inline constexpr Index line_of = 64 / Index(sizeof(A));

/// `lanes_of<A>` runs of `count` elements, `from_stride` apart, become packets `to_stride` apart. Returns how many: the last
/// few are left to the caller. Squares have at most four lanes, which fit the registers of any machine.
template <class A, class P = LanePacket<A>>
Index interleave_runs(const A* from, Index from_stride, Index count, A* to, Index to_stride) {
  constexpr int side = lane_count<P>;
  if constexpr (side > 4) {
    return interleave_runs<A, typename Eigen::internal::unpacket_traits<P>::half>(from, from_stride, count, to,
                                                                                  to_stride);
  } else {
    const Index whole = count / side * side;
    for (Index begin = 0; begin < whole; begin += line_of<A>)
      for (int lane = 0; lane < lanes_of<A>; lane += side)
        for (Index r = begin; r < std::min(whole, begin + line_of<A>); r += side)
          transpose_square<P>(from + lane * from_stride + r, from_stride, to + r * to_stride + lane, to_stride);
    return whole;
  }
}

/// The way back: packets `from_stride` apart become runs `to_stride` apart.
template <class A, class P = LanePacket<A>>
Index separate_runs(const A* from, Index from_stride, Index count, A* to, Index to_stride) {
  constexpr int side = lane_count<P>;
  if constexpr (side > 4) {
    return separate_runs<A, typename Eigen::internal::unpacket_traits<P>::half>(from, from_stride, count, to,
                                                                                to_stride);
  } else {
    const Index whole = count / side * side;
    for (Index begin = 0; begin < whole; begin += line_of<A>)
      for (int lane = 0; lane < lanes_of<A>; lane += side)
        for (Index r = begin; r < std::min(whole, begin + line_of<A>); r += side)
          transpose_square<P>(from + r * from_stride + lane, from_stride, to + lane * to_stride + r, to_stride);
    return whole;
  }
}

/// Copies a group's channels of `rows`, [row, channel], to packets `to_stride` elements apart. Lanes without a channel get 0.
template <class A, class T>
void gather_group(TensorView<T, 2> rows, ChannelGroup group, A* to, Index to_stride) {
  constexpr int lanes = lanes_of<A>;
  const Index count = rows.extents[0], row_stride = rows.strides[0], lane_stride = rows.strides[1];
  if (count == 0) return;
  auto* from = rows.data + group.first * lane_stride;
  Index r = 0;
  if (group.lanes == lanes && lane_stride == 1) {
    for (; r < count; ++r)
      Eigen::internal::pstoreu(to + r * to_stride, load_lanes<LanePacket<A>>(from + r * row_stride));
    return;
  }
  if constexpr (std::is_same_v<std::remove_const_t<T>, A>) {
    if (group.lanes == lanes && row_stride == 1) r = interleave_runs<A>(from, lane_stride, count, to, to_stride);
  }
  for (; r < count; ++r)
    for (int lane = 0; lane < lanes; ++lane)
      to[r * to_stride + lane] = lane < group.lanes ? static_cast<A>(from[r * row_stride + lane * lane_stride]) : A(0);
}

/// The way back: `rows` get the packets.
template <class A, class T>
void scatter_group(const A* from, Index from_stride, TensorView<T, 2> rows, ChannelGroup group) {
  constexpr int lanes = lanes_of<A>;
  const Index count = rows.extents[0], row_stride = rows.strides[0], lane_stride = rows.strides[1];
  if (count == 0) return;
  T* to = rows.data + group.first * lane_stride;
  Index r = 0;
  if (group.lanes == lanes && lane_stride == 1) {
    for (; r < count; ++r)
      store_lanes(to + r * row_stride, Eigen::internal::ploadu<LanePacket<A>>(from + r * from_stride));
    return;
  }
  if constexpr (std::is_same_v<T, A>) {
    if (group.lanes == lanes && row_stride == 1) r = separate_runs<A>(from, from_stride, count, to, lane_stride);
  }
  for (; r < count; ++r)
    for (int lane = 0; lane < group.lanes; ++lane)
      to[r * row_stride + lane * lane_stride] = static_cast<T>(from[r * from_stride + lane]);
}

/// Multiplies the first packet of each of `count` points by `factor`.
template <class A>
void scale_packets(A* points, Index count, A factor) {
  const LanePacket<A> f = Eigen::internal::pset1<LanePacket<A>>(factor);
  for (A* p = points; count > 0; --count, p += point_size<A>)
    Eigen::internal::pstoreu(p, Eigen::internal::pmul(Eigen::internal::ploadu<LanePacket<A>>(p), f));
}

template <class A>
void zero_packets(A* points, Index count) {
  for (A* p = points; count > 0; --count, p += point_size<A>) std::fill_n(p, lanes_of<A>, A(0));
}

}  // namespace chela::cpu::detail
