#pragma once
// Sizes of transforms that one thread block computes, and how the points meet the threads.
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/conv/float_transform_trees.cuh"

namespace chela::cuda::detail {

/// One row of Points complex points: each thread holds PerThread of them in every pass. Pass 0 is one tree (or three, if
/// PerThread is three times a power of two) over points Points / PerThread apart; below it a pass of radix r splits
/// every block into r.
///
/// Between two passes points change threads through shared memory. A thread stores what it computed where it loaded it,
/// so that one barrier is enough.
template <int Points, int PerThread, int... Radices>
struct RowSize {
  static constexpr int points = Points, per_thread = PerThread, threads = Points / PerThread;
  static constexpr int odd = PerThread % 3 == 0 ? 3 : 1, passes = 1 + sizeof...(Radices);
  CHELA_HOST_DEVICE static constexpr int radix(int pass) {
    constexpr int all[] = {PerThread, Radices...};
    return all[pass];
  }
  static_assert((PerThread * ... * Radices) == Points, "the radices must multiply to the number of points");

  /// Of a pass, the points of a block and the distance of the points in a tree.
  CHELA_HOST_DEVICE static constexpr int block(int pass) {
    return pass == 0 ? Points : block(pass - 1) / radix(pass - 1);
  }
  CHELA_HOST_DEVICE static constexpr int stride(int pass) { return block(pass) / radix(pass); }
  CHELA_HOST_DEVICE static constexpr int trees(int pass) { return PerThread / radix(pass); }  ///< of each thread

  /// Shared memory has a gap after so many points, against bank conflicts of the last pass.
  static constexpr int gap_shift = radix(passes - 1) == 32 ? 5 : 4;
  CHELA_HOST_DEVICE static constexpr int padded(int place) { return place + (place >> gap_shift); }

  /// Rows share a block of threads that would be small.
  static constexpr int rows = threads < 128 ? 128 / threads : 1;
  static constexpr int block_threads = rows * threads;
  static constexpr int shared_bytes = rows * padded(Points) * int(sizeof(float2));
  /// Threads that a multiprocessor should hold, which limits their registers.
  static constexpr int resident_threads = PerThread <= 16 ? 768 : PerThread <= 24 ? 640 : 512;
  static constexpr int resident_blocks = resident_threads / block_threads > 0 ? resident_threads / block_threads : 1;
};

/// Calls f(RowSize) for a number of points that has one.
template <class F>
auto with_row_size(int points, F f) {
  switch (points) {
    case 256:
      return f(RowSize<256, 16, 16>{});
    case 384:
      return f(RowSize<384, 24, 8, 2>{});
    case 512:
      return f(RowSize<512, 32, 16>{});
    case 768:
      return f(RowSize<768, 24, 8, 4>{});
    case 1024:
      return f(RowSize<1024, 16, 16, 4>{});
    case 1536:
      return f(RowSize<1536, 24, 8, 8>{});
    case 2048:
      return f(RowSize<2048, 16, 16, 8>{});
    case 3072:
      return f(RowSize<3072, 24, 8, 8, 2>{});
    case 4096:
      return f(RowSize<4096, 16, 16, 16>{});
    case 6144:
      return f(RowSize<6144, 24, 8, 8, 4>{});
    case 8192:
      return f(RowSize<8192, 32, 16, 16>{});
    case 12288:
      return f(RowSize<12288, 24, 8, 8, 8>{});
    default:
      return f(RowSize<16384, 32, 32, 16>{});
  }
}

/// What thread `t` of a row computes in each pass.
template <class S>
struct RowThread {
  static constexpr int per_thread = S::per_thread;
  int t;

  /// In pass P, where the first point of tree u lies, and its place in the block.
  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE int place(int u) const {
    return (t + S::threads * u) % S::stride(P);
  }
  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE int node(int u) const {
    return (t + S::threads * u) / S::stride(P);
  }
  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE int first(int u) const {
    return node<P>(u) * S::block(P) + place<P>(u);
  }

  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void store(const float2 (&x)[per_thread], float2* shared) const {
    for_each_constant<S::trees(P)>([&](auto u) {
      float2* to = shared + S::padded(first<P>(u));
      for_each_constant<S::radix(P)>([&](auto i) { to[S::padded(S::stride(P) * i)] = x[u * S::radix(P) + i]; });
    });
  }
  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void load(float2 (&x)[per_thread], const float2* shared) const {
    for_each_constant<S::trees(P)>([&](auto u) {
      const float2* from = shared + S::padded(first<P>(u));
      for_each_constant<S::radix(P)>([&](auto i) { x[u * S::radix(P) + i] = from[S::padded(S::stride(P) * i)]; });
    });
  }

  /// `angle` is the th of the row's root, which for a row of three trees is 1/4.
  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void forward(float2 (&x)[per_thread], float angle) const {
    if constexpr (P == 0) {
      if constexpr (S::odd > 1)
        forward_root<S::odd, per_thread / S::odd>(x);
      else
        forward_tree<per_thread>(x, TurnLadder<per_thread>(angle * (2.0f / per_thread)));
    } else {
      constexpr int radix = S::radix(P), nodes = S::points / S::block(P) / S::odd;  // of one of the trees
      for_each_constant<S::trees(P)>([&](auto u) {
        const int n = node<P>(u);
        float root = angle;
        if constexpr (S::odd > 1) root = (0.25f + float(n / nodes)) / float(S::odd);
        const float turns = fmaf(root, 1.0f / nodes, float(arch::reversed_bits(unsigned(n % nodes))) * 0x1p-32f);
        forward_tree<radix>(x + u * radix, TurnLadder<radix>(turns * (2.0f / radix)));
      });
    }
  }

  template <int P>
  CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void inverse(float2 (&x)[per_thread]) const {
    constexpr int radix = S::radix(P), stride = S::stride(P);
    if constexpr (P == 0) {
      inverse_root<S::odd, per_thread / S::odd>(x, float(t) * (1.0f / stride));
    } else if constexpr (stride == 1) {
      for_each_constant<S::trees(P)>([&](auto u) { innermost_inverse_tree<radix>(x + u * radix); });
    } else {
      for_each_constant<S::trees(P)>([&](auto u) {
        inverse_tree<radix>(x + u * radix, TurnLadder<radix>(float(place<P>(u)) * (2.0f / (stride * radix))));
      });
    }
  }
};

/// All passes of a row; `barrier()` comes between them.
template <class S, class Barrier>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void transform_row(const RowThread<S>& thread, float2 (&x)[S::per_thread],
                                                         float2* shared, float angle, const Barrier& barrier) {
  for_each_constant<S::passes>([&](auto p) {
    if constexpr (p > 0) thread.template load<p>(x, shared);
    thread.template forward<p>(x, angle);
    if constexpr (p + 1 < S::passes) {
      thread.template store<p>(x, shared);
      barrier();
    }
  });
}
template <class S, class Barrier>
CHELA_HOST_DEVICE CHELA_ALWAYS_INLINE void transform_row_back(const RowThread<S>& thread, float2 (&x)[S::per_thread],
                                                              float2* shared, const Barrier& barrier) {
  for_each_constant<S::passes>([&](auto from_inside) {
    constexpr int p = S::passes - 1 - from_inside;
    if constexpr (p + 1 < S::passes) thread.template load<p>(x, shared);
    thread.template inverse<p>(x);
    if constexpr (p > 0) {
      thread.template store<p>(x, shared);
      barrier();
    }
  });
}

}  // namespace chela::cuda::detail
