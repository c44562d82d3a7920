// Two files that include everything link into one program: no header defines a symbol twice.
#include "chela/chela.hpp"
#include "chela/reference.hpp"

const void* default_executor_of_second_file();

int main() { return default_executor_of_second_file() == nullptr; }
