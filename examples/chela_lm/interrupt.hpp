#pragma once
// Ctrl-C and a polite kill ask the program to stop at a good moment; a second one stops it at once. A closed pipe is an
// error of the write that meets it, not the end of the program.
#include <csignal>

namespace chela_lm {

class Interrupt {
 public:
  static constexpr int exit_code = 130;

  static void listen() {
    std::signal(SIGINT, &Interrupt::note);
    std::signal(SIGTERM, &Interrupt::note);
#if defined(SIGPIPE)
    std::signal(SIGPIPE, SIG_IGN);
#endif
  }

  static bool asked() { return asked_ != 0; }

 private:
  static void note(int signal) {
    asked_ = 1;
    std::signal(signal, SIG_DFL);
  }
  static inline volatile std::sig_atomic_t asked_ = 0;
};

/// Thrown where work that leaves nothing to save is broken off.
struct Interrupted {};

inline void stop_if_asked() {
  if (Interrupt::asked()) throw Interrupted{};
}

}  // namespace chela_lm
