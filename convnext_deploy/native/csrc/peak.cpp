// How fast this CPU multiplies matrices with these kernels: operands that stay in each core's own cache.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "convnext_deploy.h"
#include "kernels.h"

namespace {

constexpr uint32_t ROWS = 168, STEPS = 128, OUTPUTS = 64;  // 84 KiB, 32 KiB and 42 KiB: rows, weights, sums

struct alignas(64) Line {
  uint8_t bytes[64];
};

// Multiplies until `end`; the multiply-accumulates done.
double multiplied(const cnxt::Kernels &kernels, uint32_t type, std::chrono::steady_clock::time_point end) {
  std::vector<Line> a(ROWS * STEPS * 4 / 64), weights(OUTPUTS * STEPS * 4 / 64), out(ROWS * OUTPUTS * 4 / 64);
  const auto fill = [&](std::vector<Line> &lines) {  // ones, in any type: nothing denormal slows a product down
    const float one = 1;
    const uint16_t half = 0x3F80;
    for (Line &line : lines)
      for (size_t i = 0; i < 64; i += 4) {
        if (type == cnxt::FP32) std::memcpy(line.bytes + i, &one, 4);
        else if (type == cnxt::BF16) std::memcpy(line.bytes + i, &half, 2), std::memcpy(line.bytes + i + 2, &half, 2);
        else std::memset(line.bytes + i, 1, 4);
      }
  };
  fill(a), fill(weights);
  alignas(64) float bias[OUTPUTS] = {}, scale[OUTPUTS];
  alignas(64) int32_t offset[OUTPUTS] = {};
  std::fill_n(scale, OUTPUTS, 1.0f);
  constexpr size_t LENGTH = cnxt::order_length(STEPS);
  std::vector<uint16_t> order(OUTPUTS / 16 * LENGTH);
  for (size_t group = 0; kernels.find_order && group < OUTPUTS / 16; group++)
    kernels.find_order(weights[group * STEPS].bytes, STEPS / 2, &order[group * LENGTH]);
  cnxt::Gemm gemm = {};
  gemm.type = type, gemm.rows = ROWS, gemm.steps = STEPS, gemm.first = 0, gemm.last = OUTPUTS / 16;
  gemm.a = a[0].bytes, gemm.a_stride = STEPS * 4, gemm.weights = weights[0].bytes;
  gemm.bias = bias, gemm.scale = scale, gemm.offset = offset, gemm.order = order.data();
  gemm.epilogue.kind = cnxt::Epilogue::ROWS, gemm.epilogue.type = cnxt::FP32;
  gemm.epilogue.activation = cnxt::IDENTITY, gemm.epilogue.exact = true;
  gemm.epilogue.out = out[0].bytes, gemm.epilogue.stride = OUTPUTS * 4;
  gemm.epilogue.inverse_step = gemm.epilogue.step = 1;
  double done = 0;
  do {
    for (int i = 0; i < 8; i++) kernels.gemm(gemm);
    done += 8.0 * ROWS * OUTPUTS * STEPS * (4 / cnxt::bytes_of(type));
  } while (std::chrono::steady_clock::now() < end);
  return done;
}

}  // namespace

// `type` as in `cnxt_timing`; `gmacs_per_s` of all threads together, over `seconds`.
extern "C" CNXT_API int cnxt_peak(uint32_t type, uint32_t threads, double seconds, double *gmacs_per_s) {
  const cnxt::Kernels *kernels = cnxt::choose_kernels(nullptr);
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
