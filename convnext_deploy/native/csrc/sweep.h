// How fast the instructions are that products are made of: nothing is loaded and nothing waits for another. Included by
// kernels_body.h only.
#pragma once
#include "dot.h"
#include "kernels.h"
#include "simd.h"

namespace cnxt {
namespace {

#if defined(__aarch64__)
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+v"
#endif

// Keeps the compiler from knowing a register's value, so that it multiplies every time.
template <class V>
INLINE void forget(V &v) {
  asm volatile("" : IN_REGISTER(v));
}

template <class V>
INLINE void forget_all(V &v) {
  if constexpr (requires { v.even; }) forget(v.even), forget(v.odd);
  else forget(v);
}

constexpr int SUMS = 12;  // two a cycle for a latency of 6, and as many as AVX2 has registers for

template <uint32_t TYPE>
double sweep(uint32_t rounds) {
  using D = Dot<TYPE>;
  alignas(64) const uint8_t zeros[64] = {};
  auto weights = D::weights(zeros);
  auto inputs = D::inputs(zeros);
  typename D::Sum s[SUMS] = {};
  forget_all(inputs);
  for (uint32_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) {
      forget_all(weights);
      s[i] = D::add(s[i], weights, inputs);
      forget(s[i]);
    }
  return double(rounds) * SUMS * L * (4 / bytes_of(TYPE));
}

#if ADDS_IN_16_BITS
// Two steps at once, as weights of 7 bits allow.
template <>
double sweep<INT8>(uint32_t rounds) {
  Ints weights = {}, inputs = {}, s[SUMS] = {};
  forget(inputs);
  for (uint32_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++) {
      forget(weights);
      const Shorts first = code_sums(inputs, weights);
      forget(weights);
      s[i] += widened(first + code_sums(inputs, weights));
      forget(s[i]);
    }
  return double(rounds) * SUMS * L * 8;
}
#endif

double multiply_registers(uint32_t type, uint32_t rounds) {
  return type == INT8 ? sweep<INT8>(rounds) : type == BF16 ? sweep<BF16>(rounds) : sweep<FP32>(rounds);
}

}  // namespace
}  // namespace cnxt
