// A network planned for one batch and image size: its maps, its scratch, its threads.
#pragma once
#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "convnext_deploy.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"

namespace cnxt {

// A map in blocks of 16 channels, [padded(C) / 16][plane][16] floats. A plane contains the rows of all images one after
// another, each followed by `margin` zero pixels, and begins with as many: the zeros right of one row are those left
// of the next, so a depthwise kernel never asks where the border is.
struct Map {
  uint32_t channels = 0, height = 0, width = 0, margin = 0, images = 0;
  float *data[2] = {};  // a block reads one and writes the other: its neighbours' pixels are still needed

  size_t pitch() const { return size_t{width} + margin; }
  size_t pixels() const { return size_t{images} * height * width; }
  size_t plane() const { return margin + size_t{images} * height * pitch(); }
  size_t columns() const { return padded(channels); }
  // Where pixel `p`, counted over images, rows and columns, is in a plane.
  size_t at(size_t p) const { return margin + p / width * pitch() + p % width; }
};

// One thread's own memory, reused by every operation. A tile is a run of pixels whose rows stay in its cache.
struct Scratch {
  float *rows;       // [tile][widest row]
  uint8_t *inputs;   // of a product, [tile][bytes]
  uint8_t *hidden;   // [tile][bytes]
  uint32_t *pixels;  // [tile]
};

// Pixels of a V2 block's hidden map whose squares are added up at once: few enough to share small maps out evenly.
inline size_t grn_run(size_t area) { return area < 56 ? 1 : area < 196 ? area / 28 : 7; }

// How far a run is: which stage, and which of its map's two buffers contains the current values.
struct Place {
  size_t index;  // of the operation
  int stage;
  int buffer;
};

// Calls `body(first, count)` for tiles of nearly equal size that cover [first, last).
template <class F>
void for_tiles(size_t first, size_t last, size_t most, F body) {
  for (size_t left = (last - first + most - 1) / most; left > 0; left--) {
    const size_t count = (last - first + left - 1) / left;
    body(first, count);
    first += count;
  }
}

class Session {
 public:
  Session(const Model &model, const cnxt_options &options);  // throws Failure, std::bad_alloc, std::system_error
  ~Session();
  Session(const Session &) = delete;
  Session &operator=(const Session &) = delete;

  bool belongs_here() const { return pool->belongs_here(); }
  void run(const void *input, float *const *outputs, bool timed);

  const Model &model;
  const Kernels &kernels;
  const uint32_t batch, height, width, threads;
  size_t arena_bytes = 0;
  std::vector<cnxt_timing> timings;  // of the last run that was timed

 private:
  size_t lay_out(uint8_t *base);  // the arena's bytes; sets every pointer where `base` is not null
  void stem_patch(const Operation &, Place &);
  void stem_convolution(const Operation &, Place &);
  void block(const Operation &, Place &);
  void block_with_grn(const Operation &, Place &);
  void downsample(const Operation &, Place &);
  void features(const Operation &, Place &);
  void head(const Operation &, Place &);

  // Calls `body(thread, first, count)` for tiles of at most `most` of `all` things, on all threads, and waits for them.
  template <class F>
  void share(const Place &place, size_t all, size_t most, F body) {
    const size_t each = (all + threads - 1) / threads;
    const size_t pieces = threads * std::clamp<size_t>((each + most - 1) / most, 1, Pool::MOST_PIECES / threads);
    pool->run(static_cast<uint32_t>(pieces), [&](uint32_t thread, size_t piece) {
      for_tiles(all * piece / pieces, all * (piece + 1) / pieces, most,
                [&](size_t first, size_t count) { body(thread, first, count); });
    });
    mark(place, 0, 8, nullptr);
  }
  // Rows of floats to what product `p` reads, in `to`; rows are `input_stride(p)` bytes apart.
  Normalize reading(const Product &p, const float *rows, size_t stride, size_t count, void *to) const;
  Gemm product(const Product &p, const uint8_t *a, size_t rows) const;
  Epilogue to_rows(const Product *next, uint32_t activation, void *out, size_t stride) const;
  Epilogue to_map(const Map &map, int buffer, const uint32_t *pixels, const float *residual) const;
  void stem_norm(const Operation &, size_t first, size_t count, const Scratch &) const;
  void dwconv_norm(const Operation &, const Map &, int buffer, size_t first, size_t count, const Scratch &) const;
  void pool_image(const Operation &, const Map &, int buffer, size_t image, const Scratch &) const;

  // Names an operation's parts, as thread 0 may come too late to do any piece of one.
  void begin(const Operation &, const Place &);
  // Ends a part of an operation: the time since the last one is the part's. Counted on thread 0 only.
  void mark(const Place &, uint32_t thread, uint32_t part, const Product *product);

  std::unique_ptr<Pool> pool;
  uint8_t *arena = nullptr;
  std::array<Map, 4> maps;
  std::array<uint32_t, 4> tile = {};        // pixels, by stage
  std::vector<Scratch> scratch;             // of each thread
  float *middle = nullptr;                  // of an overlapping stem, [images][h][w][C]
  std::array<uint32_t, 4> grn_images = {};  // that a V2 block works on at once, by stage
  float *grn_hidden = nullptr;              // [their pixels][padded(4C)]
  float *grn_sums = nullptr;                // [their runs][padded(4C)]
  float *grn_factor = nullptr;              // [their number][padded(4C)]
  float *vectors[2] = {};                   // of the head, [images][widest]
  uint8_t *head_inputs = nullptr;
  size_t head_width = 0;  // floats

  // The running inference.
  const void *input = nullptr;
  float *const *outputs = nullptr;
  bool timed = false;
  std::chrono::steady_clock::time_point last;
};

// Bytes between the rows that a product reads: a multiple of 64 that is no multiple of 128, as rows a power of two
// apart would compete for the same few lines of the first-level cache.
inline size_t input_stride(const Product &p) {
  const size_t bytes = (p.inputs * bytes_of(p.type) + 63) / 64 * 64;
  return bytes % 128 ? bytes : bytes + 64;
}

}  // namespace cnxt
