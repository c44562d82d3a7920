#pragma once
// Rows of a matrix in whole registers: where they are if they can be read there, or else packed.
#include <algorithm>
#include <type_traits>

#include "chela/cpu/tile/packing.hpp"

namespace chela::cpu {

/// What packed rows are multiplied by: row t by rows[t * stride].
template <class S>
struct RowFactors {
  const S* rows = nullptr;  ///< null for nothing
  Index stride = 0;
};

/// Packs at once.
template <class T, class S>
void pack_panels(TensorView<const T, 2> source, RowFactors<S> factors, S* packed, Panels panels, Index columns) {
  for (Index r = 0; r < source.extents[0]; ++r) {
    const S factor = factors.rows ? factors.rows[r * factors.stride] : S(1);
    for (Index c = 0; c < columns; c += panels.width)
      detail::pack_row(&source.data[r * source.strides[0] + c * source.strides[1]], source.strides[1],
                       std::clamp<Index>(source.extents[1] - c, 0, panels.width), factor, packed + panels.at(r, c),
                       panels.width);
  }
}

/// Whether rows are whole registers of S, which can be read where they are.
template <class S, class T>
bool whole_registers(TensorView<T, 2> rows, Index columns) {
  constexpr Index lanes = Eigen::internal::packet_traits<S>::size;
  return std::is_same_v<std::remove_const_t<T>, S> && rows.strides[1] == 1 && rows.extents[1] == columns &&
         columns % lanes == 0;
}

/// Where registers of columns begin: rows of a matrix, or of a packed tile.
template <class S>
struct RegisterColumns {
  const S* data;
  Index row_stride, panel_width, panel_stride;

  const S* begin(Index column) const { return data + column / panel_width * panel_stride + column % panel_width; }
};

/// Rows where they are if they are whole registers, or else packed.
template <class T, class S>
RegisterColumns<S> pack_or_view(TensorView<const T, 2> rows, S* packed, Panels panels, Index columns) {
  if constexpr (std::is_same_v<T, S>)
    if (whole_registers<S>(rows, columns)) return {rows.data, rows.strides[0], panels.width, panels.width};
  pack_panels(rows, RowFactors<S>{}, packed, panels, columns);
  return {packed, panels.width, panels.width, panels.rows * panels.width};
}

/// Rows of whole registers.
template <class S>
struct RegisterRows {
  S* data = nullptr;
  Index stride = 0;

  S* row(Index r) const { return data + r * stride; }
};

}  // namespace chela::cpu
