#pragma once
#include "chela/core/host_device.hpp"

namespace chela::cuda::detail {

/// Divides by a number that the host knows, without dividing. Both are below 2^31.
class FixedDivisor {
 public:
  FixedDivisor() = default;
  explicit FixedDivisor(unsigned divisor) : divisor_(divisor) {
    while (1u << shift_ < divisor) ++shift_;
    factor_ = unsigned(((1ull << shift_) - divisor) * (1ull << 32) / divisor + 1);
  }
  __device__ unsigned quotient(unsigned x) const { return (__umulhi(x, factor_) + x) >> shift_; }
  __device__ unsigned remainder(unsigned x, unsigned quotient) const { return x - quotient * divisor_; }
  CHELA_HOST_DEVICE unsigned value() const { return divisor_; }

 private:
  unsigned divisor_ = 1, factor_ = 1;
  int shift_ = 0;
};

}  // namespace chela::cuda::detail
