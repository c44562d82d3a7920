// One operator, no framework: read a sequence with causal linear attention, then continue it by one token from the state.
#include <chela/chela.hpp>
#include <cstdio>
#include <random>

int main() {
  const chela::Index batch = 1, tokens = 1024, heads = 4, key_dim = 64, value_dim = 64;
  chela::Tensor<float, 4> q(batch, tokens, heads, key_dim), k = q, v(batch, tokens, heads, value_dim), o = v;
  chela::Tensor<float, 4> state(batch, heads, key_dim, value_dim);
  std::mt19937 random(7);
  for (auto* x : {&q, &k, &v})
    for (float& element : *x) element = std::normal_distribution<float>()(random);

  const chela::DefaultExecutor executor;  // OpenMP if the program is built with it; or bring your own thread pool
  chela::Status status = chela::cpu::linear_attention(
      chela::LinearAttentionArgs<float>{.q = q, .k = k, .v = v, .o = o, .final_state = state}, executor);
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.why), 1;
  std::printf("read %lld tokens, o[last] = %g %g ...\n", (long long)tokens, o(0, tokens - 1, 0, 0),
              o(0, tokens - 1, 0, 1));

  // The state stands for everything read so far: one more token costs the same after a thousand tokens or a million.
  const auto token = [](auto& x) { return chela::slice_axis<1>(x.view(), 0); };
  status = chela::cpu::linear_attention_step(
      chela::LinearAttentionStepArgs<float>{.q = token(q), .k = token(k), .v = token(v), .o = token(o), .state = state},
      executor);
  if (!status.ok()) return std::fprintf(stderr, "%s\n", status.why), 1;
  std::printf("one more token, o = %g %g ...\n", o(0, 0, 0, 0), o(0, 0, 0, 1));
  std::printf("RESULT tokens=%lld state_bytes=%lld\n", (long long)(tokens + 1), (long long)(state.size() * 4));
}
