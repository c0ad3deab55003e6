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
  else if constexpr (requires { v.low; }) forget(v.low), forget(v.high);
  else forget(v);
}

// Two a cycle for a latency of 6, and as many as AVX2 has registers for; NEON: four a cycle for a latency of 4.
constexpr int sums_of(size_t bytes) { return NEON && bytes == sizeof(Floats) ? 16 : 12; }

template <uint32_t TYPE>
double sweep(uint32_t rounds) {
  using D = Dot<TYPE>;
  constexpr int SUMS = sums_of(sizeof(typename D::Sum));
  typename D::Weights weights = {};
  typename D::Inputs inputs = {};
  typename D::Sum s[SUMS] = {};
  forget_all(inputs);
  for (uint32_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
      forget_all(weights);
      if constexpr (requires { D::template add<0>(s[i], weights, inputs); })
        s[i] = D::template add<0>(s[i], weights, inputs);
      else s[i] = D::add(s[i], weights, inputs);
      forget_all(s[i]);
    }
  constexpr uint64_t OF_A_STEP = (MULTIPLIES_MATRICES && TYPE != FP32 ? 8 : 4) / bytes_of(TYPE);
  return double(rounds) * SUMS * L * OF_A_STEP;
}

#if ADDS_IN_16_BITS
// Two steps at once, as weights of 7 bits allow.
template <>
double sweep<INT8>(uint32_t rounds) {
  constexpr int SUMS = sums_of(sizeof(Ints));
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
