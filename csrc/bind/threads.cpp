#include "threads.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#endif

namespace fastattn::bind {
namespace {

// NOTE: torch's pool is GNU OpenMP's, and its threads do not survive a fork: a parallel region in
// the child of a process that had started them waits for them forever. So such a child runs its
// loops serially, as the workers of torch's DataLoader do anyway; a child of a process that had no
// second thread keeps the whole pool.
std::atomic<bool> pool_lost_in_fork{false};

#if defined(__linux__)

bool forking_with_threads = false;  // written and read around one fork, in the thread that forks

void before_fork() {
  forking_with_threads = true;
  if (DIR* tasks = opendir("/proc/self/task")) {
    int entries = 0;  // ".", ".." and one per thread
    while (readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
    forking_with_threads = entries > 3;
  }
}

void after_fork_in_child() {
  if (forking_with_threads) pool_lost_in_fork.store(true, std::memory_order_relaxed);
}

const int atfork_registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);

#endif

struct Job {
  void (*body)(int64_t i, void* context);
  void* context;
  int64_t n;
  std::atomic<int64_t> next;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i, context);
  }
};

int64_t thread_count() {
  if (pool_lost_in_fork.load(std::memory_order_relaxed)) return 1;
  return torch::stable::get_num_threads();
}

void run_on_pool(int64_t n, void (*body)(int64_t i, void* context), void* context) {
  Job job{body, context, n, {0}};
  const int64_t workers = min_of(n, thread_count());
  if (workers <= 1) {
    job.work();
    return;
  }
  torch::stable::parallel_for(0, workers, 1, [&job](int64_t, int64_t) { job.work(); });
}

}  // namespace

Threads torch_threads() {
  return {thread_count(), run_on_pool};
}

}  // namespace fastattn::bind
