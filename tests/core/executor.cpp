#include "chela/core/executor.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "support/thread_pool.hpp"

using namespace chela;
using chela::test::ThreadPool;

namespace {

struct NoWorkers {
  template <class F>
  void for_each(Index, F) const {}
};

struct TaskOnly {
  int workers() const { return 1; }
  void for_each(Index, void (*)(Index)) const {}
};

static_assert(Executor<SerialExecutor> && Executor<DefaultExecutor> && Executor<ThreadPool>);
static_assert(!Executor<NoWorkers> && !Executor<TaskOnly> && !Executor<int>);

/// What the Executor concept promises in words: every task once, worker indices in range, never two at once with the same.
void check_promises(const Executor auto& executor) {
  for (Index tasks : {0, 1, 2, 3, 17, 500}) {
    CAPTURE(tasks);
    const int workers = executor.workers();
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
    std::vector<std::atomic<int>> busy(static_cast<std::size_t>(workers));
    std::atomic<int> out_of_range = 0, shared_worker = 0;
    executor.for_each(tasks, [&](Index task, int worker) {
      if (task < 0 || task >= tasks || worker < 0 || worker >= workers) {
        ++out_of_range;
        return;
      }
      if (busy[std::size_t(worker)]++ != 0) ++shared_worker;
      ++runs[std::size_t(task)];
      std::this_thread::yield();  // lets another worker in while this one is inside
      --busy[std::size_t(worker)];
    });
    CHECK(out_of_range == 0);
    CHECK(shared_worker == 0);
    CHECK(std::all_of(runs.begin(), runs.end(), [](const auto& count) { return count == 1; }));
  }
}

}  // namespace

TEST_CASE("the serial executor keeps its promises, in order") {
  check_promises(SerialExecutor{});
  std::vector<Index> order;
  SerialExecutor{}.for_each(5, [&](Index task, int) { order.push_back(task); });
  CHECK(order == std::vector<Index>{0, 1, 2, 3, 4});
}

TEST_CASE("a caller's own pool keeps its promises") {
  for (int threads : {1, 2, 5}) check_promises(ThreadPool(threads));
}

#if defined(_OPENMP)
TEST_CASE("OpenMP executors of any size keep their promises") {
  for (int threads : {1, 2, 3, 8}) check_promises(OpenMpExecutor(threads));
  check_promises(OpenMpExecutor());
}

TEST_CASE("an OpenMP executor has at least one worker") {
  CHECK(OpenMpExecutor(0).workers() == 1);
  CHECK(OpenMpExecutor(-3).workers() == 1);
  CHECK(OpenMpExecutor(4).workers() == 4);
}

TEST_CASE("an OpenMP executor inside an OpenMP region still runs every task") {
  std::atomic<int> runs = 0;
#pragma omp parallel num_threads(2)
  OpenMpExecutor(3).for_each(10, [&](Index, int worker) {
    if (worker >= 0 && worker < 3) ++runs;
  });
  CHECK(runs == 20);
}
#endif
