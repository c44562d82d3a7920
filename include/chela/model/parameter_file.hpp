#pragma once
// Flat parameter buffers as named tensors in a file: one tensor for each parameter, under the name that its module gave
// it.
#include <string>
#include <vector>

#include "chela/block/parameters.hpp"
#include "chela/model/safetensors.hpp"

namespace chela {

/// Appends every parameter of a buffer laid out by `infos`, named `prefix` + its own name: "" for the parameters
/// themselves, another prefix for each buffer of the same layout, such as an optimiser's moments.
template <class T>
void append_sources(const std::vector<ParameterInfo>& infos, const std::string& prefix, const T* memory,
                    std::vector<TensorSource>& sources) {
  for (const ParameterInfo& info : infos)
    sources.push_back({prefix + info.name, stored_type_of<T>, info.extents, memory + info.offset});
}

template <class T>
void append_targets(const std::vector<ParameterInfo>& infos, const std::string& prefix, T* memory,
                    std::vector<TensorTarget>& targets) {
  for (const ParameterInfo& info : infos)
    targets.push_back({prefix + info.name, stored_type_of<T>, info.extents, memory + info.offset});
}

}  // namespace chela
