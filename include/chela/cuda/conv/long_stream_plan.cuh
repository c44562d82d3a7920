#pragma once
// How a GPU cuts a kernel for streams, and where a stream's state lies. Lags are taken in three ways, each of which leaves
// the next one time:
//
//   below 32         at each token
//   32 to 255        once in 16 tokens, for the 16 outputs that begin 16 tokens later
//   2 B to 8 B - 1   for B = 128, 512 and 2048: once in B tokens by a transform of 4 B points over the last 7 B inputs, for
//                    the B outputs that begin B tokens later
//
// Longer kernels than 16384 are further runs of 12288 lags for B = 2048. Which rows (a channel of a sequence) have their
// turn follows from the position alone and goes round evenly, so that every token has the same work: per row and token 256
// products, O(log^2) for lags up to 16384 and another transform's 2048th part for each 12288 more. Inputs are kept as they
// come; outputs under way are written once and never added to.
#include <algorithm>

#include "chela/core/element.hpp"
#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"
#include "chela/cuda/workspace.cuh"

namespace chela::cuda::detail {

struct StreamTiers {
  static constexpr int direct_lags = 32, group = 16, group_lags = 256;
  static constexpr int padded_lags = group_lags + group;  ///< of the taps for direct and grouped sums, zeros at the end
  static constexpr int most = 3;

  Index taps = 0;

  CHELA_HOST_DEVICE static constexpr Index block(int tier) { return Index(128) << 2 * tier; }
  CHELA_HOST_DEVICE static constexpr Index points(int tier) { return 4 * block(tier); }
  CHELA_HOST_DEVICE static constexpr Index first_lag(int tier) { return 2 * block(tier); }
  CHELA_HOST_DEVICE static constexpr Index lags(int tier) { return 6 * block(tier); }  ///< of one transform
  /// Tokens in which a tier's rows take turns: from when the last inputs are in the history until the first outputs are
  /// collected.
  CHELA_HOST_DEVICE static constexpr Index turns(int tier) { return block(tier) - 2 * group; }

  CHELA_HOST_DEVICE constexpr int count() const {
    int tiers = 0;
    while (tiers < most && first_lag(tiers) < taps) ++tiers;
    return tiers;
  }
  /// Transforms of a tier for each of its outputs.
  CHELA_HOST_DEVICE constexpr Index pieces(int tier) const {
    return tier + 1 < most ? 1 : ceil_div(taps - first_lag(tier), lags(tier));
  }
  CHELA_HOST_DEVICE constexpr Index history() const { return count() > 0 ? round_up(taps, group) : 0; }
  /// Positions at which every way begins anew are multiples of this.
  CHELA_HOST_DEVICE constexpr Index period() const { return count() > 0 ? block(count() - 1) : group; }
};

/// A kernel's taps as streams read them.
struct StreamTaps {
  const float* lags = nullptr;                    ///< [lag, channel], `padded_lags` of them
  const float2* spectra[StreamTiers::most] = {};  ///< of a tier: [piece, channel, point]

  StreamTaps() = default;
  StreamTaps(Parts& memory, Index channels, const StreamTiers& tiers) {
    lags = memory.take<float>(StreamTiers::padded_lags * channels);
    for (int i = 0; i < tiers.count(); ++i)
      spectra[i] = memory.take<float2>(tiers.pieces(i) * channels * StreamTiers::points(i));
  }
};

/// What blocks agree on.
struct StreamClock {
  unsigned long long position;  ///< of the next token
  unsigned blocks_done;
};

/// The state of batch times channels rows.
template <class T>
struct StreamState {
  StreamClock* clock = nullptr;
  T* recent = nullptr;                     ///< [token % 256, row]
  float* due = nullptr;                    ///< [token % 32, row]: what the grouped sums and the tiers give
  T* history = nullptr;                    ///< [row, token % history]
  float* outputs[StreamTiers::most] = {};  ///< of a tier: [piece, row, block % 2, token % B]

  StreamState() = default;
  StreamState(Parts& memory, Index rows, const StreamTiers& tiers) {
    clock = memory.take<StreamClock>(1);
    recent = memory.take<T>(StreamTiers::group_lags * rows), due = memory.take<float>(2 * StreamTiers::group * rows);
    history = memory.take<T>(rows * tiers.history());
    for (int i = 0; i < tiers.count(); ++i)
      outputs[i] = memory.take<float>(tiers.pieces(i) * rows * 2 * StreamTiers::block(i));
  }
};

}  // namespace chela::cuda::detail
