#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "chela/core/executor.hpp"

namespace chela::test {

/// A pool such as a caller might bring: one thread per worker, tasks handed out from a shared counter.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) {}

  int workers() const { return threads_; }

  template <class F>
  void for_each(Index tasks, F f) const {
    std::atomic<Index> next = 0;
    std::vector<std::thread> team;
    for (int worker = 0; worker < threads_; ++worker)
      team.emplace_back([&, worker] {
        for (Index task = next++; task < tasks; task = next++) f(task, worker);
      });
    for (std::thread& thread : team) thread.join();
  }

 private:
  int threads_;
};
static_assert(Executor<ThreadPool>);

}  // namespace chela::test
