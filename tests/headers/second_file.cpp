#include "chela/chela.hpp"
#include "chela/reference.hpp"

const void* default_executor_of_second_file() {
  static const chela::DefaultExecutor executor;
  return &executor;
}
