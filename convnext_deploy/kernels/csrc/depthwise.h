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
#pragma GCC unroll 8
  for (int x = 0; x < X; x++) sums[x] = bias;
  for (int ky = from; ky < to; ky++) {
    const float *row = in + ky * pitch * BLOCK;
    const float *w = weight + ky * side * BLOCK;
    if constexpr (K > 0) {
      Floats taps[K];
#pragma GCC unroll 7
      for (int t = 0; t < K; t++) taps[t] = load<Floats>(w + t * BLOCK);
#pragma GCC unroll 16
      for (int i = 0; i < X + K - 1; i++) {
        const Floats v = load<Floats>(row + i * BLOCK);
#pragma GCC unroll 7
        for (int t = 0; t < K; t++)
          if (i - t >= 0 && i - t < X) sums[i - t] += v * taps[t];
      }
    } else {
      for (int t = 0; t < side; t++) {
        const Floats tap = load<Floats>(w + t * BLOCK);
#pragma GCC unroll 8
        for (int x = 0; x < X; x++) sums[x] += load<Floats>(row + (x + t) * BLOCK) * tap;
      }
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < X; x++) store(out + x * stride, sums[x]);
}

#if defined(__AVX512F__)
constexpr int COLUMNS = 8;
#else
constexpr int COLUMNS = 4;
#endif

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
#define ROW(X) \
  case X: depthwise_row<K, X>(in + p * L, d.pitch, side, from, to, weight + p * L, bias, out + p * L, d.out_stride); break;
          switch (columns) {
            ROW(1) ROW(2) ROW(3) ROW(4)
#if defined(__AVX512F__)
            ROW(5) ROW(6) ROW(7) ROW(8)
#endif
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

INLINE void store_as(uint32_t type, void *row, uint32_t column, Floats v, float gain, const Quantizer &q) {
  char *to = static_cast<char *>(row) + column * bytes_of(type);
  if (type == INT8) store_codes(to, v * gain, q);
  else if (type == BF16) store_bf16(to, v);
  else store(to, v);
}

// 1 for the channels that exist, 0 for those that only fill the last block.
INLINE Floats existing(uint32_t channel, uint32_t channels) {
  Floats mask;
  for (int i = 0; i < L; i++) mask[i] = channel + i < channels ? 1.0f : 0.0f;
  return mask;
}

template <uint32_t NORM>
void normalize_of(const Normalize &n) {
  const uint32_t columns = static_cast<uint32_t>(padded(n.channels));
  const Quantizer q = quantizer(n.inverse_step, n.shift, n.zero_point);
  for (uint32_t row = 0; row < n.rows; row++) {
    const float *x = n.in + row * n.in_stride;
    float mean = 0, rescale = 1;
    if constexpr (NORM == LAYERNORM || NORM == SIMPLENORM) {
      Floats total = {};
      for (uint32_t c = 0; c < columns; c += L) total += load<Floats>(x + c);  // what fills the last block is 0
      mean = sum(total) / static_cast<float>(n.channels);
    }
    if constexpr (NORM != NO_NORM) {
      Floats total = {};
      uint32_t c = 0;
      for (; c + L <= n.channels; c += L) {
        const Floats v = load<Floats>(x + c) - mean;
        total += v * v;
      }
      for (; c < columns; c += L) {
        const Floats v = (load<Floats>(x + c) - mean) * existing(c, n.channels);
        total += v * v;
      }
      const float count = static_cast<float>(NORM == SIMPLENORM ? n.channels - 1 : n.channels);
      rescale = 1.0f / __builtin_sqrtf(sum(total) / count + n.eps);
    }
    if constexpr (NORM == SIMPLENORM) mean = 0;  // it divides by the deviation and subtracts nothing
    char *out = static_cast<char *>(n.out) + row * n.out_stride;
    for (uint32_t c = 0; c < columns; c += L) {
      Floats y = (load<Floats>(x + c) - mean) * rescale;
      if (n.weight) y *= load<Floats>(n.weight + c);
      if (n.bias) y += load<Floats>(n.bias + c);
      store_as(n.type, out, c, y, n.inverse_step, q);
    }
  }
}

void normalize(const Normalize &n) {
  switch (n.norm) {
    case LAYERNORM: return normalize_of<LAYERNORM>(n);
    case RMSNORM: return normalize_of<RMSNORM>(n);
    case SIMPLENORM: return normalize_of<SIMPLENORM>(n);
    default: return normalize_of<NO_NORM>(n);
  }
}

void scale_rows(const Normalize &n, uint32_t columns) {
  const Quantizer q = quantizer(n.inverse_step, n.shift, n.zero_point);
  for (uint32_t row = 0; row < n.rows; row++) {
    const float *x = n.in + row * n.in_stride;
    char *out = static_cast<char *>(n.out) + row * n.out_stride;
    for (uint32_t c = 0; c < columns; c += L) {
      Floats y = load<Floats>(x + c);
      if (n.weight) y *= load<Floats>(n.weight + c);
      if (n.bias) y += load<Floats>(n.bias + c);
      store_as(n.type, out, c, y, n.inverse_step, q);
    }
  }
}

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
