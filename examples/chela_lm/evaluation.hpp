#pragma once
// Bits per byte of a model on a text. The first byte is not predicted.
#include <cstdint>
#include <span>

#include "chela_lm/model.hpp"

namespace chela_lm {

/// Every byte once, by full passes over windows of `context` bytes that overlap by half: all targets of the first
/// window count, of the others the second half, so that each byte but the first few is predicted from context / 2 to
/// context bytes.
double bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text, Index context,
                     Index batch);

/// An estimate from `windows` windows spread evenly over the text, the second half of each counted.
double sampled_bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text, Index context,
                             Index windows);

/// Every byte once, predicted from all that precede it: decoding step by step with the state carried from start to end.
double stateful_bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text);

}  // namespace chela_lm
