#pragma once
// A row of 256 R points, R up to 8, transformed by one warp in its registers.
#include "chela/cuda/conv/half_parts.cuh"

namespace chela::cuda::detail {

/// An organisation of a row is how its points lie with the lanes of its warps. In the middle, between the way there and
/// the way back, each lane has the spectrum in `portions` of `pairs` complex pairs, which are units of 16 bytes: unit
/// (portion * pairs / 2 + i) * 32 + lane of a spectrum in memory.
template <int R>
class WarpRow {
 public:
  static constexpr int residues = R, points = 256 * R;
  static constexpr int warps = 1, rows_per_block = 4, threads = 32;
  static constexpr int own = R;  ///< neighbouring residues that a warp loads and stores
  static constexpr int portions = 2, pairs = 2 * R;
  static constexpr int work_bytes = 0;
  static constexpr int roots = part_roots + 2 * (R - 1);
  static constexpr int normalisation = R;  ///< what the way back multiplies by
  static constexpr int blocks_per_multiprocessor = R <= 2 ? 8 : R <= 4 ? 6 : R <= 6 ? 4 : 3;

  /// Unit `which` of all constants, those of parts first: then the twiddle of residue c at a lane's pairs 2 s, 2 s + 1
  /// of a part as unit 2 (c - 1) + s.
  __device__ static uint4 root(int which, int lane) {
    if (which < part_roots) return part_root(which, lane);
    const int c = (which - part_roots) / 2 + 1, s = (which - part_roots) % 2;
    const LanePlace p(lane);
    const auto pair = [&](int q) {
      float2 x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = p.group + 8 * s + 16 * (2 * p.column + 8 * q + e);
        x[e] = unit_root(c * (4 * k + 1), 4 * points);
      }
      return ComplexPair{__floats2half2_rn(x[0].x, x[1].x), __floats2half2_rn(x[0].y, x[1].y)};
    };
    return unit_of(pair(0), pair(1));
  }

  /// `work_bytes` of memory, the warp of the row, its lane, and a barrier of the row's own.
  __device__ WarpRow(char*, int, int lane, int = 0) : lane_(lane) {}
  __device__ int first_residue() const { return 0; }
  __device__ int lane() const { return lane_; }
  __device__ int thread() const { return lane_; }
  __device__ void sync() const { __syncwarp(); }
  /// The largest of all threads' x, which are not negative.
  __device__ float largest(float x) const { return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x))); }
  __device__ float sum(float x) const {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
    return x;
  }

  /// word(c, imaginary, q, k) gives the inputs of residue c to PartForward.
  template <bool Complex, class Words>
  __device__ __forceinline__ void forward(const PartForward<Complex>& part, const Words& word) {
#pragma unroll
    for (int c = 0; c < R; ++c) part([&](bool imaginary, int q, int k) { return word(c, imaginary, q, k); }, parts_[c]);
  }

  /// Calls middle(portion, spectrum) with each portion, which is the row's if it comes from `forward`, and goes `backward`
  /// if it is to.
  template <bool Forward, bool Backward, class Roots, class Middle>
  __device__ __forceinline__ void middle(const Roots& roots, const Middle& middle) {
#pragma unroll
    for (int s = 0; s < portions; ++s) {
      ComplexPair z[pairs];
      if constexpr (Forward) spectrum_of_portion(roots, s, z);
      middle(s, z);
      if constexpr (Backward) put_portion_back(roots, s, z);
    }
  }
  /// Both ways with the spectrum of another row that has come `forward`: calls middle(portion, spectrum, of_other).
  template <class Roots, class Middle>
  __device__ __forceinline__ void middle_with(const WarpRow& other, const Roots& roots, int, int,
                                              const Middle& middle) {
#pragma unroll
    for (int s = 0; s < portions; ++s) {
      ComplexPair z[pairs], of_other[pairs];
      other.spectrum_of_portion(roots, s, of_other);
      spectrum_of_portion(roots, s, z);
      middle(s, z, of_other);
      put_portion_back(roots, s, z);
    }
  }

  /// Calls take(c, re, im) with the results of each residue c, as PartBackward gives them.
  template <bool Complex, class Roots, class Take>
  __device__ __forceinline__ void backward(const Roots& roots, const Take& take) const {
    const PartBackward<Complex> part(roots);
#pragma unroll
    for (int c = 0; c < R; ++c) {
      float re[2][4], im[2][4];
      part(parts_[c], re, im);
      take(c, re, im);
    }
  }

 private:
  template <class Roots>
  __device__ __forceinline__ void spectrum_of_portion(const Roots& roots, int s, ComplexPair (&z)[pairs]) const {
#pragma unroll
    for (int c = 0; c < R; ++c) {
      z[2 * c] = parts_[c][2 * s], z[2 * c + 1] = parts_[c][2 * s + 1];
      if (c > 0) turn<false>(roots, c, s, z);
    }
    small_transforms<R, 1, 2>(z);
  }
  template <class Roots>
  __device__ __forceinline__ void put_portion_back(const Roots& roots, int s, ComplexPair (&z)[pairs]) {
    small_transforms<R, -1, 2>(z);
#pragma unroll
    for (int c = 0; c < R; ++c) {
      if (c > 0) turn<true>(roots, c, s, z);
      parts_[c][2 * s] = z[2 * c], parts_[c][2 * s + 1] = z[2 * c + 1];
    }
  }
  template <bool Conjugate, class Roots>
  __device__ __forceinline__ static void turn(const Roots& roots, int c, int s, ComplexPair (&z)[pairs]) {
    ComplexPair first, second;
    take_unit(roots(part_roots + 2 * (c - 1) + s), first, second);
    z[2 * c] = times<Conjugate>(z[2 * c], first), z[2 * c + 1] = times<Conjugate>(z[2 * c + 1], second);
  }

  int lane_;
  ComplexPair parts_[R][4];
};

}  // namespace chela::cuda::detail
