// The main function of every test program that needs a device. Ends with 77, which CTest takes as skipped, when there
// is none.
#define DOCTEST_CONFIG_IMPLEMENT
#include <cuda_runtime.h>
#include <doctest/doctest.h>

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 77;
  return doctest::Context(argc, argv).run();
}
