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
INLINE void store_codes(void *to, const Floats *scaled, const Quantizer &q) {
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
INLINE void store_block(void *to, const Floats *y, const Quantizer &q) {
  if constexpr (TYPE == INT8) return store_codes(to, y, q);
  for (int p = 0; p < PARTS; p++) {
    char *part = static_cast<char *>(to) + p * L * bytes_of(TYPE);
    if constexpr (TYPE == BF16) store_bf16(part, y[p]);
    if constexpr (TYPE == FP32) store(part, y[p]);
  }
}

}  // namespace
}  // namespace cnxt
