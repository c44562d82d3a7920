#pragma once
// What passes of gradients leave behind for the gradient of log-decays. With S_t the state after token t, X_t its gradient,
// and dq, dk without what a token does to itself,
//
//   dg_t = <a_t S_{t-1}, X_t> = <S_w, X_w> + sum_{w <= s < t} (k_s . dk_s - q_s . dq_s)
//
// for any w <= t, S_w and X_w being the state and its gradient at w's beginning, before its decay. A sum that began with the
// sequence would gather the roundings of all its states, so it begins anew with every window of tokens: the pass of dq, in
// time, keeps S_w, and that of dk, back in time, multiplies with it. What a token does to itself would cancel, but not
// its rounding: where decays are strong it is all there is.
#include "chela/cuda/attention/linear_pass.cuh"

namespace chela::cuda::detail {

/// Tokens of a window, a power of two. Keeping a state for each of the long ones takes 4% of the traffic of 16-bit
/// elements, and leaves gradients per token with errors up to 0.7% (bfloat16). The gradient of a log-decay per head is a
/// sum over all tokens, in which terms of both signs cancel and what was gathered in a window does not: with the long ones
/// its error reached 8%, with the short ones 2%, at the price of a third more traffic.
inline constexpr int long_window = 16 * chunk_len, short_window = 2 * chunk_len;

/// The place among all windows of the one that begins at this token of a sequence, not its first: sequences lie one
/// behind the other, and of the windows of one, at most as many begin inside it.
__device__ inline Index inner_window(const SequenceBatch& sequences, int window, Index batch, Index first_token,
                                     int token) {
  return (batch * sequences.tokens + first_token) / window + token / window - 1;
}
/// Inner windows of all sequences, or more.
CHELA_HOST_DEVICE constexpr Index most_inner_windows(const SequenceBatch& sequences, int window) {
  return sequences.batch * sequences.tokens / window;
}
/// The place among all anchors of a window's: first those of the sequences' first windows, then those of inner ones.
__device__ inline Index anchor_place(const SequenceBatch& sequences, int window, Index sequence, Index batch,
                                     Index first_token, int token) {
  return token == 0 ? sequence : sequences.size() + inner_window(sequences, window, batch, first_token, token);
}

/// A warp's part of a kept state, 16 value columns: lane l has 4 registers in a row, then the next lane.
template <int Registers>
__device__ float4* kept_state(const LinearPass& pass, const Place& place, int token, int row, int lane) {
  const Index window = inner_window(pass.sequences, pass.sums.window, place.batch, place.first_token, token);
  const Index heads = pass.heads.outputs / pass.heads.outputs_per_state / pass.heads.states_per_given;
  const Index part = (window * heads + place.given_head) * (pass.value_dim / 16) + row / 16;
  return reinterpret_cast<float4*>(pass.sums.kept_states) + part * (8 * Registers) + lane;
}

/// Before the chunk that begins at `token`, in time.
template <int Registers>
__device__ void keep_state(const float (&state_t)[Registers], const LinearPass& pass, const Place& place, int token,
                           int row, int lane) {
  if (token == 0 || (token & (pass.sums.window - 1)) != 0 || !writes_states(pass, place) || row >= pass.value_dim)
    return;
  float4* const to = kept_state<Registers>(pass, place, token, row, lane);
#pragma unroll
  for (int i = 0; i < Registers / 4; ++i)
    to[32 * i] = {state_t[4 * i], state_t[4 * i + 1], state_t[4 * i + 2], state_t[4 * i + 3]};
}

/// After the chunk that begins at `token`, back in time: this warp's part of <S_w, X_w>.
template <int Registers>
__device__ void store_anchor(const float (&state_t)[Registers], const LinearPass& pass, const Place& place, int token,
                             int row, int lane) {
  if ((token & (pass.sums.window - 1)) != 0 || row - lane / 4 >= pass.value_dim) return;
  float sum = 0;
  if (token > 0) {
    const float4* const from = kept_state<Registers>(pass, place, token, row, lane);
#pragma unroll
    for (int i = 0; i < Registers / 4; ++i) {
      const float4 kept = from[32 * i];
      sum += kept.x * state_t[4 * i] + kept.y * state_t[4 * i + 1] + kept.z * state_t[4 * i + 2] +
             kept.w * state_t[4 * i + 3];
    }
  } else if (pass.sums.first_states.present()) {
    for_each_state_element<Registers>(state_of(pass.sums.first_states, place.sequence, place.given_head), row, lane,
                                      [&](int i, const float& x) { sum += x * state_t[i]; });
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const Index window =
      anchor_place(pass.sequences, pass.sums.window, place.sequence, place.batch, place.first_token, token);
  if (lane == 0) pass.sums.anchors[(window * pass.heads.outputs + place.head) * (pass.value_dim / 16) + row / 16] = sum;
}

/// Where the sums over one part of the columns go, of the tokens of a block's sequence.
__device__ inline float* row_sums(const LinearPass& pass, const Place& place, int part) {
  return pass.sums.rows +
         ((Index(part) * pass.sequences.batch + place.batch) * pass.heads.outputs + place.head) *
             pass.sequences.tokens +
         place.first_token;
}

/// One step of sum_over_rows: lanes 4 Width apart exchange halves of the 4 Width sums that both have of different rows.
template <int Width>
__device__ void exchange_sums(float (&sums)[16], int lane) {
  const bool upper = (lane & (4 * Width)) != 0;
#pragma unroll
  for (int i = 0; i < 2 * Width; ++i) {
    const float kept = upper ? sums[i + 2 * Width] : sums[i], given = upper ? sums[i] : sums[i + 2 * Width];
    sums[i] = kept + __shfl_xor_sync(~0u, given, 4 * Width);
  }
}
/// Sums over the 16 rows of a warp's transposed tile, of which this lane has columns 8 j + 2 (lane % 4) and the next in
/// sums[2 j] and sums[2 j + 1]: those of columns 2 lane and 2 lane + 1.
__device__ inline float2 sum_over_rows(float (&sums)[16], int lane) {
  exchange_sums<4>(sums, lane), exchange_sums<2>(sums, lane), exchange_sums<1>(sums, lane);
  return {sums[0], sums[1]};
}

}  // namespace chela::cuda::detail
