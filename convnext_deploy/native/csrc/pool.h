// The session's threads, and how they share a piece of work.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
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

  static constexpr uint32_t MOST_PIECES = 0xFFFF;

  // False after a fork: the child does not have the other threads.
  bool belongs_here() const;

  // Calls `work(thread, piece)` for every piece, and returns when all are done. The calling thread is 0. Each thread
  // begins with its own run of neighbouring pieces, the same ones every time, as their data is in its cache; then it
  // takes what others have not begun. So nobody waits for a thread that is late, only for pieces that are being done.
  template <class F>
  void run(uint32_t pieces, F &&work) {
    run(pieces, [](void *f, uint32_t thread, uint32_t piece) { (*static_cast<F *>(f))(thread, piece); }, &work);
  }

 private:
  using Work = void (*)(void *, uint32_t thread, uint32_t piece);

  // The pieces that a thread begins with, and whose turn it is: [first, last) of the run with that number. One word, so
  // that a thread which has slept since an earlier run cannot take a piece of this one by mistake.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // run << 32 | last << 16 | first
    std::atomic<int> core{-1};      // that the thread ran on when it last looked
  };

  void run(uint32_t pieces, Work function, void *argument);
  void serve(uint32_t thread);
  void take(uint32_t thread, uint32_t number);
  void look_around(uint32_t thread);
  void stop();

  const uint32_t threads;
  const pid_t process;
  std::vector<std::thread> workers;
  const std::unique_ptr<Share[]> shares;  // of each thread
  Work work = nullptr;                    // written between runs; read after a piece was taken
  void *argument = nullptr;
  std::atomic<bool> stopping{false};
  alignas(64) std::atomic<uint32_t> number{0};      // of the run
  alignas(64) std::atomic<uint32_t> unfinished{0};  // pieces
};

}  // namespace cnxt
