// What a user pays per file: the whole header and one operator.
#include <chela/chela.hpp>

chela::Status one_operator(const chela::LinearAttentionArgs<float>& args) {
  return chela::cpu::linear_attention(args, chela::DefaultExecutor{});
}
