#include "block.hpp"

#include <cstdio>
#include <memory>

namespace chela::emulation {
namespace {

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "emulated kernel: %s\n", why);
  std::abort();
}

Index3 current_grid;

}  // namespace

Block& block() {
  static const std::unique_ptr<Block> the_block = std::make_unique<Block>();
  return *the_block;
}

Index3 grid() { return current_grid; }

void run_grid(Index3 blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads > most_threads || threads % lanes != 0) fail("a block has up to 1024 threads, in whole warps here");
  if (shared_bytes > most_shared_bytes) fail("more shared memory than a block may have");
  current_grid = blocks;
  for (unsigned y = 0; y < blocks.y; ++y)
    for (unsigned x = 0; x < blocks.x; ++x) block().run({x, y, 0}, threads, unsigned(shared_bytes), kernel);
}

void Block::run(Index3 index, int threads, unsigned shared_bytes, const std::function<void()>& kernel) {
  index_ = index, shared_bytes_ = shared_bytes;
  std::memset(shared_.data(), 0xff, shared_bytes);
  barriers_ = {}, warps_ = {};
  threads_ = std::vector<Thread>(std::size_t(threads));
  for (Thread& thread : threads_)
    thread.fiber =
        boost::context::fiber(std::allocator_arg, stacks_, [&thread, &kernel](boost::context::fiber&& scheduler) {
          thread.scheduler = std::move(scheduler);
          kernel();
          thread.ended = true;
          return std::move(thread.scheduler);
        });
  // Each round begins with another warp, so that no warp is always ahead of another.
  for (int left = threads, first = 0; left > 0; first += lanes) {
    progress_ = false;
    for (int i = 0; i < threads; ++i) {
      current_ = (first + i) % threads;
      Thread& thread = threads_[std::size_t(current_)];
      if (thread.ended) continue;
      thread.fiber = std::move(thread.fiber).resume();
      if (thread.ended) --left, progress_ = true;
    }
    if (!progress_) fail("its threads wait for each other");
  }
}

void Block::let_others_run() {
  Thread& thread = threads_[std::size_t(current_)];
  thread.scheduler = std::move(thread.scheduler).resume();
}

void Block::wait_for(Meeting& meeting, int threads) {
  const unsigned before = meeting.held;
  progress_ = true;
  if (++meeting.arrived == threads)
    meeting.arrived = 0, ++meeting.held;
  else
    while (meeting.held == before) let_others_run();
}

const LaneWords& Block::exchange(const std::uint32_t* words, int count) {
  const std::size_t warp = std::size_t(current_ / lanes);
  // The words of two meetings: a lane may be at the next one while others still read these.
  LaneWords& shown = words_[warp][warps_[warp].held % 2];
  std::copy(words, words + count, shown[std::size_t(lane())].begin());
  wait_for(warps_[warp], lanes);
  return shown;
}

char* Block::shared_at(std::uint32_t address, std::size_t bytes) {
  if (address + bytes > shared_bytes_) fail("an access outside of the block's shared memory");
  if (address % bytes != 0) fail("a misaligned access to shared memory");
  return shared_.data() + address;
}

void Block::copy(std::uint32_t to, const void* from, int bytes, int of_all_bytes) {
  shared_at(to, std::size_t(of_all_bytes));
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(from) % std::uintptr_t(of_all_bytes) != 0)
    fail("a misaligned copy to shared memory");
  Copy copy{to, of_all_bytes, {}};
  std::memcpy(copy.data.data(), from, std::size_t(bytes));
  threads_[std::size_t(current_)].copies.push_back(copy);
}

void Block::commit_copies() {
  Thread& thread = threads_[std::size_t(current_)];
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void Block::wait_for_copies(int pending_groups) {
  std::vector<std::vector<Copy>>& groups = threads_[std::size_t(current_)].groups;
  while (int(groups.size()) > pending_groups) {
    for (const Copy& copy : groups.front())
      std::memcpy(shared_.data() + copy.to, copy.data.data(), std::size_t(copy.bytes));
    groups.erase(groups.begin());
  }
}

}  // namespace chela::emulation
