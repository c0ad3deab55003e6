// The tile registers of AMX: eight of up to 16 rows by 64 bytes, and the instructions that this engine uses of them.
// With CNXT_MODEL_AMX they are a model in C++ instead, written from the instructions' description in Intel's manual,
// which runs where no CPU has them and stops the program where the CPU would raise a fault. Included by gemm_tiles.h.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(CNXT_MODEL_AMX)
#include <cstdio>
#include <cstdlib>
#endif

#include "simd.h"

namespace cnxt {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // of one register at most

// What `ldtilecfg` reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};

  void set(int tile, int height) { bytes[tile] = TILE_BYTES, rows[tile] = static_cast<uint8_t>(height); }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(CNXT_MODEL_AMX)

struct TileModel {
  TileShapes shapes;
  bool configured = false;
  uint8_t data[8][TILE_ROWS][TILE_BYTES];

  [[noreturn]] static void fault(const char *what) {
    std::fprintf(stderr, "model of AMX: %s\n", what);
    std::abort();
  }
  static void need(bool condition, const char *what) {
    if (!condition) fault(what);
  }
  void need_tile(int tile) const {
    need(configured, "no tiles are configured");
    need(tile < 8 && shapes.rows[tile] && shapes.bytes[tile], "the tile has no shape");
  }
};

thread_local TileModel model_tiles;

INLINE void configure_tiles(const TileShapes &shapes) {
  const auto need = TileModel::need;
  need(shapes.palette == 1, "palette");
  for (int i = 0; i < 14; i++) need(shapes.reserved[i] == 0, "reserved bytes");
  for (int tile = 0; tile < 16; tile++) {
    need((shapes.rows[tile] == 0) == (shapes.bytes[tile] == 0), "rows without bytes");
    need(tile < 8 ? shapes.rows[tile] <= TILE_ROWS && shapes.bytes[tile] <= TILE_BYTES : shapes.rows[tile] == 0,
         "rows or bytes of a tile");
  }
  model_tiles.shapes = shapes;
  model_tiles.configured = true;
  std::memset(model_tiles.data, 0, sizeof model_tiles.data);
}

INLINE void release_tiles() { model_tiles.configured = false; }

template <int TILE>
INLINE void load_tile(const void *from, size_t stride) {
  model_tiles.need_tile(TILE);
  std::memset(model_tiles.data[TILE], 0, sizeof model_tiles.data[TILE]);
  for (int row = 0; row < model_tiles.shapes.rows[TILE]; row++)
    std::memcpy(model_tiles.data[TILE][row], static_cast<const uint8_t *>(from) + row * stride,
                model_tiles.shapes.bytes[TILE]);
}

template <int TILE>
INLINE void store_tile(void *to, size_t stride) {
  model_tiles.need_tile(TILE);
  for (int row = 0; row < model_tiles.shapes.rows[TILE]; row++)
    std::memcpy(static_cast<uint8_t *>(to) + row * stride, model_tiles.data[TILE][row], model_tiles.shapes.bytes[TILE]);
}

// What is too small to be a normal number is 0, on the way in and on the way out.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float from_half(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return flushed(x);
}

template <uint32_t TYPE, int SUM, int A, int B>
void multiply_tiles() {
  TileModel &t = model_tiles;
  t.need_tile(SUM), t.need_tile(A), t.need_tile(B);
  static_assert(SUM != A && SUM != B && A != B);
  TileModel::need(t.shapes.bytes[A] % 4 == 0 && t.shapes.bytes[B] % 4 == 0 && t.shapes.bytes[SUM] % 4 == 0 &&
                      t.shapes.rows[SUM] == t.shapes.rows[A] && t.shapes.bytes[SUM] == t.shapes.bytes[B] &&
                      t.shapes.bytes[A] / 4 == t.shapes.rows[B],
                  "shapes of a product");
  const int steps = t.shapes.bytes[A] / 4, columns = t.shapes.bytes[B] / 4;
  for (int m = 0; m < t.shapes.rows[SUM]; m++) {
    const uint8_t *a = t.data[A][m];
    if constexpr (TYPE == INT8) {
      int32_t sums[16];
      std::memcpy(sums, t.data[SUM][m], sizeof sums);
      for (int k = 0; k < steps; k++)
        for (int n = 0; n < columns; n++)
          for (int i = 0; i < 4; i++)
            sums[n] = static_cast<int32_t>(
                static_cast<uint32_t>(sums[n]) +
                static_cast<uint32_t>(int32_t{a[4 * k + i]} * static_cast<int8_t>(t.data[B][k][4 * n + i])));
      std::memcpy(t.data[SUM][m], sums, sizeof sums);
    } else {
      float even[16] = {}, odd[16] = {}, sums[16];
      for (int k = 0; k < steps; k++)
        for (int n = 0; n < columns; n++) {
          uint16_t left[2], right[2];
          std::memcpy(left, a + 4 * k, 4), std::memcpy(right, t.data[B][k] + 4 * n, 4);
          even[n] = flushed(__builtin_fmaf(from_half(left[0]), from_half(right[0]), even[n]));
          odd[n] = flushed(__builtin_fmaf(from_half(left[1]), from_half(right[1]), odd[n]));
        }
      std::memcpy(sums, t.data[SUM][m], sizeof sums);
      for (int n = 0; n < columns; n++) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
      std::memcpy(t.data[SUM][m], sums, sizeof sums);
    }
  }
  for (int m = t.shapes.rows[SUM]; m < TILE_ROWS; m++) std::memset(t.data[SUM][m], 0, TILE_BYTES);
}

#else

// In assembly, as the intrinsics' macros take no template's numbers. Compilers keep nothing in these registers.
INLINE void configure_tiles(const TileShapes &shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }

INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
INLINE void load_tile(const void *from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
INLINE void store_tile(void *to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <uint32_t TYPE, int SUM, int A, int B>
INLINE void multiply_tiles() {
  if constexpr (TYPE == INT8) asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#endif

}  // namespace
}  // namespace cnxt
