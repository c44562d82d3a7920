#pragma once
// States of linear attention from one form into another: another layout, another element type, or both.
//
//   to[i, h, key, value] = from[i, h, key, value], rounded to the type of `to`
#include "chela/attention/member.hpp"
#include "chela/core/status.hpp"

namespace chela {

template <Element From, Element To>
struct ConvertStatesArgs {
  TensorView<const From, 4> from = {};  ///< [entry, head, key_dim, value_dim], the last two exchanged if value_major
  TensorView<To, 4> to = {};            ///< likewise in its own layout; not the memory of `from`
  StateLayout from_layout = StateLayout::key_major;
  StateLayout to_layout = StateLayout::key_major;
};

template <Element From, Element To>
constexpr Status check(const ConvertStatesArgs<From, To>& a) {
  const auto from = key_major(a.from, a.from_layout);
  const auto to = key_major(a.to, a.to_layout);
  return first_failure(
      require(readable(from), Code::bad_shape, "from needs data and extents of zero or more"),
      require(
          same_extents(from, to), Code::bad_shape,
          "from and to must hold the same states: [entry, head, key_dim, value_dim] once each is read in its layout"),
      require(writable(to), Code::bad_stride, "to needs data, and must not have broadcast axes"));
}

}  // namespace chela
