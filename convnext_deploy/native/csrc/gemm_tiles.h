// Matrix products of codes and bf16 on tile registers. Included by kernels_body.h only.
//
// The packed weights are what the instructions read: 16 steps of 16 outputs are one register. Two registers of rows
// and two of weights make four of sums, so that each is used twice. A row's steps are shared evenly among as few
// registers as can, so that no end has to be copied and filled up with zeros. Rows are shared evenly too; the last
// register's may overlap those before: their sums are the same, and are written twice.
#pragma once
#include "gemm.h"
#include "tiles.h"

namespace cnxt {
namespace {

constexpr uint32_t TILE_STEPS = TILE_BYTES / 4, ROWS_AT_ONCE = 256;

// What one block of sums is made of.
struct TileInputs {
  const uint8_t *rows[2];  // of the two registers of rows
  size_t stride;
  const uint8_t *weights[2];  // of the two groups
  uint32_t turns;             // registers along a row
  uint32_t bytes;             // of a row in each of them
  uint32_t second;            // rows from the first register's to the second's
};

// Sums that wait for their epilogue. It runs in pieces between the next block's tile instructions, which other parts of
// a core execute.
struct Waiting {
  const Gemm &g;
  const Finish finish;
  const float *sums = nullptr;
  uint32_t row = 0, rows = 0, group = 0;
  int groups = 0;

  template <uint32_t TYPE>
  INLINE void finish_some(Waiting &w, uint32_t most) {
    const uint32_t count = w.rows < most ? w.rows : most;
    if (count == 0) return;
    w.finish(w.g, w.sums, w.row, static_cast<int>(count), w.group, w.groups);
    w.sums += count * WIDTH<TYPE>, w.row += count, w.rows -= count;
  }
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

// `next` is brought into the second-level cache meanwhile, as much of it as the weights that are read. `waiting` is
// done when this returns, and its sums may be where these are written.
template <uint32_t TYPE, int R, int G>
__attribute__((noinline)) void multiply_block(const TileInputs &in, const float *start, const uint8_t *next,
                                              Waiting &waiting, float *sums) {
  load_tile<0>(start, 0);  // the same line for every row
  if constexpr (G == 2) load_tile<1>(start + BLOCK, 0);
  if constexpr (R == 2) load_tile<2>(start, 0);
  if constexpr (R == 2 && G == 2) load_tile<3>(start + BLOCK, 0);
  const uint32_t some = (waiting.rows + in.turns - 1) / in.turns;
  const size_t turn_bytes = size_t{in.bytes} * 16;
  for (uint32_t turn = 0; turn < in.turns; turn++) {
    for (size_t line = 0; line < turn_bytes; line += 64) __builtin_prefetch(next + turn * turn_bytes + line, 0, 2);
    multiply_step<TYPE, R, G>(in.rows, turn * size_t{in.bytes}, in.stride, in.weights, turn * turn_bytes);
    Waiting::finish_some<TYPE>(waiting, some);
  }
  Waiting::finish_some<TYPE>(waiting, waiting.rows);
  constexpr size_t PITCH = WIDTH<TYPE> * sizeof(float);
  store_tile<0>(sums, PITCH);
  if constexpr (G == 2) store_tile<1>(sums + BLOCK, PITCH);
  float *second = sums + in.second * WIDTH<TYPE>;
  if constexpr (R == 2) store_tile<2>(second, PITCH);
  if constexpr (R == 2 && G == 2) store_tile<3>(second + BLOCK, PITCH);
}

// The fewest registers along a row that share its steps evenly, so that none needs an end of its own.
INLINE uint32_t turns_of(uint32_t steps) {
  uint32_t turns = (steps + TILE_STEPS - 1) / TILE_STEPS;
  while (steps % turns) turns++;
  return turns;
}

using MultiplyBlock = void (*)(const TileInputs &, const float *, const uint8_t *, Waiting &, float *);

// The rows [row, row + count) of all groups of outputs, `height` in a register and each in `turns` of them.
template <uint32_t TYPE>
void multiply_rows(const Gemm &g, uint32_t row, uint32_t count, uint32_t height, uint32_t turns, Finish finish) {
  static_assert(GROUPS<TYPE> == 2);
  static constexpr MultiplyBlock blocks[2][2] = {{multiply_block<TYPE, 1, 1>, multiply_block<TYPE, 1, 2>},
                                                 {multiply_block<TYPE, 2, 1>, multiply_block<TYPE, 2, 2>}};
  alignas(64) float sums[2][2 * TILE_ROWS * WIDTH<TYPE>];  // of this block, and of the one before
  const auto *start = TYPE == INT8 ? reinterpret_cast<const float *>(g.offset) : g.bias;
  const size_t group_bytes = size_t{g.steps} * 64;
  const uint32_t tiles = (count + height - 1) / height;
  const uint8_t *a = g.a + row * g.a_stride;
  TileInputs in;
  in.stride = g.a_stride;
  in.turns = turns;
  in.bytes = g.steps / turns * 4;
  in.second = 0;
  Waiting waiting{g, finish};
  int buffer = 0;
  for (uint32_t group = g.first; group < g.last; group += 2) {
    const int groups = group + 2 <= g.last ? 2 : 1;
    for (int i = 0; i < groups; i++) in.weights[i] = g.weights + (group + i) * group_bytes;
    const uint8_t *next = group + 2 < g.last ? in.weights[0] + 2 * group_bytes : g.next;
    for (uint32_t tile = 0; tile < tiles; tile += 2, buffer = 1 - buffer) {
      const uint32_t pair = tile + 1 < tiles ? 2 : 1, from = tile * height;
      uint32_t first[2] = {};
      for (uint32_t i = 0; i < pair; i++) {
        first[i] = from + i * height;
        if (first[i] + height > count) first[i] = count - height;
        in.rows[i] = a + first[i] * g.a_stride;
      }
      if (pair == 2) in.second = first[1] - first[0];  // of less than 16: the same sums are written twice
      // The first two blocks bring in the weights of the next two groups; later ones what is there anyway.
      const uint8_t *fetched = tile < 4 && next ? next + tile / 2 * group_bytes : in.weights[0];
      blocks[pair - 1][groups - 1](in, start + group * BLOCK, fetched, waiting, sums[buffer]);
      waiting.sums = sums[buffer] + (from - first[0]) * WIDTH<TYPE>;
      waiting.row = row + from;
      waiting.rows = (from + pair * height < count ? from + pair * height : count) - from;
      waiting.group = group, waiting.groups = groups;
    }
  }
  Waiting::finish_some<TYPE>(waiting, waiting.rows);
}

template <uint32_t TYPE>
void gemm_on_tiles(const Gemm &g) {
  const Finish finish = finish_of<TYPE>(g.epilogue);
  const uint32_t turns = turns_of(g.steps), steps = g.steps / turns;
  for (uint32_t row = 0; row < g.rows; row += ROWS_AT_ONCE) {
    const uint32_t count = g.rows - row < ROWS_AT_ONCE ? g.rows - row : ROWS_AT_ONCE;
    const uint32_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS, height = (count + tiles - 1) / tiles;
    TileShapes shapes;
    for (int tile = 0; tile < 6; tile++) shapes.set(tile, static_cast<int>(height));
    for (int tile = 6; tile < 8; tile++) shapes.set(tile, static_cast<int>(steps));
    for (int tile = 4; tile < 6; tile++) shapes.bytes[tile] = static_cast<uint16_t>(4 * steps);
    configure_tiles(shapes);
    multiply_rows<TYPE>(g, row, count, height, turns, finish);
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
  constexpr uint64_t INPUTS = TILE_BYTES / bytes_of(TYPE);
  return double(rounds) * 4 * TILE_ROWS * BLOCK * INPUTS;
}

double multiply_tile_registers(uint32_t type, uint32_t rounds) {
  return type == INT8   ? sweep_tiles<INT8>(rounds)
         : type == BF16 ? sweep_tiles<BF16>(rounds)
                        : multiply_registers(type, rounds);
}

}  // namespace
}  // namespace cnxt
