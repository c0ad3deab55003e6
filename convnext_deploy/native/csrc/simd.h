// Vectors of the instruction set that this translation unit is compiled for. Included by kernels_body.h only.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(PORTABLE)
#include <arm_neon.h>
#define NEON true
#endif
#if !defined(NEON)
#define NEON false
#endif

#include "format.h"

#define INLINE static inline __attribute__((always_inline))

namespace cnxt {
namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
constexpr int PARTS = BLOCK / L;  // vectors in a block of channels
#if defined(__AVX512F__) || NEON
constexpr int REGISTERS = 32;  // of vectors
#else
constexpr int REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * L), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * L), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * L), may_alias));
typedef int16_t Shorts __attribute__((vector_size(4 * L), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(L), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * L), may_alias));

#if NEON  // with memcpy g++ keeps vectors in pairs of general registers, and has too few of the others left
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};

template <class V>
INLINE V load(const void *from) {
  return static_cast<const Unaligned<V> *>(from)->v;
}

template <class V>
INLINE void store(void *to, V v) {
  static_cast<Unaligned<V> *>(to)->v = v;
}
#else
template <class V>
INLINE V load(const void *from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
INLINE void store(void *to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}
#endif

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat(int32_t x) { return x - Ints{}; }
INLINE Floats as_floats(Words v) { return (Floats)v; }

// The second operand where the first is NaN, as minps has it.
INLINE Floats least(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif NEON
  return (Floats)vminnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a < b ? a : b;
#endif
}

INLINE Floats greatest(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif NEON
  return (Floats)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return a > b ? a : b;
#endif
}

// Half to even. |v| < 2^22.
INLINE Ints rounded(Floats v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)v);
#elif NEON
  return (Ints)vcvtnq_s32_f32((float32x4_t)v);
#else
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: what is added to it loses its fraction
  return (Ints)(v + magic) - (Ints)magic;
#endif
}

INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

INLINE float sum(Floats v) {
  float total = 0;
#if defined(__AVX512F__)
  total = _mm512_reduce_add_ps((__m512)v);
#elif NEON
  total = vaddvq_f32((float32x4_t)v);
#else
  for (int i = 0; i < L; i++) total += v[i];
#endif
  return total;
}

INLINE Floats from_bf16(Halves v) { return as_floats(__builtin_convertvector(v, Words) << 16); }

INLINE void store_bf16(void *to, Floats v) {  // half to even; NaN stays NaN
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)v));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && NEON
  store(to, vcvt_bf16_f32((float32x4_t)v));
#else
  const Words bits = (Words)v;
  const Words even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words kept = (v == v) ? even : (bits >> 16) | 0x40;
  store(to, __builtin_convertvector(kept, Halves));
#endif
}

// (v - shift) / step to a code: rounded half to even, moved by the zero point, saturated.
struct Quantizer {
  Floats move, low, high;
  Ints zero_point;
};

INLINE Quantizer quantizer(float inverse_step, float shift, int32_t zero_point) {
  return {splat(-shift * inverse_step), splat(-static_cast<float>(zero_point)),
          splat(255.0f - static_cast<float>(zero_point)), splat(zero_point)};
}

// The codes of a block of 16 channels; `scaled` is v / step.
INLINE void store_codes(void *to, const Floats (&scaled)[PARTS], const Quantizer &q) {
#if defined(__AVX512F__)
  // What is too large for an int32 becomes its smallest, which as an unsigned number is saturated like the others.
  const Ints codes = rounded(greatest(scaled[0] + q.move, q.low)) + q.zero_point;
  _mm_storeu_si128(static_cast<__m128i *>(to), _mm512_cvtusepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
  Ints codes[2];
  for (int p = 0; p < 2; p++) codes[p] = rounded(least(scaled[p] + q.move, q.high)) + q.zero_point;
  const __m256i shorts =
      _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);  // channels 0 to 3 and 8 to 11, others
  const __m128i mixed = _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
  _mm_storeu_si128(static_cast<__m128i *>(to), _mm_shuffle_epi32(mixed, 0xD8));
#elif NEON
  int16x8_t shorts[2];  // conversion, narrowing and addition saturate: there is no bound to keep
  for (int p = 0; p < 2; p++)
    shorts[p] = vcombine_s16(vqmovn_s32((int32x4_t)rounded(scaled[2 * p] + q.move)),
                             vqmovn_s32((int32x4_t)rounded(scaled[2 * p + 1] + q.move)));
  const int16x8_t zero_point = vreinterpretq_s16_s32((int32x4_t)q.zero_point);  // in the lower half of each
  const int16x8_t move = vdupq_laneq_s16(zero_point, 0);
  store(to, vcombine_u8(vqmovun_s16(vqaddq_s16(shorts[0], move)), vqmovun_s16(vqaddq_s16(shorts[1], move))));
#else
  for (int p = 0; p < PARTS; p++) {
    const Ints codes = rounded(greatest(least(scaled[p] + q.move, q.high), q.low)) + q.zero_point;
    store(static_cast<char *>(to) + p * L, __builtin_convertvector(codes, Bytes));
  }
#endif
}

template <uint32_t TYPE>
INLINE void store_block(void *to, const Floats (&y)[PARTS], const Quantizer &q) {
  if constexpr (TYPE == INT8) return store_codes(to, y, q);
  for (int p = 0; p < PARTS; p++) {
    char *part = static_cast<char *>(to) + p * L * bytes_of(TYPE);
    if constexpr (TYPE == BF16) store_bf16(part, y[p]);
    if constexpr (TYPE == FP32) store(part, y[p]);
  }
}

// e^v for v in [-87, 87], relative error below 3e-7.
INLINE Floats exponential(Floats v) {
  const Floats magic = splat(12582912.0f);
  const Floats shifted = v * 1.44269504f + magic;
  const Floats whole = shifted - magic;
  const Floats r = (v - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
  return p * (Floats)power;
}

INLINE Floats sigmoid_times(Floats x, Floats argument) {  // x / (1 + e^-argument)
  const Floats bounded = greatest(least(argument, splat(87.0f)), splat(-87.0f));
  return x / (1.0f + exponential(-bounded));
}

// gain x Phi(x). Phi is 1/2 + c P(c^2) with c = x limited to the bound, where it is 0 or 1 but for rounding, which a
// large negative x must not be multiplied with; the coefficients minimize the largest error of x Phi(x). Largest
// absolute errors: coarse 5.8e-4, middle 8.2e-5, fine 8e-7 (tested), relative to x beyond 1.
// The gain is that of the quantizer that follows: part of the coefficients, it costs nothing.
INLINE Floats gelu_coarse(Floats x, float gain) {
  const Floats v = greatest(x, splat(-3.6f)), c = least(v, splat(3.6f)), u = c * c;
  Floats p = splat(gain * -5.39761434e-07f);
  p = p * u + gain * 2.87446915e-05f;
  p = p * u + gain * -0.000642883016f;
  p = p * u + gain * 0.00800349462f;
  p = p * u + gain * -0.0629901345f;
  p = p * u + gain * 0.396803654f;
  return v * (c * p + gain * 0.5f);
}

INLINE Floats gelu_middle(Floats x, float gain) {
  const Floats v = greatest(x, splat(-4.2f)), c = least(v, splat(4.2f)), u = c * c;
  Floats p = splat(gain * -9.01765097e-10f);
  p = p * u + gain * 7.94141883e-08f;
  p = p * u + gain * -3.03795289e-06f;
  p = p * u + gain * 6.68909888e-05f;
  p = p * u + gain * -0.000950659683f;
  p = p * u + gain * 0.0092982378f;
  p = p * u + gain * -0.0655282172f;
  p = p * u + gain * 0.398465882f;
  return v * (c * p + gain * 0.5f);
}

INLINE Floats gelu_fine(Floats x, float gain) {
  const Floats v = greatest(x, splat(-5.2f)), c = least(v, splat(5.2f));
  const Floats z = c * c * (2.0f / (5.2f * 5.2f)) - 1.0f;  // in [-1, 1]: keeps the polynomial well conditioned
  Floats p = splat(-0.000368731491f);
  p = p * z + 0.00118187286f;
  p = p * z - 0.00152307824f;
  p = p * z + 0.00202210833f;
  p = p * z - 0.00448492991f;
  p = p * z + 0.00834959742f;
  p = p * z - 0.0126483014f;
  p = p * z + 0.0180451763f;
  p = p * z - 0.0246920264f;
  p = p * z + 0.0319727511f;
  p = p * z - 0.0399326636f;
  p = p * z + 0.0500256902f;
  p = p * z - 0.0677435996f;
  p = p * z + 0.135949981f;
  return v * (c * p + 0.5f) * gain;
}

enum class Exactness { COARSE, MIDDLE, FINE };

template <uint32_t A, Exactness E>
INLINE Floats activated(Floats x, float gain) {
  if constexpr (A == GELU) {
    if constexpr (E == Exactness::COARSE) return gelu_coarse(x, gain);
    if constexpr (E == Exactness::MIDDLE) return gelu_middle(x, gain);
    return gelu_fine(x, gain);
  } else if constexpr (A == GELU_TANH) {
    return gain * sigmoid_times(x, x * (1.59576912f + 0.0713548163f * x * x));  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
  } else if constexpr (A == SILU) {
    return gain * sigmoid_times(x, x);
  } else if constexpr (A == RELU) {
    return gain * greatest(x, splat(0.0f));
  } else if constexpr (A == TANH) {
    return gain * (sigmoid_times(splat(2.0f), 2.0f * x) - 1.0f);
  } else {
    return gain * x;
  }
}

}  // namespace
}  // namespace cnxt
