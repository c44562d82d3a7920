#pragma once
// The right-angle transform (chela/conv/fft_plan.hpp) of one packet of channels at a time: channels are the lanes, a point is
// a packet of real and a packet of imaginary parts, and `work` holds N points. Depth first: a pass over a block, then each of
// its sub-blocks to the end, then the inverse pass over the block, so that sub-blocks stay in the nearest caches. On the 8
// points of an innermost block, forward pass, product and inverse pass share the registers.
//
//   transform          rows -> spectrum in tree order
//   transform_back     spectrum -> rows
//   convolve           rows -> spectrum -> middle(point, row) -> rows, without a spectrum in between
//
// Sources have `is_real` and `load(row)`, sinks have `store(row, point)`, both `prefetch(row)`; a middle is called with a point
// of the spectrum, in registers, and its place in tree order.
#include "chela/conv/fft_plan.hpp"
#include "chela/cpu/conv/complex_lanes.hpp"

namespace chela::cpu::detail {

/// Rows of a whole packet of neighbouring real channels in the caller's memory or in `work`. Rows from `count` on are zero.
template <class A>
struct RealRows {
  static constexpr bool is_real = true;
  const A* data = nullptr;
  Index stride = 0;
  Index count = 0;

  CHELA_ALWAYS_INLINE ComplexLanes<A> load(Index row) const {
    return {row < count ? Eigen::internal::ploadu<LanePacket<A>>(data + row * stride)
                        : Eigen::internal::pset1<LanePacket<A>>(A(0)),
            Eigen::internal::pset1<LanePacket<A>>(A(0))};
  }
  CHELA_ALWAYS_INLINE void prefetch(Index row) const { Eigen::internal::prefetch(data + row * stride); }
};

/// Where the real parts of the first `count` rows go; the others are dropped.
template <class A>
struct RealRowsOut {
  A* data = nullptr;
  Index stride = 0;
  Index count = 0;

  CHELA_ALWAYS_INLINE void store(Index row, const ComplexLanes<A>& x) const {
    if (row < count) Eigen::internal::pstoreu(data + row * stride, x.re);
  }
  CHELA_ALWAYS_INLINE void prefetch(Index row) const { Eigen::internal::prefetch(data + row * stride); }
};

/// N complex points, read or written in place.
template <class A>
struct Points {
  static constexpr bool is_real = false;
  A* data = nullptr;

  CHELA_ALWAYS_INLINE ComplexLanes<A> load(Index row) const { return load_point<A>(data + row * point_size<A>); }
  CHELA_ALWAYS_INLINE void store(Index row, const ComplexLanes<A>& x) const {
    store_point(data + row * point_size<A>, x);
  }
  CHELA_ALWAYS_INLINE void prefetch(Index) const {}
};

/// Leaves the spectrum as it is.
struct KeepSpectrum {
  template <class A>
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>&, Index) const {}
};

template <int Radix, class A>
CHELA_ALWAYS_INLINE NodeTwiddles<A, Radix> node_twiddles(const RightAnglePlan<A>& plan, Index node) {
  NodeTwiddles<A, Radix> t;
  t.w[0] = broadcast_root<A>(plan.twiddle(node));
  t.w[1] = broadcast_root<A>(plan.twiddle(2 * node));
  if constexpr (Radix == 8) {
    t.w[2] = broadcast_root<A>(plan.twiddle(4 * node));
    t.w[3] = broadcast_root<A>(plan.twiddle(4 * node + 2));
  }
  return t;
}

/// Rows this far below are fetched early in the outermost passes, from this many points on: below, all is near anyway.
inline constexpr Index rows_ahead = 8, least_points_to_prefetch = 2048;

/// Forward pass over the block of one node.
template <int Radix, class A, class Source>
void forward_pass(const RightAnglePlan<A>& plan, Index node, Index stride, const Source& source, A* block) {
  const NodeTwiddles<A, Radix> twiddles = node_twiddles<Radix>(plan, node);
  const bool far = plan.points() >= least_points_to_prefetch;
  for (Index j = 0; j < stride; ++j) {
    if (far) {
      CHELA_UNROLL
      for (int e = 0; e < Radix; ++e) source.prefetch(j + rows_ahead + e * stride);
    }
    ComplexLanes<A> x[Radix];
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = source.load(j + e * stride);
    forward_radix<Radix, Source::is_real>(x, twiddles);
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) store_point(block + (j + e * stride) * point_size<A>, x[e]);
  }
}

template <int Radix, class A>
void inverse_pass(const A* table, Index stride, A* block) {
  for (Index j = 0; j < stride; ++j, table += Radix) {
    ComplexLanes<A> x[Radix];
    A* at = block + j * point_size<A>;
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = load_point<A>(at + e * stride * point_size<A>);
    inverse_radix<Radix>(x, table);
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) store_point(at + e * stride * point_size<A>, x[e]);
  }
}

/// The outermost inverse pass, which also turns each row back by its output weight.
template <int Radix, class A, class Sink>
void last_pass(const RightAnglePlan<A>& plan, const A* work, const Sink& sink) {
  using namespace Eigen::internal;
  const Index stride = plan.pass(0).stride;
  const A* table = plan.inverse_twiddles(plan.pass(0));
  const bool far = plan.points() >= least_points_to_prefetch;
  for (Index j = 0; j < stride; ++j, table += Radix) {
    if (far) {
      CHELA_UNROLL
      for (int e = 0; e < Radix; ++e) sink.prefetch(j + rows_ahead + e * stride);
    }
    ComplexLanes<A> x[Radix];
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = load_point<A>(work + (j + e * stride) * point_size<A>);
    inverse_radix<Radix>(x, table);
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) {
      const ComplexLanes<A> w = broadcast_root<A>(plan.output_weight(j + e * stride));
      sink.store(j + e * stride,
                 {pmadd(x[e].im, w.im, pmul(x[e].re, w.re)), negated_madd(x[e].re, w.im, pmul(x[e].im, w.re))});
    }
  }
}

/// Which way a walk over the tree goes.
enum class Walk { forward, inverse, both };

template <Walk W, class A, class Middle>
void walk_middle(const RightAnglePlan<A>& plan, Index node, Index row, A* block, const Middle& middle) {
  constexpr int points = RightAnglePlan<A>::middle;
  ComplexLanes<A> x[points];
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) x[e] = load_point<A>(block + e * point_size<A>);
  if constexpr (W != Walk::inverse) forward_radix<points, false>(x, node_twiddles<points>(plan, node));
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) middle(x[e], row + e);
  if constexpr (W != Walk::forward) inverse_innermost(x);
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) store_point(block + e * point_size<A>, x[e]);
}

/// Everything below the outermost pass: the block of `node` begins at `row`, and `depth` passes lie above it.
template <Walk W, class A, class Middle>
void walk_block(const RightAnglePlan<A>& plan, int depth, Index node, Index row, A* work, const Middle& middle) {
  A* block = work + row * point_size<A>;
  if (depth == plan.passes()) return walk_middle<W>(plan, node, row, block, middle);
  const auto& pass = plan.pass(depth);
  if constexpr (W != Walk::inverse) {
    if (pass.radix == 8)
      forward_pass<8>(plan, node, pass.stride, Points<A>{block}, block);
    else
      forward_pass<4>(plan, node, pass.stride, Points<A>{block}, block);
  }
  for (int e = 0; e < pass.radix; ++e)
    walk_block<W>(plan, depth + 1, node * pass.radix + e, row + e * pass.stride, work, middle);
  if constexpr (W != Walk::forward) {
    if (pass.radix == 8)
      inverse_pass<8>(plan.inverse_twiddles(pass), pass.stride, block);
    else
      inverse_pass<4>(plan.inverse_twiddles(pass), pass.stride, block);
  }
}

template <class A, class Source>
void first_pass(const RightAnglePlan<A>& plan, const Source& source, A* work) {
  const auto& pass = plan.pass(0);
  if (pass.radix == 8)
    forward_pass<8>(plan, 1, pass.stride, source, work);
  else
    forward_pass<4>(plan, 1, pass.stride, source, work);
}

template <class A, class Sink>
void last_pass(const RightAnglePlan<A>& plan, const A* work, const Sink& sink) {
  if (plan.pass(0).radix == 8)
    last_pass<8>(plan, work, sink);
  else
    last_pass<4>(plan, work, sink);
}

template <Walk W, class A, class Middle>
void walk_all(const RightAnglePlan<A>& plan, A* work, const Middle& middle) {
  const auto& pass = plan.pass(0);
  for (int e = 0; e < pass.radix; ++e) walk_block<W>(plan, 1, pass.radix + e, e * pass.stride, work, middle);
}

/// `middle` sees each point of the spectrum; what it leaves is in `work` in tree order.
template <class A, class Source, class Middle = KeepSpectrum>
void transform(const RightAnglePlan<A>& plan, const Source& source, A* work, const Middle& middle = {}) {
  first_pass(plan, source, work);
  walk_all<Walk::forward>(plan, work, middle);
}

/// N times the rows whose spectrum is in `work`, which is overwritten.
template <class A, class Sink>
void transform_back(const RightAnglePlan<A>& plan, A* work, const Sink& sink) {
  walk_all<Walk::inverse>(plan, work, KeepSpectrum{});
  last_pass(plan, work, sink);
}

template <class A, class Source, class Middle, class Sink>
void convolve(const RightAnglePlan<A>& plan, const Source& source, const Middle& middle, const Sink& sink, A* work) {
  first_pass(plan, source, work);
  walk_all<Walk::both>(plan, work, middle);
  last_pass(plan, work, sink);
}

}  // namespace chela::cpu::detail
