#include "session.h"

#include <algorithm>
#include <cstring>
#include <new>

#include <sys/mman.h>

namespace cnxt {
namespace {

constexpr size_t HIDDEN_BYTES = 192 << 10;  // of a tile, so that it stays in a second-level cache of 512 KB or more
constexpr size_t GRN_PIXELS = 784;          // at least, for a V2 block's images at once
constexpr size_t MOST_BYTES = size_t{1} << 44;

const Kernels &kernels_for(const char *isa) {
  const Kernels *found = choose_kernels(isa);
  if (!found) {
    const std::string refused = refused_kernels(), why = refused.empty() ? "" : "; " + refused;
    throw Failure{CNXT_BAD_ARGUMENT,
                  std::string("this CPU has no path '") + isa + "'; it has " + available_kernels() + why};
  }
  return *found;
}

// Hands out aligned pieces of the arena; only counts where there is none yet.
struct Cursor {
  uint8_t *base;
  unsigned __int128 used = 0;

  template <class T>
  T *take(unsigned __int128 count) {
    T *piece = base ? reinterpret_cast<T *>(base + static_cast<size_t>(used)) : nullptr;
    used += (count * sizeof(T) + 127) / 64 * 64;  // a line between pieces of different threads
    return piece;
  }
};

}  // namespace

Session::Session(const Model &model, const cnxt_options &options)
    : model(model),
      kernels(kernels_for(options.isa)),
      batch(options.batch),
      height(options.height),
      width(options.width),
      threads(options.threads) {
  const auto size = std::to_string(height) + "x" + std::to_string(width);
  if (batch < 1 || batch > 65536) throw Failure{CNXT_BAD_ARGUMENT, "batch " + std::to_string(batch) + "; 1 to 65536"};
  if (height < 32 || width < 32 || height > 32768 || width > 32768)
    throw Failure{CNXT_BAD_ARGUMENT, "images of " + size + " pixels; sides are 32 to 32768"};
  if (threads < 1 || threads > 1024) throw Failure{CNXT_BAD_ARGUMENT, std::to_string(threads) + " threads; 1 to 1024"};
  model.orders->find(kernels, model.data, model.operations);
  scratch.resize(threads);
  arena_bytes = lay_out(nullptr);
  void *memory = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, arena_bytes, MADV_HUGEPAGE);  // fewer address translations; refused where the system has none
#endif
  arena = static_cast<uint8_t *>(memory);
  lay_out(arena);
  try {
    timings.reserve(model.operations.size() * 9);  // parts
    pool = std::make_unique<Pool>(threads);
  } catch (...) {
    munmap(arena, arena_bytes);
    throw;
  }
}

Session::~Session() {
  pool.reset();
  munmap(arena, arena_bytes);
}

size_t Session::lay_out(uint8_t *base) {
  using Wide = unsigned __int128;
  Cursor cursor{base};
  const auto heights = map_sides(model, height), widths = map_sides(model, width);
  for (int s = 0; s < 4; s++) {
    Map &map = maps[s];
    map.channels = model.channels[s];
    map.height = heights[s];
    map.width = widths[s];
    map.margin = model.margin[s];
    map.images = batch;
    if (map.plane() >= (size_t{1} << 32)) throw Failure{CNXT_BAD_ARGUMENT, "the batch has more than 2^32 pixels"};
    for (float *&data : map.data) data = cursor.take<float>(Wide{map.plane()} * map.columns());
  }
  // The widest rows of any operation, in bytes, and the tile of each stage.
  size_t rows = 0, inputs = 0, head = 0, hidden_pixels = 0, sums = 0, factors = 0;
  std::array<size_t, 4> hidden = {};
  int stage = 0;
  size_t middle_floats = 0;
  for (const Operation &op : model.operations) {
    const size_t columns = padded(op.channels);
    switch (op.kind) {
      case STEM_CONV:
        if (middle_floats == 0) middle_floats = op.a.outputs;
        [[fallthrough]];
      case STEM_PATCH:
        rows = std::max({rows, size_t{op.a.inputs}, padded(op.a.outputs)});
        inputs = std::max(inputs, input_stride(op.a));
        break;
      case BLOCK_OP:
        rows = std::max(rows, columns);
        inputs = std::max(inputs, input_stride(op.a));
        hidden[stage] = std::max(hidden[stage], input_stride(op.b));
        if (op.grn_weight) {
          const size_t area = size_t{maps[stage].height} * maps[stage].width;
          grn_images[stage] = static_cast<uint32_t>(std::clamp<size_t>(GRN_PIXELS / area, 1, batch));
          hidden_pixels = std::max(hidden_pixels, grn_images[stage] * area * padded(4 * size_t{op.channels}));
          sums = std::max(
              sums, grn_images[stage] * ((area + grn_run(area) - 1) / grn_run(area)) * padded(4 * size_t{op.channels}));
          factors = std::max(factors, grn_images[stage] * padded(4 * size_t{op.channels}));
        }
        break;
      case DOWNSAMPLE:
        rows = std::max(rows, columns);
        inputs = std::max(inputs, input_stride(op.a));
        stage++;
        break;
      case FEATURES:
        if (op.norm != NO_NORM) rows = std::max(rows, columns);
        break;
      case HEAD:
        rows = std::max(rows, columns);
        head_width = columns;
        for (const Product *p : {&op.a, &op.b})
          if (p->outputs) {
            head_width = std::max({head_width, padded(p->outputs)});
            head = std::max(head, input_stride(*p));
          }
        break;
    }
  }
  size_t most = 0, hidden_bytes = 0, stem = 0;
  for (const Operation &op : model.operations)
    if (op.kind == STEM_PATCH || op.kind == STEM_CONV) stem = std::max<size_t>(stem, padded(op.a.outputs));
  for (int s = 0; s < 4; s++) {
    const size_t fitting = HIDDEN_BYTES / std::max<size_t>(hidden[s], 1) / 28 * 28;
    tile[s] = static_cast<uint32_t>(std::min(std::clamp<size_t>(fitting, 56, 224), maps[s].pixels()));
    most = std::max(most, size_t{tile[s]});
    hidden_bytes = std::max(hidden_bytes, tile[s] * hidden[s]);
  }
  hidden_bytes = std::max(hidden_bytes, tile[0] * stem * sizeof(float));  // the stem leaves its rows of floats there
  for (Scratch &own : scratch) {
    own.rows = cursor.take<float>(Wide{most} * rows);
    own.inputs = cursor.take<uint8_t>(Wide{most} * inputs);
    own.hidden = cursor.take<uint8_t>(hidden_bytes);
    own.pixels = cursor.take<uint32_t>(most);
  }
  middle = cursor.take<float>(Wide{batch} * half_padded(height) * half_padded(width) * middle_floats);
  grn_hidden = cursor.take<float>(hidden_pixels);
  grn_sums = cursor.take<float>(sums);
  grn_factor = cursor.take<float>(factors);
  for (float *&vector : vectors) vector = cursor.take<float>(Wide{batch} * head_width);
  head_inputs = cursor.take<uint8_t>(Wide{batch} * head);
  if (cursor.used > MOST_BYTES) throw Failure{CNXT_BAD_ARGUMENT, "the activations need more than 16 TB"};
  return static_cast<size_t>(cursor.used);
}

void Session::run(const void *images, float *const *results, bool with_times) {
  input = images;
  outputs = results;
  timed = with_times;
  timings.clear();
  last = std::chrono::steady_clock::now();
  Place place{0, 0, 0};
  for (const Operation &op : model.operations) {
    begin(op, place);
    switch (op.kind) {
      case STEM_PATCH: stem_patch(op, place); break;
      case STEM_CONV: stem_convolution(op, place); break;
      case BLOCK_OP: op.grn_weight ? block_with_grn(op, place) : block(op, place); break;
      case DOWNSAMPLE: downsample(op, place); break;
      case FEATURES: features(op, place); break;
      default: head(op, place); break;
    }
    place.index++;
  }
}

void Session::begin(const Operation &op, const Place &place) {
  const auto has = [&](uint32_t part, const Product *product) { mark(place, 0, part, product); };
  switch (op.kind) {
    case STEM_PATCH:
    case STEM_CONV: return has(0, &op.a);
    case BLOCK_OP:
      has(1, nullptr);
      has(2, &op.a);
      if (op.grn_weight) has(3, nullptr);
      return has(4, &op.b);
    case DOWNSAMPLE: return has(5, &op.a);
    case FEATURES: return has(7, nullptr);
    default: return has(6, op.b.outputs ? &op.b : op.a.outputs ? &op.a : nullptr);
  }
}

void Session::mark(const Place &place, uint32_t thread, uint32_t part, const Product *product) {
  if (!timed || thread != 0) return;
  const auto now = std::chrono::steady_clock::now();
  const double ms = std::chrono::duration<double, std::milli>(now - last).count();
  last = now;
  const uint32_t type = product ? product->type : 3;
  const uint32_t executed = type == BF16 && !kernels.multiplies_bf16 ? uint32_t{FP32} : type;
  for (cnxt_timing &timing : timings)  // a tile after the first adds to its part
    if (timing.operation == place.index && timing.part == part) {
      timing.ms += ms;
      return;
    }
  timings.push_back({static_cast<uint32_t>(place.index), part, type, executed, ms});
}

}  // namespace cnxt
