// Matrix products of codes and bf16 on tile registers. Included by kernels_body.h only.
//
// The packed weights are what the instructions read: 16 steps of 16 outputs are one register. Two registers of rows
// and two of weights make four of sums, so that each is used twice. Rows and weights whose bytes are no multiple of 64
// end in a copy that is filled up with zeros. Where rows are no multiple of 16, the last register's overlap those
// before: their sums are the same, and are left out.
#pragma once
#include "gemm.h"
#include "tiles.h"

namespace cnxt {
namespace {

constexpr uint32_t TILE_STEPS = TILE_BYTES / 4, ROWS_AT_ONCE = 256;
constexpr size_t WEIGHTS_BYTES = size_t{TILE_STEPS} * 64;  // of one register

// What one block of sums is made of.
struct TileInputs {
  const uint8_t *rows[2], *ends[2];  // of the two registers of rows; their ends are 64 bytes apart
  size_t stride;
  const uint8_t *weights[2];  // of the two groups
  const uint8_t *weight_ends[2];
  uint32_t whole;  // registers before the ends
  bool rest;       // whether there are ends
};

template <uint32_t TYPE, int R, int G>
INLINE void multiply_step(const uint8_t *const (&rows)[2], size_t at, size_t stride, const uint8_t *const (&w)[2],
                          size_t w_at) {
  load_tile<4>(rows[0] + at, stride);
  load_tile<6>(w[0] + w_at, 64);
  multiply_tiles<TYPE, 0, 4, 6>();
  if constexpr (G == 2) {
    load_tile<7>(w[1] + w_at, 64);
    multiply_tiles<TYPE, 1, 4, 7>();
  }
  if constexpr (R == 2) {
    load_tile<5>(rows[1] + at, stride);
    multiply_tiles<TYPE, 2, 5, 6>();
    if constexpr (G == 2) multiply_tiles<TYPE, 3, 5, 7>();
  }
}

// `next` is brought into the second-level cache meanwhile, as much of it as the weights that are read.
template <uint32_t TYPE, int R, int G>
__attribute__((noinline)) void multiply_block(const TileInputs &in, const float *start, const uint8_t *next,
                                              float *sums) {
  load_tile<0>(start, 0);  // the same line for every row
  if constexpr (G == 2) load_tile<1>(start + BLOCK, 0);
  if constexpr (R == 2) load_tile<2>(start, 0);
  if constexpr (R == 2 && G == 2) load_tile<3>(start + BLOCK, 0);
  for (uint32_t k = 0; k < in.whole; k++) {
    for (size_t line = 0; line < WEIGHTS_BYTES; line += 64) __builtin_prefetch(next + k * WEIGHTS_BYTES + line, 0, 2);
    multiply_step<TYPE, R, G>(in.rows, k * size_t{TILE_BYTES}, in.stride, in.weights, k * WEIGHTS_BYTES);
  }
  if (in.rest) multiply_step<TYPE, R, G>(in.ends, 0, TILE_BYTES, in.weight_ends, 0);
  constexpr size_t PITCH = WIDTH<TYPE> * sizeof(float);
  store_tile<0>(sums, PITCH);
  if constexpr (G == 2) store_tile<1>(sums + BLOCK, PITCH);
  if constexpr (R == 2) store_tile<2>(sums + TILE_ROWS * WIDTH<TYPE>, PITCH);
  if constexpr (R == 2 && G == 2) store_tile<3>(sums + TILE_ROWS * WIDTH<TYPE> + BLOCK, PITCH);
}

using MultiplyBlock = void (*)(const TileInputs &, const float *, const uint8_t *, float *);

// The rows [row, row + count) of all groups of outputs.
template <uint32_t TYPE>
void multiply_rows(const Gemm &g, uint32_t row, uint32_t count, Finish finish) {
  static_assert(GROUPS<TYPE> == 2);
  static constexpr MultiplyBlock blocks[2][2] = {{multiply_block<TYPE, 1, 1>, multiply_block<TYPE, 1, 2>},
                                                 {multiply_block<TYPE, 2, 1>, multiply_block<TYPE, 2, 2>}};
  alignas(64) float sums[2 * TILE_ROWS * WIDTH<TYPE>];
  alignas(64) uint8_t ends[ROWS_AT_ONCE][TILE_BYTES], weight_ends[2][WEIGHTS_BYTES];
  const auto *start = TYPE == INT8 ? reinterpret_cast<const float *>(g.offset) : g.bias;
  const size_t group_bytes = size_t{g.steps} * 64;
  const uint32_t height = count < TILE_ROWS ? count : TILE_ROWS, tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
  const uint8_t *a = g.a + row * g.a_stride;
  TileInputs in;
  in.stride = g.a_stride;
  in.whole = g.steps / TILE_STEPS;
  in.rest = g.steps % TILE_STEPS != 0;
  const size_t end = size_t{in.whole} * TILE_BYTES, end_bytes = size_t{g.steps} * 4 - end;
  if (in.rest)
    for (uint32_t r = 0; r < count; r++) {
      __builtin_memset(ends[r], 0, TILE_BYTES);
      __builtin_memcpy(ends[r], a + r * g.a_stride + end, end_bytes);
    }
  for (uint32_t group = g.first; group < g.last; group += 2) {
    const int groups = group + 2 <= g.last ? 2 : 1;
    for (int i = 0; i < groups; i++) {
      in.weights[i] = g.weights + (group + i) * group_bytes;
      in.weight_ends[i] = weight_ends[i];
      if (!in.rest) continue;
      __builtin_memset(weight_ends[i], 0, WEIGHTS_BYTES);
      __builtin_memcpy(weight_ends[i], in.weights[i] + in.whole * WEIGHTS_BYTES, end_bytes * 16);
    }
    const uint8_t *next = group + 2 < g.last ? in.weights[0] + 2 * group_bytes : g.next;
    for (uint32_t tile = 0; tile < tiles; tile += 2) {
      const int pair = tile + 1 < tiles ? 2 : 1;
      uint32_t first[2];
      for (int i = 0; i < pair; i++) {
        first[i] = (tile + i) * TILE_ROWS;
        if (first[i] + height > count) first[i] = count - height;
        in.rows[i] = a + first[i] * g.a_stride;
        in.ends[i] = ends[first[i]];
      }
      // The first two blocks bring in the weights of the next two groups; later ones what is there anyway.
      const uint8_t *fetched = tile < 4 && next ? next + tile / 2 * group_bytes : in.weights[0];
      blocks[pair - 1][groups - 1](in, start + group * BLOCK, fetched, sums);
      for (int i = 0; i < pair; i++) {
        const uint32_t from = (tile + i) * TILE_ROWS, to = from + TILE_ROWS < count ? from + TILE_ROWS : count;
        finish(g, sums + (i * TILE_ROWS + from - first[i]) * WIDTH<TYPE>, row + from, static_cast<int>(to - from),
               group, groups);
      }
    }
  }
}

template <uint32_t TYPE>
void gemm_on_tiles(const Gemm &g) {
  const Finish finish = finish_of<TYPE>(g.epilogue);
  for (uint32_t row = 0; row < g.rows; row += ROWS_AT_ONCE) {
    const uint32_t count = g.rows - row < ROWS_AT_ONCE ? g.rows - row : ROWS_AT_ONCE;
    const int height = count < TILE_ROWS ? static_cast<int>(count) : TILE_ROWS;
    TileShapes shapes;
    for (int tile = 0; tile < 6; tile++) shapes.set(tile, height);  // sums and rows
    shapes.set(6, TILE_ROWS), shapes.set(7, TILE_ROWS);             // weights
    configure_tiles(shapes);
    multiply_rows<TYPE>(g, row, count, finish);
  }
  release_tiles();  // so that nobody else has to save them
}

void tile_gemm(const Gemm &g) {
  if (g.type == INT8) gemm_on_tiles<INT8>(g);
  else if (g.type == BF16) gemm_on_tiles<BF16>(g);
  else gemm_of<FP32>(g);
}

// Four independent sums, as many as products have.
template <uint32_t TYPE>
double sweep_tiles(uint32_t rounds) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; tile++) shapes.set(tile, TILE_ROWS);
  configure_tiles(shapes);
  for (uint32_t round = 0; round < rounds; round++) {
    multiply_tiles<TYPE, 0, 4, 6>();
    multiply_tiles<TYPE, 1, 4, 7>();
    multiply_tiles<TYPE, 2, 5, 6>();
    multiply_tiles<TYPE, 3, 5, 7>();
  }
  release_tiles();
  return double(rounds) * 4 * TILE_ROWS * BLOCK * (TILE_BYTES / bytes_of(TYPE));
}

double multiply_tile_registers(uint32_t type, uint32_t rounds) {
  return type == INT8   ? sweep_tiles<INT8>(rounds)
         : type == BF16 ? sweep_tiles<BF16>(rounds)
                        : multiply_registers(type, rounds);
}

}  // namespace
}  // namespace cnxt
