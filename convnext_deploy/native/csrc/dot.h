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
// Arm's usmmla and bfmmla: two rows times two outputs at once, of 8 bytes each.
#if NEON && defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MULTIPLIES_MATRICES true
#else
#define MULTIPLIES_MATRICES false
#endif
// Arm's older instructions multiply int8 by int8: codes are moved down by 128, and what that takes from a sum is in
// what it begins with.
#define SIGNED_CODES (NEON && !MULTIPLIES_MATRICES)
// Without an instruction that adds products of codes in 32 bits, those that add in 16 bits are used where no input can
// make them saturate.
#if defined(__AVX2__) && !MULTIPLIES_INT8
#define ADDS_IN_16_BITS true
#else
#define ADDS_IN_16_BITS false
#endif

namespace cnxt {
namespace {

// The tile that stays in registers, rows by blocks of 16 outputs, and how many steps one turn of the loop takes. Every
// product has a multiple of 4 steps, as its inputs are a multiple of 16.
struct Tile {
  int rows, groups, steps;
};
#if defined(__AVX512VNNI__)
constexpr Tile TILES[TYPES] = {{14, 2, 1}, {14, 2, 1}, {14, 2, 1}};  // FP32, BF16, INT8
#elif defined(__AVX512F__)
constexpr Tile TILES[TYPES] = {{14, 2, 1}, {12, 2, 1}, {14, 1, 2}};
#elif defined(__AVX2__)
constexpr Tile TILES[TYPES] = {{6, 1, 4}, {4, 1, 2}, MULTIPLIES_INT8 ? Tile{6, 1, 4} : Tile{4, 1, 2}};
#elif MULTIPLIES_MATRICES
constexpr Tile TILES[TYPES] = {{6, 1, 4}, {6, 1, 4}, {6, 1, 4}};
#elif NEON && defined(__ARM_FEATURE_DOTPROD)
constexpr Tile TILES[TYPES] = {{6, 1, 4}, {4, 1, 4}, {6, 1, 4}};
#elif NEON
constexpr Tile TILES[TYPES] = {{6, 1, 4}, {4, 1, 4}, {2, 1, 4}};
#else
constexpr Tile TILES[TYPES] = {{2, 1, 1}, {2, 1, 1}, {2, 1, 1}};
#endif

#if !MULTIPLIES_INT8 && !NEON
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

// What a vector of sums begins with and comes to: it is kept as it is.
INLINE void begin(Ints &sums, const void *from) { sums = load<Ints>(from); }
INLINE void begin(Floats &sums, const void *from) { sums = load<Floats>(from); }
INLINE Ints total(Ints sums) { return sums; }
INLINE Floats total(Floats sums) { return sums; }

// How one step of 4 bytes of a row multiplies one vector of weights; sums are Ints or Floats. With NEON one vector of
// inputs contains the four steps of a turn, which multiplication takes as lanes.
template <uint32_t TYPE>
struct Dot;

#if NEON

#if MULTIPLIES_MATRICES
// Inputs are 8 bytes of one row and of the next; weights are those of two outputs, of two steps: see multiply_pairs.
template <>
struct Dot<INT8> {
  using Sum = Ints;
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Sum add(Sum s, Weights w, Inputs a) { return (Ints)vusmmlaq_s32((int32x4_t)s, (uint8x16_t)a, (int8x16_t)w); }
};

template <>
struct Dot<BF16> {
  using Sum = Floats;
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    return (Floats)vbfmmlaq_f32((float32x4_t)s, (bfloat16x8_t)a, (bfloat16x8_t)w);
  }
};
#else
#if defined(__ARM_FEATURE_DOTPROD)
template <>
struct Dot<INT8> {
  using Sum = Ints;
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Weights weights(const uint8_t *from) { return load<Ints>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return (Ints)(load<Words>(from) ^ 0x80808080u); }
  template <int LANE>
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    return (Ints)vdotq_laneq_s32((int32x4_t)s, (int8x16_t)w, (int8x16_t)a, LANE);
  }
};
#else
// A product of two int8 fits into 16 bits, and two of them do not always. So each two neighbours are added in 32 bits:
// two sums an output, of two vectors for four outputs.
struct HalfSums {
  Ints low, high;
};

INLINE void begin(HalfSums &sums, const void *from) {
  const int32x4_t start = (int32x4_t)load<Ints>(from), zero = vdupq_n_s32(0);
  sums = {(Ints)vzip1q_s32(start, zero), (Ints)vzip2q_s32(start, zero)};
}
INLINE Ints total(HalfSums sums) { return (Ints)vpaddq_s32((int32x4_t)sums.low, (int32x4_t)sums.high); }

template <>
struct Dot<INT8> {
  using Sum = HalfSums;
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Weights weights(const uint8_t *from) { return load<Ints>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return (Ints)(load<Words>(from) ^ 0x80808080u); }
  template <int LANE>
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    const int8x16_t codes = (int8x16_t)w, step = (int8x16_t)vdupq_laneq_s32((int32x4_t)a, LANE);
    return {(Ints)vpadalq_s16((int32x4_t)s.low, vmull_s8(vget_low_s8(codes), vget_low_s8(step))),
            (Ints)vpadalq_s16((int32x4_t)s.high, vmull_high_s8(codes, step))};
  }
};
#endif

template <>
struct Dot<BF16> {
  using Sum = Floats;
  struct Pair {
    Floats even, odd;
  };
  using Weights = Pair;
  using Inputs = Pair;
  INLINE Pair widened(Words v) { return {as_floats(v << 16), as_floats(v & 0xFFFF0000u)}; }
  INLINE Weights weights(const uint8_t *from) { return widened(load<Words>(from)); }
  INLINE Inputs inputs(const uint8_t *from) { return widened(load<Words>(from)); }
  template <int LANE>
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    const float32x4_t even = vfmaq_laneq_f32((float32x4_t)s, (float32x4_t)w.even, (float32x4_t)a.even, LANE);
    return (Floats)vfmaq_laneq_f32(even, (float32x4_t)w.odd, (float32x4_t)a.odd, LANE);
  }
};
#endif

template <>
struct Dot<FP32> {
  using Sum = Floats;
  using Weights = Floats;
  using Inputs = Floats;
  INLINE Weights weights(const uint8_t *from) { return load<Floats>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return load<Floats>(from); }
  template <int LANE>
  INLINE Sum add(Sum s, Weights w, Inputs a) {
    return (Floats)vfmaq_laneq_f32((float32x4_t)s, (float32x4_t)w, (float32x4_t)a, LANE);
  }
};

#else

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
  struct Pair {
    Ints even, odd;
  };  // 16-bit halves: inputs 0 and 2 of each step, and 1 and 3
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
  struct Pair {
    Floats even, odd;
  };
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

#endif

}  // namespace
}  // namespace cnxt
