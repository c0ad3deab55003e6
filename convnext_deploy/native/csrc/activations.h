// Activation functions of vectors. Included by kernels_body.h only.
#pragma once
#include "simd.h"

namespace cnxt {
namespace {

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

// Horner's scheme for N values side by side: a core that waits for one's last step goes on with the others'.
template <int N, int TERMS>
INLINE void polynomial(Floats (&p)[N], const Floats (&u)[N], const float (&terms)[TERMS], float gain) {
  for (int i = 0; i < N; i++) p[i] = splat(gain * terms[0]);
#pragma GCC unroll 16
  for (int t = 1; t < TERMS; t++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) p[i] = p[i] * u[i] + gain * terms[t];
}

// gain x Phi(x). Phi is 1/2 + c P(c^2) with c = x limited to the bound, where it is 0 or 1 but for rounding, which a
// large negative x must not be multiplied with; the coefficients minimize the largest error of x Phi(x). Largest
// absolute errors: coarse 5.8e-4, middle 8.2e-5, fine 8e-7 (tested), relative to x beyond 1.
enum class Exactness { COARSE, MIDDLE, FINE };

constexpr float COARSE_BOUND = 3.6f, MIDDLE_BOUND = 4.2f, FINE_BOUND = 5.2f;
constexpr float COARSE_TERMS[] = {-5.39761434e-07f, 2.87446915e-05f, -0.000642883016f,
                                  0.00800349462f,   -0.0629901345f,  0.396803654f};
constexpr float MIDDLE_TERMS[] = {-9.01765097e-10f, 7.94141883e-08f, -3.03795289e-06f, 6.68909888e-05f,
                                  -0.000950659683f, 0.0092982378f,   -0.0655282172f,   0.398465882f};
constexpr float FINE_TERMS[] = {-0.000368731491f, 0.00118187286f, -0.00152307824f, 0.00202210833f, -0.00448492991f,
                                0.00834959742f,   -0.0126483014f, 0.0180451763f,   -0.0246920264f, 0.0319727511f,
                                -0.0399326636f,   0.0500256902f,  -0.0677435996f,  0.135949981f};

// The gain is that of the quantizer that follows: part of the coefficients, it costs nothing.
template <int N, int TERMS>
INLINE void gelu(Floats (&x)[N], float bound, const float (&terms)[TERMS], float gain) {
  Floats c[N], u[N], p[N];
  for (int i = 0; i < N; i++) x[i] = greatest(x[i], splat(-bound));
  for (int i = 0; i < N; i++) c[i] = least(x[i], splat(bound));
  for (int i = 0; i < N; i++) u[i] = c[i] * c[i];
  polynomial(p, u, terms, gain);
  for (int i = 0; i < N; i++) p[i] = c[i] * p[i] + gain * 0.5f;
  for (int i = 0; i < N; i++) x[i] *= p[i];
}

template <int N>
INLINE void gelu_fine(Floats (&x)[N], float gain) {
  Floats c[N], z[N], p[N];
  for (int i = 0; i < N; i++) x[i] = greatest(x[i], splat(-FINE_BOUND));
  for (int i = 0; i < N; i++) c[i] = least(x[i], splat(FINE_BOUND));
  for (int i = 0; i < N; i++)  // in [-1, 1]: keeps the polynomial well conditioned
    z[i] = c[i] * c[i] * (2.0f / (FINE_BOUND * FINE_BOUND)) - 1.0f;
  polynomial(p, z, FINE_TERMS, 1.0f);
  for (int i = 0; i < N; i++) p[i] = c[i] * p[i] + 0.5f;
  for (int i = 0; i < N; i++) x[i] = x[i] * p[i] * gain;
}

#if defined(__AVX512F__)
// A parabola for each of 30 pieces of [-4.11, 4.11], 0 before them and x after them: one instruction chooses among 32
// numbers. Fewer multiplications than a polynomial for all of it, and an error of 8.2e-5 at most (tested).
constexpr float PIECE = 4.11f / 15;
alignas(64) constexpr float SQUARES[] = {
    0.0f,          -0.0010481136f, -0.0025303578f, -0.005570754f, -0.0111326855f, -0.020055924f, -0.032213196f,
    -0.045232188f, -0.053320136f,  -0.04721469f,   -0.016526183f, 0.045531143f,   0.13644828f,   0.24120146f,
    0.334647f,     0.39001969f,    0.39001969f,    0.334647f,     0.24120146f,    0.13644828f,   0.045531143f,
    -0.016526183f, -0.04721469f,   -0.053320136f,  -0.045232188f, -0.032213196f,  -0.020055924f, -0.0111326855f,
    -0.005570754f, -0.0025303578f, -0.0010481136f, 0.0f};
alignas(64) constexpr float SLOPES[] = {
    0.0f,         -0.0089014415f, -0.020224461f, -0.04179803f,  -0.07824394f, -0.13187988f, -0.19839084f, -0.2626576f,
    -0.29849857f, -0.27591443f,   -0.17625971f,  -0.007604628f, 0.19067182f,  0.3627771f,   0.46628118f,  0.49873808f,
    0.50126195f,  0.5337188f,     0.6372229f,    0.8093282f,    1.0076046f,   1.1762598f,   1.2759144f,   1.2984985f,
    1.2626576f,   1.1983908f,     1.1318799f,    1.078244f,     1.041798f,    1.0202245f,   1.0089015f,   1.0f};
alignas(64) constexpr float STARTS[] = {
    0.0f,          -0.018962149f,    -0.04058858f,     -0.07886242f,  -0.13857563f,  -0.21918783f, -0.3101746f,
    -0.38950562f,  -0.42921922f,     -0.40835243f,     -0.3274141f,   -0.21273541f,  -0.10449549f, -0.033644643f,
    -0.004843932f, -0.000023261664f, -0.000023261664f, -0.004843932f, -0.033644643f, -0.10449549f, -0.21273541f,
    -0.3274141f,   -0.40835243f,     -0.42921922f,     -0.38950562f,  -0.3101746f,   -0.21918783f, -0.13857563f,
    -0.07886242f,  -0.04058858f,     -0.018962149f,    0.0f};

template <int N>
INLINE void gelu_in_pieces(Floats (&x)[N], float gain) {
  const auto chosen = [](__m512i piece, const __m512(&from)[2]) {
    return (Floats)_mm512_permutex2var_ps(from[0], piece, from[1]);
  };
  const auto scaled = [gain](const float *from) { return (__m512)(load<Floats>(from) * gain); };
  const __m512 squares[] = {scaled(SQUARES), scaled(SQUARES + L)}, slopes[] = {scaled(SLOPES), scaled(SLOPES + L)},
               starts[] = {scaled(STARTS), scaled(STARTS + L)};
  const __m512 inverse = (__m512)splat(1 / PIECE), magic = (__m512)splat(12582912.0f + 16);  // its last bits are 16
  Floats c[N];
  __m512i piece[N];
  for (int i = 0; i < N; i++) x[i] = greatest(x[i], splat(-15.5f * PIECE));
  for (int i = 0; i < N; i++) c[i] = least(x[i], splat(15.5f * PIECE));
  for (int i = 0; i < N; i++)
    piece[i] = (__m512i)_mm512_fmadd_round_ps((__m512)c[i], inverse, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  for (int i = 0; i < N; i++) c[i] = chosen(piece[i], squares) * c[i] + chosen(piece[i], slopes);
  for (int i = 0; i < N; i++) x[i] = c[i] * x[i] + chosen(piece[i], starts);
}
#endif

template <uint32_t A>
INLINE Floats activated(Floats x) {
  if constexpr (A == GELU_TANH)
    return sigmoid_times(x, x * (1.59576912f + 0.0713548163f * x * x));  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
  else if constexpr (A == SILU) return sigmoid_times(x, x);
  else if constexpr (A == RELU) return greatest(x, splat(0.0f));
  else if constexpr (A == TANH) return sigmoid_times(splat(2.0f), 2.0f * x) - 1.0f;
  else return x;
}

template <uint32_t A, Exactness E, int N>
INLINE void activate(Floats (&x)[N], float gain) {
  if constexpr (A != GELU)
    for (int i = 0; i < N; i++) x[i] = gain * activated<A>(x[i]);
  else if constexpr (E == Exactness::FINE) gelu_fine(x, gain);
#if defined(__AVX512F__)
  else gelu_in_pieces(x, gain);
#else
  else if constexpr (E == Exactness::MIDDLE) gelu(x, MIDDLE_BOUND, MIDDLE_TERMS, gain);
  else gelu(x, COARSE_BOUND, COARSE_TERMS, gain);
#endif
}

}  // namespace
}  // namespace cnxt
