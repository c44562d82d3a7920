#pragma once
// Slots: states of many sequences kept in one pool, of which a call uses a few. state_slots [sequence] says which entry of the
// pool's first axis is each sequence's own.
#include "chela/core/index_view.hpp"
#include "chela/core/status.hpp"

namespace chela::detail {

/// Absent, or one slot for each sequence.
constexpr Status check_slots(IndexView slots, Index sequences) {
  return require(!slots.present() || slots.size() == sequences, Code::bad_shape,
                 "state_slots must be [sequence]: one entry of the states for each");
}

/// Reads the slots, which must be in host memory. Ascending ones, the usual case, are seen to differ in one sweep.
template <class S, int Rank>
constexpr Status check_slot_values(IndexView slots, TensorView<S, Rank> states) {
  if (!slots.present() || !states.present()) return {};
  bool ascending = true;
  for (Index i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0 || slots[i] >= states.extents[0])
      return {Code::bad_value, "state_slots must lie in the states' first axis: 0 up to its extent less one"};
    ascending = ascending && (i == 0 || slots[i - 1] < slots[i]);
    for (Index j = 0; j < i && !ascending; ++j)
      if (slots[i] == slots[j]) return {Code::bad_value, "state_slots must differ: two sequences share one state"};
  }
  return {};
}

}  // namespace chela::detail
