#pragma once
// Transforms of 256 points on tensor cores, from which the transforms of rows in 16 bits are made.
//
// A row of N = 256 R points is transformed modulo x^N - i: X[m] = sum_n x[n] e^(2 pi i n (4 m + 1) / (4 N)). Real rows
// keep their length, and nothing wraps around into the real parts. With n = R u + c and m = k + 256 j
//
//   X[k + 256 j] = sum_c e^(2 pi i c j / R) e^(2 pi i c (4 k + 1) / (4 N)) P_c[k]
//   P_c[k] = sum_u x[R u + c] e^(2 pi i u (4 k + 1) / 1024)
//
// where the part P_c of a residue c is the same transform of 256 points for every c and N. With u = 16 a + b and
// k = f + 16 h it is two products of 16 x 16 matrices with a twiddle between them,
//
//   P_c[f + 16 h] = sum_b e^(2 pi i b h / 16) e^(2 pi i b (4 f + 1) / 1024) sum_a e^(2 pi i a (4 f + 1) / 64) x[a, b]
//
// The way back is the conjugate of each in reverse order. In registers the result of one product lies as an operand of
// the next one (arch/mma.cuh), and the index to sum over is where the operand has it: no number changes lanes.
//
// Everything is in __half: rows and kernels are scaled by powers of two (half_rows.cuh), and the two factors 1/16 of the
// way back keep what the way there has summed within its range.
#include <cstdint>

#include "chela/cuda/arch/mma.cuh"
#include "chela/cuda/conv/half_complex.cuh"

namespace chela::cuda::detail {

/// What all lanes of a warp hold of constant matrices: a unit of 16 bytes a lane.
enum HalfRoot {
  first_re,  ///< e^(2 pi i a (4 f + 1) / 64), an operand a
  first_im,
  first_minus_im,
  turn_re,  ///< the twiddle, as the first product's results lie
  turn_im,
  second_re,  ///< e^(2 pi i b h / 16), an operand b in two halves of 8 columns
  second_im,
  second_minus_im,
  back_re,  ///< conjugates and sixteenths from here on: of the second, its rows in the order `output_place`
  back_im,
  back_minus_im,
  turn_back_re,
  turn_back_im,
  last_re,
  last_im,
  last_minus_im,
  part_roots,  ///< what follows belongs to the organisation of a row
};

/// The order of the rows b on the way back, which gives the four lanes of a group neighbouring rows.
__device__ constexpr int output_place(int row) { return (row & 8) + 4 * (row & 1) + ((row & 7) >> 1); }

/// A lane's place in fragments: rows `group` and `group` + 8, columns from 2 `column` and from 2 `column` + 8.
struct LanePlace {
  int group, column;
  __device__ explicit LanePlace(int lane) : group(lane >> 2), column(lane & 3) {}
};

/// One unit of a matrix whose entries are given by entry(row, column): as an operand a, or for Columns, of the
/// transposed matrix, as an operand b.
template <bool Columns = false, class Entry>
__device__ uint4 matrix_unit(int lane, const Entry& entry) {
  const LanePlace p(lane);
  std::uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int outer = Columns ? i >> 1 : i & 1, inner = Columns ? i & 1 : i >> 1;
    const int row = p.group + 8 * outer, column = 2 * p.column + 8 * inner;
    word[i] = bits(__floats2half2_rn(entry(row, column), entry(row, column + 1)));
  }
  return {word[0], word[1], word[2], word[3]};
}

/// The units up to `part_roots`.
__device__ inline uint4 part_root(int which, int lane) {
  const auto part = [&](float2 root, int re, int minus_im) {
    return which == re ? root.x : which == minus_im ? -root.y : root.y;
  };
  if (which <= first_minus_im)
    return matrix_unit(lane,
                       [&](int f, int a) { return part(unit_root(a * (4 * f + 1), 64), first_re, first_minus_im); });
  if (which <= turn_im)
    return matrix_unit(lane, [&](int f, int b) { return part(unit_root(b * (4 * f + 1), 1024), turn_re, -1); });
  if (which <= second_minus_im)
    return matrix_unit<true>(lane,
                             [&](int h, int b) { return part(unit_root(b * h, 16), second_re, second_minus_im); });
  if (which <= back_minus_im)
    return matrix_unit(lane, [&](int row, int h) {
      return 0.0625f * part(unit_root(output_place(row) * h, 16), back_re, back_minus_im);
    });
  if (which <= turn_back_im)
    return matrix_unit(lane, [&](int row, int f) {
      return part(unit_root(output_place(row) * (4 * f + 1), 1024), turn_back_re, turn_back_im);
    });
  return matrix_unit(
      lane, [&](int a, int f) { return 0.0625f * part(unit_root(a * (4 * f + 1), 64), last_re, last_minus_im); });
}

/// Units that lie in memory, [unit][lane].
struct StoredRoots {
  const uint4* units;
  int lane;
  __device__ uint4 operator()(int which) const { return __ldg(units + which * 32 + lane); }
};

/// Two complex pairs in one unit.
__device__ inline void take_unit(uint4 unit, ComplexPair& first, ComplexPair& second) {
  first = complex_pair(unit.x, unit.y), second = complex_pair(unit.z, unit.w);
}
__device__ inline uint4 unit_of(ComplexPair first, ComplexPair second) {
  return {bits(first.re), bits(first.im), bits(second.re), bits(second.im)};
}

/// A part as it lies in a lane's registers: pair 2 s + q has f = group + 8 s and h = 2 column + 8 q and the next one.
using Part = ComplexPair[4];

__device__ inline void multiply_turns(std::uint32_t (&re)[2][2], std::uint32_t (&im)[2][2], const uint4& turn_re,
                                      const uint4& turn_im) {
  const std::uint32_t c[4] = {turn_re.x, turn_re.y, turn_re.z, turn_re.w};
  const std::uint32_t s[4] = {turn_im.x, turn_im.y, turn_im.z, turn_im.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const ComplexPair z = complex_pair(re[i >> 1][i & 1], im[i >> 1][i & 1]) * complex_pair(c[i], s[i]);
    re[i >> 1][i & 1] = bits(z.re), im[i >> 1][i & 1] = bits(z.im);
  }
}

/// The way there. `Complex` inputs have imaginary parts.
template <bool Complex>
struct PartForward {
  uint4 first_re, first_im, first_minus_im, turn_re, turn_im, second_re, second_im, second_minus_im;

  template <class Roots>
  __device__ explicit PartForward(const Roots& roots)
      : first_re(roots(detail::first_re)),
        first_im(roots(detail::first_im)),
        first_minus_im(Complex ? roots(detail::first_minus_im) : uint4{}),
        turn_re(roots(detail::turn_re)),
        turn_im(roots(detail::turn_im)),
        second_re(roots(detail::second_re)),
        second_im(roots(detail::second_im)),
        second_minus_im(roots(detail::second_minus_im)) {}

  /// word(imaginary, q, k) has the inputs of a = 2 column + 8 k and the next one, for b = group + 8 q.
  template <class Words>
  __device__ __forceinline__ void operator()(const Words& word, Part& to) const {
    std::uint32_t re[2][2], im[2][2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const std::uint32_t low = word(false, q, 0), high = word(false, q, 1);
      arch::multiply_halves(re[q], first_re, low, high);
      arch::multiply_halves(im[q], first_im, low, high);
      if constexpr (Complex) {
        const std::uint32_t imaginary_low = word(true, q, 0), imaginary_high = word(true, q, 1);
        arch::multiply_add_halves(re[q], first_minus_im, imaginary_low, imaginary_high);
        arch::multiply_add_halves(im[q], first_re, imaginary_low, imaginary_high);
      }
    }
    multiply_turns(re, im, turn_re, turn_im);
    const uint4 a_re = {re[0][0], re[0][1], re[1][0], re[1][1]}, a_im = {im[0][0], im[0][1], im[1][0], im[1][1]};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const auto low = [&](const uint4& unit) { return q ? unit.z : unit.x; };
      const auto high = [&](const uint4& unit) { return q ? unit.w : unit.y; };
      std::uint32_t x[2], y[2];
      arch::multiply_halves(x, a_re, low(second_re), high(second_re));
      arch::multiply_halves(y, a_re, low(second_im), high(second_im));
      arch::multiply_add_halves(x, a_im, low(second_minus_im), high(second_minus_im));
      arch::multiply_add_halves(y, a_im, low(second_re), high(second_re));
      to[q] = complex_pair(x[0], y[0]), to[2 + q] = complex_pair(x[1], y[1]);
    }
  }
};

/// The way back: the real parts of the points, and for `Complex` their imaginary parts.
template <bool Complex>
struct PartBackward {
  uint4 back_re, back_im, back_minus_im, turn_re, turn_im, last_re, last_im, last_minus_im;

  template <class Roots>
  __device__ explicit PartBackward(const Roots& roots)
      : back_re(roots(detail::back_re)),
        back_im(roots(detail::back_im)),
        back_minus_im(roots(detail::back_minus_im)),
        turn_re(roots(detail::turn_back_re)),
        turn_im(roots(detail::turn_back_im)),
        last_re(roots(detail::last_re)),
        last_im(roots(detail::last_im)),
        last_minus_im(Complex ? roots(detail::last_minus_im) : uint4{}) {}

  /// out[d][k] has a = group + 8 (k / 2) and b = column + 4 (k % 2) + 8 d.
  __device__ __forceinline__ void operator()(const Part& from, float (&re_out)[2][4], float (&im_out)[2][4]) const {
    std::uint32_t re[2][2], im[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const std::uint32_t re_low = bits(from[2 * s].re), re_high = bits(from[2 * s + 1].re);
      const std::uint32_t im_low = bits(from[2 * s].im), im_high = bits(from[2 * s + 1].im);
      arch::multiply_halves(re[s], back_re, re_low, re_high);
      arch::multiply_halves(im[s], back_re, im_low, im_high);
      arch::multiply_add_halves(re[s], back_im, im_low, im_high);
      arch::multiply_add_halves(im[s], back_minus_im, re_low, re_high);
    }
    multiply_turns(re, im, turn_re, turn_im);
#pragma unroll
    for (int d = 0; d < 2; ++d) {
#pragma unroll
      for (int k = 0; k < 4; ++k) re_out[d][k] = 0;
      arch::multiply_add_halves(re_out[d], last_re, re[0][d], re[1][d]);
      arch::multiply_add_halves(re_out[d], last_im, im[0][d], im[1][d]);
      if constexpr (Complex) {
#pragma unroll
        for (int k = 0; k < 4; ++k) im_out[d][k] = 0;
        arch::multiply_add_halves(im_out[d], last_re, im[0][d], im[1][d]);
        arch::multiply_add_halves(im_out[d], last_minus_im, re[0][d], re[1][d]);
      }
    }
  }
};

}  // namespace chela::cuda::detail
