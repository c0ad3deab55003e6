#include "pool.h"

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

// Waits until `value` is no longer `old`: spinning for some 50 us, which is longer than a barrier usually takes, then
// asleep, so that fewer cores than threads still make progress.
void wait_while(const std::atomic<uint32_t> &value, uint32_t old) {
  for (int spin = 0; spin < 4000; spin++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(uint32_t threads) : threads(threads), process(getpid()) {
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
  stopping = true;
  started.fetch_add(1, std::memory_order_release);
  started.notify_all();
  for (auto &worker : workers) worker.join();
}

void Pool::serve(uint32_t thread) {
  for (uint32_t seen = 0;;) {
    wait_while(started, seen);
    seen++;
    if (stopping) return;
    (*work)(thread);
    barrier();
  }
}

void Pool::run(const std::function<void(uint32_t)> &function) {
  work = &function;
  started.fetch_add(1, std::memory_order_release);
  if (threads > 1) started.notify_all();
  function(0);
  barrier();
}

void Pool::barrier() {
  if (threads == 1) return;
  const uint32_t generation = passed.load(std::memory_order_relaxed);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived.store(0, std::memory_order_relaxed);
    passed.fetch_add(1, std::memory_order_release);
    passed.notify_all();
  } else {
    wait_while(passed, generation);
  }
}

}  // namespace cnxt
