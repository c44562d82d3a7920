#pragma once
#include <Eigen/Core>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"

namespace chela::cpu {

namespace detail {

template <class Packet, class S>
CHELA_ALWAYS_INLINE void transpose_packets(const S* source, Index source_stride, S* target, Index target_stride) {
  constexpr int lanes = Eigen::internal::unpacket_traits<Packet>::size;
  Eigen::internal::PacketBlock<Packet, lanes> block;
  CHELA_UNROLL
  for (int i = 0; i < lanes; ++i) block.packet[i] = Eigen::internal::ploadu<Packet>(source + i * source_stride);
  Eigen::internal::ptranspose(block);
  CHELA_UNROLL
  for (int i = 0; i < lanes; ++i) Eigen::internal::pstoreu(target + i * target_stride, block.packet[i]);
}

}  // namespace detail

/// target[c, r] = source[r, c] for all `rows` and `columns`; then zeros up to target[c, padded).
template <class S, class Packet = typename Eigen::internal::packet_traits<S>::type>
void transpose_rows(const S* source, Index source_stride, Index rows, Index columns, S* target, Index target_stride,
                    Index padded) {
  constexpr int lanes = Eigen::internal::packet_traits<S>::size;
  Index r = 0;
  for (; r + lanes <= rows; r += lanes) {
    Index c = 0;
    for (; c + lanes <= columns; c += lanes)
      detail::transpose_packets<Packet>(source + r * source_stride + c, source_stride, target + c * target_stride + r,
                                        target_stride);
    for (; c < columns; ++c)
      for (Index i = r; i < r + lanes; ++i) target[c * target_stride + i] = source[i * source_stride + c];
  }
  for (Index c = 0; c < columns; ++c) {
    for (Index i = r; i < rows; ++i) target[c * target_stride + i] = source[i * source_stride + c];
    for (Index i = rows; i < padded; ++i) target[c * target_stride + i] = S(0);
  }
}

}  // namespace chela::cpu
