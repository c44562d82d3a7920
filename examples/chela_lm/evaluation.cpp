#include "chela_lm/evaluation.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "chela_lm/error.hpp"
#include "chela_lm/interrupt.hpp"

namespace chela_lm {

namespace {

/// Predicts text[begin + 1 .. begin + length], and counts from the target numbered `counted_from`.
struct Window {
  Index begin, counted_from;
};

/// Mean bits over all counted targets. Windows of one length, `batch` of them at a time.
double mean_bits(Model& model, const float* parameters, std::span<const std::uint8_t> text, Index length,
                 const std::vector<Window>& windows, Index batch) {
  double nats = 0;
  Index counted = 0;
  std::vector<Token> tokens, targets;
  for (std::size_t next = 0; next < windows.size();) {
    stop_if_asked();
    const Index rows = std::min<Index>(batch, Index(windows.size() - next));
    tokens.assign(std::size_t(rows * length), 0);
    targets.assign(std::size_t(rows * length), -1);
    Index counted_here = 0;
    for (Index row = 0; row < rows; ++row, ++next) {
      const auto [begin, counted_from] = windows[next];
      for (Index i = 0; i < length; ++i) {
        tokens[std::size_t(row * length + i)] = text[std::size_t(begin + i)];
        if (i >= counted_from) targets[std::size_t(row * length + i)] = text[std::size_t(begin + i + 1)];
      }
      counted_here += length - counted_from;
    }
    const auto view = [&](const std::vector<Token>& of) { return chela::contiguous(of.data(), rows, length); };
    nats += double(counted_here) * model.loss(parameters, view(tokens), view(targets));
    counted += counted_here;
  }
  return nats / double(counted) / std::numbers::ln2;
}

/// Targets in the text; at least one.
Index targets_in(std::span<const std::uint8_t> text) {
  if (text.size() < 2) throw Error("the text is too short to evaluate: fewer than two bytes");
  return Index(text.size()) - 1;
}

}  // namespace

double bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text, Index context,
                     Index batch) {
  const Index total = targets_in(text), length = std::min(context, total), stride = std::max<Index>(length / 2, 1);
  std::vector<Window> windows{{0, 0}};
  for (Index reached = length; reached < total;) {
    const Index begin = std::min(windows.back().begin + stride, total - length);
    windows.push_back({begin, reached - begin});
    reached = begin + length;
  }
  return mean_bits(model, parameters, text, length, windows, batch);
}

double sampled_bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text, Index context,
                             Index count) {
  const Index total = targets_in(text), length = std::min(context, total);
  std::vector<Window> windows;
  for (Index i = 0; i < count; ++i)
    windows.push_back({(total - length) * i / std::max<Index>(count - 1, 1), length / 2});
  return mean_bits(model, parameters, text, length, windows, count);
}

double stateful_bits_per_byte(Model& model, const float* parameters, std::span<const std::uint8_t> text) {
  const Index total = targets_in(text);
  const auto decoder = model.decoder(parameters);
  double nats = 0;
  for (std::size_t i = 0; i + 1 < text.size(); ++i) {
    if (i % 1024 == 0) stop_if_asked();
    const auto& logits = decoder->step(text[i]);
    const double largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - largest);
    nats += std::log(sum) + largest - logits[text[i + 1]];
  }
  return nats / double(total) / std::numbers::ln2;
}

}  // namespace chela_lm
