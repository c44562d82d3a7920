// Linear attention over two tokens whose answer fits in the head: keys and queries are 1, so outputs are running sums.
#include <chela/chela.hpp>

int main() {
  float ones[] = {1, 1}, values[] = {2, 3}, outputs[] = {0, 0};
  chela::LinearAttentionArgs<float> args;
  args.q = args.k = chela::contiguous(ones, 1, 2, 1, 1);
  args.v = chela::contiguous(values, 1, 2, 1, 1);
  args.o = chela::contiguous(outputs, 1, 2, 1, 1);
  const chela::Status status = chela::cpu::linear_attention(args, chela::SerialExecutor{});
  return status.ok() && outputs[0] == 2 && outputs[1] == 5 ? 0 : 1;
}
