#pragma once
// Rows of 16-bit tokens times a kernel's spectrum.
#include "chela/cuda/arch/shared.cuh"
#include "chela/cuda/conv/half_spectrum.cuh"
#include "chela/cuda/fixed_divisor.cuh"

namespace chela::cuda::detail {

/// How a row's tokens come to its registers and results leave them.
enum class RowWay {
  runs,    ///< where they lie in global memory
  staged,  ///< through shared memory, by the row's threads
  tile,    ///< the same by the whole block, before and after
};

/// What becomes of a row's tokens once they are in registers: nothing. Another source has a `finish` of its own, which
/// sees the row's words and, where they were staged, the memory in which the tokens before a run still lie.
struct StoredTokens {
  template <class Row, RowWay Way, class T>
  __device__ __forceinline__ void finish(const Row&, const TokenRows<const T>&, int, int, const char*,
                                         RowWords<Row::own>&) const {}
};

template <class T, class Source = StoredTokens>
struct HalfConvolutionCall {
  TokenRows<const T> x = {};
  Source source = {};
  TokenRows<T> y = {};
  HistoryRows<const T> history = {};
  HistoryRows<T> history_gradient = {};
  FixedDivisor batch;
  int channels = 0;
  HalfSpectrumView spectrum = {};
};

/// The bytes of shared memory that a row of tokens and its transform take.
template <class Row>
inline constexpr int convolution_row_bytes = [] {
  constexpr int in = StagedInput<Row::residues>::bytes, out = StagedOutput<Row::residues>::bytes;
  constexpr int most = in > out ? in : out;
  return most > Row::work_bytes ? most : Row::work_bytes;
}();

/// Whether a lane's runs are worth reading and writing where they lie: one warp's cover whole sectors.
template <class Row>
inline constexpr bool reads_runs = Row::warps == 1 && (Row::residues == 2 || Row::residues == 4 || Row::residues == 8);

/// A row's tokens in registers, scaled: real parts, and with a history imaginary parts.
template <class Row, class T, bool History, RowWay Way>
struct ScaledRow {
  static constexpr int residues = Row::residues;
  RowWords<Row::own> words[History ? 2 : 1];
  float inverse;  ///< of the scale

  template <class Source = StoredTokens>
  __device__ __forceinline__ ScaledRow(const Row& row, const TokenRows<const T>& x, const HistoryRows<const T>& history,
                                       int batch, int channel, char* memory, const Source& source = {}) {
    take_tokens(row, x, batch, channel, memory);
    source.template finish<Row, Way>(row, x, batch, channel, memory, words[0]);
    if constexpr (History) {
      row.sync();
      fetch_history<residues, Row::threads>(memory, history, batch, channel, row.thread());
      row.sync();
      read_staged_row<residues, Row::own>(words[1], memory, row.first_residue(), row.lane());
    }
    std::uint32_t most = 0;
    for_words([&](std::uint32_t& word) { most = larger_magnitudes<T>(most, word); });
    const float2 larger = arch::unpack<T>(most);
    const PowerOfTwo scale = row_scale<T>(row.largest(fmaxf(larger.x, larger.y)));
    const std::uint32_t factors = arch::pack<T>(scale.factor, scale.factor);
    for_words([&](std::uint32_t& word) { word = scaled_word<T>(word, factors); });
    inverse = scale.inverse;
  }

  /// As PartForward asks for them, of the warp's residue c.
  __device__ __forceinline__ std::uint32_t operator()(int c, bool imaginary, int q, int k) const {
    const RowWords<Row::own>& x = words[History && imaginary ? 1 : 0];
    return pair_of<T>(x[4 * k + q][c / 2], x[4 * k + 2 + q][c / 2], c & 1);
  }

 private:
  __device__ __forceinline__ void take_tokens(const Row& row, const TokenRows<const T>& x, int batch, int channel,
                                              char* memory) {
    const T* const tokens = x.row(batch, channel);
    if constexpr (Way == RowWay::runs) {
      read_row<residues>(words[0], tokens, x.tokens, row.lane());
    } else {
      if constexpr (Way == RowWay::staged) {
        fetch_row<residues, Row::threads>(memory, tokens, x.tokens, x.in_units, row.thread());
        arch::wait_copies<0>();
        row.sync();
      }
      read_staged_row<residues, Row::own>(words[0], memory, row.first_residue(), row.lane());
    }
  }
  template <class F>
  __device__ __forceinline__ void for_words(const F& f) {
#pragma unroll
    for (auto& part : words)
#pragma unroll
      for (auto& run : part)
#pragma unroll
        for (std::uint32_t& word : run) f(word);
  }
};

template <RowWay Way, class Row, class T>
__device__ __forceinline__ void put_row(const Row& row, const RowResults<T, Row::own>& results, const TokenRows<T>& y,
                                        int batch, int channel, char* memory) {
  T* const tokens = y.row(batch, channel);
  if constexpr (Way == RowWay::runs) {
    results.write(tokens, y.tokens, row.lane());
  } else {
    row.sync();
    results.template write_staged<Row::residues>(memory, row.first_residue(), row.lane());
    row.sync();
    if constexpr (Way == RowWay::staged)
      send_row<Row::residues, Row::threads>(tokens, memory, y.tokens, y.in_units, row.thread());
  }
}

template <class Row, class T>
__device__ __forceinline__ void put_history(const Row& row, const RowResults<T, Row::own>& results,
                                            const HistoryRows<T>& history, int batch, int channel, char* memory) {
  row.sync();
  results.template write_staged<Row::residues>(memory, row.first_residue(), row.lane());
  row.sync();
  send_history<Row::residues, Row::threads>(history, memory, batch, channel, row.thread());
}

/// Multiplies a portion of a row's spectrum by the kernel's, `units` being the lane's first in it.
template <bool Conjugate, int Pairs>
__device__ __forceinline__ void multiply_by_kernel(ComplexPair (&z)[Pairs], const uint4* units) {
#pragma unroll
  for (int i = 0; i < Pairs / 2; ++i) {
    ComplexPair first, second;
    take_unit(__ldg(units + 32 * i), first, second);
    z[2 * i] = times<Conjugate>(z[2 * i], first), z[2 * i + 1] = times<Conjugate>(z[2 * i + 1], second);
  }
}

/// One row times its kernel, all in registers and the row's work memory. `staged` may be the same memory.
template <bool Conjugate, bool History, RowWay Way, class Row, class T, class Source>
__device__ __forceinline__ void convolve_row(Row& row, const HalfConvolutionCall<T, Source>& call, int batch,
                                             int channel, char* staged, RowResults<T, Row::own>& results,
                                             RowResults<T, Row::own>& of_history) {
  constexpr bool complex_in = History && !Conjugate, complex_out = History && Conjugate;
  // In a tile constants that are there before a source is done do not find registers beside it.
  constexpr bool source_first = Way == RowWay::tile && !std::is_same_v<Source, StoredTokens>;
  const StoredRoots stored{call.spectrum.roots, row.lane()};
  const auto roots = [&] {
    if constexpr (source_first)
      return StoredRoots{arch::made_anew(call.spectrum.roots), row.lane()};
    else
      return stored;
  };
  const float kernel_scale = call.spectrum.scale[channel];
  using Tokens = ScaledRow<Row, T, complex_in, Way>;
  float inverse;
  if constexpr (source_first) {
    const Tokens tokens(row, call.x, call.history, batch, channel, staged, call.source);
    row.forward(PartForward<complex_in>(roots()), tokens);
    inverse = tokens.inverse;
  } else {
    const PartForward<complex_in> part(roots());
    const Tokens tokens(row, call.x, call.history, batch, channel, staged, call.source);
    row.forward(part, tokens);
    inverse = tokens.inverse;
  }
  const uint4* const units = call.spectrum.units + Index(channel) * spectrum_units<Row> + row.lane();
  row.template middle<true, true>(roots(), [&](int portion, ComplexPair(&z)[Row::pairs]) {
    multiply_by_kernel<Conjugate>(z, units + portion * (16 * Row::pairs));
  });
  const float factor = inverse * kernel_scale;
  row.template backward<complex_out>(roots(), [&](int c, const float(&re)[2][4], const float(&im)[2][4]) {
    results.take(c, re, factor);
    if constexpr (complex_out) of_history.take(c, im, -factor);
  });
}

/// Rows that are staged have fewer blocks: both ways to bring them in take registers.
template <class Row, RowWay Way>
inline constexpr int convolution_blocks = Way == RowWay::runs || Row::warps > 1
                                              ? Row::blocks_per_multiprocessor
                                              : (5 * Row::blocks_per_multiprocessor + 3) / 6;

/// y = kernel * x, or for Conjugate the gradient of x from that of y: rows of one channel side by side. With `History`
/// the tokens before a row's first take part too, and for Conjugate get their gradient: modulo x^N - i token -m is
/// coefficient N - m times -i, on the way in as on the way out.
template <class Row, class T, bool Conjugate, bool History, RowWay Way, class Source>
__global__ void __launch_bounds__(32 * Row::warps * Row::rows_per_block, convolution_blocks<Row, Way>)
    half_convolution_kernel(const __grid_constant__ HalfConvolutionCall<T, Source> call) {
  auto* const shared = arch::dynamic_shared<uint4>();
  const RowPlace<Row> place(reinterpret_cast<char*>(shared), convolution_row_bytes<Row>);
  if (place.row >= int(call.batch.value()) * call.channels) return;
  const int channel = int(call.batch.quotient(place.row)), batch = int(call.batch.remainder(place.row, channel));
  Row row(place.memory, place.warp, int(threadIdx.x) % 32);
  RowResults<T, Row::own> results, of_history;
  convolve_row<Conjugate, History, Way>(row, call, batch, channel, place.memory, results, of_history);
  if (call.y.data) put_row<Way>(row, results, call.y, batch, channel, place.memory);
  if constexpr (History && Conjugate) put_history(row, of_history, call.history_gradient, batch, channel, place.memory);
}

}  // namespace chela::cuda::detail
