#pragma once
// A register of numbers that formulas can be written in as if it were one number: the vector type over which the gates
// of chela/attention/gates.hpp run.
#include <Eigen/Core>
#include <type_traits>

#include "chela/core/host_device.hpp"
#include "chela/core/index.hpp"

namespace chela::cpu::detail {

/// Comparisons give masks for `choose`. A is float or double, and has packets of more than one entry.
template <class A>
struct Wide {
  using Packet = typename Eigen::internal::packet_traits<A>::type;
  Packet packet;

  explicit Wide(A value) : packet(Eigen::internal::pset1<Packet>(value)) {}
  explicit Wide(const Packet& from) : packet(from) {}

  friend Wide operator+(Wide a, Wide b) { return Wide(Eigen::internal::padd(a.packet, b.packet)); }
  friend Wide operator-(Wide a, Wide b) { return Wide(Eigen::internal::psub(a.packet, b.packet)); }
  friend Wide operator*(Wide a, Wide b) { return Wide(Eigen::internal::pmul(a.packet, b.packet)); }
  friend Wide operator/(Wide a, Wide b) { return Wide(Eigen::internal::pdiv(a.packet, b.packet)); }
  friend Wide operator-(Wide a) { return Wide(Eigen::internal::pnegate(a.packet)); }
  friend Wide operator>(Wide a, Wide b) { return Wide(Eigen::internal::pcmp_lt(b.packet, a.packet)); }
  friend Wide operator==(Wide a, Wide b) { return Wide(Eigen::internal::pcmp_eq(a.packet, b.packet)); }
  friend Wide choose(Wide mask, Wide yes, Wide no) {
    return Wide(Eigen::internal::pselect(mask.packet, yes.packet, no.packet));
  }
  friend Wide abs(Wide a) { return Wide(Eigen::internal::pabs(a.packet)); }

  /// Eigen's exponential stops near the smallest normal number and may lose NaN; here what lies below is
  /// zero, and NaN stays.
  friend Wide exp(Wide a) {
    constexpr A lowest = std::is_same_v<A, double> ? A(-708.39) : A(-87.33);  // the smallest normal number's logarithm
    const Wide inside(Eigen::internal::pexp(a.packet));
    return choose(a == a, choose(Wide(lowest) > a, Wide(A(0)), inside), a);
  }

  /// log(1 + x) for x in [0, 1] is 2 artanh(s), s = x / (2 + x) <= 1/3, whose series gains a factor of 9 per term.
  friend Wide log1p_of_unit(Wide x) {
    constexpr int terms = std::is_same_v<A, double> ? 16 : 8;
    const Wide s = x / (x + Wide(A(2))), square = s * s;
    Wide sum(A(1) / A(2 * terms - 1));
    CHELA_UNROLL
    for (int n = terms - 2; n >= 0; --n)
      sum = Wide(Eigen::internal::pmadd(sum.packet, square.packet, Wide(A(1) / A(2 * n + 1)).packet));
    return (s + s) * sum;
  }
};

/// The widest type that formulas over A can run on: a register, or one number where there are no vector instructions.
template <class A>
using Widest = std::conditional_t<(Eigen::internal::packet_traits<A>::size > 1), Wide<A>, A>;

/// Entries in a V: a Wide<A> or an A.
template <class V, class A>
inline constexpr Index width_of = std::is_same_v<V, A> ? 1 : Index(Eigen::internal::packet_traits<A>::size);

template <class V, class A>
CHELA_ALWAYS_INLINE V load(const A* from) {
  if constexpr (std::is_same_v<V, A>)
    return *from;
  else
    return V(Eigen::internal::ploadu<typename V::Packet>(from));
}

template <class V, class A>
CHELA_ALWAYS_INLINE void store(A* to, V value) {
  if constexpr (std::is_same_v<V, A>)
    *to = value;
  else
    Eigen::internal::pstoreu(to, value.packet);
}

}  // namespace chela::cpu::detail
