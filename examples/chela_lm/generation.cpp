#include "chela_lm/generation.hpp"

#include <algorithm>
#include <cmath>

#include "chela/model/random.hpp"
#include "chela_lm/interrupt.hpp"
#include "chela_lm/output.hpp"
#include "chela_lm/progress.hpp"

namespace chela_lm {

namespace {

using Logits = std::array<float, vocabulary>;

/// The byte at which the cumulative probability passes `uniform`, in [0, 1).
std::uint8_t draw(const Logits& logits, double temperature, double uniform) {
  const auto likeliest = std::max_element(logits.begin(), logits.end());
  if (temperature == 0) return std::uint8_t(likeliest - logits.begin());
  std::array<double, vocabulary> weights;
  double sum = 0;
  for (std::size_t i = 0; i < logits.size(); ++i)
    sum += weights[i] = std::exp((double(logits[i]) - double(*likeliest)) / temperature);
  double left = uniform * sum;
  for (std::size_t i = 0; i < weights.size(); ++i)
    if ((left -= weights[i]) < 0) return std::uint8_t(i);
  return std::uint8_t(likeliest - logits.begin());  // rounding left nothing to draw from
}

void write_byte(std::uint8_t byte) {
  const char c = char(byte);
  write_output(&c, 1);
}

}  // namespace

double generate(Model& model, const float* parameters, const GenerationSettings& settings) {
  const auto decoder = model.decoder(parameters);
  const chela::CounterRandom random(settings.seed, chela::stream_of("generation"));
  write_output(settings.prompt.data(), settings.prompt.size());
  const Timer timer;
  for (std::size_t i = 0; i + 1 < settings.prompt.size(); ++i) decoder->step(std::uint8_t(settings.prompt[i]));
  auto byte = std::uint8_t(settings.prompt.back());
  for (Index i = 0; i < settings.bytes; ++i) {
    stop_if_asked();
    byte = draw(decoder->step(byte), settings.temperature, random.uniform(std::uint64_t(i)));
    write_byte(byte);
  }
  return double(Index(settings.prompt.size()) - 1 + settings.bytes) / timer.seconds();
}

}  // namespace chela_lm
