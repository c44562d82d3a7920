#pragma once
// Moves one packet of channels between the caller's arrays, of any element type and strides, and points of the
// transform.
#include <algorithm>
#include <memory>
#include <new>

#include "chela/core/large_pages.hpp"
#include "chela/core/tensor_view.hpp"
#include "chela/cpu/conv/complex_lanes.hpp"

namespace chela::cpu::detail {

/// Uninitialised memory, aligned to a cache line, or where it is large to large pages: the passes of a transform walk
/// points that lie far apart.
template <class A>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(Index size) {
    const std::size_t bytes = sizeof(A) * std::size_t(size), line = 64, large_page = std::size_t(1) << 21;
    if (bytes == 0) return;
    const std::align_val_t alignment{bytes >= large_page ? large_page : line};
    memory_ = {static_cast<A*>(::operator new(bytes, alignment)), Free{alignment}};
    chela::detail::prefer_large_pages(memory_.get(), bytes);
  }

  A* data() const { return memory_.get(); }

 private:
  struct Free {
    std::align_val_t alignment{};
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

/// Elements of a cache line. Runs are often a power of two apart and share a few places of the nearest cache, so a line
/// is used up before the next one is asked for.
template <class A>
inline constexpr Index line_of = 64 / Index(sizeof(A));

/// Which way channels move: from the caller's rows to packets, or back.
enum class Move { gather, scatter };

/// `lanes_of<A>` runs of `count` elements, `run_stride` apart, become packets `packet_stride` apart, or the other way
/// round. Returns how many: the last few are left to the caller. Squares have at most four lanes, which fit the
/// registers of any machine.
template <Move M, class A, class P = LanePacket<A>, class Run, class Packet>
Index move_runs(Run* runs, Index run_stride, Index count, Packet* packets, Index packet_stride) {
  constexpr int side = lane_count<P>;
  if constexpr (side > 4) {
    return move_runs<M, A, typename Eigen::internal::unpacket_traits<P>::half>(runs, run_stride, count, packets,
                                                                               packet_stride);
  } else {
    const Index whole = count / side * side;
    for (Index begin = 0; begin < whole; begin += line_of<A>)
      for (int lane = 0; lane < lanes_of<A>; lane += side)
        for (Index r = begin; r < std::min(whole, begin + line_of<A>); r += side) {
          auto* run = runs + lane * run_stride + r;
          auto* packet = packets + r * packet_stride + lane;
          if constexpr (M == Move::gather)
            transpose_square<P>(run, run_stride, packet, packet_stride);
          else
            transpose_square<P>(packet, packet_stride, run, run_stride);
        }
    return whole;
  }
}

/// Moves a group's channels between `rows`, [row, channel], and packets `stride` elements apart.
template <Move M, class A, class T, class Packet>
void move_group(TensorView<T, 2> rows, ChannelGroup group, Packet* packets, Index stride) {
  constexpr int lanes = lanes_of<A>;
  const Index count = rows.extents[0], row_stride = rows.strides[0], lane_stride = rows.strides[1];
  if (count == 0) return;
  T* first = rows.data + group.first * lane_stride;
  Index r = 0;
  if (group.lanes == lanes && lane_stride == 1) {
    for (; r < count; ++r) {
      if constexpr (M == Move::gather)
        Eigen::internal::pstoreu(packets + r * stride, load_lanes<LanePacket<A>>(first + r * row_stride));
      else
        store_lanes(first + r * row_stride, Eigen::internal::ploadu<LanePacket<A>>(packets + r * stride));
    }
    return;
  }
  if constexpr (std::is_same_v<std::remove_const_t<T>, A>) {
    if (group.lanes == lanes && row_stride == 1) r = move_runs<M, A>(first, lane_stride, count, packets, stride);
  }
  for (; r < count; ++r)
    for (int lane = 0; lane < lanes; ++lane) {
      T* at = first + r * row_stride + lane * lane_stride;
      auto& packet_lane = packets[r * stride + lane];
      if constexpr (M == Move::gather)
        packet_lane = lane < group.lanes ? static_cast<A>(*at) : A(0);
      else if (lane < group.lanes)
        *at = static_cast<T>(packet_lane);
    }
}

/// Copies a group's channels of `rows` to packets. Lanes without a channel get 0.
template <class A, class T>
void gather_group(TensorView<T, 2> rows, ChannelGroup group, A* to, Index to_stride) {
  move_group<Move::gather, A>(rows, group, to, to_stride);
}

/// The way back: `rows` get the packets.
template <class A, class T>
void scatter_group(const A* from, Index from_stride, TensorView<T, 2> rows, ChannelGroup group) {
  move_group<Move::scatter, A>(rows, group, from, from_stride);
}

/// packets += factor * rows, packets `stride` elements apart.
template <class A, class T>
void add_group(TensorView<T, 2> rows, ChannelGroup group, A factor, A* packets, Index stride) {
  using namespace Eigen::internal;
  constexpr int lanes = lanes_of<A>;
  constexpr Index tile = 32;
  A values[tile * lanes];
  const LanePacket<A> f = pset1<LanePacket<A>>(factor);
  for (Index begin = 0; begin < rows.extents[0]; begin += tile) {
    const Index count = std::min(tile, rows.extents[0] - begin);
    gather_group<A>(run(rows, 0, begin, count), group, values, lanes);
    for (Index r = 0; r < count; ++r) {
      A* at = packets + (begin + r) * stride;
      pstoreu(at, pmadd(f, ploadu<LanePacket<A>>(values + r * lanes), ploadu<LanePacket<A>>(at)));
    }
  }
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
