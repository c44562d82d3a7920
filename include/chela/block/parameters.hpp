#pragma once
// How modules (projections, norms, memories, blocks, whole models) declare their parameters, so that one declaration serves
// allocation, initialisation, gradients, optimisers and files. A module is a type with
//
//   struct Shape                                       its sizes
//   template <class A> struct Parameters               its leaves as TensorView<A, rank>; A = const float reads, A = float writes
//   static void visit(const Shape&, F f, P&... p)      calls f(ParameterInfo, p.leaf...) for each leaf, always in the same order
//
// where p... are any number of its Parameters structs (none, values, values and gradients, ...), walked side by side.
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "chela/core/tensor_view.hpp"

namespace chela {

/// How a parameter begins, seeded by whoever owns it.
struct Initializer {
  enum class Kind { constant, normal, uniform };
  Kind kind = Kind::constant;
  double a = 0;  ///< constant: the value; normal: the mean; uniform: the lower end
  double b = 0;  ///< normal: the standard deviation; uniform: the upper end
};

constexpr Initializer constant_init(double value) { return {Initializer::Kind::constant, value, 0}; }
constexpr Initializer normal_init(double mean, double deviation) {
  return {Initializer::Kind::normal, mean, deviation};
}
constexpr Initializer uniform_init(double low, double high) { return {Initializer::Kind::uniform, low, high}; }

/// What is known about one parameter besides its values.
struct ParameterInfo {
  std::string name;            ///< dotted path from the root module, as in files: "blocks.3.memory.long.taps"
  std::vector<Index> extents;  ///< row-major
  Initializer initial = {};
  bool decays = false;  ///< whether weight decay applies: matrices yes; biases, gains and kernels no
  Index offset = 0;     ///< first element in a flat buffer of all the module's parameters; set by describe_parameters

  Index count() const {
    Index n = 1;
    for (Index extent : extents) n *= extent;
    return n;
  }
};

/// Visits a module held inside another, under "name.".
template <class Module, class F, class... P>
void visit_nested(const std::string& name, const typename Module::Shape& shape, F&& f, P&... p) {
  Module::visit(
      shape,
      [&](ParameterInfo info, auto&... leaf) {
        info.name = name + "." + info.name;
        f(std::move(info), leaf...);
      },
      p...);
}

/// Every parameter of a module in visiting order, laid out one after the other.
template <class Module>
std::vector<ParameterInfo> describe_parameters(const typename Module::Shape& shape) {
  std::vector<ParameterInfo> infos;
  Index offset = 0;
  Module::visit(shape, [&](ParameterInfo info) {
    info.offset = offset;
    offset += info.count();
    infos.push_back(std::move(info));
  });
  return infos;
}

template <class Module>
Index parameter_count(const typename Module::Shape& shape) {
  Index total = 0;
  Module::visit(shape, [&](const ParameterInfo& info) { total += info.count(); });
  return total;
}

namespace detail {
template <class A, int Rank>
void point_at(TensorView<A, Rank>& leaf, A* memory, const std::vector<Index>& extents) {
  leaf.data = memory;
  Index stride = 1;
  for (int axis = Rank - 1; axis >= 0; --axis) {
    leaf.extents[axis] = extents[std::size_t(axis)];
    leaf.strides[axis] = stride;
    stride *= extents[std::size_t(axis)];
  }
}
}  // namespace detail

/// Views of all parameters of a module inside one flat buffer of `parameter_count` elements.
template <class Module, class A>
typename Module::template Parameters<A> bind_parameters(const typename Module::Shape& shape, A* memory) {
  typename Module::template Parameters<A> parameters;
  Module::visit(
      shape,
      [&](const ParameterInfo& info, auto& leaf) {
        detail::point_at(leaf, memory, info.extents);
        memory += info.count();
      },
      parameters);
  return parameters;
}

}  // namespace chela
