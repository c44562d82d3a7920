// expect: constraint
#include "chela/cpu/attention/linear.hpp"

struct OneThread {
#if defined(WITHIN_LIMITS)
  int workers() const { return 1; }
#endif
  template <class F>
  void for_each(chela::Index tasks, F f) const {
    for (chela::Index task = 0; task < tasks; ++task) f(task, 0);
  }
};

chela::Status attend(const chela::LinearAttentionArgs<float>& args) {
  return chela::cpu::linear_attention(args, OneThread{});
}
