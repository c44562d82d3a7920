#pragma once
// What every fuzzed call has: workers, offsets and slots, tensors that are sound for the most part, and how close an
// answer must be.
#include <cmath>
#include <limits>
#include <random>

#include "chela/chunk/ragged.hpp"
#include "fuzz/draw.hpp"
#include "support/tolerance.hpp"

namespace chela::test {

/// Several workers on one thread, tasks in either order.
struct FuzzExecutor {
  int count = 1;
  bool backwards = false;
  int workers() const { return count; }
  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index i = 0; i < tasks; ++i) f(backwards ? tasks - 1 - i : i, int(i % count));
  }
};

/// Indices of either width, with a stride.
struct DrawnIndices {
  std::vector<Index> values;
  std::vector<std::int32_t> narrow;
  std::vector<std::int64_t> wide;
  IndexView view = {};

  void place(Bytes& bytes) {
    const Index stride = 1 + bytes.upto(1), size = Index(values.size());
    for (Index x : values)
      for (Index i = 0; i < stride; ++i)
        narrow.push_back(std::int32_t(i == 0 ? x : -5)), wide.push_back(std::int64_t(i == 0 ? x : -5));
    narrow.push_back(-5), wide.push_back(-5);  // no index is no reason for no memory
    view = bytes.upto(1) ? IndexView(wide.data(), size, stride) : IndexView(narrow.data(), size, stride);
  }
  /// Rarely puts in a number that leads out of every tensor here; whether it did.
  bool spoil(Bytes& bytes) {
    if (!bytes.once_in(12) || values.empty()) return false;
    constexpr Index wrong[] = {-1, 1000, std::numeric_limits<std::int32_t>::min(),
                               std::numeric_limits<std::int32_t>::max()};
    values[std::size_t(bytes.upto(Index(values.size()) - 1))] = wrong[bytes.upto(3)];
    return true;
  }
};

/// One call. What is drawn wrong on purpose makes it unsound.
struct DrawnCase {
  static constexpr Index rarely = 16, very_rarely = 120;

  Bytes& bytes;
  std::mt19937 random;
  FuzzExecutor executor;
  bool sound = true;  ///< whether the call must be accepted
  Index sequences = 0, terms = 1;
  double magnitude = 1;  ///< of what such a sum may have cancelled from
  DrawnIndices offsets, slots;

  explicit DrawnCase(Bytes& b) : bytes(b), random(b.byte()), executor{int(1 + b.upto(2)), b.once_in(2)} {}

  /// An extent that is not as it must be, rarely.
  template <std::size_t Rank>
  std::array<Index, Rank> extents(std::array<Index, Rank> good, std::size_t first_axis = 0) {
    if (!bytes.once_in(very_rarely)) return good;
    good[first_axis + std::size_t(bytes.upto(Index(Rank - first_axis) - 1))] += bytes.upto(1) ? 1 : -1 - bytes.upto(1);
    sound = false;
    return good;
  }

  /// A tensor to write to. If elements share their place the call must be refused.
  template <std::size_t Rank>
  Placed<float, int(Rank)> output(const std::array<Index, Rank>& of) {
    Placed<float, int(Rank)> x(of, bytes, very_rarely);
    sound = sound && !x.broadcast();
    return x;
  }
  template <std::size_t Rank>
  Placed<float, int(Rank)> input(const std::array<Index, Rank>& of) {
    Placed<float, int(Rank)> x(of, bytes, rarely);
    x.fill([&] { return uniform(-1, 1); });
    return x;
  }

  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random); }

  /// Offsets of several sequences in one batch entry.
  void draw_offsets(Index batch, Index tokens) {
    offsets.values = {0, tokens};
    for (Index n = bytes.upto(3); n > 0; --n) offsets.values.push_back(bytes.upto(tokens));
    std::sort(offsets.values.begin(), offsets.values.end());
    sequences = Index(offsets.values.size()) - 1;
    if (offsets.spoil(bytes) || batch != 1) sound = false;
    offsets.place(bytes);
  }

  /// Perhaps slots in a pool of states with two entries to spare; how many entries the states have then. Whether wrong
  /// ones are refused depends on whether there are states at all, so that is left to `wrong_slots`.
  Index draw_slots(bool& wrong_slots) {
    if (!bytes.once_in(3)) return sequences;
    slots.values.resize(std::size_t(sequences + 2));
    std::iota(slots.values.begin(), slots.values.end(), Index(0));
    std::shuffle(slots.values.begin(), slots.values.end(), random);
    slots.values.resize(std::size_t(sequences));
    wrong_slots = slots.spoil(bytes);
    if (sequences > 1 && bytes.once_in(20)) slots.values[0] = slots.values[1], wrong_slots = true;
    slots.place(bytes);
    return sequences + 2;
  }

  Sequence sequence_of(Index batch, Index tokens, Index i) const {
    return SequenceBatch{batch, tokens, offsets.view}[i];
  }
  Index entry(Index i) const { return slots.view.present() ? slots.view[i] : i; }

  /// Close for sums of `terms` products of numbers of about 1, however much of them cancels.
  template <int Rank>
  void demand_close(TensorView<float, Rank> got, const Tensor<double, Rank>& want, const char* what) const {
    double difference = 0, norm = 0;
    for_each_index(got, [&](auto... i) {
      difference += std::pow(double(got(i...)) - want(i...), 2), norm += std::pow(want(i...), 2);
    });
    const double floor = magnitude * std::sqrt(double(got.size()));
    demand(std::sqrt(difference) <= tolerance<float>(terms) * (std::sqrt(norm) + floor), what);
  }
};

}  // namespace chela::test
