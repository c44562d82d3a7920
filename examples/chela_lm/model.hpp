#pragma once
// The model behind the program: CHELA blocks over bytes. The templates are instantiated in model.cpp alone.
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "chela/block/parameters.hpp"
#include "chela/core/executor.hpp"
#include "chela_lm/settings.hpp"

namespace chela_lm {

inline constexpr Index vocabulary = 256;

/// A byte, or -1 as a target that is not counted.
using Token = std::int16_t;
using Tokens = chela::TensorView<const Token, 2>;  ///< [batch, token]

/// Reads one byte after another and carries a state of constant size.
class Decoder {
 public:
  virtual ~Decoder() = default;
  /// The logits of the byte that follows.
  virtual const std::array<float, vocabulary>& step(std::uint8_t byte) = 0;
};

class Model {
 public:
  virtual ~Model() = default;

  /// Layout of the flat buffers below.
  virtual const std::vector<chela::ParameterInfo>& parameters() const = 0;
  Index count() const;

  /// Mean cross-entropy in nats, and its gradient.
  virtual double loss_and_gradients(const float* parameters, Tokens tokens, Tokens targets, float* gradients) = 0;
  virtual double loss(const float* parameters, Tokens tokens, Tokens targets) = 0;

  /// The parameters must outlive the decoder and not change meanwhile.
  virtual std::unique_ptr<Decoder> decoder(const float* parameters) = 0;
};

/// Throws Error when no model can have these settings.
std::unique_ptr<Model> make_model(const ModelSettings& settings, const chela::DefaultExecutor& executor);

}  // namespace chela_lm
