// How fast this CPU multiplies with the instructions of a path.
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "convnext_deploy.h"
#include "kernels.h"

namespace {

double multiplied(const cnxt::Kernels &kernels, uint32_t type, std::chrono::steady_clock::time_point end) {
  double done = 0;
  do {
    done += kernels.multiply_registers(type, 10000);
  } while (std::chrono::steady_clock::now() < end);
  return done;
}

}  // namespace

// `isa` as in `cnxt_options`, `type` as in `cnxt_timing`; `gmacs_per_s` of all threads together, over `seconds`.
extern "C" CNXT_API int cnxt_peak(const char *isa, uint32_t type, uint32_t threads, double seconds,
                                  double *gmacs_per_s) {
  const cnxt::Kernels *kernels = cnxt::choose_kernels(isa);
  if (!kernels || !gmacs_per_s || type >= cnxt::TYPES || threads < 1 || !(seconds > 0 && seconds <= 10))
    return CNXT_BAD_ARGUMENT;
  std::vector<std::thread> others;
  int code = CNXT_OK;
  try {
    std::vector<double> done(threads);
    const auto start = std::chrono::steady_clock::now();
    const auto end = start + std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
    const auto work = [&](uint32_t i) { done[i] = multiplied(*kernels, type, end); };
    try {
      for (uint32_t i = 1; i < threads; i++) others.emplace_back(work, i);
    } catch (const std::exception &) {
      code = CNXT_NO_THREADS;
    }
    if (code == CNXT_OK) work(0);
    for (std::thread &other : others) other.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    double sum = 0;
    for (const double one : done) sum += one;
    *gmacs_per_s = sum / took.count() / 1e9;
  } catch (const std::exception &) {
    return CNXT_NO_MEMORY;
  }
  return code;
}
