// Torch's own OpenMP pool, reached by addresses that Python looks up in the loaded libraries: no link to either.
#pragma once
#include <atomic>
#include <cstdint>

namespace tqc {

struct Pool {
  int (*threads)() = nullptr;         // at::get_num_threads
  bool (*inside)() = nullptr;         // at::in_parallel_region
  void (*fork)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
};
extern Pool pool;

inline int available_threads() {
  if (!pool.threads || !pool.fork || (pool.inside && pool.inside())) return 1;
  return pool.threads();
}

// body(task) for each task in [0, tasks), handed out in order to whichever thread is free.
template <class Body>
inline void parallel(int64_t tasks, int threads, const Body& body) {
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  struct Shared {
    alignas(64) std::atomic<int64_t> next;
    alignas(64) int64_t tasks;
    const Body* body;
  } shared{{0}, tasks, &body};
  pool.fork(
      [](void* p) {
        Shared& s = *(Shared*)p;
        for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(task);
      },
      &shared, threads, 0);
}

}  // namespace tqc
