#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

namespace cnxt {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Longer than threads that all run wait for each other; short beside a scheduler's slice, which a thread that spins
// keeps from the one that it waits for where both have one core.
constexpr std::chrono::microseconds SPIN{50};
constexpr int LOOKS = 64;      // between two looks at the clock
constexpr uint32_t RUNS = 16;  // between two looks at the cores

template <class Done>
bool spin_until(const Done &done) {
  for (int look = 0; look < LOOKS; look++, pause())
    if (done()) return true;
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int look = 0; look < LOOKS; look++, pause())
      if (done()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Waits until the value is another one: spinning for a while, then asleep.
uint32_t changed(const std::atomic<uint32_t> &value, uint32_t old) {
  if (!spin_until([&] { return value.load(std::memory_order_acquire) != old; }))
    value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

Pool::Pool(uint32_t threads) : threads(threads), process(getpid()), shares(new Share[threads]) {
  try {
    for (uint32_t thread = 1; thread < threads; thread++) workers.emplace_back([this, thread] { serve(thread); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() {
  if (belongs_here()) stop();
  else
    for (auto &worker : workers) worker.detach();  // they do not exist in this process
}

bool Pool::belongs_here() const { return getpid() == process; }

void Pool::stop() {
  stopping.store(true, std::memory_order_relaxed);
  number.fetch_add(1, std::memory_order_release);
  number.notify_all();
  for (auto &worker : workers) worker.join();
}

void Pool::serve(uint32_t thread) {
  for (uint32_t seen = 0, looked = 0;;) {
    seen = changed(number, seen);
    if (stopping.load(std::memory_order_relaxed)) return;
    if (seen - looked >= RUNS) looked = seen, look_around(thread);
    take(thread, seen);
  }
}

// Moves to another core where this thread shares one with a thread before it. Some kernels put threads that sleep often
// on one core although others are idle, and leave them there.
void Pool::look_around(uint32_t thread) {
#if defined(__linux__)
  const int core = sched_getcpu();
  shares[thread].core.store(core, std::memory_order_relaxed);
  bool crowded = false;
  cpu_set_t allowed, others;
  CPU_ZERO(&others);
  for (uint32_t other = 0; other < thread; other++) {
    const int its = shares[other].core.load(std::memory_order_relaxed);
    crowded |= its == core;
    if (its >= 0 && its < CPU_SETSIZE) CPU_SET(its, &others);
  }
  if (!crowded || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_AND(&others, &others, &allowed);
  CPU_XOR(&others, &others, &allowed);  // those that no thread before this one is on
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
  static_cast<void>(thread);
#endif
}

// Does pieces of that run until all have been begun.
void Pool::take(uint32_t thread, uint32_t run) {
  uint32_t done = 0;
  for (uint32_t other = 0; other < threads && number.load(std::memory_order_relaxed) == run; other++) {
    std::atomic<uint64_t> &left = shares[(thread + other) % threads].left;
    for (uint64_t found = left.load(std::memory_order_relaxed);;) {
      const uint64_t piece = found & 0xFFFF, last = found >> 16 & 0xFFFF;
      if (found >> 32 != run || piece >= last) break;
      if (!left.compare_exchange_weak(found, found + 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      work(argument, thread, static_cast<uint32_t>(piece));
      done++;
      found++;
    }
  }
  if (done && unfinished.fetch_sub(done, std::memory_order_acq_rel) == done && thread != 0) unfinished.notify_one();
}

void Pool::run(uint32_t pieces, Work function, void *with) {
  work = function;
  argument = with;
  if (threads == 1) {
    for (uint32_t piece = 0; piece < pieces; piece++) work(argument, 0, piece);
    return;
  }
  const uint32_t run = number.load(std::memory_order_relaxed) + 1;
  if (run % RUNS == 0) look_around(0);
  unfinished.store(pieces, std::memory_order_relaxed);
  for (uint64_t thread = 0; thread < threads; thread++)
    shares[thread].left.store(uint64_t{run} << 32 | (pieces * (thread + 1) / threads) << 16 | pieces * thread / threads,
                              std::memory_order_release);
  number.store(run, std::memory_order_release);
  number.notify_all();
  take(0, run);
  const auto finished = [&] { return unfinished.load(std::memory_order_acquire) == 0; };
  if (spin_until(finished)) return;
  for (uint32_t left; (left = unfinished.load(std::memory_order_acquire)) != 0;)
    unfinished.wait(left, std::memory_order_acquire);
}

}  // namespace cnxt
