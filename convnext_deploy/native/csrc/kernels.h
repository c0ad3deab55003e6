// The inner loops that exist once for each instruction set, behind a table of functions.
#pragma once
#include <cstddef>
#include <cstdint>

#include "format.h"

namespace cnxt {

// Kernels that add products of codes in 16 bits take two steps at a time, where no input makes a sum saturate. Of each
// group of 16 outputs they are told how many pairs of steps are added in 16 bits together, and how many one step at a
// time; then the pairs' places, these first, those next, and last what has to be added in 32 bits.
constexpr size_t order_length(uint32_t steps) { return 2 + steps / 2; }

// Where a matrix product's rows go. `m` counts rows of the call, `n` outputs.
struct Epilogue {
  enum Kind : uint32_t { ROWS, STREAM } kind;
  uint32_t type;           // ROWS: of the written values; INT8 ones are quantized with step, shift and zero_point
  uint32_t activation;     // ROWS
  bool exact;              // ROWS of FP32: whether the activation is, too; otherwise to the precision of bf16
  void *out;               // ROWS: row m at `out + m * stride` bytes. STREAM: [padded(N) / 16][plane][16] floats
  size_t stride;           // ROWS: bytes; STREAM: pixels in a plane
  const uint32_t *pixels;  // STREAM: of each row, inside a plane
  const float *residual;   // STREAM: laid out as `out`; added, or NULL
  float inverse_step;      // 1 / step of the product that reads these rows
  float step;
  float shift;
  int32_t zero_point;
};

// out = epilogue(scale * (A W + offset) + bias) for outputs [16 * first, 16 * last).
struct Gemm {
  uint32_t type;
  uint32_t rows;
  uint32_t steps;        // of 4 bytes of a row of A
  uint32_t first, last;  // groups of 16 outputs
  const uint8_t *a;
  size_t a_stride;  // bytes between rows
  const uint8_t *weights;
  const float *bias;
  const float *scale;     // INT8
  const int32_t *offset;  // INT8
  const uint16_t *order;  // INT8: [padded(N) / 16][order_length(steps)], for kernels that have `find_order`
  const uint8_t *next;    // weights of the product that follows, or NULL: brought into the cache at the end
  Epilogue epilogue;
};

// Depthwise convolution of pixels [first, last) of the maps in a padded plane, to rows of floats.
struct Depthwise {
  const float *in;  // [blocks][plane][16], at the first real pixel
  size_t plane;     // pixels
  uint32_t blocks;
  uint32_t height, width;
  uint32_t pitch;  // pixels between rows: width + kernel / 2
  uint32_t kernel;
  const float *weight;  // [blocks][kernel * kernel][16]
  const float *bias;    // [blocks][16]
  size_t first, last;   // pixels, counted over images, rows, columns
  float *out;           // row `p - first`, [blocks][16]
  size_t out_stride;    // floats
};

// Normalization of rows over `channels`, to rows in the type that the next product reads.
struct Normalize {
  uint32_t norm, channels, rows, type;
  float eps;
  const float *weight, *bias;  // or NULL
  const float *in;
  size_t in_stride;  // floats
  void *out;
  size_t out_stride;  // bytes
  float inverse_step, shift;
  int32_t zero_point;
};

constexpr int LINE = 64;         // bytes that are weighed together
constexpr int WEIGHT_BITS = 22;  // behind the point, of a weight

struct Kernels {
  const char *name;
  bool multiplies_bf16;
  // The order of the pairs of steps of one group, 128 bytes of an INT8 product's weights each; NULL: not asked for.
  void (*find_order)(const uint8_t *weights, uint32_t pairs, uint16_t *order);
  void (*gemm)(const Gemm &);
  void (*depthwise)(const Depthwise &);
  void (*normalize)(const Normalize &);
  // Rows of floats times weight plus bias, where they are given, to rows of `type`; `columns` is a multiple of 16.
  void (*scale_rows)(const Normalize &, uint32_t columns);
  // sums[c] = the rows' sum of x[r][c]^2.
  void (*sum_squares)(const float *in, size_t stride, uint32_t rows, uint32_t columns, float *sums);
  // Multiplies and adds registers of that type, `rounds` times; the multiply-accumulates done. INT8: of 7-bit weights.
  double (*multiply_registers)(uint32_t type, uint32_t rounds);
  // out[i] = the sum over the taps of in[tap * stride + i] * weights[tap], rounded and saturated, for LINE bytes.
  void (*weigh)(const uint8_t *in, size_t stride, const int32_t *weights, uint32_t taps, uint8_t *out);
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avx_vnni_kernels();
const Kernels *avx512_kernels();
const Kernels *avx512_vnni_kernels();
const Kernels *avx512_bf16_kernels();
const Kernels *amx_kernels();
const Kernels *neon_kernels();
const Kernels *neon_dotprod_kernels();
const Kernels *neon_bf16_kernels();

// The kernels named, or the best of this CPU where `name` is null; null where the CPU does not have them.
const Kernels *choose_kernels(const char *name);
const char *available_kernels();
// Why kernels that this CPU has instructions for are not among those; empty where there are none.
const char *refused_kernels();
// Why kernels with more instructions are behind others; empty where none are.
const char *slower_kernels();

}  // namespace cnxt
