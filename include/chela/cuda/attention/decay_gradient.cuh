#pragma once
// The gradient of scalar log-decays from what the passes of dq and dk left behind (decay_sums.cuh): a sum along each window
// of tokens that begins with the window's anchor, and anew at resets. Where it has to end is known too: with the next
// window's anchor, or before a reset with zero. What it ends with instead are the roundings gathered on the way; they are
// taken off evenly. In double, in a fixed order.
#include "chela/cuda/attention/decay_sums.cuh"

namespace chela::cuda::detail {

struct DecayGradient {
  SequenceBatch sequences;
  int heads = 1, state_heads = 1;
  int row_parts = 1, anchor_parts = 1;  ///< that each row sum and each anchor is to be summed from
  int window = long_window;
  bool ends_at_zero = true;  ///< no gradient flows into final states
  const float *query_rows = nullptr, *key_rows = nullptr, *anchors = nullptr;
  float scale = 1;
  TensorView<const float, 3> log_decay = {};  ///< [batch, token, state_head]
  TensorView<float, 3> per_token = {};        ///< like log_decay, or absent
  double* totals = nullptr;                   ///< [window, state_head]: sums over tokens, or absent
  TensorView<float, 1> per_head = {};         ///< [state_head], or absent
  bool adds = false;                          ///< to the gradients that are there
};

/// Windows of all sequences, or more: as many blocks per head.
CHELA_HOST_DEVICE constexpr Index most_windows(const SequenceBatch& sequences, int window) {
  return most_inner_windows(sequences, window) + sequences.size();
}

/// The sequence that comes at this place along the tokens.
__device__ inline Index sequence_at(const SequenceBatch& sequences, Index place) {
  return sequences.reversed && sequences.cu_seqlens.present() ? sequences.size() - 1 - place : place;
}
/// Where the windows of the sequence at this place begin among all.
__device__ inline Index first_window(const SequenceBatch& sequences, int window, Index place) {
  const Sequence s = sequences[sequence_at(sequences, place)];
  return (s.batch * sequences.tokens + s.begin) / window + place;
}

/// A sum along tokens that begins anew at resets: what a run of tokens does to it.
struct ResettingSum {
  double sum = 0;
  int reset = 0;

  friend __device__ ResettingSum then(ResettingSum earlier, ResettingSum later) {
    return {later.reset ? later.sum : earlier.sum + later.sum, earlier.reset | later.reset};
  }
};

inline constexpr int tokens_per_thread = 4, most_gradient_warps = long_window / tokens_per_thread / 32;

/// The anchor of the window that begins at `token` of a sequence, by one warp.
__device__ inline double anchor_of(const DecayGradient& args, Index sequence, int token, int state_head, int lane) {
  const Sequence s = args.sequences[sequence];
  const int run_length = args.heads / args.state_heads;
  const Index place = anchor_place(args.sequences, args.window, sequence, s.batch, s.begin, token);
  const float* const from = args.anchors + (place * args.heads + state_head * run_length) * args.anchor_parts;
  double sum = 0;
  for (int i = lane; i < run_length * args.anchor_parts; i += 32) sum += double(from[i]);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

/// One block per window and state head, heads side by side, a thread for each tokens_per_thread tokens of the window.
template <class = void>
__global__ void __launch_bounds__(32 * most_gradient_warps) decay_gradient(const __grid_constant__ DecayGradient args) {
  constexpr int each = tokens_per_thread;
  __shared__ ResettingSum of_warps[most_gradient_warps];
  __shared__ double reached[long_window + 1];                // by the sum before each token, and at the end
  __shared__ unsigned resets_of[most_gradient_warps][each];  // lane by lane
  __shared__ double begins, ends, totals[most_gradient_warps];
  const SequenceBatch& sequences = args.sequences;
  const Index slot = blockIdx.x / unsigned(args.state_heads);
  const int state_head = int(blockIdx.x % unsigned(args.state_heads));
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, warps = int(blockDim.x) / 32;

  Index place = 0;
  for (Index end = sequences.size(); end - place > 1;) {
    const Index middle = (place + end) / 2;
    (first_window(sequences, args.window, middle) <= slot ? place : end) = middle;
  }
  const Index sequence = sequence_at(sequences, place);
  const Sequence s = sequences[sequence];
  const int begin = int(slot - first_window(sequences, args.window, place)) * args.window;
  const int tokens = min(int(s.count) - begin, args.window);
  if (tokens <= 0) {
    if (thread == 0 && args.totals) args.totals[blockIdx.x] = 0;
    return;
  }
  const bool last = begin + tokens == int(s.count), end_known = !last || args.ends_at_zero;
  if (warp == 0) {
    const double first = anchor_of(args, sequence, begin, state_head, lane);
    const double next = last ? 0 : anchor_of(args, sequence, begin + tokens, state_head, lane);
    if (lane == 0) begins = first, ends = next;
  }

  const int run_length = args.heads / args.state_heads, mine = each * thread;
  const Index token = s.begin + begin + mine;  // of its batch entry
  double x[each] = {};
  bool resets[each] = {};
  ResettingSum own;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (mine + i < tokens) {
      for (int head = state_head * run_length; head < (state_head + 1) * run_length; ++head)
        for (int part = 0; part < args.row_parts; ++part) {
          const Index at = ((part * sequences.batch + s.batch) * args.heads + head) * sequences.tokens + token + i;
          x[i] += double(args.key_rows[at]) - double(args.query_rows[at]);
        }
      resets[i] = is_reset(log2_e * args.log_decay(s.batch, token + i, state_head));
      own = then(own, {x[i], resets[i]});
    }
    const unsigned votes = __ballot_sync(~0u, resets[i]);
    if (lane == 0) resets_of[warp][i] = votes;
  }

  ResettingSum before = own;  // of the warp's threads up to this one, then of those before it
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const ResettingSum earlier{__shfl_up_sync(~0u, before.sum, step), __shfl_up_sync(~0u, before.reset, step)};
    if (lane >= step) before = then(earlier, before);
  }
  if (lane == 31) of_warps[warp] = before;
  before = {__shfl_up_sync(~0u, before.sum, 1), __shfl_up_sync(~0u, before.reset, 1)};
  if (lane == 0) before = {};
  __syncthreads();
  ResettingSum all{begins, 0};
  for (int i = 0; i < warp; ++i) all = then(all, of_warps[i]);
  double sum = then(all, before).sum, prefix[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (mine + i >= tokens) break;
    reached[mine + i] = sum;
    if (resets[i]) sum = 0;
    prefix[i] = sum;
    sum += x[i];
    if (mine + i + 1 == tokens) reached[tokens] = sum;
  }
  __syncthreads();

  const auto is_reset_at = [&](int t) { return resets_of[t / (32 * each)][t % each] >> (t / each % 32) & 1; };
  bool any = false;
  for (int i = 0; i < warps * each; ++i) any = any || resets_of[i / each][i % each];
  double total = 0;
  int run_begin = 0, run_end = tokens;
  if (any) {
    for (run_begin = mine; run_begin > 0 && !is_reset_at(run_begin);) --run_begin;
    for (run_end = mine + 1; run_end < tokens && !is_reset_at(run_end);) ++run_end;
  }
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (mine + i >= tokens) break;
    if (any && i > 0 && resets[i]) {
      run_begin = mine + i;
      for (run_end = run_begin + 1; run_end < tokens && !is_reset_at(run_end);) ++run_end;
    }
    const double excess = run_end < tokens ? reached[run_end] : end_known ? reached[tokens] - ends : 0.0;
    const double share = double(mine + i - run_begin) / double(run_end - run_begin);
    const float gradient = float(double(args.scale) * (prefix[i] - excess * share));
    if (args.per_token.present()) {
      float& to = args.per_token(s.batch, token + i, state_head);
      to = args.adds ? to + gradient : gradient;
    }
    total += double(gradient);
  }
  if (!args.totals) return;
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  if (thread > 0) return;
  total = 0;
  for (int i = 0; i < warps; ++i) total += totals[i];
  args.totals[blockIdx.x] = total;
}

/// The gradient per head: one block of 256 threads per state head.
template <class = void>
__global__ void sum_decay_gradients(const __grid_constant__ DecayGradient args) {
  __shared__ double sums[256];
  const Index windows = most_windows(args.sequences, args.window);
  double sum = 0;
  for (Index i = threadIdx.x; i < windows; i += 256) sum += args.totals[i * args.state_heads + blockIdx.x];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
  for (double x : sums) sum += x;
  float& to = args.per_head(blockIdx.x);
  to = args.adds ? to + float(sum) : float(sum);
}

}  // namespace chela::cuda::detail
