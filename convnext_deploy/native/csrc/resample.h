// Weighted sums of bytes in fixed point: what a resize is made of, in either direction. Included by kernels_body.h
// only.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace cnxt {
namespace {

// Saturated to what a byte has.
INLINE void store_bytes(uint8_t *to, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i *>(to),
                   _mm512_cvtusepi32_epi8(_mm512_max_epi32((__m512i)v, _mm512_setzero_si512())));
#elif defined(__AVX2__)
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(to), _mm_packus_epi16(shorts, shorts));
#else
  v = v < 0 ? splat(0) : v;
  v = v > 255 ? splat(255) : v;
  store(to, __builtin_convertvector(v, Bytes));
#endif
}

// The next 16 / L vectors of bytes. What compilers make of a conversion takes each byte by itself.
struct Widened {
  Ints part[16 / L];
};

INLINE Widened widened_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
  return {{(Ints)_mm512_cvtepu8_epi32(load<__m128i>(from))}};
#elif defined(__AVX2__)
  const __m128i bytes = load<__m128i>(from);
  return {{(Ints)_mm256_cvtepu8_epi32(bytes), (Ints)_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(bytes, bytes))}};
#elif NEON
  const uint8x16_t bytes = load<uint8x16_t>(from);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{(Ints)vmovl_u16(vget_low_u16(low)), (Ints)vmovl_high_u16(low), (Ints)vmovl_u16(vget_low_u16(high)),
           (Ints)vmovl_high_u16(high)}};
#elif defined(__SSE2__)
  const __m128i bytes = load<__m128i>(from), zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi8(bytes, zero), high = _mm_unpackhi_epi8(bytes, zero);
  return {{(Ints)_mm_unpacklo_epi16(low, zero), (Ints)_mm_unpackhi_epi16(low, zero),
           (Ints)_mm_unpacklo_epi16(high, zero), (Ints)_mm_unpackhi_epi16(high, zero)}};
#else
  Widened made;
  for (int part = 0; part < 16 / L; part++)
    made.part[part] = __builtin_convertvector(load<Bytes>(from + part * L), Ints);
  return made;
#endif
}

// Bytes whose sums have a register each, beside those that are added.
constexpr int WEIGHED = L >= 16 ? 64 : L >= 8 || NEON ? 32 : 16;

void weigh(const uint8_t *in, size_t stride, const int32_t *weights, uint32_t taps, uint8_t *out) {
  for (int start = 0; start < LINE; start += WEIGHED) {
    Ints sums[WEIGHED / L];
    for (Ints &sum : sums) sum = splat(1 << (WEIGHT_BITS - 1));
    const uint8_t *from = in + start;
    for (uint32_t tap = 0; tap < taps; tap++, from += stride) {
      const Ints weight = splat(weights[tap]);
      for (int group = 0; group < WEIGHED; group += 16) {
        const Widened bytes = widened_bytes(from + group);
        for (int part = 0; part < 16 / L; part++) sums[group / L + part] += bytes.part[part] * weight;
      }
    }
    for (int v = 0; v < WEIGHED / L; v++) store_bytes(out + start + v * L, sums[v] >> WEIGHT_BITS);
  }
}

}  // namespace
}  // namespace cnxt
