#pragma once
// The right-angle transform (chela/conv/fft_plan.hpp) of one packet of channels at a time: channels are the lanes, a
// point is a packet of real and a packet of imaginary parts, and `work` holds N points. Depth first: a pass over a
// block, then each of its sub-blocks to the end, then the inverse pass over the block, so that sub-blocks stay in the
// nearest caches. On the 8 points of an innermost block, forward pass, product and inverse pass share the registers.
//
//   transform          rows -> spectrum in tree order
//   transform_back     spectrum -> rows
//   convolve           rows -> spectrum -> middle(point, row) -> rows, without a spectrum in between
//
// Sources have `is_real` and `load(row)`, sinks have `store(row, point)`, both `fetch(row)`. A middle is called with
// each point of the spectrum, in registers, and its place in tree order: the row of its innermost block, and the point
// in it. The points not in the mask `kept` are zero for the inverse pass. `begin(row)` comes before each innermost
// block, and `fetch_ahead()` at every few points of every pass below the outermost, to spread what the middle reads
// over all the work.
#include <type_traits>

#include "chela/conv/fft_plan.hpp"
#include "chela/cpu/conv/root_radix.hpp"
#include "chela/cpu/conv/stream_lanes.hpp"

namespace chela::cpu::detail {

/// Rows of a whole packet of neighbouring real channels in the caller's memory or in `work`. Rows from `count` on are
/// zero.
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
  CHELA_ALWAYS_INLINE void fetch(Index row) const { fetch_to_read(data + row * stride); }
};

/// Where the real parts of the first `count` rows go; the others are dropped. `Streams`: past the caches, which takes
/// packets of whole cache lines.
template <class A, bool Streams = false>
struct RealRowsOut {
  A* data = nullptr;
  Index stride = 0;
  Index count = 0;

  CHELA_ALWAYS_INLINE void store(Index row, const ComplexLanes<A>& x) const {
    if (row >= count) return;
    if constexpr (Streams)
      stream_lanes(data + row * stride, x.re);
    else
      Eigen::internal::pstoreu(data + row * stride, x.re);
  }
  CHELA_ALWAYS_INLINE void fetch(Index row) const {
    if constexpr (!Streams) fetch_to_write(data + row * stride);
  }
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
  CHELA_ALWAYS_INLINE void fetch(Index) const {}
};

/// Every point of an innermost block.
inline constexpr unsigned all_points = 0xff;

/// Leaves the spectrum as it is, at these points of each innermost block.
template <unsigned Kept>
struct KeepPoints {
  static constexpr unsigned kept = Kept;
  CHELA_ALWAYS_INLINE void begin(Index) const {}
  CHELA_ALWAYS_INLINE void fetch_ahead() const {}
  template <class A>
  CHELA_ALWAYS_INLINE void operator()(ComplexLanes<A>&, Index, int) const {}
};

using KeepSpectrum = KeepPoints<all_points>;

/// Of node n; `tree` holds the twiddles of the tree of twos it belongs to.
template <int Radix, class A>
CHELA_ALWAYS_INLINE NodeTwiddles<A, Radix> node_twiddles(const A* tree, Index n) {
  NodeTwiddles<A, Radix> t;
  t.w[0] = broadcast_root<A>(tree + 2 * n);
  t.w[1] = broadcast_root<A>(tree + 4 * n);
  if constexpr (Radix == 8) {
    t.w[2] = broadcast_root<A>(tree + 8 * n);
    t.w[3] = broadcast_root<A>(tree + 8 * n + 4);
  }
  return t;
}

/// Rows this far below are fetched early in the outermost passes, from this many points on: below, all is near anyway.
/// They go to the second-level cache: rows of a wide array share a few sets of the first.
inline constexpr Index rows_ahead = 8, least_points_to_fetch = 2048;

/// Forward pass over the block of one node.
template <int Radix, class A, class Source, class Middle>
void forward_pass(const A* tree, Index node, Index stride, bool far, const Source& source, A* block, Middle& middle) {
  const NodeTwiddles<A, Radix> twiddles = node_twiddles<Radix>(tree, node);
  for (Index j = 0; j < stride; ++j) {
    middle.fetch_ahead();
    if (far) {
      CHELA_UNROLL
      for (int e = 0; e < Radix; ++e) source.fetch(j + rows_ahead + e * stride);
    }
    ComplexLanes<A> x[Radix];
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = source.load(j + e * stride);
    forward_radix<Radix, Source::is_real>(x, twiddles);
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) store_point(block + (j + e * stride) * point_size<A>, x[e]);
  }
}

template <int Radix, class A, class Middle>
void inverse_pass(const A* table, Index stride, A* block, Middle& middle) {
  for (Index j = 0; j < stride; ++j, table += Radix) {
    middle.fetch_ahead();
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
  const bool far = plan.points() >= least_points_to_fetch;
  constexpr bool root = splits_root(Radix);
  for (Index j = 0; j < stride; ++j, table += root ? 2 * (Radix - 1) : Radix) {
    if (far) {
      CHELA_UNROLL
      for (int e = 0; e < Radix; ++e) sink.fetch(j + rows_ahead + e * stride);
    }
    ComplexLanes<A> x[Radix];
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = load_point<A>(work + (j + e * stride) * point_size<A>);
    if constexpr (root)
      inverse_root<Radix>(x, table, plan.root_circle());
    else
      inverse_radix<Radix>(x, table);
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e)
      sink.store(j + e * stride, times_conjugate(x[e], broadcast_root<A>(plan.output_weight(j + e * stride))));
  }
}

/// The outermost forward pass where the root splits into a number of trees that is no power of two.
template <int Radix, class A, class Source>
void first_root_pass(const RightAnglePlan<A>& plan, const Source& source, A* work) {
  const Index stride = plan.pass(0).stride;
  const bool far = plan.points() >= least_points_to_fetch;
  for (Index j = 0; j < stride; ++j) {
    if (far) {
      CHELA_UNROLL
      for (int e = 0; e < Radix; ++e) source.fetch(j + rows_ahead + e * stride);
    }
    ComplexLanes<A> x[Radix];
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) x[e] = source.load(j + e * stride);
    forward_root<Radix, Source::is_real>(x, plan.root_angles(), plan.root_circle());
    CHELA_UNROLL
    for (int e = 0; e < Radix; ++e) store_point(work + (j + e * stride) * point_size<A>, x[e]);
  }
}

/// Which way a walk over the tree goes.
enum class Walk { forward, inverse, both };

template <Walk W, class A, class Middle>
void walk_middle(const A* tree, Index node, Index row, A* block, Middle& middle) {
  constexpr int points = RightAnglePlan<A>::middle;
  middle.begin(row);
  ComplexLanes<A> x[points];
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) x[e] = load_point<A>(block + e * point_size<A>);
  if constexpr (W != Walk::inverse) forward_radix<points, false>(x, node_twiddles<points>(tree, node));
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) middle(x[e], row, e);
  if constexpr (W != Walk::forward) inverse_innermost<Middle::kept>(x);
  CHELA_UNROLL
  for (int e = 0; e < points; ++e) store_point(block + e * point_size<A>, x[e]);
}

/// Everything below the outermost pass: the block of `node` begins at `row`, and `depth` passes lie above it.
template <Walk W, class A, class Middle>
void walk_block(const RightAnglePlan<A>& plan, int depth, const A* tree, Index node, Index row, A* work,
                Middle& middle) {
  A* block = work + row * point_size<A>;
  if (depth == plan.passes()) return walk_middle<W>(tree, node, row, block, middle);
  const auto& pass = plan.pass(depth);
  if constexpr (W != Walk::inverse) {
    if (pass.radix == 8)
      forward_pass<8>(tree, node, pass.stride, false, Points<A>{block}, block, middle);
    else
      forward_pass<4>(tree, node, pass.stride, false, Points<A>{block}, block, middle);
  }
  for (int e = 0; e < pass.radix; ++e)
    walk_block<W>(plan, depth + 1, tree, node * pass.radix + e, row + e * pass.stride, work, middle);
  if constexpr (W != Walk::forward) {
    if (pass.radix == 8)
      inverse_pass<8>(plan.inverse_twiddles(pass), pass.stride, block, middle);
    else
      inverse_pass<4>(plan.inverse_twiddles(pass), pass.stride, block, middle);
  }
}

/// Calls `use(radix)` with the radix of the outermost pass as a constant.
template <class A, class Use>
void with_outermost_radix(const RightAnglePlan<A>& plan, const Use& use) {
  switch (plan.pass(0).radix) {
    case 3:
      return use(std::integral_constant<int, 3>{});
    case 4:
      return use(std::integral_constant<int, 4>{});
    case 5:
      return use(std::integral_constant<int, 5>{});
    case 6:
      return use(std::integral_constant<int, 6>{});
    case 7:
      return use(std::integral_constant<int, 7>{});
    case 8:
      return use(std::integral_constant<int, 8>{});
    default:
      return use(std::integral_constant<int, 9>{});
  }
}

template <class A, class Source>
void first_pass(const RightAnglePlan<A>& plan, const Source& source, A* work) {
  with_outermost_radix(plan, [&](auto radix) {
    if constexpr (splits_root(radix)) {
      first_root_pass<radix>(plan, source, work);
    } else {
      const KeepSpectrum middle;
      forward_pass<radix>(plan.tree(), 1, plan.pass(0).stride, plan.points() >= least_points_to_fetch, source, work,
                          middle);
    }
  });
}

template <class A, class Sink>
void last_pass(const RightAnglePlan<A>& plan, const A* work, const Sink& sink) {
  with_outermost_radix(plan, [&](auto radix) { last_pass<radix>(plan, work, sink); });
}

/// One of the parts below the outermost pass.
template <Walk W, class A, class Middle>
void walk_part(const RightAnglePlan<A>& plan, int part, A* work, Middle& middle) {
  const auto& pass = plan.pass(0);
  if (splits_root(pass.radix))
    walk_block<W>(plan, 1, plan.tree(part), 1, part * pass.stride, work, middle);
  else
    walk_block<W>(plan, 1, plan.tree(), pass.radix + part, part * pass.stride, work, middle);
}

template <Walk W, class A, class Middle>
void walk_all(const RightAnglePlan<A>& plan, A* work, Middle middle) {
  for (int part = 0; part < plan.pass(0).radix; ++part) walk_part<W>(plan, part, work, middle);
}

/// `middle` sees each point of the spectrum; what it leaves is in `work` in tree order.
template <class A, class Source, class Middle = KeepSpectrum>
void transform(const RightAnglePlan<A>& plan, const Source& source, A* work, const Middle& middle = {}) {
  first_pass(plan, source, work);
  walk_all<Walk::forward>(plan, work, middle);
}

/// N times the rows whose spectrum is in `work`, which is overwritten.
template <class A, class Sink, class Middle = KeepSpectrum>
void transform_back(const RightAnglePlan<A>& plan, A* work, const Sink& sink, const Middle& middle = {}) {
  walk_all<Walk::inverse>(plan, work, middle);
  last_pass(plan, work, sink);
}

template <class A, class Source, class Middle, class Sink>
void convolve(const RightAnglePlan<A>& plan, const Source& source, const Middle& middle, const Sink& sink, A* work) {
  first_pass(plan, source, work);
  walk_all<Walk::both>(plan, work, middle);
  last_pass(plan, work, sink);
}

}  // namespace chela::cpu::detail
