#pragma once
// One thread block of a kernel at a time on the CPU: its threads are fibers that run in turn, and change places where
// they wait for each other.
#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace chela::emulation {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

inline constexpr int most_threads = 1024, most_shared_bytes = 232448, lanes = 32;

/// Words that the lanes of a warp show each other at once.
using LaneWords = std::array<std::array<std::uint32_t, 8>, lanes>;

class Block {
 public:
  /// Ends the program if threads wait for what no other thread will do.
  void run(Index3 index, int threads, unsigned shared_bytes, const std::function<void()>& kernel);

  void barrier(int id, int threads) { wait_for(barriers_[std::size_t(id)], threads); }
  /// What all lanes of the current warp bring to this call, which all of them have to make.
  const LaneWords& exchange(const std::uint32_t* words, int count);

  /// Copies to shared memory that become visible when their thread has waited for them.
  void copy(std::uint32_t to, const void* from, int bytes, int of_all_bytes);
  void commit_copies();
  void wait_for_copies(int pending_groups);

  char* shared() { return shared_.data(); }
  /// Of so many bytes at an address in shared memory; ends the program if that is outside or misaligned.
  char* shared_at(std::uint32_t address, std::size_t bytes);
  std::uint32_t shared_address(const void* place) const {
    return std::uint32_t(static_cast<const char*>(place) - shared_.data());
  }

  int lane() const { return current_ % lanes; }
  Index3 thread_index() const { return {unsigned(current_)}; }
  Index3 index() const { return index_; }
  Index3 dim() const { return {unsigned(threads_.size()), 1, 1}; }

 private:
  struct Meeting {
    int arrived = 0;
    unsigned held = 0;  ///< times that all have arrived
  };
  struct Copy {
    std::uint32_t to;
    int bytes;
    std::array<char, 16> data;
  };
  struct Thread {
    boost::context::fiber fiber, scheduler;
    bool ended = false;
    std::vector<Copy> copies;
    std::vector<std::vector<Copy>> groups;
  };

  void let_others_run();
  void wait_for(Meeting& meeting, int threads);

  alignas(1024) std::array<char, most_shared_bytes> shared_;
  boost::context::pooled_fixedsize_stack stacks_{256 * 1024};
  std::vector<Thread> threads_;
  std::array<Meeting, 16> barriers_;
  std::array<Meeting, most_threads / lanes> warps_;
  std::array<std::array<LaneWords, 2>, most_threads / lanes> words_;
  Index3 index_;
  unsigned shared_bytes_ = 0;
  int current_ = 0;
  bool progress_ = false;
};

/// The one that runs now.
Block& block();

/// Runs all blocks of a grid after each other.
void run_grid(Index3 blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
Index3 grid();

/// While a stream is captured kernels are kept in place of being run.
void launch(Index3 blocks, int threads, int shared_bytes, std::function<void()> kernel);

}  // namespace chela::emulation
