// Torch's own pool of threads, reached by addresses of its stable C interface that Python looks up in the loaded library.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace tqc {

struct Pool {
  int32_t (*threads)(uint32_t*) = nullptr;  // torch_get_num_threads
  // torch_parallel_for; it runs all on the calling thread inside of a parallel region
  int32_t (*loop)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
};
extern Pool pool;

inline int available_threads() {
  uint32_t threads = 1;
  if (pool.loop && pool.threads) pool.threads(&threads);
  return int(threads);
}

// body(task) for each task in [0, tasks), handed out in order to whichever thread is free. A body throws nothing.
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
  const auto run = [](int64_t, int64_t, void* p) {
    Shared& s = *(Shared*)p;
    for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) (*s.body)(task);
  };
  if (pool.loop(0, threads, 1, run, &shared)) std::abort();
}

}  // namespace tqc
