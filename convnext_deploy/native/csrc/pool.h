// The session's threads: all of them run the same function, and meet at barriers inside it.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include <sys/types.h>

namespace cnxt {

class Pool {
 public:
  explicit Pool(uint32_t threads);  // the calling thread is one of them
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  // False after a fork: the child does not have the other threads.
  bool belongs_here() const;
  // Runs `work(thread)` on every thread, the calling one being 0, and returns when all are done.
  void run(const std::function<void(uint32_t)> &work);
  // Every thread of `run` waits here for all others.
  void barrier();

 private:
  void serve(uint32_t thread);
  void stop();

  const uint32_t threads;
  const pid_t process;
  std::vector<std::thread> workers;
  const std::function<void(uint32_t)> *work = nullptr;
  bool stopping = false;
  alignas(64) std::atomic<uint32_t> started{0};  // counts runs
  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> passed{0};  // counts barriers
};

}  // namespace cnxt
