#pragma once
// The gradient of scalar log-decays from what the passes of dq and dk left behind (decay_sums.cuh): a sum along each window
// of tokens that begins with the window's anchor, and anew at resets. In double, in a fixed order.
#include "chela/cuda/attention/decay_sums.cuh"

namespace chela::cuda::detail {

struct DecayGradient {
  SequenceBatch sequences;
  int heads = 1, state_heads = 1;
  int row_parts = 1, anchor_parts = 1;            ///< that each row sum and each anchor is to be summed from
  const float *query_rows = nullptr, *key_rows = nullptr, *anchors = nullptr;
  float scale = 1;
  TensorView<const float, 3> log_decay = {};  ///< [batch, token, state_head]
  TensorView<float, 3> per_token = {};        ///< like log_decay, or absent
  double* totals = nullptr;                   ///< [window, state_head]: sums over tokens, or absent
  TensorView<float, 1> per_head = {};         ///< [state_head], or absent
};

/// Windows of all sequences, or more: as many blocks per head.
CHELA_HOST_DEVICE constexpr Index most_windows(const SequenceBatch& sequences) {
  return most_inner_windows(sequences) + sequences.size();
}

/// Where a sequence's windows begin among all.
__device__ inline Index first_window(const SequenceBatch& sequences, Index sequence) {
  const Sequence s = sequences[sequence];
  return (s.batch * sequences.tokens + s.begin) / window_len + sequence;
}

/// A sum along tokens that begins anew at resets: what a run of tokens does to it.
struct ResettingSum {
  double sum = 0;
  int reset = 0;

  friend __device__ ResettingSum then(ResettingSum earlier, ResettingSum later) {
    return {later.reset ? later.sum : earlier.sum + later.sum, earlier.reset | later.reset};
  }
};

inline constexpr int decay_gradient_threads = 256;

/// One block per window and state head, heads side by side.
template <class = void>
__global__ void __launch_bounds__(decay_gradient_threads)
    decay_gradient(const __grid_constant__ DecayGradient args) {
  constexpr int each = window_len / decay_gradient_threads, warps = decay_gradient_threads / 32;
  __shared__ ResettingSum of_warps[warps];
  __shared__ double anchor, of_tokens[warps];
  const SequenceBatch& sequences = args.sequences;
  const Index slot = blockIdx.x / unsigned(args.state_heads);
  const int state_head = int(blockIdx.x % unsigned(args.state_heads));
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;

  Index sequence = 0;
  for (Index end = sequences.size(); end - sequence > 1;) {
    const Index middle = (sequence + end) / 2;
    (first_window(sequences, middle) <= slot ? sequence : end) = middle;
  }
  const Sequence s = sequences[sequence];
  const Index window = slot - first_window(sequences, sequence);
  const int tokens = int(min(s.count - window * window_len, Index(window_len)));
  if (tokens <= 0) {
    if (thread == 0 && args.totals) args.totals[blockIdx.x] = 0;
    return;
  }

  const int run_length = args.heads / args.state_heads, first_head = state_head * run_length;
  const Index token = s.begin + window * window_len + each * thread;  // of its batch entry
  double x[each] = {};
  int resets[each] = {};
  ResettingSum mine;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (each * thread + i >= tokens) break;
    for (int head = first_head; head < first_head + run_length; ++head)
      for (int part = 0; part < args.row_parts; ++part) {
        const Index at =
            ((part * sequences.batch + s.batch) * args.heads + head) * sequences.tokens + token + i;
        x[i] += double(args.key_rows[at]) - double(args.query_rows[at]);
      }
    resets[i] = is_reset(log2_e * args.log_decay(s.batch, token + i, state_head));
    mine = then(mine, {x[i], resets[i]});
  }
  if (warp == 0) {
    const Index place = window > 0 ? sequences.size() + inner_window(sequences, s.batch, s.begin, int(window) * window_len)
                                   : sequence;
    const float* const from = args.anchors + (place * args.heads + first_head) * args.anchor_parts;
    double sum = 0;
    for (int i = lane; i < run_length * args.anchor_parts; i += 32) sum += double(from[i]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) anchor = sum;
  }

  ResettingSum before = mine;  // of the warp's threads up to this one, then of those before it
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const ResettingSum earlier{__shfl_up_sync(~0u, before.sum, step), __shfl_up_sync(~0u, before.reset, step)};
    if (lane >= step) before = then(earlier, before);
  }
  if (lane == 31) of_warps[warp] = before;
  before = {__shfl_up_sync(~0u, before.sum, 1), __shfl_up_sync(~0u, before.reset, 1)};
  if (lane == 0) before = {};
  __syncthreads();
  ResettingSum all{anchor, 0};
  for (int i = 0; i < warp; ++i) all = then(all, of_warps[i]);
  double sum = then(all, before).sum, total = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (each * thread + i >= tokens) break;
    if (resets[i]) sum = 0;
    const float gradient = float(double(args.scale) * sum);
    if (args.per_token.present()) args.per_token(s.batch, token + i, state_head) = gradient;
    total += double(gradient);
    sum += x[i];
  }
  if (!args.totals) return;
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  if (lane == 0) of_tokens[warp] = total;
  __syncthreads();
  if (thread > 0) return;
  total = 0;
  for (int i = 0; i < warps; ++i) total += of_tokens[i];
  args.totals[blockIdx.x] = total;
}

/// The gradient per head: one block per state head.
template <class = void>
__global__ void __launch_bounds__(decay_gradient_threads)
    sum_decay_gradients(const __grid_constant__ DecayGradient args) {
  __shared__ double sums[decay_gradient_threads];
  const Index windows = most_windows(args.sequences);
  double sum = 0;
  for (Index i = threadIdx.x; i < windows; i += decay_gradient_threads)
    sum += args.totals[i * args.state_heads + blockIdx.x];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
  for (double x : sums) sum += x;
  args.per_head(blockIdx.x) = float(sum);
}

}  // namespace chela::cuda::detail
