#pragma once
#include "block.hpp"
#include "chela/cuda/arch/target.cuh"

namespace chela::cuda::arch {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::block().shared());
}
inline std::uint32_t shared_address(const void* pointer) { return emulation::block().shared_address(pointer); }

template <int Threads>
void sync_threads(int barrier) {
  emulation::block().barrier(barrier, Threads);
}

template <class T>
T load_shared(std::uint32_t address) {
  T x;
  std::memcpy(&x, emulation::block().shared_at(address, sizeof(T)), sizeof(T));
  return x;
}
template <class T>
void store_shared(std::uint32_t address, T x) {
  std::memcpy(emulation::block().shared_at(address, sizeof(T)), &x, sizeof(T));
}
inline float2 load_shared_float2(std::uint32_t address) { return load_shared<float2>(address); }
inline float load_shared_float(std::uint32_t address) { return load_shared<float>(address); }
inline std::uint32_t load_shared_word(std::uint32_t address) { return load_shared<std::uint32_t>(address); }
inline uint2 load_shared_words(std::uint32_t address) { return load_shared<uint2>(address); }
inline unsigned short load_shared_half_word(std::uint32_t address) { return load_shared<unsigned short>(address); }
inline uint4 load_shared_unit(std::uint32_t address) { return load_shared<uint4>(address); }
inline void store_shared_float2(std::uint32_t address, float x, float y) { store_shared(address, float2{x, y}); }
inline void store_shared_word(std::uint32_t address, std::uint32_t x) { store_shared(address, x); }
inline void store_shared_half_word(std::uint32_t address, std::uint32_t x) { store_shared(address, std::uint16_t(x)); }
inline void store_shared_unit(std::uint32_t address, uint4 x) { store_shared(address, x); }

/// Lanes 8 i to 8 i + 7 give the rows of matrix i.
inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  const emulation::LaneWords& rows = emulation::block().exchange(&address, 1);
  const unsigned lane = unsigned(emulation::block().lane());
  for (unsigned i = 0; i < 4; ++i) r[i] = load_shared_word(rows[8 * i + lane / 4][0] + 4 * (lane % 4));
}
inline void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  const emulation::LaneWords& rows = emulation::block().exchange(&address, 1);
  const unsigned lane = unsigned(emulation::block().lane());
  const auto element = [&](unsigned row) { return load_shared<std::uint16_t>(rows[row][0] + 2 * (lane / 4)); };
  for (unsigned i = 0; i < 4; ++i)
    r[i] = element(8 * i + 2 * (lane % 4)) | std::uint32_t(element(8 * i + 2 * (lane % 4) + 1)) << 16;
}
inline void copy_async_16(std::uint32_t to, const void* from, bool valid) {
  emulation::block().copy(to, from, valid ? 16 : 0, 16);
}
inline void copy_async_first_bytes(std::uint32_t to, const void* from, int bytes) {
  emulation::block().copy(to, from, bytes, 16);
}
inline void copy_async_8(std::uint32_t to, const void* from, bool valid) {
  emulation::block().copy(to, from, valid ? 8 : 0, 8);
}
inline void copy_async_4(std::uint32_t to, const void* from, bool valid) {
  emulation::block().copy(to, from, valid ? 4 : 0, 4);
}
inline void commit_copies() { emulation::block().commit_copies(); }
template <int Pending>
void wait_copies() {
  emulation::block().wait_for_copies(Pending);
}

}  // namespace chela::cuda::arch
