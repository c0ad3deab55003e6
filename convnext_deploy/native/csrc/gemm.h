// Matrix products on packed weights. Included by kernels_body.h only.
#pragma once
#include "activations.h"
#include "dot.h"
#include "kernels.h"
#include "simd.h"

namespace cnxt {
namespace {

// One tile's sums, `[rows][groups * 16]`, are left in the first-level cache for the epilogue.
template <uint32_t TYPE>
constexpr int ROWS = TILES[TYPE].rows;
template <uint32_t TYPE>
constexpr int GROUPS = TILES[TYPE].groups;
template <uint32_t TYPE>
constexpr int WIDTH = GROUPS<TYPE> * BLOCK;

#if NEON && !defined(__clang__)
// g++ would move loads up before it assigns registers, and then have too few of them.
#define LOOP __attribute__((noinline, optimize("no-schedule-insns")))
#else
#define LOOP __attribute__((noinline))
#endif

// Up to 14 rows of A. Three bases keep their addresses to base + {0, 1, 2, 3, 4} strides and leave registers for the
// loop.
struct Rows {
  const uint8_t *bases[3];
  size_t stride, three;

  INLINE Rows from(const uint8_t *a, size_t stride) {
    return {{a, a + 5 * stride, a + 10 * stride}, stride, 3 * stride};
  }
  inline __attribute__((always_inline)) const uint8_t *at(int row) const {
    return bases[row / 5] + (row % 5 == 3 ? three : row % 5 * stride);
  }
  inline __attribute__((always_inline)) void advance(size_t bytes) {
    bases[0] += bytes, bases[1] += bytes, bases[2] += bytes;
  }
};

template <int M, int V, class Sum>
INLINE void begin_all(Sum (&s)[M][V], const void *start) {
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    begin(s[0][v], static_cast<const char *>(start) + v * L * 4);
#pragma GCC unroll 14
    for (int m = 1; m < M; m++) s[m][v] = s[0][v];
  }
}

template <uint32_t TYPE, int M, int V, class Sum>
INLINE void leave(const Sum (&s)[M][V], void *sums) {
#pragma GCC unroll 14
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(static_cast<char *>(sums) + (m * WIDTH<TYPE> + v * L) * 4, total(s[m][v]));
}

#if !NEON
// Adds one step's products, whose weights are those of group 0 at `w` and follow after `group` bytes each.
template <uint32_t TYPE, int M, int V, class Sum>
INLINE void add_step(Sum (&s)[M][V], const Rows &rows, size_t offset, const uint8_t *w, size_t group) {
  using D = Dot<TYPE>;
  typename D::Weights b[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) b[v] = D::weights(w + (v / PARTS) * group + (v % PARTS) * (4 * L));
#pragma GCC unroll 14
  for (int m = 0; m < M; m++) {
    const auto x = D::inputs(rows.at(m) + offset);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) s[m][v] = D::add(s[m][v], b[v], x);
  }
}
#else
// The same for the step that is in one lane of the inputs.
template <uint32_t TYPE, int LANE, int M, int V, class Sum>
INLINE void add_lane(Sum (&s)[M][V], const typename Dot<TYPE>::Inputs (&x)[M], const uint8_t *w, size_t group) {
  using D = Dot<TYPE>;
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    const auto b = D::weights(w + LANE * 64 + (v / PARTS) * group + (v % PARTS) * (4 * L));
#pragma GCC unroll 14
    for (int m = 0; m < M; m++) s[m][v] = D::template add<LANE>(s[m][v], b, x[m]);
  }
}

template <uint32_t TYPE, int M, int V, class Sum>
INLINE void add_lanes(Sum (&s)[M][V], const Rows &rows, const uint8_t *w, size_t group) {
  typename Dot<TYPE>::Inputs x[M];
#pragma GCC unroll 14
  for (int m = 0; m < M; m++) x[m] = Dot<TYPE>::inputs(rows.at(m));
  add_lane<TYPE, 0>(s, x, w, group), add_lane<TYPE, 1>(s, x, w, group);
  add_lane<TYPE, 2>(s, x, w, group), add_lane<TYPE, 3>(s, x, w, group);
}
#endif

// Sums that begin with `start`, one value an output: a product's offset or bias. `next` is brought into the
// second-level cache meanwhile, a line a step.
template <uint32_t TYPE, int M, int G>
LOOP void multiply(const uint8_t *a, size_t stride, const uint8_t *w, size_t group, uint32_t steps, const void *start,
                   const uint8_t *next, const uint16_t *, void *sums) {
  constexpr int V = G * PARTS, STEPS = TILES[TYPE].steps;
  typename Dot<TYPE>::Sum s[M][V];
  begin_all(s, start);
  Rows rows = Rows::from(a, stride);
  for (uint32_t step = 0; step < steps; step += STEPS, w += 64 * STEPS, next += 64 * STEPS) {
#pragma GCC unroll 4
    for (int i = 0; i < STEPS; i++) {
      __builtin_prefetch(next + 64 * i, 0, 2);
#if !NEON
      add_step<TYPE>(s, rows, 4 * i, w + 64 * i, group);
#endif
    }
#if NEON
    static_assert(STEPS == 4);
    add_lanes<TYPE>(s, rows, w, group);
#endif
    rows.advance(4 * STEPS);
  }
  leave<TYPE>(s, sums);
}

#if MULTIPLIES_MATRICES
// The same for instructions that take 8 bytes of two rows and of two outputs. An odd last row is multiplied twice.
template <uint32_t TYPE, int M, int G>
LOOP void multiply_pairs(const uint8_t *a, size_t stride, const uint8_t *w, size_t, uint32_t steps, const void *start,
                         const uint8_t *next, const uint16_t *, void *sums) {
  static_assert(G == 1 && L == 4);
  using D = Dot<TYPE>;
  constexpr int P = (M + 1) / 2, V = 2 * PARTS;
  using Sum = typename D::Sum;
  Sum s[P][V];  // of rows 2p and 2p + 1, two outputs each
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    const uint64x2_t both = vdupq_n_u64(load<uint64_t>(static_cast<const char *>(start) + 8 * v));
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) s[p][v] = (Sum)both;
  }
  Rows rows = Rows::from(a, stride);
  for (uint32_t step = 0; step < steps; step += 2, w += 128, next += 128) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    typename D::Inputs x[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; p++)
      x[p] = (typename D::Inputs)vcombine_u64(load<uint64x1_t>(rows.at(2 * p)),
                                              load<uint64x1_t>(rows.at(2 * p + 1 < M ? 2 * p + 1 : 2 * p)));
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      const auto first = (int32x4_t)load<Ints>(w + 16 * part), second = (int32x4_t)load<Ints>(w + 64 + 16 * part);
      const auto low = (typename D::Weights)vzip1q_s32(first, second);
      const auto high = (typename D::Weights)vzip2q_s32(first, second);
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) {
        s[p][2 * part] = D::add(s[p][2 * part], low, x[p]);
        s[p][2 * part + 1] = D::add(s[p][2 * part + 1], high, x[p]);
      }
    }
    rows.advance(8);
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; part++) {
      const auto left = (uint64x2_t)s[m / 2][2 * part], right = (uint64x2_t)s[m / 2][2 * part + 1];
      store(static_cast<char *>(sums) + (m * WIDTH<TYPE> + part * L) * 4,
            m % 2 ? vzip2q_u64(left, right) : vzip1q_u64(left, right));
    }
}
#endif

#if ADDS_IN_16_BITS
// Adds to sums what the pairs of steps come to that have to be added one step at a time or in 32 bits.
template <int M>
__attribute__((noinline)) void add_wide(const uint8_t *a, size_t stride, const uint8_t *w, const uint16_t *places,
                                        int single, int wide, void *sums) {
  Ints s[M][PARTS];
#pragma GCC unroll 14
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int v = 0; v < PARTS; v++) s[m][v] = load<Ints>(static_cast<char *>(sums) + (m * BLOCK + v * L) * 4);
  for (int i = 0; i < single; i++) {
    const Rows rows = Rows::from(a + 8 * size_t{*places}, stride);
    const uint8_t *from = w + 128 * size_t{*places++};
#pragma GCC unroll 2
    for (int step = 0; step < 2; step++) {
      Ints b[PARTS];
#pragma GCC unroll 2
      for (int v = 0; v < PARTS; v++) b[v] = load<Ints>(from + 64 * step + v * 4 * L);
#pragma GCC unroll 14
      for (int m = 0; m < M; m++) {
        const Ints x = splat(load<int32_t>(rows.at(m) + 4 * step));
#pragma GCC unroll 2
        for (int v = 0; v < PARTS; v++) s[m][v] += widened(code_sums(x, b[v]));
      }
    }
  }
  for (int i = 0; i < wide; i++) {
    const Rows rows = Rows::from(a + 8 * size_t{*places}, stride);
    const uint8_t *from = w + 128 * size_t{*places++};
    add_step<INT8>(s, rows, 0, from, 0);
    add_step<INT8>(s, rows, 4, from + 64, 0);
  }
  leave<INT8>(s, sums);
}

// The same for codes: first the pairs of steps that are added in 16 bits.
template <int M, int G>
__attribute__((noinline)) void multiply_codes(const uint8_t *a, size_t stride, const uint8_t *w, size_t, uint32_t steps,
                                              const void *start, const uint8_t *next, const uint16_t *order,
                                              void *sums) {
  static_assert(G == 1);
  const int pairs = order[0], single = order[1];
  const uint16_t *places = order + 2;
  Ints s[M][PARTS];
  begin_all(s, start);
  for (int i = 0; i < pairs; i++, next += 128) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    const Rows rows = Rows::from(a + 8 * size_t{*places}, stride);
    const uint8_t *from = w + 128 * size_t{*places++};
    Ints first[PARTS], second[PARTS];
#pragma GCC unroll 2
    for (int v = 0; v < PARTS; v++)
      first[v] = load<Ints>(from + v * 4 * L), second[v] = load<Ints>(from + 64 + v * 4 * L);
#pragma GCC unroll 14
    for (int m = 0; m < M; m++) {
      const Ints x = splat(load<int32_t>(rows.at(m))), y = splat(load<int32_t>(rows.at(m) + 4));
#pragma GCC unroll 2
      for (int v = 0; v < PARTS; v++) s[m][v] += widened(code_sums(x, first[v]) + code_sums(y, second[v]));
    }
  }
  leave<INT8>(s, sums);
  const int wide = static_cast<int>(steps / 2) - pairs - single;
  if (single + wide) {
    for (int i = 0; i < single + wide; i++, next += 128)
      __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + 64, 0, 2);
    add_wide<M>(a, stride, w, places, single, wide, sums);
  }
}

INLINE bool any(Shorts v) {
  typedef uint64_t Quads __attribute__((vector_size(4 * L), may_alias));
  uint64_t found = 0;
  for (int i = 0; i < L / 2; i++) found |= ((Quads)v)[i];
  return found != 0;
}

// How the products of two steps may be added without any input making a sum saturate: both in 16 bits, each in 16 bits,
// or in 32. 255 times what the positive weights among those that are added come to, and the negative ones, has to fit.
enum Width : uint8_t { PAIR, SINGLE, WIDE };

Width width_of(const uint8_t *weights) {
  constexpr int16_t MOST = 128;  // 255 * 128 is 32,640; 255 * 129 is beyond 32,767
  const auto above = [](Shorts v) { return v & (v > 0); };
  Shorts single = {}, both = {};
  for (size_t part = 0; part < 64; part += 4 * L) {
    Shorts positive = {}, negative = {};
    for (size_t step = 0; step < 128; step += 64) {
      const Shorts w = load<Shorts>(weights + step + part), even = (w << 8) >> 8, odd = w >> 8;
      const Shorts p = above(even) + above(odd), n = above(-even) + above(-odd);
      single |= (p > MOST) | (n > MOST);
      positive += p, negative += n;
    }
    both |= (positive > MOST) | (negative > MOST);
  }
  return any(single) ? WIDE : any(both) ? SINGLE : PAIR;
}

void find_order(const uint8_t *weights, uint32_t pairs, uint16_t *order) {
  Width widths[MAX_CHANNELS / 8];
  uint32_t counts[3] = {};
  for (uint32_t pair = 0; pair < pairs; pair++) counts[widths[pair] = width_of(weights + size_t{pair} * 128)]++;
  order[0] = static_cast<uint16_t>(counts[PAIR]), order[1] = static_cast<uint16_t>(counts[SINGLE]);
  uint16_t *ends[3] = {order + 2, order + 2 + counts[PAIR], order + 2 + counts[PAIR] + counts[SINGLE]};
  for (uint32_t pair = 0; pair < pairs; pair++) *ends[widths[pair]]++ = static_cast<uint16_t>(pair);
}
#endif

using Multiply = void (*)(const uint8_t *, size_t, const uint8_t *, size_t, uint32_t, const void *, const uint8_t *,
                          const uint16_t *, void *);

template <uint32_t TYPE, int M, int G>
constexpr Multiply multiply_of_type() {
#if ADDS_IN_16_BITS
  if constexpr (TYPE == INT8) return multiply_codes<M, G>;
#elif MULTIPLIES_MATRICES
  if constexpr (TYPE != FP32) return multiply_pairs<TYPE, M, G>;
  else
#endif
  return multiply<TYPE, M, G>;
}

template <uint32_t TYPE, int G, int... M>
INLINE Multiply multiply_of(int rows, std::integer_sequence<int, M...>) {
  static constexpr Multiply table[] = {multiply_of_type<TYPE, M + 1, G>()...};
  return table[rows - 1];
}

template <uint32_t TYPE>
INLINE Multiply multiply_of(int rows, int groups) {
  using All = std::make_integer_sequence<int, ROWS<TYPE>>;
  return groups == GROUPS<TYPE> ? multiply_of<TYPE, GROUPS<TYPE>>(rows, All{}) : multiply_of<TYPE, 1>(rows, All{});
}

#if SIGNED_CODES
// What a group's sums begin with: the offset, and what moving the codes by 128 takes from them. This is as much work as
// one more row.
INLINE void begin_signed(const uint8_t *weights, uint32_t steps, const int32_t *offset, int32_t *start) {
  using D = Dot<INT8>;
  typename D::Sum s[PARTS] = {};
  const Ints moved = (Ints)(Words{} + 0x80808080u);
  for (uint32_t step = 0; step < steps; step++, weights += 64)
#pragma GCC unroll 4
    for (int v = 0; v < PARTS; v++) s[v] = D::add<0>(s[v], D::weights(weights + v * 4 * L), moved);
  for (int v = 0; v < PARTS; v++) store(start + v * L, load<Words>(offset + v * L) - (Words)total(s[v]));
}
#endif

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

// Where rows of floats go, and how.
struct To {
  char *out;
  size_t stride;
  float gain;
  Quantizer q;
};

// R rows at once, then what is left of `rows`: one row's activation is a chain in which each instruction waits for the
// one before it.
template <uint32_t TYPE, uint32_t OUT, uint32_t A, Exactness E, int R>
INLINE void finish_rows(const Outputs<TYPE> (&outputs)[PARTS], const float *sums, int rows, To to) {
  for (; rows >= R; rows -= R, sums += R * WIDTH<TYPE>, to.out += R * to.stride) {
    Floats y[R * PARTS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++)
        y[r * PARTS + p] = Outputs<TYPE>::from(sums + r * WIDTH<TYPE> + p * L, outputs[p]);
    activate<A, E>(y, to.gain);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store_block<OUT>(to.out + r * to.stride, y + r * PARTS, to.q);
  }
  if constexpr (R > 1) finish_rows<TYPE, OUT, A, E, R / 2>(outputs, sums, rows, to);
}

// As many rows at once as make four vectors, which fit into the registers.
constexpr int ROWS_TOGETHER = PARTS < 4 ? 4 / PARTS : 1;

template <uint32_t TYPE, uint32_t OUT, uint32_t A, Exactness E>
void rows_epilogue(const Gemm &g, const float *sums, size_t row, int rows, size_t group, int groups) {
  const Epilogue &e = g.epilogue;
  To to = {nullptr, e.stride, OUT == INT8 ? e.inverse_step : 1.0f, quantizer(e.inverse_step, e.shift, e.zero_point)};
  for (int block = 0; block < groups; block++) {
    Outputs<TYPE> outputs[PARTS];
    for (int p = 0; p < PARTS; p++) outputs[p] = Outputs<TYPE>::of(g, (group + block) * BLOCK + p * L);
    to.out = static_cast<char *>(e.out) + row * e.stride + (group + block) * BLOCK * bytes_of(OUT);
    finish_rows<TYPE, OUT, A, E, A == GELU ? ROWS_TOGETHER : 1>(outputs, sums + block * BLOCK, rows, to);
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
      Floats y = Outputs<TYPE>::from(sums + m * WIDTH<TYPE> + v * L, outputs);
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
  alignas(64) float sums[ROWS<TYPE> * WIDTH<TYPE>];
  const Finish finish = finish_of<TYPE>(g.epilogue);
  const auto *start = TYPE == INT8 ? reinterpret_cast<const float *>(g.offset) : g.bias;
  const size_t group_bytes = size_t{g.steps} * 64;
  const uint32_t blocks = (g.rows + ROWS<TYPE> - 1) / ROWS<TYPE>;
  constexpr uint32_t GROUPS = TILES[TYPE].groups;
  for (uint32_t group = g.first; group < g.last; group += GROUPS) {
    const int groups = group + GROUPS <= g.last ? static_cast<int>(GROUPS) : 1;
    uint32_t row = 0;
    const uint8_t *weights = g.weights + group * group_bytes, *next = weights + GROUPS * group_bytes;
    const uint16_t *order = g.order ? g.order + size_t{group} * order_length(g.steps) : nullptr;
    if (group + GROUPS >= g.last) next = g.next;
    const float *begin = start + group * BLOCK;
#if SIGNED_CODES
    alignas(64) int32_t moved[BLOCK];
    if constexpr (TYPE == INT8) {
      begin_signed(weights, g.steps, g.offset + group * BLOCK, moved);
      begin = reinterpret_cast<const float *>(moved);
    }
#endif
    for (uint32_t block = 0; block < blocks; block++) {  // rows spread evenly over the blocks
      const int rows = static_cast<int>((g.rows - row + blocks - block - 1) / (blocks - block));
      // The first two blocks bring in the weights of the next two groups; later ones what is there anyway.
      const uint8_t *fetched = block < GROUPS && next ? next + block * group_bytes : weights;
      multiply_of<TYPE>(rows, groups)(g.a + row * g.a_stride, g.a_stride, weights, group_bytes, g.steps, begin, fetched,
                                      order, sums);
      finish(g, sums, row, rows, group, groups);
      row += rows;
    }
  }
}

[[maybe_unused]] void gemm(const Gemm &g) {  // tiles take the place of two of the three
  if (g.type == INT8) gemm_of<INT8>(g);
  else if (g.type == BF16) gemm_of<BF16>(g);
  else gemm_of<FP32>(g);
}

}  // namespace
}  // namespace cnxt
