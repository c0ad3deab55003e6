// How a matrix product's inner loop multiplies: all that depends on the instruction set beside simd.h, so that another
// one is another branch here and there. Included by kernels_body.h only.
#pragma once
#include "kernels.h"
#include "simd.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define MULTIPLIES_INT8 true
#else
#define MULTIPLIES_INT8 false
#endif
// Without an instruction that adds products of codes in 32 bits, those that add in 16 bits are used where no input can
// make them saturate.
#if defined(__AVX2__) && !MULTIPLIES_INT8
#define ADDS_IN_16_BITS true
#else
#define ADDS_IN_16_BITS false
#endif

namespace cnxt {
namespace {

// The tile that stays in registers, rows by blocks of 16 outputs, and how many steps one turn of the loop takes.
struct Tile {
  int rows, groups, steps;
};
#if defined(__AVX512VNNI__)
constexpr Tile TILES[TYPES] = {{14, 2, 1}, {14, 2, 1}, {14, 2, 1}};  // FP32, BF16, INT8
#elif defined(__AVX512F__)
constexpr Tile TILES[TYPES] = {{14, 2, 1}, {12, 2, 1}, {14, 1, 2}};
#elif defined(__AVX2__)
constexpr Tile TILES[TYPES] = {{6, 1, 4}, {4, 1, 2}, MULTIPLIES_INT8 ? Tile{6, 1, 4} : Tile{4, 1, 2}};
#else
constexpr Tile TILES[TYPES] = {{2, 1, 1}, {2, 1, 1}, {2, 1, 1}};
#endif

#if !MULTIPLIES_INT8
// The sum of the products of each two neighbouring int16.
INLINE Ints pair_sums(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
#endif

#if ADDS_IN_16_BITS
// The sum of the products of each two neighbouring codes, uint8 by int8, in 16 bits: saturated.
INLINE Shorts code_sums(Ints a, Ints w) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)a, (__m512i)w);
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)w);
#endif
}

INLINE Ints widened(Shorts sums) { return pair_sums((Ints)sums, (Ints)(Shorts{} + 1)); }
#endif

// How one step of 4 bytes of a row multiplies one vector of weights; sums are Ints or Floats.
template <uint32_t TYPE>
struct Dot;

template <>
struct Dot<INT8> {
  using Sum = Ints;
#if MULTIPLIES_INT8
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Weights weights(const uint8_t *from) { return load<Ints>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return splat(load<int32_t>(from)); }
  INLINE Sum add(Sum s, Weights w, Inputs a) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)s, (__m512i)a, (__m512i)w);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)a, (__m256i)w);
#endif
  }
#else
  struct Pair { Ints even, odd; };  // 16-bit halves: inputs 0 and 2 of each step, and 1 and 3
  using Weights = Pair;
  using Inputs = Pair;
  INLINE Weights weights(const uint8_t *from) {
    const Shorts w = load<Shorts>(from);
    return {(Ints)((w << 8) >> 8), (Ints)(w >> 8)};
  }
  INLINE Inputs inputs(const uint8_t *from) {
    const Words bytes = (Words)splat(load<int32_t>(from));
    return {(Ints)(bytes & 0x00FF00FF), (Ints)((bytes >> 8) & 0x00FF00FF)};
  }
  INLINE Sum add(Sum s, Weights w, Inputs a) { return s + pair_sums(w.even, a.even) + pair_sums(w.odd, a.odd); }
#endif
};

template <>
struct Dot<BF16> {
  using Sum = Floats;
#if defined(__AVX512BF16__)
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Weights weights(const uint8_t *from) { return load<Ints>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return splat(load<int32_t>(from)); }
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    return (Floats)_mm512_dpbf16_ps((__m512)s, (__m512bh)(__m512i)a, (__m512bh)(__m512i)w);
  }
#else
  struct Pair { Floats even, odd; };
  using Weights = Pair;
  using Inputs = Pair;
  INLINE Weights weights(const uint8_t *from) {
    const Words w = load<Words>(from);
    return {as_floats(w << 16), as_floats(w & 0xFFFF0000u)};
  }
  INLINE Inputs inputs(const uint8_t *from) {
    const Words a = (Words)splat(load<int32_t>(from));
    return {as_floats(a << 16), as_floats(a & 0xFFFF0000u)};
  }
  INLINE Sum add(Sum s, Weights w, Inputs a) { return s + w.even * a.even + w.odd * a.odd; }
#endif
};

template <>
struct Dot<FP32> {
  using Sum = Floats;
  using Weights = Floats;
  using Inputs = Floats;
  INLINE Weights weights(const uint8_t *from) { return load<Floats>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return splat(load<float>(from)); }
  INLINE Sum add(Sum s, Weights w, Inputs a) { return s + w * a; }
};

}  // namespace
}  // namespace cnxt
