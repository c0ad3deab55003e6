// Depthwise convolution and normalization. Included by kernels_body.h only.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace cnxt {
namespace {

// X neighbouring outputs of one row and one vector of channels. K is the kernel's side, or 0 for `side`. The padded
// plane has zeros left and right of every row, so only rows above and below the image are left out.
template <int K, int X>
INLINE void depthwise_row(const float *in, size_t pitch, int side, int from, int to, const float *weight, Floats bias,
                          float *out, size_t stride) {
  Floats sums[X];
#pragma GCC unroll 14
  for (int x = 0; x < X; x++) sums[x] = bias;
  for (int ky = from; ky < to; ky++) {
    const float *row = in + ky * pitch * BLOCK;
    const float *w = weight + ky * side * BLOCK;
    if constexpr (K > 0) {
      Floats taps[K];
#pragma GCC unroll 7
      for (int t = 0; t < K; t++) taps[t] = load<Floats>(w + t * BLOCK);
#pragma GCC unroll 20
      for (int i = 0; i < X + K - 1; i++) {
        const Floats v = load<Floats>(row + i * BLOCK);
#pragma GCC unroll 7
        for (int t = 0; t < K; t++)
          if (i - t >= 0 && i - t < X) sums[i - t] += v * taps[t];
      }
    } else {
      for (int t = 0; t < side; t++) {
        const Floats tap = load<Floats>(w + t * BLOCK);
#pragma GCC unroll 14
        for (int x = 0; x < X; x++) sums[x] += load<Floats>(row + (x + t) * BLOCK) * tap;
      }
    }
  }
#pragma GCC unroll 14
  for (int x = 0; x < X; x++) store(out + x * stride, sums[x]);
}

// Each sum waits for the one before it, so few of them would wait for the latency. 14 divide the widths 14, 28 and 56,
// and leave registers for the taps; with 16 registers those are read from the cache.
constexpr int COLUMNS = REGISTERS == 32 ? 14 : 8;

template <int K>
void depthwise_of(const Depthwise &d) {
  const int side = K ? K : static_cast<int>(d.kernel), half = side / 2, height = static_cast<int>(d.height);
  for (uint32_t block = 0; block < d.blocks; block++) {
    const float *plane = d.in + block * d.plane * BLOCK;
    const float *weight = d.weight + size_t{block} * side * side * BLOCK;
    for (size_t pixel = d.first; pixel < d.last;) {
      const size_t line = pixel / d.width;  // counted over images
      const int y = static_cast<int>(line % d.height), x0 = static_cast<int>(pixel % d.width);
      int left = static_cast<int>(d.width) - x0;
      if (d.last - pixel < static_cast<size_t>(left)) left = static_cast<int>(d.last - pixel);
      const int from = half - y > 0 ? half - y : 0, to = height + half - y < side ? height + half - y : side;
      const ptrdiff_t corner = (static_cast<ptrdiff_t>(line) - half) * d.pitch + x0 - half;
      const float *in = plane + corner * BLOCK;
      float *out = d.out + (pixel - d.first) * d.out_stride + block * BLOCK;
      pixel += left;
      for (int parts = (left + COLUMNS - 1) / COLUMNS; parts > 0; parts--) {  // columns spread evenly
        const int columns = (left + parts - 1) / parts;
        for (int p = 0; p < PARTS; p++) {
          const Floats bias = load<Floats>(d.bias + block * BLOCK + p * L);
#define ROW(X)                                                                                                   \
  case X:                                                                                                        \
    if constexpr (X <= COLUMNS)                                                                                  \
      depthwise_row<K, X>(in + p * L, d.pitch, side, from, to, weight + p * L, bias, out + p * L, d.out_stride); \
    break;
          switch (columns) {
            ROW(1)
            ROW(2)
            ROW(3)
            ROW(4)
            ROW(5)
            ROW(6)
            ROW(7)
            ROW(8)
            ROW(9)
            ROW(10)
            ROW(11)
            ROW(12)
            ROW(13)
            ROW(14)
          }
#undef ROW
        }
        in += columns * BLOCK;
        out += columns * d.out_stride;
        left -= columns;
      }
    }
  }
}

void depthwise(const Depthwise &d) {
  switch (d.kernel) {
    case 3: return depthwise_of<3>(d);
    case 5: return depthwise_of<5>(d);
    case 7: return depthwise_of<7>(d);
    default: return depthwise_of<0>(d);
  }
}

// Rows times `factor` plus `term`, which are one number each, then by the weight and bias that `n` may have. A branch
// between product and sum would have them rounded once in some functions and twice in others, and a row would depend on
// how many are computed together.
template <uint32_t TYPE, bool WEIGHT, bool BIAS>
INLINE void store_row(const Normalize &n, const float *x, uint32_t columns, float factor, float term,
                      const Quantizer &q, char *out) {
  constexpr bool AFFINE = WEIGHT || BIAS;
  const float gain = TYPE == INT8 ? n.inverse_step : 1.0f;
  const Floats scale = splat(AFFINE ? factor : factor * gain), move = splat(AFFINE ? term : term * gain);
  for (uint32_t block = 0; block < columns; block += BLOCK) {
    Floats y[PARTS];
    for (int p = 0; p < PARTS; p++) {
      const uint32_t c = block + p * L;
      y[p] = load<Floats>(x + c) * scale + move;
      if constexpr (AFFINE) {
        if constexpr (WEIGHT) y[p] *= load<Floats>(n.weight + c);
        if constexpr (BIAS) y[p] += load<Floats>(n.bias + c);
        if constexpr (TYPE == INT8) y[p] *= gain;
      }
    }
    store_block<TYPE>(out + block * bytes_of(TYPE), y, q);
  }
}

// R rows at once, so that one's chain of additions, root and division does not keep the next waiting. `whole` channels
// fill vectors, `mask` is 1 for those of the next vector that exist.
template <uint32_t TYPE, bool WEIGHT, bool BIAS, int R>
INLINE void normalize_together(const Normalize &n, uint32_t first, uint32_t columns, uint32_t whole, Floats mask,
                               const Quantizer &q) {
  const float channels = static_cast<float>(n.channels);
  const float *x[R];
  float mean[R], factor[R];
  for (int r = 0; r < R; r++) x[r] = n.in + (first + r) * n.in_stride, mean[r] = 0, factor[r] = 1;
  if (n.norm == LAYERNORM || n.norm == SIMPLENORM) {
    Floats totals[R] = {};
    for (uint32_t c = 0; c < columns; c += L)  // what fills the last block is 0
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) totals[r] += load<Floats>(x[r] + c);
    for (int r = 0; r < R; r++) mean[r] = sum(totals[r]) / channels;
  }
  if (n.norm != NO_NORM) {  // in a second pass: the difference of two large sums would have few digits left
    Floats totals[R] = {};
    for (uint32_t c = 0; c < whole; c += L)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Floats v = load<Floats>(x[r] + c) - mean[r];
        totals[r] += v * v;
      }
    for (int r = 0; r < R; r++) {
      if (whole < n.channels) {
        const Floats v = (load<Floats>(x[r] + whole) - mean[r]) * mask;
        totals[r] += v * v;
      }
      const float power = sum(totals[r]) / (n.norm == SIMPLENORM ? channels - 1 : channels);
      factor[r] = 1.0f / __builtin_sqrtf(power + n.eps);
    }
  }
  for (int r = 0; r < R; r++)  // SimpleNorm divides by the deviation from the mean and subtracts nothing
    store_row<TYPE, WEIGHT, BIAS>(n, x[r], columns, factor[r], n.norm == LAYERNORM ? -mean[r] * factor[r] : 0.0f, q,
                                  static_cast<char *>(n.out) + (first + r) * n.out_stride);
}

// From `row` on R rows at once, as long as there are as many, then fewer.
template <uint32_t TYPE, bool WEIGHT, bool BIAS, int R>
INLINE void normalize_from(const Normalize &n, uint32_t row, uint32_t columns, uint32_t whole, Floats mask,
                           const Quantizer &q) {
  for (; row + R <= n.rows; row += R) normalize_together<TYPE, WEIGHT, BIAS, R>(n, row, columns, whole, mask, q);
  if constexpr (R > 1) normalize_from<TYPE, WEIGHT, BIAS, R / 2>(n, row, columns, whole, mask, q);
}

template <uint32_t TYPE, bool WEIGHT, bool BIAS>
void normalize_rows(const Normalize &n, uint32_t columns) {
  const Quantizer q = quantizer(n.inverse_step, n.shift, n.zero_point);
  const uint32_t whole = n.channels / L * L;
  Floats mask = {};
  for (uint32_t i = 0; i < n.channels - whole; i++) mask[i] = 1.0f;
  normalize_from<TYPE, WEIGHT, BIAS, REGISTERS / 4>(n, 0, columns, whole, mask, q);
}

template <uint32_t TYPE>
INLINE void normalize_to(const Normalize &n, uint32_t columns) {
  if (n.weight) n.bias ? normalize_rows<TYPE, true, true>(n, columns) : normalize_rows<TYPE, true, false>(n, columns);
  else n.bias ? normalize_rows<TYPE, false, true>(n, columns) : normalize_rows<TYPE, false, false>(n, columns);
}

void scale_rows(const Normalize &n, uint32_t columns) {
  if (n.type == INT8) normalize_to<INT8>(n, columns);
  else if (n.type == BF16) normalize_to<BF16>(n, columns);
  else normalize_to<FP32>(n, columns);
}

void normalize(const Normalize &n) { scale_rows(n, static_cast<uint32_t>(padded(n.channels))); }

void sum_squares(const float *in, size_t stride, uint32_t rows, uint32_t columns, float *sums) {
  for (uint32_t c = 0; c < columns; c += L) {
    Floats total = {};
    for (uint32_t row = 0; row < rows; row++) {
      const Floats v = load<Floats>(in + row * stride + c);
      total += v * v;
    }
    store(sums + c, total);
  }
}

}  // namespace
}  // namespace cnxt
