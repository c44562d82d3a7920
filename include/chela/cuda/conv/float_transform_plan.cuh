#pragma once
// Which transforms a long convolution takes, from sizes alone.
#include <algorithm>

#include "chela/conv/fft_plan.hpp"
#include "chela/conv/long.hpp"
#include "chela/core/index.hpp"

namespace chela::cuda::detail {

inline constexpr Index float_transform_most_points = Index(1) << 20, float_transform_most_row_points = 16384;

/// A transform of columns * row_points points and what it serves: sequences of more than `more_than` and at most
/// `at_most` tokens, and of the kernel the taps that those can meet.
struct FloatTransformPart {
  int columns = 1, row_points = 0;
  Index more_than = 0, at_most = 0;
  Index taps = 0, back_taps = 0;

  constexpr Index points() const { return Index(columns) * row_points; }
  /// The largest power of two that divides columns.
  constexpr int column_nodes() const { return columns & -columns; }
};

/// 2^k or 3 2^k points, at least `least`: as one row, or as columns of rows short enough that a multiprocessor holds
/// several.
constexpr FloatTransformPart float_transform_of(Index least) {
  Index points = 256;
  while (points < least) points = points % 3 == 0 ? points / 3 * 4 : points / 2 * 3;
  if (points <= float_transform_most_row_points) return {1, int(points)};
  constexpr Index short_rows = 8192, most_columns = 64;
  const Index rows = points <= most_columns * short_rows ? short_rows : float_transform_most_row_points;
  return {int(points / rows), int(rows)};
}

/// The parts of a call, the largest first. Packed sequences may have any lengths: there is a transform for every power
/// of two below, and a thread block that comes to a sequence of another part leaves it alone.
struct FloatTransformPlan {
  static constexpr int most = 16;
  FloatTransformPart parts[most] = {};
  int size = 0;

  constexpr FloatTransformPlan(const LongConvShape& s, bool with_state) {
    const auto least = [&](Index tokens) { return right_angle_least_points(tokens, s.taps, s.back_taps, with_state); };
    add(float_transform_of(least(s.tokens)), s.tokens, s, with_state);
    if (!s.sequences.cu_seqlens.present()) return;
    for (Index points = float_transform_most_points; points >= 256; points /= 2) {
      if (points >= parts[0].points()) continue;
      Index low = 0, high = s.tokens;  // the longest sequence that so many points serve
      while (low < high) {
        const Index middle = (low + high + 1) / 2;
        if (least(middle) <= points)
          low = middle;
        else
          high = middle - 1;
      }
      if (low == 0) break;
      parts[size - 1].more_than = low;
      add(float_transform_of(points), low, s, with_state);
    }
  }

  constexpr Index points() const {
    Index all = 0;
    for (int i = 0; i < size; ++i) all += parts[i].points();
    return all;
  }

 private:
  constexpr void add(FloatTransformPart part, Index tokens, const LongConvShape& s, bool with_state) {
    part.at_most = tokens;
    part.taps = with_state ? s.taps : std::min(s.taps, tokens);
    part.back_taps = std::min(s.back_taps, std::max<Index>(tokens - 1, 0));
    parts[size++] = part;
  }
};

/// Channels that are transformed together, of which one needs so many bytes of workspace: all of them within a limit,
/// since small groups do not fill the device (H100).
constexpr Index float_transform_group(Index channels, Index bytes_of_channel) {
  constexpr Index group_bytes = Index(1) << 30, sector = 8;
  Index group = std::clamp<Index>(group_bytes / bytes_of_channel, 1, channels);
  if (group < channels && group > sector) group -= group % sector;
  return group;
}

}  // namespace chela::cuda::detail
