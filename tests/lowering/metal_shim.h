// Metal on a CPU: a threadgroup is a set of fibers that run one after the other, each up to its next barrier or
// simdgroup function. Those of a simdgroup must all come to the same one; else the program ends with a message.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>

#define device
#define constant
#define thread
#define threadgroup

typedef unsigned int uint;
typedef _Float16 float16_t;
struct uint2 { uint x, y; };
struct uint3 { uint x, y, z; };
struct uint4 { uint x, y, z, w; };
struct bfloat16_t {
  uint16_t bits;
  explicit bfloat16_t(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  explicit operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
using std::exp2;
using std::fabs;
using std::isfinite;
using std::log;
using std::log2;
using std::rint;
using std::sqrt;
using std::tanh;

// Threadgroup memory is a section, which holds NaNs when a threadgroup begins.
static char no_shared_memory __attribute__((section("tqc_shared"), used));
extern char __start_tqc_shared[], __stop_tqc_shared[];

namespace shim {
constexpr int MOST = 1024, STACK = 1 << 16;
struct Fiber {
  ucontext_t first;
  jmp_buf here;
  bool started, done;
  // How often it came to a barrier of the threadgroup, and to a meeting of the simdgroup.
  long barriers, meetings;
};
inline Fiber fibers[MOST];
inline char* stacks;
inline jmp_buf scheduler;
inline ucontext_t origin;
inline int count, current;
inline bool progress;
inline float slots[2][MOST];
inline void (*body)(int);

inline void fail(const char* why) {
  fprintf(stderr, "shim: %s\n", why);
  abort();
}
inline void yield() {
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}
inline void barrier() {
  const long mine = ++fibers[current].barriers;
  progress = true;
  for (;;) {
    yield();
    bool all = true;
    for (int i = 0; i < count; i++) {
      if (fibers[i].done && fibers[i].barriers < mine) fail("a thread ended before a barrier that others wait at");
      all = all && fibers[i].barriers >= mine;
    }
    if (all) return;
  }
}
inline float* meet(float x) {
  Fiber& own = fibers[current];
  const long mine = ++own.meetings;
  const int begin = current / 32 * 32, end = begin + 32 < count ? begin + 32 : count;
  slots[mine % 2][current] = x;
  progress = true;
  for (;;) {
    yield();
    bool all = true;
    for (int i = begin; i < end; i++) {
      if (fibers[i].done && fibers[i].meetings < mine) fail("a thread ended before its simdgroup met");
      if (fibers[i].barriers != own.barriers && fibers[i].meetings < mine) fail("a simdgroup diverged");
      all = all && fibers[i].meetings >= mine;
    }
    if (all) return slots[mine % 2] + begin;
  }
}
inline void enter() {
  body(current);
  fibers[current].done = true;
  progress = true;
  _longjmp(scheduler, 1);
}
// One threadgroup; `backwards`: threads take their turns from the last to the first.
inline void run_group(int threads, bool backwards, void (*function)(int)) {
  if (!stacks) stacks = (char*)malloc(size_t(MOST) * STACK);
  memset(__start_tqc_shared, 0xff, __stop_tqc_shared - __start_tqc_shared);
  body = function;
  count = threads;
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.barriers = fiber.meetings = 0;
  }
  for (volatile int left = threads; left;) {
    progress = false;
    for (volatile int k = 0; k < threads; k++) {
      current = backwards ? threads - 1 - k : k;
      Fiber& fiber = fibers[current];
      if (fiber.done) continue;
      if (!_setjmp(scheduler)) {
        if (fiber.started) _longjmp(fiber.here, 1);
        fiber.started = true;
        getcontext(&fiber.first);
        fiber.first.uc_stack.ss_sp = stacks + size_t(current) * STACK;
        fiber.first.uc_stack.ss_size = STACK;
        fiber.first.uc_link = nullptr;
        makecontext(&fiber.first, enter, 0);
        setcontext(&fiber.first);
      }
      if (fibers[current].done) left = left - 1;
    }
    if (!progress && left) {
      bool blocked = true;
      for (int i = 0; i < threads; i++) blocked = blocked && (fibers[i].done || fibers[i].started);
      static int idle;
      if (blocked && ++idle > 4) fail("no thread can go on");
      if (progress) idle = 0;
    }
  }
}
}  // namespace shim

inline void threadgroup_barrier(mem_flags) { shim::barrier(); }
inline void simdgroup_barrier(mem_flags) { shim::meet(0.0f); }
inline float simd_sum(float x) {
  const float* all = shim::meet(x);
  float sum = 0.0f;
  for (int i = 0; i < 32; i++) sum += all[i];
  return sum;
}
inline float simd_max(float x) {
  const float* all = shim::meet(x);
  float most = all[0];
  for (int i = 1; i < 32; i++) most = all[i] > most ? all[i] : most;
  return most;
}
