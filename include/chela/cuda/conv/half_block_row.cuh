#pragma once
// A row of 256 C Q points, C = 4, 8, 12 or 16, transformed by the C / 4 warps of a block, with one exchange through
// shared memory each way.
//
// A residue is c = Q e + i, e < C and i < Q, and the other half of a frequency is j + C l, j < C and l < Q. What follows
// the parts (half_parts.cuh) is, for each i, one more product with a matrix, C x C in the corner of 16 x 16, and then
// transforms of Q points in registers:
//
//   Z_i[k + 256 j] = sum_e e^(2 pi i e j / C) e^(2 pi i e (4 k + 1) / (1024 C)) P_(Q e + i)[k]
//   X[m + 256 C l] = sum_i e^(2 pi i i l / Q) e^(2 pi i i (4 m + 1) / (4 N)) Z_i[m]
//
// The rows of the product are 16 of the frequencies k, a tile of them; its columns e and j are in the order `place` on
// both sides: a warp has the parts of four neighbouring e, which are two places next to each other in either half of the
// 16, so that lanes write and read 16 bytes, and the matrix stays symmetric: one operand serves both ways.
#include <algorithm>

#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_parts.cuh"
#include "chela/cuda/conv/half_rows.cuh"

namespace chela::cuda::detail {

/// As WarpRow.
template <int C, int Q>
class BlockRow {
 public:
  static_assert(C % 4 == 0 && C <= 16);
  static constexpr int residues = C * Q, points = 256 * C * Q;
  static constexpr int warps = C / 4, rows_per_block = 1, threads = 32 * warps;
  static constexpr int own = 4 * Q;
  static constexpr int portions = 16, pairs = 4 * Q;
  /// What warps tell each other lies behind the exchange, and behind what is staged of two rows at once.
  static constexpr int told_at = std::max(16384 * Q, 2 * StagedInput<residues>::bytes);
  static constexpr int work_bytes = told_at + 16 * warps;
  static constexpr int across_re = part_roots, across_im = across_re + 1, across_minus_im = across_re + 2;
  static constexpr int turns = across_re + 3, roots = turns + 32 * Q;
  static constexpr int normalisation = C * Q;
  static constexpr int tiles_at_once = Q == 1 ? 2 : 1;  ///< of the middle, in registers
  static constexpr int blocks_per_multiprocessor = (Q == 1 ? 20 : Q == 2 ? 16 : 12) / warps;

  /// Unit `which`: of parts, of the product across residues, of the twiddle before it as turns + 2 tile + u, then of
  /// that of each i > 0 after it.
  __device__ static uint4 root(int which, int lane) {
    if (which < part_roots) return part_root(which, lane);
    if (which < turns)
      return matrix_unit<true>(lane, [&](int column, int row) {
        const int e = place(row), j = place(column);
        const float2 x = unit_root(e * j, C);
        return e >= C || j >= C ? 0.f : which == across_re ? x.x : which == across_im ? x.y : -x.y;
      });
    const LanePlace p(lane);
    const int i = (which - turns) / 32, tile = (which - turns) / 2 % 16, u = (which - turns) % 2;
    const auto pair = [&](int second) {
      float2 x[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int e = 4 * p.column + 2 * u + n, k = frequency(tile, p.group, second);
        x[n] = i == 0 ? unit_root(e * (4 * k + 1), 1024 * C) : unit_root(i * (4 * (k + 256 * e) + 1), 4 * points);
      }
      return ComplexPair{__floats2half2_rn(x[0].x, x[1].x), __floats2half2_rn(x[0].y, x[1].y)};
    };
    return unit_of(pair(0), pair(1));
  }

  __device__ BlockRow(char* work, int warp, int lane, int barrier = 0)
      : exchange_(reinterpret_cast<uint4*>(work)),
        over_warps_(reinterpret_cast<float*>(work + told_at)),
        warp_(warp),
        lane_(lane),
        barrier_(barrier) {}
  __device__ int first_residue() const { return own * warp_; }
  __device__ int lane() const { return lane_; }
  __device__ int thread() const { return 32 * warp_ + lane_; }
  __device__ void sync() const { arch::sync_threads<threads>(barrier_); }
  __device__ float largest(float x) const {
    x = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
    return of_warps(over_warps_, x, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ float sum(float x) const {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return of_warps(over_warps_ + warps, x, [](float a, float b) { return a + b; });
  }

  template <bool Complex, class Words>
  __device__ __forceinline__ void forward(const PartForward<Complex>& part, const Words& word) {
#pragma unroll
    for (int i = 0; i < Q; ++i) {
      Part parts[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        part([&](bool imaginary, int q, int k) { return word(Q * e + i, imaginary, q, k); }, parts[e]);
      const auto pack = [&](int pair, auto of) -> uint4 {
        const auto word_of = [&](int e) { return bits(parts[e][pair].*of); };
        return {__byte_perm(word_of(0), word_of(1), 0x5410), __byte_perm(word_of(0), word_of(1), 0x7632),
                __byte_perm(word_of(2), word_of(3), 0x5410), __byte_perm(word_of(2), word_of(3), 0x7632)};
      };
      const LanePlace p(lane_);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int tile = 4 * pair + p.column;
        exchanged(i, tile, 2 * warp_) = pack(pair, &ComplexPair::re);
        exchanged(i, tile, 2 * warp_ + 1) = pack(pair, &ComplexPair::im);
      }
    }
    sync();
  }

  template <bool Forward, bool Backward, class Roots, class Middle>
  __device__ __forceinline__ void middle(const Roots& roots, const Middle& middle) {
    const Across across(roots);
#pragma unroll(tiles_at_once)
    for (int tile = warp_; tile < portions; tile += warps) {
      const Turns turn(roots, tile);
      ComplexPair z[pairs];
      if constexpr (Forward) spectrum_of_tile(roots, across, turn, tile, z);
      middle(tile, z);
      if constexpr (Backward) put_tile_back(roots, across, turn, tile, z);
    }
    sync();
  }
  /// Both ways with the spectrum of another row that has come `forward`: calls middle(portion, spectrum, of_other) for
  /// every step-th portion from `first` on. Without a barrier at the end.
  template <class Roots, class Middle>
  __device__ __forceinline__ void middle_with(const BlockRow& other, const Roots& roots, int first, int step,
                                              const Middle& middle) {
    const Across across(roots);
#pragma unroll(tiles_at_once)
    for (int tile = first; tile < portions; tile += step) {
      const Turns turn(roots, tile);
      ComplexPair z[pairs], of_other[pairs];
      other.spectrum_of_tile(roots, across, turn, tile, of_other);
      spectrum_of_tile(roots, across, turn, tile, z);
      middle(tile, z, of_other);
      put_tile_back(roots, across, turn, tile, z);
    }
  }

  /// Without a barrier at the end: the work memory is free for others once all warps have come through.
  template <bool Complex, class Roots, class Take>
  __device__ __forceinline__ void backward(const Roots& roots, const Take& take) const {
    const PartBackward<Complex> part(roots);
    const LanePlace p(lane_);
#pragma unroll
    for (int i = 0; i < Q; ++i) {
      Part parts[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int tile = 4 * pair + p.column;
        const uint4 x = exchanged(i, tile, 2 * warp_), y = exchanged(i, tile, 2 * warp_ + 1);
        const auto unpack = [&](int e, std::uint32_t x0, std::uint32_t x1, std::uint32_t y0, std::uint32_t y1) {
          const int which = e & 1 ? 0x7632 : 0x5410;
          parts[e][pair] = complex_pair(__byte_perm(x0, x1, which), __byte_perm(y0, y1, which));
        };
        unpack(0, x.x, x.y, y.x, y.y), unpack(1, x.x, x.y, y.x, y.y);
        unpack(2, x.z, x.w, y.z, y.w), unpack(3, x.z, x.w, y.z, y.w);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float out_re[2][4], out_im[2][4];
        part(parts[e], out_re, out_im);
        take(Q * e + i, out_re, out_im);
      }
    }
  }

 private:
  /// The residue e, or frequency j, of a column.
  __device__ static constexpr int place(int column) {
    return 4 * ((column & 7) >> 1) + 2 * (column >> 3) + (column & 1);
  }
  /// The frequency k of row `group` of a tile's first or second eight.
  __device__ static constexpr int frequency(int tile, int group, int second) {
    return group + 8 * (tile >> 3) + 16 * (2 * (tile & 3) + 8 * (tile >> 2 & 1) + second);
  }

  /// Unit 2 w of what four lanes hold of warp w's residues, real parts, and 2 w + 1, imaginary parts.
  __device__ uint4& exchanged(int i, int tile, int unit) const {
    const int group = LanePlace(lane_).group;
    return exchange_[1024 * i + 64 * tile + 8 * group + (unit ^ (2 * (tile & 3) + (group & 1)))];
  }

  /// The constants of the product across residues, and of a tile the twiddle before it.
  struct Across {
    uint4 re, im, minus_im;
    template <class Roots>
    __device__ explicit Across(const Roots& roots)
        : re(roots(across_re)), im(roots(across_im)), minus_im(roots(across_minus_im)) {}
  };
  struct Turns {
    ComplexPair of[4];
    template <class Roots>
    __device__ Turns(const Roots& roots, int tile) {
      take_unit(roots(turns + 2 * tile), of[0], of[1]), take_unit(roots(turns + 2 * tile + 1), of[2], of[3]);
    }
  };

  template <class Roots>
  __device__ __forceinline__ void spectrum_of_tile(const Roots& roots, const Across& across, const Turns& turn,
                                                   int tile, ComplexPair (&z)[pairs]) const {
    const int column = LanePlace(lane_).column;
#pragma unroll
    for (int i = 0; i < Q; ++i) {
      uint4 x = {}, y = {};
      if (column < warps) x = exchanged(i, tile, 2 * column), y = exchanged(i, tile, 2 * column + 1);
      ComplexPair row[4] = {complex_pair(x.x, y.x), complex_pair(x.y, y.y), complex_pair(x.z, y.z),
                            complex_pair(x.w, y.w)};
#pragma unroll
      for (int n = 0; n < 4; ++n) row[n] = row[n] * turn.of[n];
      multiply_across(row, across.re, across.im, across.minus_im);
#pragma unroll
      for (int n = 0; n < 4; ++n) z[4 * i + n] = row[n];
      if (i > 0) turn_residue<false>(roots, i, tile, z);
    }
    small_transforms<Q, 1, 4>(z);
  }
  template <class Roots>
  __device__ __forceinline__ void put_tile_back(const Roots& roots, const Across& across, const Turns& turn, int tile,
                                                ComplexPair (&z)[pairs]) const {
    const int column = LanePlace(lane_).column;
    small_transforms<Q, -1, 4>(z);
#pragma unroll
    for (int i = 0; i < Q; ++i) {
      if (i > 0) turn_residue<true>(roots, i, tile, z);
      ComplexPair row[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) row[n] = z[4 * i + n];
      multiply_across(row, across.re, across.minus_im, across.im);
#pragma unroll
      for (int n = 0; n < 4; ++n) row[n] = times_conjugate(row[n], turn.of[n]);
      if (column < warps) {
        exchanged(i, tile, 2 * column) = {bits(row[0].re), bits(row[1].re), bits(row[2].re), bits(row[3].re)};
        exchanged(i, tile, 2 * column + 1) = {bits(row[0].im), bits(row[1].im), bits(row[2].im), bits(row[3].im)};
      }
    }
  }

  __device__ __forceinline__ static void multiply_across(ComplexPair (&z)[4], const uint4& re, const uint4& im,
                                                         const uint4& minus_im) {
    const uint4 x = {bits(z[0].re), bits(z[1].re), bits(z[2].re), bits(z[3].re)};
    const uint4 y = {bits(z[0].im), bits(z[1].im), bits(z[2].im), bits(z[3].im)};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const auto low = [&](const uint4& unit) { return q ? unit.z : unit.x; };
      const auto high = [&](const uint4& unit) { return q ? unit.w : unit.y; };
      std::uint32_t out_re[2], out_im[2];
      arch::multiply_halves(out_re, x, low(re), high(re));
      arch::multiply_halves(out_im, x, low(im), high(im));
      arch::multiply_add_halves(out_re, y, low(minus_im), high(minus_im));
      arch::multiply_add_halves(out_im, y, low(re), high(re));
      z[2 * q] = complex_pair(out_re[0], out_im[0]), z[2 * q + 1] = complex_pair(out_re[1], out_im[1]);
    }
  }

  template <bool Conjugate, class Roots>
  __device__ __forceinline__ static void turn_residue(const Roots& roots, int i, int tile, ComplexPair (&z)[pairs]) {
    ComplexPair turn[4];
    take_unit(roots(turns + 32 * i + 2 * tile), turn[0], turn[1]);
    take_unit(roots(turns + 32 * i + 2 * tile + 1), turn[2], turn[3]);
#pragma unroll
    for (int n = 0; n < 4; ++n) z[4 * i + n] = times<Conjugate>(z[4 * i + n], turn[n]);
  }

  /// Every warp's x, in one order. Leaves time for all to have come here before the work memory is used.
  template <class F>
  __device__ float of_warps(float* place, float x, F combine) const {
    if (lane_ == 0) place[warp_] = x;
    sync();
    x = place[0];
#pragma unroll
    for (int w = 1; w < warps; ++w) x = combine(x, place[w]);
    return x;
  }

  uint4* exchange_;
  float* over_warps_;
  int warp_, lane_, barrier_;
};

}  // namespace chela::cuda::detail
