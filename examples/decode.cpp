// Generation with a state of constant size: read a prompt in one pass, write token by token, undo two tokens that were only
// guessed, and go on. One layer of gated linear attention over bytes with random weights: it writes noise, but reads, steps
// and remembers as a trained layer does.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chela/chela.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using chela::Index;
constexpr auto decay = chela::DecayKind::per_key;
constexpr auto rule = chela::RuleKind::additive;
constexpr int bytes = 256;

/// What each byte asks, offers, says and forgets [byte, head * dim], and how outputs vote for the next byte [head * dim, byte].
struct Layer {
  Index heads, dim;
  chela::Tensor<float, 2> query, key, value, log_decay, vote;
  chela::DefaultExecutor executor;

  Layer(Index head_count, Index head_dim)
      : heads(head_count),
        dim(head_dim),
        query(bytes, heads * dim),
        key(query),
        value(query),
        log_decay(query),
        vote(heads * dim, bytes) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (auto* table : {&query, &key, &value, &vote})
      for (float& x : *table) x = normal(random);
    for (float& x : log_decay) x = -0.02f * std::abs(normal(random));
  }

  chela::Tensor<float, 4> look_up(const chela::Tensor<float, 2>& table, const std::vector<int>& text) const {
    chela::Tensor<float, 4> rows(1, Index(text.size()), heads, dim);
    for (std::size_t t = 0; t < text.size(); ++t)
      std::copy_n(&table(text[t], 0), heads * dim, rows.data() + Index(t) * heads * dim);
    return rows;
  }

  int next_byte(const float* output) const {
    std::vector<float> votes(bytes);
    for (Index i = 0; i < heads * dim; ++i)
      for (Index b = 0; b < bytes; ++b) votes[std::size_t(b)] += vote(i, b) * output[i];
    return int(std::max_element(votes.begin(), votes.end()) - votes.begin());
  }
};

void stop_unless(chela::Status status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.why);
  std::exit(1);
}

/// Reads `text` in one pass and advances `state`; returns the outputs [1, token, head, dim]. `last_states`, if present, receives
/// the states after the last tokens, so that they can be undone.
chela::Tensor<float, 4> read(const Layer& layer, const std::vector<int>& text, chela::Tensor<float, 4>& state,
                             chela::TensorView<float, 5> last_states = {}) {
  const auto q = layer.look_up(layer.query, text), k = layer.look_up(layer.key, text),
             v = layer.look_up(layer.value, text), g = layer.look_up(layer.log_decay, text);
  auto o = v;
  stop_unless(chela::cpu::linear_attention(chela::LinearAttentionArgs<float, decay, rule>{.q = q,
                                                                                          .k = k,
                                                                                          .v = v,
                                                                                          .o = o,
                                                                                          .initial_state = state,
                                                                                          .final_state = state,
                                                                                          .log_decay = g,
                                                                                          .last_states = last_states},
                                           layer.executor));
  return o;
}

/// One byte in, the next one out.
int step(const Layer& layer, int byte, chela::Tensor<float, 4>& state) {
  const auto row = [&](const chela::Tensor<float, 2>& table) {
    return chela::contiguous(&table(byte, 0), 1, layer.heads, layer.dim);
  };
  chela::Tensor<float, 3> o(1, layer.heads, layer.dim);
  stop_unless(chela::cpu::linear_attention_step(
      chela::LinearAttentionStepArgs<float, decay, rule>{.q = row(layer.query),
                                                         .k = row(layer.key),
                                                         .v = row(layer.value),
                                                         .o = o,
                                                         .state = state,
                                                         .log_decay = row(layer.log_decay)},
      layer.executor));
  return layer.next_byte(o.data());
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

int main(int argc, char** argv) {
  Index prompt_len = 8192, new_tokens = 256, heads = 8, dim = 64;
  CLI::App app("Prefill, decode, roll back and continue with linear attention");
  app.add_option("--prompt-len", prompt_len, "tokens read before the first is written")->check(CLI::Range(1, 1 << 24));
  app.add_option("--new-tokens", new_tokens, "tokens written; 4 or more")->check(CLI::Range(4, 1 << 20));
  app.add_option("--heads", heads, "heads of the layer")->check(CLI::Range(1, 1024));
  app.add_option("--dim", dim, "key_dim and value_dim of a head")->check(CLI::Range(1, 1024));
  CLI11_PARSE(app, argc, argv);

  const Layer layer(heads, dim);
  std::vector<int> prompt;
  std::mt19937 random(11);
  for (Index t = 0; t < prompt_len; ++t) prompt.push_back(int(random() % bytes));

  // The whole prompt in one pass.
  chela::Tensor<float, 4> state(1, heads, dim, dim);
  auto begin = std::chrono::steady_clock::now();
  const auto read_prompt = read(layer, prompt, state);
  const double prefill = double(prompt_len) / seconds_since(begin);
  const chela::Tensor<float, 4> after_prompt = state;

  // Token by token: each costs the same, however long the text has become.
  begin = std::chrono::steady_clock::now();
  std::vector<int> written{layer.next_byte(&read_prompt(0, prompt_len - 1, 0, 0))};
  while (Index(written.size()) < new_tokens) written.push_back(step(layer, written.back(), state));
  const double decode = double(new_tokens - 1) / seconds_since(begin);

  // Again, with four tokens guessed ahead, the last two wrongly. One pass tests them all; what it says of the second shows
  // that the third is wrong, and the state of two tokens ago is at hand.
  std::vector<int> guess{written[0], written[1], (written[2] + 1) % bytes, (written[3] + 1) % bytes};
  state = after_prompt;
  chela::Tensor<float, 5> last(1, 3, heads, dim, dim);
  const auto tested = read(layer, guess, state, last);
  const auto verdict = [&](std::size_t i) { return layer.next_byte(&tested(0, Index(i), 0, 0)); };
  std::vector<int> continued{guess[0]};
  for (std::size_t i = 0; i + 1 < guess.size() && verdict(i) == guess[i + 1]; ++i) continued.push_back(guess[i + 1]);
  const std::size_t undone = guess.size() - continued.size();
  if (undone < std::size_t(last.extents()[1]))
    std::copy_n(&last(0, last.extents()[1] - 1 - Index(undone), 0, 0, 0), state.size(), state.data());
  continued.push_back(verdict(continued.size() - 1));
  while (Index(continued.size()) < new_tokens) continued.push_back(step(layer, continued.back(), state));
  const bool same = undone == 2 && continued == written;

  const double state_kib = double(state.size()) * sizeof(float) / 1024;
  const double cache_kib = double(prompt_len + new_tokens) * double(heads * dim * 2) * sizeof(float) / 1024;
  std::printf("prefill   %10.0f tokens/s  (%lld tokens in one pass)\n", prefill, (long long)prompt_len);
  std::printf("decode    %10.0f tokens/s  (one step each)\n", decode);
  std::printf("rollback  %zu of %zu guessed tokens undone, the text after them is %s\n", undone, guess.size(),
              same ? "the same" : "NOT the same");
  std::printf("memory    %10.0f KiB of state, constant; keys and values of as many tokens would be %.0f KiB\n",
              state_kib, cache_kib);
  std::printf(
      "RESULT prefill_tokens_per_second=%.0f decode_tokens_per_second=%.0f undone=%zu same_text=%d "
      "state_kib=%.0f kv_cache_kib=%.0f\n",
      prefill, decode, undone, int(same), state_kib, cache_kib);
  return same ? 0 : 1;
}
