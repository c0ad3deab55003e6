// Matrix products on packed weights. Included by kernels_body.h only.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace cnxt {
namespace {

// The tile that stays in registers: ROWS rows by GROUPS blocks of 16 outputs.
#if defined(__AVX512VNNI__)
constexpr int ROWS = 14, GROUPS = 2;
#elif defined(__AVX512F__)
constexpr int ROWS = 12, GROUPS = 2;
#elif defined(__AVX2__)
constexpr int ROWS = 4, GROUPS = 1;
#else
constexpr int ROWS = 2, GROUPS = 1;
#endif

// How one step of 4 bytes of a row multiplies one vector of weights; sums are Ints or Floats.
template <uint32_t TYPE>
struct Dot;

template <>
struct Dot<INT8> {
  using Sum = Ints;
#if defined(__AVX512VNNI__)
  using Weights = Ints;
  using Inputs = Ints;
  INLINE Weights weights(const uint8_t *from) { return load<Ints>(from); }
  INLINE Inputs inputs(const uint8_t *from) { return splat(load<int32_t>(from)); }
  INLINE Sum add(Sum s, Weights w, Inputs a) { return (Ints)_mm512_dpbusd_epi32((__m512i)s, (__m512i)a, (__m512i)w); }
#else
  typedef int16_t Shorts __attribute__((vector_size(4 * L), may_alias));
  struct Pair { Ints even, odd; };  // 16-bit halves: inputs 0 and 2 of each step, and 1 and 3
  using Weights = Pair;
  using Inputs = Pair;
  INLINE Weights weights(const uint8_t *from) {
    const Shorts w = load<Shorts>(from);
    return {(Ints)((w << 8) >> 8), (Ints)(w >> 8)};
  }
  INLINE Inputs inputs(const uint8_t *from) {
    const int32_t bytes = load<int32_t>(from);
    return {splat(bytes & 0x00FF00FF), splat((bytes >> 8) & 0x00FF00FF)};
  }
  INLINE Ints pairs(Ints a, Ints b) {
#if defined(__AVX512F__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  INLINE Sum add(Sum s, Weights w, Inputs a) { return s + pairs(w.even, a.even) + pairs(w.odd, a.odd); }
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

// One tile's sums, `[ROWS][GROUPS * 16]`, left in the first-level cache for the epilogue.
constexpr int TILE = GROUPS * BLOCK;

// Sums that begin with `start`, one value an output: a product's offset or bias. `next` is brought into the second-level
// cache meanwhile, a line a step.
template <uint32_t TYPE, int M, int G>
__attribute__((noinline)) void multiply(const uint8_t *a, size_t stride, const uint8_t *w, size_t group, uint32_t steps,
                                        const void *start, const uint8_t *next, void *sums) {
  using D = Dot<TYPE>;
  constexpr int V = G * PARTS;
  typename D::Sum s[M][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    const auto first = load<typename D::Sum>(static_cast<const char *>(start) + v * L * 4);
#pragma GCC unroll 14
    for (int m = 0; m < M; m++) s[m][v] = first;
  }
  // Three bases keep the row addresses to base + {0, 1, 2, 3, 4} strides and leave registers for the loop.
  const uint8_t *rows[3] = {a, a + 5 * stride, a + 10 * stride};
  const size_t three = 3 * stride;
  for (uint32_t step = 0; step < steps; step++, w += 64, next += 64) {
    __builtin_prefetch(next, 0, 2);
    typename D::Weights b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = D::weights(w + (v / PARTS) * group + (v % PARTS) * (4 * L));
#pragma GCC unroll 14
    for (int m = 0; m < M; m++) {
      const int of = m % 5;
      const auto x = D::inputs(rows[m / 5] + (of == 3 ? three : of * stride));
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) s[m][v] = D::add(s[m][v], b[v], x);
    }
    rows[0] += 4, rows[1] += 4, rows[2] += 4;
  }
#pragma GCC unroll 14
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(static_cast<char *>(sums) + (m * TILE + v * L) * 4, s[m][v]);
}

using Multiply = void (*)(const uint8_t *, size_t, const uint8_t *, size_t, uint32_t, const void *, const uint8_t *,
                          void *);

template <uint32_t TYPE, int G, int... M>
INLINE Multiply multiply_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr Multiply table[] = {multiply<TYPE, M + 1, G>...};
  return table[rows - 1];
}

template <uint32_t TYPE>
INLINE Multiply multiply_of(int rows, int groups) {
  using All = std::make_integer_sequence<int, ROWS>;
  return groups == GROUPS ? multiply_of<TYPE, GROUPS>(rows, All{}) : multiply_of<TYPE, 1>(rows, All{});
}

// What turns sums into outputs, for one vector of them.
template <uint32_t TYPE>
struct Outputs {
  Floats scale, bias;

  INLINE Outputs of(const Gemm &g, size_t n) {
    if constexpr (TYPE == INT8) return {load<Floats>(g.scale + n), load<Floats>(g.bias + n)};
    else return {splat(1.0f), splat(0.0f)};
  }
  INLINE Floats from(const float *sums, Outputs o) {
    if constexpr (TYPE == INT8) return to_floats(load<Ints>(sums)) * o.scale + o.bias;
    return load<Floats>(sums);  // they began with the bias
  }
};

template <uint32_t TYPE, uint32_t OUT, uint32_t A, Exactness E>
void rows_epilogue(const Gemm &g, const float *sums, size_t row, int rows, size_t group, int groups) {
  const Epilogue &e = g.epilogue;
  const Quantizer q = quantizer(e.inverse_step, e.shift, e.zero_point);
  const float gain = OUT == INT8 ? e.inverse_step : 1.0f;
  const size_t width = bytes_of(OUT);
  for (int v = 0; v < groups * PARTS; v++) {
    const Outputs<TYPE> outputs = Outputs<TYPE>::of(g, group * BLOCK + v * L);
    char *to = static_cast<char *>(e.out) + row * e.stride + (group * BLOCK + v * L) * width;
    for (int m = 0; m < rows; m++, to += e.stride) {
      const Floats y = activated<A, E>(Outputs<TYPE>::from(sums + m * TILE + v * L, outputs), gain);
      if constexpr (OUT == INT8) store_codes(to, y, q);
      if constexpr (OUT == BF16) store_bf16(to, y);
      if constexpr (OUT == FP32) store(to, y);
    }
  }
}

template <uint32_t TYPE, bool RESIDUAL>
void stream_epilogue(const Gemm &g, const float *sums, size_t row, int rows, size_t group, int groups) {
  const Epilogue &e = g.epilogue;
  for (int v = 0; v < groups * PARTS; v++) {
    const Outputs<TYPE> outputs = Outputs<TYPE>::of(g, group * BLOCK + v * L);
    const size_t plane = (group + v / PARTS) * e.stride, part = v % PARTS * L;
    for (int m = 0; m < rows; m++) {
      const size_t at = (plane + e.pixels[row + m]) * BLOCK + part;
      Floats y = Outputs<TYPE>::from(sums + m * TILE + v * L, outputs);
      if constexpr (RESIDUAL) y += load<Floats>(e.residual + at);
      store(static_cast<float *>(e.out) + at, y);
    }
  }
}

using Finish = void (*)(const Gemm &, const float *, size_t, int, size_t, int);

// The coarse GELU is off by less than a sixteenth of a step of the codes that it is rounded to.
constexpr float COARSE_STEP = 16 * 5.8e-4f;

template <uint32_t TYPE, uint32_t OUT, Exactness E>
INLINE Finish rows_finish(uint32_t activation) {
  switch (activation) {
    case GELU: return rows_epilogue<TYPE, OUT, GELU, E>;
    case GELU_TANH: return rows_epilogue<TYPE, OUT, GELU_TANH, E>;
    case SILU: return rows_epilogue<TYPE, OUT, SILU, E>;
    case RELU: return rows_epilogue<TYPE, OUT, RELU, E>;
    case TANH: return rows_epilogue<TYPE, OUT, TANH, E>;
    default: return rows_epilogue<TYPE, OUT, IDENTITY, E>;
  }
}

template <uint32_t TYPE>
INLINE Finish finish_of(const Epilogue &e) {
  if (e.kind == Epilogue::STREAM) return e.residual ? stream_epilogue<TYPE, true> : stream_epilogue<TYPE, false>;
  if (e.type == FP32 && !e.exact && e.activation == GELU) return rows_epilogue<TYPE, FP32, GELU, Exactness::MIDDLE>;
  if (e.type == FP32) return rows_finish<TYPE, FP32, Exactness::FINE>(e.activation);
  if (e.type == BF16) return rows_finish<TYPE, BF16, Exactness::MIDDLE>(e.activation);
  if (e.activation == GELU && e.step < COARSE_STEP) return rows_epilogue<TYPE, INT8, GELU, Exactness::FINE>;
  return rows_finish<TYPE, INT8, Exactness::COARSE>(e.activation);
}

template <uint32_t TYPE>
void gemm_of(const Gemm &g) {
  alignas(64) float sums[ROWS * TILE];
  const Finish finish = finish_of<TYPE>(g.epilogue);
  const auto *start = TYPE == INT8 ? reinterpret_cast<const float *>(g.offset) : g.bias;
  const size_t group_bytes = size_t{g.steps} * 64;
  const uint32_t blocks = (g.rows + ROWS - 1) / ROWS;
  for (uint32_t group = g.first; group < g.last; group += GROUPS) {
    const int groups = group + GROUPS <= g.last ? GROUPS : 1;
    uint32_t row = 0;
    const uint8_t *weights = g.weights + group * group_bytes, *next = weights + GROUPS * group_bytes;
    if (group + GROUPS >= g.last) next = g.next;
    for (uint32_t block = 0; block < blocks; block++) {  // rows spread evenly over the blocks
      const int rows = static_cast<int>((g.rows - row + blocks - block - 1) / (blocks - block));
      // The first two blocks bring in the weights of the next two groups; later ones what is there anyway.
      const uint8_t *fetched = block < GROUPS && next ? next + block * group_bytes : weights;
      multiply_of<TYPE>(rows, groups)(g.a + row * g.a_stride, g.a_stride, weights, group_bytes, g.steps,
                                      start + group * BLOCK, fetched, sums);
      finish(g, sums, row, rows, group, groups);
      row += rows;
    }
  }
}

void gemm(const Gemm &g) {
  if (g.type == INT8) gemm_of<INT8>(g);
  else if (g.type == BF16) gemm_of<BF16>(g);
  else gemm_of<FP32>(g);
}

}  // namespace
}  // namespace cnxt
