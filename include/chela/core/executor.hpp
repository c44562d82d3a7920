#pragma once
// Who runs the independent parts of a CPU operator. The library keeps no threads and no global state: each call is given an
// executor, and tasks are handed out one by one so that a disturbed core does not hold up the rest.
#include <concepts>

#include "chela/core/index.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace chela {

namespace detail {
struct AnyTask {
  void operator()(Index task, int worker) const;
};
}  // namespace detail

/// A caller's own thread pool serves by offering these two members:
///   int workers() const                     how many tasks may run at once
///   void for_each(Index tasks, F f) const   calls f(task, worker) for every task in [0, tasks), worker in [0, workers()),
///                                           no two running tasks with the same worker, and returns when all are done
/// Tasks never throw and never wait for one another. Results do not depend on the order or on the number of workers.
template <class E>
concept Executor = requires(const E executor, Index tasks, detail::AnyTask f) {
  { executor.workers() } -> std::convertible_to<int>;
  executor.for_each(tasks, f);
};

/// Runs every task on the calling thread.
struct SerialExecutor {
  int workers() const { return 1; }

  template <class F>
  void for_each(Index tasks, F&& f) const {
    for (Index task = 0; task < tasks; ++task) f(task, 0);
  }
};

#if defined(_OPENMP)
/// Runs tasks on an OpenMP team of a fixed size. There when the program is compiled with OpenMP.
class OpenMpExecutor {
 public:
  OpenMpExecutor() : threads_(omp_get_max_threads()) {}
  explicit OpenMpExecutor(int threads) : threads_(threads < 1 ? 1 : threads) {}

  int workers() const { return threads_; }

  template <class F>
  void for_each(Index tasks, F&& f) const {
    if (threads_ == 1 || tasks <= 1) return SerialExecutor{}.for_each(tasks, f);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (Index task = 0; task < tasks; ++task) f(task, omp_get_thread_num());
  }

 private:
  int threads_;
};

using DefaultExecutor = OpenMpExecutor;
#else
using DefaultExecutor = SerialExecutor;
#endif

}  // namespace chela
