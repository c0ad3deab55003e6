// The operations of a network: the calling thread goes through them, and all threads share each one's pixels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "session.h"

namespace cnxt {
namespace {

// Where pixels [first, first + count) are in a plane of the map.
void place_pixels(const Map &map, size_t first, size_t count, uint32_t *pixels) {
  size_t x = first % map.width, at = map.at(first);
  for (size_t i = 0; i < count; i++) {
    pixels[i] = static_cast<uint32_t>(at++);
    if (++x == map.width) x = 0, at += map.margin;
  }
}

// Rows of floats from every block of a map. Neighbouring pixels are beside each other in one block's plane, and a whole
// plane away in the next, so the blocks come first.
void gather(const Map &map, int buffer, const uint32_t *pixels, size_t count, float *rows) {
  const size_t columns = map.columns(), step = map.plane() * BLOCK;
  const float *plane = map.data[buffer];
  for (size_t c = 0; c < columns; c += BLOCK, plane += step)
    for (size_t i = 0; i < count; i++)
      std::memcpy(rows + i * columns + c, plane + size_t{pixels[i]} * BLOCK, BLOCK * sizeof(float));
}

void scatter(const Map &map, int buffer, const uint32_t *pixels, size_t count, const float *rows) {
  const size_t columns = map.columns(), step = map.plane() * BLOCK;
  float *plane = map.data[buffer];
  for (size_t c = 0; c < columns; c += BLOCK, plane += step)
    for (size_t i = 0; i < count; i++)
      std::memcpy(plane + size_t{pixels[i]} * BLOCK, rows + i * columns + c, BLOCK * sizeof(float));
}

// 4x4 pixels of planes of one channel each, channels last. CHANS is how many there are, or 0 for `chans`.
template <size_t CHANS>
void patch(const float *from, size_t plane, size_t line, size_t chans, float *to) {
  if constexpr (CHANS > 0) chans = CHANS;
  for (size_t y = 0; y < 4; y++)
    for (size_t x = 0; x < 4; x++)
      for (size_t c = 0; c < chans; c++) *to++ = from[c * plane + y * line + x];
}

}  // namespace

Normalize Session::reading(const Product &p, const float *rows, size_t stride, size_t count, void *to) const {
  Normalize n = {};
  n.rows = static_cast<uint32_t>(count);
  n.type = p.type;
  n.in = rows;
  n.in_stride = stride;
  n.out = to;
  n.out_stride = input_stride(p);
  n.inverse_step = p.type == INT8 ? 1.0f / p.step : 1.0f;
  n.shift = p.shift;
  n.zero_point = p.zero_point;
  return n;
}

Gemm Session::product(const Product &p, const uint8_t *a, size_t rows) const {
  Gemm g = {};
  g.type = p.type;
  g.rows = static_cast<uint32_t>(rows);
  g.steps = static_cast<uint32_t>(p.inputs * bytes_of(p.type) / 4);
  g.last = static_cast<uint32_t>(padded(p.outputs) / BLOCK);
  g.a = a;
  g.a_stride = input_stride(p);
  g.weights = model.tensor<uint8_t>(p.weights);
  g.bias = model.tensor<float>(p.bias);
  g.scale = model.tensor<float>(p.scale);
  g.offset = model.tensor<int32_t>(p.offset);
  if (kernels.find_order) g.order = model.orders->of(p);  // another session may be finding them otherwise
  return g;
}

Epilogue Session::to_rows(const Product *next, uint32_t activation, void *out, size_t stride) const {
  Epilogue e = {};
  e.kind = Epilogue::ROWS;
  e.type = next ? next->type : uint32_t{FP32};
  e.activation = activation;
  e.out = out;
  e.stride = stride;
  e.exact = true;
  if (e.type == INT8) {
    e.inverse_step = 1.0f / next->step;
    e.step = next->step;
    e.shift = next->shift;
    e.zero_point = next->zero_point;
  }
  return e;
}

Epilogue Session::to_map(const Map &map, int buffer, const uint32_t *pixels, const float *residual) const {
  Epilogue e = {};
  e.kind = Epilogue::STREAM;
  e.out = map.data[buffer];
  e.stride = map.plane();
  e.pixels = pixels;
  e.residual = residual;
  return e;
}

// The stem's convolution left rows of floats; their norm goes to the first map.
void Session::stem_norm(const Operation &op, size_t first, size_t count, const Scratch &own) const {
  const Map &map = maps[0];
  float *rows = reinterpret_cast<float *>(own.hidden);
  Normalize n = {};
  n.norm = op.norm, n.channels = map.channels, n.rows = static_cast<uint32_t>(count), n.type = FP32, n.eps = op.eps;
  n.weight = model.tensor<float>(op.norm_weight), n.bias = model.tensor<float>(op.norm_bias);
  n.in = rows, n.in_stride = map.columns(), n.out = rows, n.out_stride = map.columns() * sizeof(float);
  kernels.normalize(n);
  place_pixels(map, first, count, own.pixels);
  scatter(map, 0, own.pixels, count, rows);
}

void Session::stem_patch(const Operation &op, Place &place) {
  const Map &map = maps[0];
  const uint32_t chans = model.header->in_chans;
  const size_t used = size_t{16} * chans, wide = op.a.inputs, stride = input_stride(op.a);
  const bool raw = model.header->input == UINT8_NHWC;
  const auto *bytes = static_cast<const uint8_t *>(input);
  const auto *floats = static_cast<const float *>(input);
  // Raw pixels are codes already where a step is 1 and nothing is subtracted.
  const bool codes = raw && op.a.type == INT8 && op.a.step == 1 && op.a.zero_point == 0 && op.a.shift == 0;
  const bool direct = op.a.type == FP32;  // the product reads rows of floats
  share(place, map.pixels(), tile[0], [&](uint32_t thread, size_t first, size_t count) {
    const Scratch &own = scratch[thread];
    size_t x = first % map.width, line = first / map.width, image = 0, y = 0;  // lines are counted over images
    for (size_t i = 0; i < count; i++, line += ++x == map.width, x = x == map.width ? 0 : x) {
      if (i == 0 || x == 0) image = line / map.height, y = 4 * (line % map.height);  // rows may be left over below
      uint8_t *code = own.inputs + i * stride;
      float *row = direct ? reinterpret_cast<float *>(code) : own.rows + i * wide;
      if (!raw) {
        const float *from = floats + (image * chans * height + y) * width + 4 * x;
        if (chans == 3) patch<3>(from, size_t{height} * width, width, 3, row);
        else patch<0>(from, size_t{height} * width, width, chans, row);
      }
      for (size_t ky = 0; raw && ky < 4; ky++) {
        const uint8_t *from = bytes + ((image * height + y + ky) * width + 4 * x) * chans;
        if (codes && chans == 3) std::memcpy(code + ky * 12, from, 12);  // two moves, no call
        else if (codes) std::memcpy(code + ky * 4 * chans, from, 4 * chans);
        else
          for (size_t j = 0; j < 4 * chans; j++) row[ky * 4 * chans + j] = from[j];
      }
      if (codes && wide > used) std::memset(code + used, 0, wide - used);
      else std::fill(row + used, row + wide, 0.0f);
    }
    if (!codes && !direct) kernels.scale_rows(reading(op.a, own.rows, wide, count, own.inputs), op.a.inputs);
    Gemm g = product(op.a, own.inputs, count);
    g.epilogue = to_rows(nullptr, IDENTITY, own.hidden, map.columns() * sizeof(float));
    kernels.gemm(g);
    stem_norm(op, first, count, own);
    mark(place, thread, 0, &op.a);
  });
}

void Session::stem_convolution(const Operation &op, Place &place) {
  const bool first_of_two = place.index == 0;
  const uint32_t chans = op.channels;
  const size_t from_h = first_of_two ? height : half_padded(height), h = half_padded(from_h);
  const size_t from_w = first_of_two ? width : half_padded(width), w = half_padded(from_w), wide = op.a.inputs;
  const bool raw = model.header->input == UINT8_NHWC;
  const auto *bytes = static_cast<const uint8_t *>(input);
  const auto *floats = static_cast<const float *>(input);
  const float *mean = model.tensor<float>(op.input_mean);
  const size_t out_columns = padded(op.a.outputs), stride = input_stride(op.a);
  const bool direct = op.a.type == FP32;
  share(place, size_t{batch} * h * w, tile[0], [&](uint32_t thread, size_t first, size_t count) {
    const Scratch &own = scratch[thread];
    for (size_t i = 0; i < count; i++) {
      const size_t x = (first + i) % w, line = (first + i) / w, image = line / h, y = line % h;
      float *row = direct ? reinterpret_cast<float *>(own.inputs + i * stride) : own.rows + i * wide;
      std::fill(row, row + wide, 0.0f);
      for (size_t tap = 0; tap < 9; tap++) {
        const size_t from_y = 2 * y + tap / 3 - 1, from_x = 2 * x + tap % 3 - 1;  // -1 wraps to the largest number
        if (from_y >= from_h || from_x >= from_w) continue;
        float *to = row + tap * chans;
        const size_t pixel = (image * from_h + from_y) * from_w + from_x;
        if (!first_of_two) std::memcpy(to, middle + pixel * chans, chans * sizeof(float));
        else
          for (size_t c = 0; c < chans; c++) {
            const float value = raw ? static_cast<float>(bytes[pixel * chans + c])
                                    : floats[((image * chans + c) * from_h + from_y) * from_w + from_x];
            to[c] = value - (mean ? mean[c] : 0);
          }
      }
    }
    if (!direct) kernels.scale_rows(reading(op.a, own.rows, wide, count, own.inputs), op.a.inputs);
    Gemm g = product(op.a, own.inputs, count);
    g.epilogue = to_rows(nullptr, op.activation, own.hidden, out_columns * sizeof(float));
    kernels.gemm(g);
    const auto *result = reinterpret_cast<const float *>(own.hidden);
    if (!first_of_two) stem_norm(op, first, count, own);
    else
      for (size_t i = 0; i < count; i++)
        std::memcpy(middle + (first + i) * op.a.outputs, result + i * out_columns, op.a.outputs * sizeof(float));
    mark(place, thread, 0, &op.a);
  });
}

void Session::dwconv_norm(const Operation &op, const Map &map, int buffer, size_t first, size_t count,
                          const Scratch &own) const {
  Depthwise d = {};
  d.in = map.data[buffer] + size_t{map.margin} * BLOCK;
  d.plane = map.plane();
  d.blocks = static_cast<uint32_t>(map.columns() / BLOCK);
  d.height = map.height, d.width = map.width, d.pitch = static_cast<uint32_t>(map.pitch());
  d.kernel = op.kernel;
  d.weight = model.tensor<float>(op.dw_weight), d.bias = model.tensor<float>(op.dw_bias);
  d.first = first, d.last = first + count;
  d.out = own.rows, d.out_stride = map.columns();
  kernels.depthwise(d);
  Normalize n = reading(op.a, own.rows, map.columns(), count, own.inputs);
  n.norm = op.norm, n.channels = map.channels, n.eps = op.eps;
  n.weight = model.tensor<float>(op.norm_weight), n.bias = model.tensor<float>(op.norm_bias);
  kernels.normalize(n);
}

void Session::block(const Operation &op, Place &place) {
  const Map &map = maps[place.stage];
  const uint8_t *following =
      place.index + 1 < model.operations.size() ? model.tensor<uint8_t>((&op + 1)->a.weights) : nullptr;
  share(place, map.pixels(), tile[place.stage], [&](uint32_t thread, size_t first, size_t count) {
    const Scratch &own = scratch[thread];
    dwconv_norm(op, map, place.buffer, first, count, own);
    mark(place, thread, 1, nullptr);
    Gemm expand = product(op.a, own.inputs, count);
    expand.next = model.tensor<uint8_t>(op.b.weights);
    expand.epilogue = to_rows(&op.b, op.activation, own.hidden, input_stride(op.b));
    kernels.gemm(expand);
    mark(place, thread, 2, &op.a);
    place_pixels(map, first, count, own.pixels);
    Gemm project = product(op.b, own.hidden, count);
    project.next = following;
    project.epilogue = to_map(map, 1 - place.buffer, own.pixels, map.data[place.buffer]);
    kernels.gemm(project);
    mark(place, thread, 4, &op.b);
  });
  place.buffer = 1 - place.buffer;
}

// GRN needs the whole image's hidden map before any of it can go on, so it is written out. Its sums of squares are
// taken over short runs of pixels, while those are in the cache, and the runs are added up in order: the result
// does not depend on how many threads there are.
void Session::block_with_grn(const Operation &op, Place &place) {
  const Map &map = maps[place.stage];
  const size_t area = size_t{map.height} * map.width, wide = op.b.inputs, hidden = 4 * size_t{op.channels};
  const size_t length = grn_run(area), runs = (area + length - 1) / length;  // of a run; of an image
  const auto pixel_of = [&](size_t run) { return run / runs * area + std::min(run % runs * length, area); };
  for (size_t image = 0; image < batch; image += grn_images[place.stage]) {
    const size_t images = std::min<size_t>(grn_images[place.stage], batch - image), start = image * area;
    const size_t most = std::max<size_t>(tile[place.stage] / length, 1);
    share(place, images * runs, most, [&](uint32_t thread, size_t run, size_t count) {
      const Scratch &own = scratch[thread];
      const size_t first = pixel_of(run), pixels = pixel_of(run + count) - first;
      dwconv_norm(op, map, place.buffer, start + first, pixels, own);
      mark(place, thread, 1, nullptr);
      Gemm expand = product(op.a, own.inputs, pixels);
      expand.next = model.tensor<uint8_t>(op.a.weights);
      expand.epilogue = to_rows(nullptr, op.activation, grn_hidden + first * wide, wide * sizeof(float));
      expand.epilogue.exact = op.b.type == FP32;
      kernels.gemm(expand);
      mark(place, thread, 2, &op.a);
      for (size_t r = run; r < run + count; r++)
        kernels.sum_squares(grn_hidden + pixel_of(r) * wide, wide, static_cast<uint32_t>(pixel_of(r + 1) - pixel_of(r)),
                            static_cast<uint32_t>(wide), grn_sums + r * wide);
      mark(place, thread, 3, nullptr);
    });
    const size_t blocks = images * wide / BLOCK;
    share(place, blocks, blocks, [&](uint32_t thread, size_t first, size_t count) {
      for (size_t block = first; block < first + count; block++) {
        const size_t i = block * BLOCK / wide, column = block * BLOCK % wide;
        float total[BLOCK] = {};
        for (size_t r = i * runs; r < (i + 1) * runs; r++)
          for (size_t c = 0; c < BLOCK; c++) total[c] += grn_sums[r * wide + column + c];
        for (size_t c = 0; c < BLOCK; c++) grn_factor[i * wide + column + c] = std::sqrt(total[c]);
      }
      mark(place, thread, 3, nullptr);
    });
    const float *weight = model.tensor<float>(op.grn_weight);
    for (size_t i = 0; i < images; i++) {
      float *factor = grn_factor + i * wide;
      double total = 0;
      for (size_t c = 0; c < hidden; c++) total += factor[c];
      const float mean = static_cast<float>(total / static_cast<double>(hidden));
      for (size_t c = 0; c < wide; c++) factor[c] = 1 + weight[c] * (factor[c] / (mean + op.grn_eps));
    }
    mark(place, 0, 3, nullptr);
    share(place, images * runs, most, [&](uint32_t thread, size_t run, size_t count) {
      const Scratch &own = scratch[thread];
      const size_t first = pixel_of(run), pixels = pixel_of(run + count) - first;
      for (size_t done = 0; done < pixels;) {  // a tile may reach into the next image, whose factors are others
        const size_t i = (first + done) / area, rows = std::min(pixels - done, (i + 1) * area - first - done);
        Normalize n =
            reading(op.b, grn_hidden + (first + done) * wide, wide, rows, own.hidden + done * input_stride(op.b));
        n.weight = grn_factor + i * wide;
        n.bias = model.tensor<float>(op.grn_bias);
        kernels.scale_rows(n, op.b.inputs);
        done += rows;
      }
      mark(place, thread, 3, nullptr);
      place_pixels(map, start + first, pixels, own.pixels);
      Gemm project = product(op.b, own.hidden, pixels);
      project.next = model.tensor<uint8_t>(op.b.weights);
      project.epilogue = to_map(map, 1 - place.buffer, own.pixels, map.data[place.buffer]);
      kernels.gemm(project);
      mark(place, thread, 4, &op.b);
    });
  }
  place.buffer = 1 - place.buffer;
}

void Session::downsample(const Operation &op, Place &place) {
  const Map &from = maps[place.stage], &to = maps[place.stage + 1];
  share(place, to.pixels(), tile[place.stage + 1], [&](uint32_t thread, size_t first, size_t count) {
    const Scratch &own = scratch[thread];
    for (size_t tap = 0; tap < 4; tap++) {
      size_t x = first % to.width, line = first / to.width, above = 0;  // lines are counted over images, in both maps
      for (size_t i = 0; i < count; i++, line += ++x == to.width, x = x == to.width ? 0 : x) {
        if (i == 0 || x == 0) above = line / to.height * from.height + 2 * (line % to.height) + tap / 2;
        own.pixels[i] = static_cast<uint32_t>(from.margin + above * from.pitch() + 2 * x + tap % 2);
      }
      gather(from, place.buffer, own.pixels, count, own.rows);
      Normalize n =
          reading(op.a, own.rows, from.columns(), count, own.inputs + tap * from.columns() * bytes_of(op.a.type));
      n.norm = op.norm, n.channels = from.channels, n.eps = op.eps;
      n.weight = model.tensor<float>(op.norm_weight), n.bias = model.tensor<float>(op.norm_bias);
      kernels.normalize(n);
    }
    place_pixels(to, first, count, own.pixels);
    Gemm g = product(op.a, own.inputs, count);
    g.epilogue = to_map(to, 0, own.pixels, nullptr);
    kernels.gemm(g);
    mark(place, thread, 5, &op.a);
  });
  place.stage++;
  place.buffer = 0;
}

// A stage's map as (N, C, H, W), and through its norm where it has one.
void Session::features(const Operation &op, Place &place) {
  const Map &map = maps[place.stage];
  const size_t area = size_t{map.height} * map.width, columns = map.columns();
  float *out = outputs[place.stage];
  if (op.norm != NO_NORM) {
    share(place, map.pixels(), tile[place.stage], [&](uint32_t thread, size_t first, size_t count) {
      const Scratch &own = scratch[thread];
      place_pixels(map, first, count, own.pixels);
      gather(map, place.buffer, own.pixels, count, own.rows);
      Normalize n = {};
      n.norm = op.norm, n.channels = map.channels, n.rows = static_cast<uint32_t>(count), n.type = FP32, n.eps = op.eps;
      n.weight = model.tensor<float>(op.norm_weight), n.bias = model.tensor<float>(op.norm_bias);
      n.in = own.rows, n.in_stride = columns, n.out = own.rows, n.out_stride = columns * sizeof(float);
      kernels.normalize(n);
      for (size_t i = 0; i < count;) {  // a tile may reach into the next image
        const size_t image = (first + i) / area, pixel = (first + i) % area, rows = std::min(count - i, area - pixel);
        for (size_t c = 0; c < map.channels; c++) {
          float *to = out + (image * map.channels + c) * area + pixel;
          for (size_t r = 0; r < rows; r++) to[r] = own.rows[(i + r) * columns + c];
        }
        i += rows;
      }
      mark(place, thread, 7, nullptr);
    });
    return;
  }
  share(place, size_t{batch} * map.channels, BLOCK, [&](uint32_t thread, size_t first, size_t count) {
    for (size_t channel = first; channel < first + count; channel++) {
      const size_t image = channel / map.channels, c = channel % map.channels;
      const float *plane = map.data[place.buffer] + c / BLOCK * map.plane() * BLOCK + c % BLOCK;
      for (size_t p = 0; p < area; p++) out[channel * area + p] = plane[map.at(image * area + p) * BLOCK];
    }
    mark(place, thread, 7, nullptr);
  });
}

// One image's mean over its pixels, normalized before or after.
void Session::pool_image(const Operation &op, const Map &map, int buffer, size_t image, const Scratch &own) const {
  const size_t area = size_t{map.height} * map.width, columns = map.columns();
  float *row = own.rows, *vector = vectors[0] + image * head_width;
  Normalize n = {};
  n.norm = op.norm, n.channels = map.channels, n.rows = 1, n.type = FP32, n.eps = op.eps;
  n.weight = model.tensor<float>(op.norm_weight), n.bias = model.tensor<float>(op.norm_bias);
  std::fill(vector, vector + columns, 0.0f);
  for (size_t p = 0; p < area; p++) {
    const auto at = static_cast<uint32_t>(map.at(image * area + p));
    gather(map, buffer, &at, 1, row);
    if (op.flags & NORM_FIRST) {
      n.in = row, n.out = row;
      kernels.normalize(n);
    }
    for (size_t c = 0; c < columns; c++) vector[c] += row[c];
  }
  for (size_t c = 0; c < columns; c++) vector[c] /= static_cast<float>(area);
  if (!(op.flags & NORM_FIRST)) {
    n.in = vector, n.out = vector;
    kernels.normalize(n);
  }
}

void Session::head(const Operation &op, Place &place) {
  const Product *last = op.b.outputs ? &op.b : op.a.outputs ? &op.a : nullptr;
  share(place, batch, 1, [&](uint32_t thread, size_t image, size_t) {
    pool_image(op, maps[3], place.buffer, image, scratch[thread]);
    mark(place, thread, 6, last);
  });
  int current = 0;
  for (const Product *p : {&op.a, &op.b}) {
    if (!p->outputs) continue;
    kernels.scale_rows(reading(*p, vectors[current], head_width, batch, head_inputs), p->inputs);
    mark(place, 0, 6, last);
    const Gemm whole = product(*p, head_inputs, batch);
    share(place, whole.last, whole.last, [&](uint32_t thread, size_t first, size_t count) {
      Gemm g = whole;
      g.first = static_cast<uint32_t>(first), g.last = static_cast<uint32_t>(first + count);
      g.epilogue = to_rows(nullptr, p == &op.a ? op.activation : uint32_t{IDENTITY}, vectors[1 - current],
                           head_width * sizeof(float));
      kernels.gemm(g);
      mark(place, thread, 6, last);
    });
    current = 1 - current;
  }
  for (size_t image = 0; image < batch; image++)
    std::memcpy(outputs[0] + image * model.width, vectors[current] + image * head_width, model.width * sizeof(float));
  mark(place, 0, 6, last);
}

}  // namespace cnxt
