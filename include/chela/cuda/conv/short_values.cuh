#pragma once
// What the kernels of the short convolution compute with: neighbouring elements moved at once, the activation, and sums
// over taps. Every output is the bias plus one product after the other from the oldest input to the newest, whatever
// kernel forms it, so that layouts, pieces and steps agree in their bits.
#include <cstdint>
#include <cstring>

#include "chela/conv/short.hpp"
#include "chela/cuda/arch/numbers.cuh"
#include "chela/cuda/element.cuh"

namespace chela::cuda::detail {

template <std::size_t Bytes>
struct WordsOf;
template <>
struct WordsOf<2> {
  using type = unsigned short;
};
template <>
struct WordsOf<4> {
  using type = unsigned int;
};
template <>
struct WordsOf<8> {
  using type = uint2;
};
template <>
struct WordsOf<16> {
  using type = uint4;
};

/// Neighbouring elements that one instruction moves.
template <class T, int Size>
struct Packet {
  using Words = typename WordsOf<Size * sizeof(T)>::type;
  Words words = {};

  __device__ static Packet load(const T* from) { return {*reinterpret_cast<const Words*>(from)}; }
  /// Of memory that nobody writes meanwhile and few read again.
  __device__ static Packet load_streamed(const T* from) { return {__ldcs(reinterpret_cast<const Words*>(from))}; }
  __device__ void store(T* to) const { *reinterpret_cast<Words*>(to) = words; }
  __device__ void store_streamed(T* to) const { __stcs(reinterpret_cast<Words*>(to), words); }

  __device__ static Packet rounded(const float (&values)[Size]) {
    Packet packet;
    if constexpr (Size == 1) {
      const T element = T(values[0]);
      memcpy(&packet.words, &element, sizeof(T));
    } else {
      std::uint32_t parts[Size * sizeof(T) / 4];
#pragma unroll
      for (int i = 0; i < int(Size * sizeof(T) / 4); ++i) {
        if constexpr (sizeof(T) == 4)
          parts[i] = __float_as_uint(values[i]);
        else
          parts[i] = arch::pack<T>(values[2 * i], values[2 * i + 1]);
      }
      memcpy(&packet.words, parts, sizeof(parts));
    }
    return packet;
  }
  __device__ void widen(float (&values)[Size]) const {
    if constexpr (Size == 1) {
      T element;
      memcpy(&element, &words, sizeof(T));
      values[0] = float(element);
    } else {
      std::uint32_t parts[Size * sizeof(T) / 4];
      memcpy(parts, &words, sizeof(parts));
#pragma unroll
      for (int i = 0; i < int(Size * sizeof(T) / 4); ++i) {
        if constexpr (sizeof(T) == 4) {
          values[i] = __uint_as_float(parts[i]);
        } else {
          const float2 pair = arch::unpack<T>(parts[i]);
          values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
        }
      }
    }
  }
};

/// exp(-a), as accurate as T can show.
template <class T>
__device__ float exp_of_negative(float a) {
  if constexpr (sizeof(T) < sizeof(float))
    return arch::exp2_flushed(-1.4426950408889634f * a);
  else
    return expf(-a);
}

/// What sums are multiplied by, exactly, before `activated_scaled`.
template <Activation A, class T>
inline constexpr float activation_scale = A == Activation::silu&& std::is_same_v<T, __nv_bfloat16> ? 0.5f : 1.f;

/// The activation of `scaled` over the scale. For bf16 silu(a) = a/2 + a/2 tanh(a/2), one special function where exp and a
/// division are two: off by 2^-12 of a at most, an eighth of a rounding of it.
template <Activation A, class T>
__device__ float activated_scaled(float scaled) {
  if constexpr (A != Activation::silu)
    return scaled;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return fmaf(scaled, arch::tanh_approximate(scaled), scaled);
  else
    return __fdividef(scaled, 1.f + exp_of_negative<T>(scaled));
}
template <Activation A, class T>
__device__ float activated(float a) {
  return activated_scaled<A, T>(activation_scale<A, T> * a);
}

/// The derivative of the activation. Of silu: s (1 + a (1 - s)) = s + s (a - a s) with s = sigmoid(a).
template <Activation A, class T>
__device__ float activation_slope(float a) {
  if constexpr (A == Activation::silu && sizeof(T) < sizeof(float)) {
    const float s = arch::reciprocal_flushed(1.f + exp_of_negative<T>(a));
    return fmaf(s, fmaf(-a, s, a), s);
  } else if constexpr (A == Activation::silu) {
    const float s = __fdividef(1.f, 1.f + exp_of_negative<T>(a));
    return s * fmaf(a, 1.f - s, 1.f);
  }
  return 1.f;
}

/// Taps are met eight at a time; the oldest ones are what is left over. `Width` up to 8 is one group.
inline constexpr int taps_together = 8;
template <int Width>
inline constexpr int oldest_taps = (Width - 1) % taps_together + 1;

/// sums[row] += sum_j taps[j] input[row + Taps - 1 - j], the oldest input first.
template <int Taps, int Rows, int Channels>
__device__ void add_taps(const float (&taps)[Taps][Channels], const float (&input)[Channels], int place,
                         float (&sums)[Rows][Channels]) {
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    const int j = row + Taps - 1 - place;
    if (j < 0 || j >= Taps) continue;
#pragma unroll
    for (int c = 0; c < Channels; ++c) sums[row][c] = fmaf(taps[j][c], input[c], sums[row][c]);
  }
}
template <int Taps, int Rows, class T, int Channels>
__device__ void add_taps(const float (&taps)[Taps][Channels], const Packet<T, Channels> (&inputs)[Rows + Taps - 1],
                         float (&sums)[Rows][Channels]) {
#pragma unroll
  for (int place = 0; place < Rows + Taps - 1; ++place) {
    float input[Channels];
    inputs[place].widen(input);
    add_taps(taps, input, place, sums);
  }
}

/// sums[row] += sum_j taps[j] slopes[row + j]: the sums' transpose, for gradients of inputs.
template <int Taps, int Rows, int Channels>
__device__ void add_slopes(const float (&taps)[Taps][Channels], const float (&slope)[Channels], int place,
                           float (&sums)[Rows][Channels]) {
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    const int j = place - row;
    if (j < 0 || j >= Taps) continue;
#pragma unroll
    for (int c = 0; c < Channels; ++c) sums[row][c] = fmaf(taps[j][c], slope[c], sums[row][c]);
  }
}

/// A run of tokens of one channel: from the Width - 1 inputs before it and its own to its outputs. What a kernel that
/// loads its input through a short convolution calls. Taps and bias have been multiplied by the activation's scale.
template <Activation A, class T, int Width, int Tokens>
__device__ void short_conv_run(const float (&taps)[Width], float bias, const float (&inputs)[Tokens + Width - 1],
                               float (&outputs)[Tokens]) {
#pragma unroll
  for (int t = 0; t < Tokens; ++t) outputs[t] = bias;
#pragma unroll
  for (int i = 0; i < Tokens + Width - 1; ++i)
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
      if (i >= t && i < t + Width) outputs[t] = fmaf(taps[t + Width - 1 - i], inputs[i], outputs[t]);
#pragma unroll
  for (int t = 0; t < Tokens; ++t) outputs[t] = activated_scaled<A, T>(outputs[t]);
}

/// The taps of a block's channels in shared memory, [tap][channel] with the bias as the last row.
template <int Width>
struct SharedTaps {
  float* memory;
  int channels;  // a multiple of what a thread has

  /// Rows are apart by eight banks: what is read by channel is written without conflicts.
  CHELA_HOST_DEVICE static constexpr int row_len(int channels) { return channels + 8; }
  CHELA_HOST_DEVICE static constexpr int bytes(int channels) {
    return (Width + 1) * row_len(channels) * int(sizeof(float));
  }

  /// Called by all threads of a block, before a barrier.
  __device__ void stage(TensorView<const float, 2> taps, TensorView<const float, 1> bias, Index first, int thread,
                        int threads) const {
    const int count = int(min(Index(channels), taps.extents[0] - first));
    if constexpr (Width <= taps_together) {
      for (int c = thread; c < count; c += threads) {
        const float* from = taps.data + (first + c) * taps.strides[0];
#pragma unroll
        for (int j = 0; j < Width; ++j) memory[j * row_len(channels) + c] = from[j * taps.strides[1]];
        memory[Width * row_len(channels) + c] = bias.present() ? bias(first + c) : 0.f;
      }
    } else {  // so many that neighbours should read neighbours
      for (int i = thread; i < count * Width; i += threads)
        memory[i % Width * row_len(channels) + i / Width] = taps(first + i / Width, i % Width);
      for (int c = thread; c < count; c += threads)
        memory[Width * row_len(channels) + c] = bias.present() ? bias(first + c) : 0.f;
    }
  }

  template <int Taps, int Channels>
  __device__ void read(int first_tap, int channel, float (&taps)[Taps][Channels]) const {
#pragma unroll
    for (int j = 0; j < Taps; ++j) read_row(first_tap + j, channel, taps[j]);
  }
  template <int Channels>
  __device__ void read_bias(int channel, float (&bias)[Channels]) const {
    read_row(Width, channel, bias);
  }

 private:
  template <int Channels>
  __device__ void read_row(int row, int channel, float (&values)[Channels]) const {
    constexpr int together = Channels < 4 ? Channels : 4;
    const float* const from = memory + row * row_len(channels) + channel;
#pragma unroll
    for (int c = 0; c < Channels; c += together) {
      float part[together];
      Packet<float, together>::load(from + c).widen(part);
#pragma unroll
      for (int i = 0; i < together; ++i) values[c + i] = part[i];
    }
  }
};

}  // namespace chela::cuda::detail
