// Resizing as Pillow does it, to the bit: along rows and along columns, one after the other, rounded to bytes in
// between, with weights of 22 bits behind the point. Only the window that is asked for is computed.
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "resample_image.h"

namespace cnxt {
namespace {

struct Filter {
  double reach;  // pixels to either side, of an image that does not shrink
  double (*weight)(double);
};

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1 ? 1 - x : 0;
}

double bicubic(double x) {  // of Keys with a = -1/2
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= M_PI;
  return std::sin(x) / x;
}

double lanczos(double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

constexpr Filter FILTERS[] = {{1, bilinear}, {2, bicubic}, {3, lanczos}};

// Which pixels along one axis make those of the window, and with which weights.
struct Axis {
  uint32_t most = 1;  // weights of a place
  std::vector<uint32_t> first, count;
  std::vector<int32_t> weights;  // [place][most]
  uint32_t begin = 0, end = 0;   // of all pixels that are read
  bool same;                     // nothing to be computed

  Axis(uint32_t size, uint32_t resized, uint32_t start, uint32_t length, const Filter &filter)
      : first(length), count(length), same(size == resized) {
    if (same) {
      begin = start;
      end = start + length;
      return;
    }
    const double scale = static_cast<double>(size) / resized, stretch = scale < 1 ? 1 : scale;
    const double reach = filter.reach * stretch, shrink = 1 / stretch;
    most = static_cast<uint32_t>(std::ceil(reach)) * 2 + 1;
    weights.resize(static_cast<size_t>(length) * most);
    std::vector<double> exact(most);
    for (uint32_t place = 0; place < length; place++) {
      const double centre = (start + place + 0.5) * scale;
      const double low = centre - reach + 0.5, high = centre + reach + 0.5;
      const uint32_t from = low < 0 ? 0 : static_cast<uint32_t>(low);
      const uint32_t to = high > size ? size : static_cast<uint32_t>(high);
      double sum = 0;
      for (uint32_t i = 0; i < to - from; i++) sum += exact[i] = filter.weight((i + from - centre + 0.5) * shrink);
      for (uint32_t i = 0; i < to - from; i++) {
        const double part = (sum != 0 ? exact[i] / sum : exact[i]) * (1 << WEIGHT_BITS);
        weights[static_cast<size_t>(place) * most + i] = static_cast<int32_t>(part < 0 ? part - 0.5 : part + 0.5);
      }
      first[place] = from;
      count[place] = to - from;
      if (place == 0 || from < begin) begin = from;
      if (to > end) end = to;
    }
  }

  const int32_t *of(uint32_t place) const { return &weights[static_cast<size_t>(place) * most]; }
};

// An image whose pixels have BYTES bytes. Each is kept in one byte where it is grey or becomes it, and else in four, of
// which the last says nothing.
template <uint32_t BYTES, bool GREY>
struct Source {
  static constexpr uint32_t KEPT = BYTES == 1 || GREY ? 1 : 4;

  const uint8_t *pixels;
  size_t stride;
  uint32_t height, width;

  static void keep(const uint8_t *from, uint8_t *to) {
    if constexpr (BYTES == 1) *to = *from;
    else if constexpr (GREY)
      *to = static_cast<uint8_t>((19595U * from[0] + 38470U * from[1] + 7471U * from[2] + (1U << 15)) >> 16);
    else std::memcpy(to, from, 4);
  }

  // Pixels [begin, end) of a row to places that are `apart` bytes from each other.
  void take(uint32_t row, uint32_t begin, uint32_t end, size_t apart, uint8_t *to) const {
    const uint8_t *from = pixels + row * stride + static_cast<size_t>(begin) * BYTES;
    // A pixel of three bytes is read with the byte behind it, which the last one of the image has not.
    const bool spare = BYTES == 3 && !GREY && row == height - 1 && end == width;
    for (uint32_t count = end - begin - spare; count > 0; count--, from += BYTES, to += apart) keep(from, to);
    if (spare) std::memcpy(to, from, 3);
  }
};

// Rows of pixels, each of whole lines.
struct Rows {
  size_t pitch;
  std::unique_ptr<uint8_t[]> pixels;

  Rows(uint32_t rows, size_t bytes) : pitch((bytes + LINE - 1) / LINE * LINE), pixels(new uint8_t[rows * pitch]()) {}
};

template <class S>
Rows copied(const S &source, const Axis &across, const Axis &down) {
  Rows made(down.end - down.begin, static_cast<size_t>(across.end - across.begin) * S::KEPT);
  for (uint32_t row = down.begin; row < down.end; row++)
    source.take(row, across.begin, across.end, S::KEPT, &made.pixels[(row - down.begin) * made.pitch]);
  return made;
}

// Rows [begin, end) of the source, `left` columns of which are not there, resized along themselves.
template <class S>
Rows along_rows(const Kernels &kernels, const S &source, const Axis &across, uint32_t begin, uint32_t end,
                uint32_t left) {
  constexpr uint32_t KEPT = S::KEPT, STRIP = LINE / KEPT;
  const auto width = static_cast<uint32_t>(across.first.size());
  Rows made(end - begin, static_cast<size_t>(width) * KEPT);
  // A strip of rows at a time. Of each column there is a line, its pixels of these rows one by one.
  const std::unique_ptr<uint8_t[]> lines(new uint8_t[static_cast<size_t>(across.end - across.begin) * LINE]());
  alignas(64) uint8_t line[LINE];
  for (uint32_t row = begin; row < end; row += STRIP) {
    uint8_t *to = &made.pixels[(row - begin) * made.pitch];
    const uint32_t rows = end - row < STRIP ? end - row : STRIP;
    for (uint32_t r = 0; r < rows; r++)
      source.take(row + r, across.begin - left, across.end - left, LINE, &lines[r * KEPT]);
    for (uint32_t x = 0; x < width; x++) {
      kernels.weigh(&lines[static_cast<size_t>(across.first[x] - across.begin) * LINE], LINE, across.of(x),
                    across.count[x], line);
      for (uint32_t r = 0; r < rows; r++) std::memcpy(to + r * made.pitch + x * KEPT, line + r * KEPT, KEPT);
    }
  }
  return made;
}

// Rows from `down.begin` on, resized along their columns.
Rows along_columns(const Kernels &kernels, const Rows &rows, const Axis &down) {
  const auto height = static_cast<uint32_t>(down.first.size());
  Rows made(height, rows.pitch);
  for (uint32_t y = 0; y < height; y++)
    for (size_t start = 0; start < rows.pitch; start += LINE)
      kernels.weigh(&rows.pixels[(down.first[y] - down.begin) * rows.pitch + start], rows.pitch, down.of(y),
                    down.count[y], &made.pixels[y * made.pitch + start]);
  return made;
}

template <uint32_t BYTES, bool GREY>
Rows resized(const Kernels &kernels, const cnxt_resize &asked, const uint8_t *pixels, const Axis &across,
             const Axis &down) {
  using S = Source<BYTES, GREY>;
  const S source{pixels, asked.row_bytes, asked.source_height, asked.source_width};
  if (!across.same && !down.same && asked.columns_first) {
    const Rows made = along_columns(kernels, copied(source, across, down), down);
    const Source<S::KEPT, false> rest{made.pixels.get(), made.pitch, asked.rows, across.end - across.begin};
    return along_rows(kernels, rest, across, 0, asked.rows, across.begin);
  }
  Rows rows = across.same ? copied(source, across, down) : along_rows(kernels, source, across, down.begin, down.end, 0);
  return down.same ? std::move(rows) : along_columns(kernels, rows, down);
}

}  // namespace

void resample(const Kernels &kernels, const cnxt_resize &asked, const uint8_t *pixels, uint8_t *out) {
  const Filter &filter = FILTERS[asked.filter];
  const Axis across(asked.source_width, asked.width, asked.left, asked.columns, filter);
  const Axis down(asked.source_height, asked.height, asked.top, asked.rows, filter);
  const auto make = asked.pixel_bytes == 1                 ? resized<1, false>
                    : asked.pixel_bytes == 3 && asked.grey ? resized<3, true>
                    : asked.pixel_bytes == 3               ? resized<3, false>
                    : asked.grey                           ? resized<4, true>
                                                           : resized<4, false>;
  const Rows made = make(kernels, asked, pixels, across, down);
  const size_t plane = static_cast<size_t>(asked.rows) * asked.columns;
  for (uint32_t y = 0; y < asked.rows; y++, out += asked.columns) {
    const uint8_t *line = &made.pixels[y * made.pitch];
    if (asked.pixel_bytes == 1 || asked.grey) {
      std::memcpy(out, line, asked.columns);
      continue;
    }
    for (uint32_t channel = 0; channel < 3; channel++)
      for (uint32_t x = 0; x < asked.columns; x++) {  // whole words, of which compilers make vectors
        uint32_t pixel;
        std::memcpy(&pixel, line + x * sizeof pixel, sizeof pixel);
        out[channel * plane + x] = static_cast<uint8_t>(pixel >> 8 * channel);
      }
  }
}

}  // namespace cnxt
