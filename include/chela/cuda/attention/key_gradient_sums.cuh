#pragma once
// The gradient of log-decays per key, on the way of the walks of dq and dk (key_gradient_pass.cuh). With dq and dk without
// what a token does to itself, key by key
//
//   dg_t = dg_{t+1} + q_t dq_t - k_t dk_t
//
// The walk of dq, in time, leaves its dq behind; that of dk, back in time, sums. What a token does to itself would cancel, but
// not its rounding: where decays are strong it is all there is. A sum along the whole sequence would gather the roundings of
// all its states, so it begins anew with every window of tokens, at whose beginning w
//
//   dg_w = sum over values of S_w X_w
//
// S_w and X_w being the state and its gradient before w's decay: the walk of dq keeps S_w. Where a window's sum arrives at
// is known as well: what it arrives at instead are the roundings gathered on the way, which are taken off evenly. At the end
// of the sequence, where there is no decay any more, the state that the last token reads takes the place of S_w, and that
// token's k dk is left out.
#include "chela/cuda/attention/decay_sums.cuh"
#include "chela/cuda/attention/key_gradient_block.cuh"

namespace chela::cuda::detail {

/// Tokens of a window, and the blocks of terms that are in shared memory at once: its own, and one of the next. Windows of
/// twice the length would save 1/2 of a tensor's traffic of 16-bit elements for 128 values, and leave errors above 1%
/// (bfloat16) where decays are strong.
inline constexpr int key_window = 128, sum_tiles = key_window / 16 + 1;

/// What the walks of dq and dk need beside a pass. Absent where null.
template <class T>
struct KeyDecayGradient {
  TensorView<T, 4> queries = {};                   ///< dq / scale without own terms, [batch, token, head, key_dim]
  T* kept_states = nullptr;                        ///< [inner window, state head, 16 keys, fragment]
  float* kept_ends = nullptr;                      ///< [sequence, state head, 16 keys, fragment]
  bool ends_at_zero = true;                        ///< no gradient flows into final states
  TensorView<const float, 5> segment_states = {};  ///< of the walk of dq
  TensorView<float, 4> log_decay = {};             ///< the gradient, [batch, token, head, key_dim]
};

/// The term of a token with a reset, which ends sums: a number that no sum gives.
__device__ inline float reset_mark() { return __uint_as_float(~0u); }

/// A lane's units of a state [16 keys, values] in memory, the next one 32 units on.
template <int Registers, class X>
__device__ uint4* kept_units(X* states, const LinearPass& pass, const Place& place, Index n, int row, int lane) {
  const HeadSharing& heads = pass.heads;
  const Index count = heads.outputs / heads.outputs_per_state / heads.states_per_given;
  const Index part = (n * count + place.given_head) * (pass.value_dim / 16) + row / 16;
  return reinterpret_cast<uint4*>(states + part * (32 * Registers)) + lane;
}

/// Calls f(unit, first of so many registers in it), for kept elements of type X.
template <class X, int Registers, class F>
__device__ void for_each_kept(F f) {
  constexpr int each = 16 / int(sizeof(X));
#pragma unroll
  for (int i = 0; i < Registers / each; ++i) f(32 * i, each * i);
}

template <class X, int Registers>
__device__ void keep_keys(uint4* to, const float (&state)[Registers]) {
  for_each_kept<X, Registers>([&](int unit, int i) {
    const float* const s = state + i;
    if constexpr (sizeof(X) == sizeof(float))
      to[unit] = {__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]), __float_as_uint(s[3])};
    else
      to[unit] = {arch::pack<X>(s[0], s[1]), arch::pack<X>(s[2], s[3]), arch::pack<X>(s[4], s[5]),
                  arch::pack<X>(s[6], s[7])};
  });
}

/// sums += products of a kept state with this one, of a lane's two keys.
template <class X, int Registers>
__device__ void multiply_kept(float (&sums)[2], const uint4* from, const float (&state)[Registers]) {
  for_each_kept<X, Registers>([&](int unit, int i) {
    const uint4 kept = from[unit];
    const std::uint32_t words[] = {kept.x, kept.y, kept.z, kept.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (sizeof(X) == sizeof(float)) {
        sums[j / 2] += __uint_as_float(words[j]) * state[i + j];
      } else {
        const float2 pair = arch::unpack<X>(words[j]);
        sums[j % 2] += pair.x * state[i + 2 * j] + pair.y * state[i + 2 * j + 1];
      }
    }
  });
}

/// The same with a state in its own layout.
template <int Registers>
__device__ void multiply_given(float (&sums)[2], TensorView<const float, 2> given, const float (&state)[Registers],
                               int row, int lane) {
  for_each_state_element<Registers>(given, row + lane / 4, lane,
                                    [&](int i, const float& x) { sums[i / 2 % 2] += x * state[i]; });
}

/// Sums over a lane's values to those over all.
__device__ inline void sum_over_values(float (&sums)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
    sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
  }
}

template <int Registers, class T>
__device__ uint4* kept_state(const KeyDecayGradient<T>& decay, const LinearPass& pass, const Place& place, int token,
                             int row, int lane) {
  return kept_units<Registers>(decay.kept_states, pass, place,
                               inner_window(pass.sequences, key_window, place.batch, place.first_token, token), row,
                               lane);
}
template <int Registers, class T>
__device__ uint4* kept_end(const KeyDecayGradient<T>& decay, const LinearPass& pass, const Place& place, int row,
                           int lane) {
  return kept_units<Registers>(decay.kept_ends, pass, place, place.sequence, row, lane);
}

/// The log-decays' gradient of the token after a segment, from this state's gradient there.
template <class T, int Registers>
__device__ void multiply_state_after(float (&sums)[2], const float (&state)[Registers], const LinearPass& pass,
                                     const KeyDecayGradient<T>& decay, const Place& place, bool at_end, int row,
                                     int lane) {
  if (!at_end)
    multiply_given(
        sums, state_of(slice(decay.segment_states, pass.segments - place.segment), place.sequence, place.given_head),
        state, row, lane);
  else if (!decay.ends_at_zero)
    multiply_kept<float>(sums, kept_end<Registers>(decay, pass, place, row, lane), state);
  sum_over_values(sums);
}

/// That of `token`, at the beginning of the sequence, of a window, or of a segment.
template <class T, int Registers>
__device__ void multiply_state_before(float (&sums)[2], const float (&state)[Registers], const LinearPass& pass,
                                      const KeyDecayGradient<T>& decay, const Place& place, int token, int row,
                                      int lane) {
  if (token > 0 && token % key_window == 0)
    multiply_kept<T>(sums, kept_state<Registers>(decay, pass, place, token, row, lane), state);
  else if (token > 0)
    multiply_given(
        sums,
        state_of(slice(decay.segment_states, pass.segments - 1 - place.segment), place.sequence, place.given_head),
        state, row, lane);
  else if (pass.sums.first_states.present())
    multiply_given(sums, state_of(pass.sums.first_states, place.sequence, place.given_head), state, row, lane);
  sum_over_values(sums);
}

/// The sums of a block of threads. Back in time.
template <class Tiles>
class GradientSums {
 public:
  /// `token`: that after the first block to come. Its gradient, key by key, is in `anchors` of the tiles.
  __device__ void begin(const Tiles& tiles, int token, int thread) {
    top_ = end_ = token;
    if (thread >= 8 * Tiles::key_units) return;
    key_ = 4 * thread;
    sum_ = arch::load_shared_float(tiles.anchors() + unsigned(key_));
  }

  /// Sums along the terms of one block from `token` on, in place, each thread for one key; and if it `ends` a window, leaves
  /// what is to be taken off its sums.
  __device__ void add_block(const Tiles& tiles, int token, int step, bool ends) {
    if (key_ < 0) return;
    const std::uint32_t tile = tiles.terms(step) + unsigned(key_);
    float terms[16];
#pragma unroll
    for (int t = 0; t < 16; ++t) terms[t] = arch::load_shared_float(tile + unsigned(t * Tiles::float_row));
#pragma unroll
    for (int t = 15; t >= 0; --t) {
      const bool resets = __float_as_uint(terms[t]) == ~0u;
      sum_ = resets ? 0.f : sum_ + terms[t];
      if (resets) top_ = token + t;
      arch::store_shared_float(tile + unsigned(t * Tiles::float_row), sum_);
    }
    if (!ends) return;
    const float known = arch::load_shared_float(tiles.anchors() + unsigned(key_));
    const float excess = top_ > token ? (sum_ - known) / float(top_ - token) : 0.f;
    arch::store_shared_float2(tiles.excess() + 2u * unsigned(key_), excess, float(top_ - token));
    sum_ = known, top_ = token;
  }

  /// Stores the window that begins at `token`, in the block of this step. All threads, two keys each.
  template <class T>
  __device__ void store_window(const Tiles& tiles, const KeyDecayGradient<T>& decay, const Place& place, int keys,
                               float scale, int token, int step, int thread) {
    constexpr int pairs = 4 * Tiles::key_units, together = Tiles::threads / pairs;
    const int pair = thread % pairs, count = min(end_, place.tokens) - token;
    end_ = token;
    if (place.value_begin + 2 * pair >= keys) return;
    const std::uint32_t excess = tiles.excess() + 16u * unsigned(pair);
    const float2 first = arch::load_shared_float2(excess), second = arch::load_shared_float2(excess + 8);
    const Index stride = decay.log_decay.strides[1];
    int t = thread / pairs;
    float* to = &decay.log_decay(place.batch, place.first_token + token + t, place.head, place.value_begin + 2 * pair);
#pragma unroll 4
    for (; t < count; t += together, to += together * stride) {
      const float2 sum =
          arch::load_shared_float2(tiles.terms(step - t / 16) + unsigned(t % 16 * Tiles::float_row + 8 * pair));
      const auto without = [&](float x, float2 by) { return scale * (x - by.x * fmaxf(by.y - float(t), 0.f)); };
      *reinterpret_cast<float2*>(to) = {without(sum.x, first), without(sum.y, second)};
    }
  }

 private:
  int key_ = -1;  ///< in bytes, or none
  float sum_ = 0;
  int top_ = 0, end_ = 0;  ///< the run of tokens without a reset, and the window, end before these
};

}  // namespace chela::cuda::detail
