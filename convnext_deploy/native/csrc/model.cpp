#include "model.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace cnxt {
namespace {

static_assert(std::endian::native == std::endian::little, "packed networks are little endian and read in place");

class Reader {
 public:
  Reader(Model &model, size_t index) : model(model), index(index), op(model.operations[index]) {}

  [[noreturn]] void fail(const std::string &what) const {
    throw Failure{CNXT_BAD_FILE, "operation " + std::to_string(index) + ": " + what};
  }

  void require(bool holds, const char *what) const {
    if (!holds) fail(what);
  }

  // A tensor of that many bytes, inside the file and after the records. No sum here can overflow: sizes are below
  // 2^53, and an offset is compared before anything is added to it.
  void tensor(uint64_t offset, uint64_t size, const char *name, bool optional = false) const {
    if (offset == 0 && optional) return;
    const uint64_t records = sizeof(Header) + model.operations.size() * sizeof(Operation);
    if (offset % ALIGNMENT) fail(std::string(name) + " is not aligned to 64 bytes");
    if (offset < records || offset > model.bytes || size > model.bytes - offset)
      fail(std::string(name) + " is outside the file");
  }

  void product(const Product &p, uint64_t inputs, uint64_t outputs, const char *name) const {
    if (p.type >= TYPES) fail(std::string(name) + " has unknown type " + std::to_string(p.type));
    if (p.inputs != inputs || p.outputs != outputs || inputs == 0 || inputs > MAX_CHANNELS || outputs > MAX_CHANNELS)
      fail(std::string(name) + " is " + std::to_string(p.inputs) + " to " + std::to_string(p.outputs) + ", expected " +
           std::to_string(inputs) + " to " + std::to_string(outputs));
    const uint64_t wide = padded(outputs);
    tensor(p.weights, wide * inputs * bytes_of(p.type), name);
    tensor(p.bias, wide * 4, name);
    if (p.type != INT8) return require(!p.scale && !p.offset, "scales of a product that is not int8");
    tensor(p.scale, wide * 4, name);
    tensor(p.offset, wide * 4, name);
    require(p.zero_point >= 0 && p.zero_point <= 255, "a zero point is not a code");
    require(std::isfinite(p.step) && p.step >= 1e-30f && p.step <= 1e30f && std::isfinite(p.shift),
            "a step is no step");
  }

  void norm(bool present, uint64_t channels) const {
    require(present ? op.norm > NO_NORM && op.norm < NORMS : op.norm == NO_NORM, "unknown norm");
    require(std::isfinite(op.eps) && op.eps >= 0, "a norm's epsilon is negative or not finite");
    tensor(op.norm_weight, padded(channels) * 4, "norm weight", true);
    tensor(op.norm_bias, padded(channels) * 4, "norm bias", true);
  }

  // What a kind of operation does not use is 0, so that nothing can point anywhere unchecked.
  void unused(bool block_tensors, bool mean, bool second) const {
    require(!block_tensors || !(op.dw_weight | op.dw_bias | op.grn_weight | op.grn_bias), "tensors of another kind");
    require(!mean || !op.input_mean, "a mean of no pixels");
    require(!second || blank(op.b), "a product of another kind");
  }

  static bool blank(const Product &p) {
    static constexpr Product none = {};
    return std::memcmp(&p, &none, sizeof none) == 0;  // NOLINT(bugprone-suspicious-memory-comparison): bits, -0.0 too
  }

  Model &model;
  const size_t index;
  const Operation &op;
};

bool channels_are_valid(uint64_t channels) { return channels >= 1 && channels <= MAX_CHANNELS; }

}  // namespace

void Orders::find(const Kernels &kernels, const uint8_t *data, const std::vector<Operation> &operations) {
  if (!kernels.find_order) return;
  std::call_once(once, [&] {
    std::map<Place, std::vector<uint16_t>> made;
    for (const Operation &op : operations)
      for (const Product *p : {&op.a, &op.b}) {
        if (p->type != INT8) continue;
        const uint32_t steps = p->inputs / 4, pairs = steps / 2;  // inputs are a multiple of 16
        const size_t groups = padded(p->outputs) / BLOCK;
        std::vector<uint16_t> &order = made[{p->weights, p->inputs}];
        if (order.size() < groups * order_length(steps)) order.resize(groups * order_length(steps));
        for (size_t group = 0; group < groups; group++)
          kernels.find_order(data + p->weights + group * steps * 64, pairs, &order[group * order_length(steps)]);
      }
    found = std::move(made);
  });
}

const uint16_t *Orders::of(const Product &p) const {
  const auto at = p.type == INT8 ? found.find({p.weights, p.inputs}) : found.end();
  return at == found.end() ? nullptr : at->second.data();
}

Model read_model(const void *data, size_t bytes) {
  Model model;
  model.data = static_cast<const uint8_t *>(data), model.bytes = bytes;
  const auto fail = [](const std::string &what) { throw Failure{CNXT_BAD_FILE, what}; };
  if (reinterpret_cast<uintptr_t>(data) % ALIGNMENT)
    throw Failure{CNXT_BAD_ARGUMENT, "the data is not aligned to 64 bytes"};
  if (bytes < sizeof(Header)) fail("the file is shorter than its header");
  model.header = reinterpret_cast<const Header *>(data);
  const Header &header = *model.header;
  if (std::memcmp(header.magic, MAGIC, sizeof MAGIC) != 0) fail("not a packed network: wrong first 8 bytes");
  if (header.version != VERSION)
    fail("version " + std::to_string(header.version) + "; this library reads version " + std::to_string(VERSION));
  if (header.bytes != bytes)
    fail("the file has " + std::to_string(bytes) + " bytes, its header says " + std::to_string(header.bytes));
  if (header.operations == 0 || header.operations > MAX_OPERATIONS ||
      header.operations > (bytes - sizeof(Header)) / sizeof(Operation))
    fail("the file cannot hold " + std::to_string(header.operations) + " operations");
  if (header.input >= INPUTS) fail("unknown input " + std::to_string(header.input));
  if (header.in_chans < 1 || header.in_chans > 4096) fail(std::to_string(header.in_chans) + " input channels");
  for (const uint32_t word : header.reserved)
    if (word) fail("a reserved field is not 0");
  model.operations.resize(header.operations);
  std::memcpy(model.operations.data(), model.data + sizeof(Header), header.operations * sizeof(Operation));

  // The order of operations: a stem, then four stages with a downsample between them, then a head; or as many stages as
  // the last map needs, each with its map or without one.
  int stage = -1, convolutions = 0;
  uint32_t channels = header.in_chans;
  bool closed = false, patched = false;
  for (size_t index = 0; index < model.operations.size(); index++) {
    const Reader r(model, index);
    const Operation &op = r.op;
    r.require(op.kind < KINDS, "unknown kind");
    r.require(!closed, "it follows the head");
    r.require(channels_are_valid(op.channels), "channels are 0 or above 65536");
    if (op.kind != FEATURES && op.channels != channels)
      r.fail("it takes " + std::to_string(op.channels) + " channels and is given " + std::to_string(channels));
    r.require(op.activation < ACTIVATIONS, "unknown activation");
    r.require((op.flags & ~uint32_t{NORM_FIRST}) == 0, "unknown flags");
    switch (op.kind) {
      case STEM_PATCH:
      case STEM_CONV: {
        const bool patch = op.kind == STEM_PATCH;
        r.require(index == 0 || (!patch && convolutions == 1), "a stem is one patch convolution or two others");
        r.require(op.kernel == (patch ? 4 : 3), "a stem's kernel is 4 or, overlapping, 3");
        const uint64_t taps = patch ? 16 : 9;
        r.require(channels_are_valid(op.a.outputs), "outputs are 0 or above 65536");
        r.product(op.a, padded(taps * channels), op.a.outputs, "stem");
        const bool last = patch || convolutions == 1;
        r.norm(last, op.a.outputs);  // over the outputs
        r.unused(true, false, true);
        r.tensor(op.input_mean, padded(channels) * 4, "input mean", true);
        r.require(op.input_mean == 0 || (!patch && index == 0), "only the pixels have a mean");
        channels = op.a.outputs;
        convolutions++;
        patched |= patch;
        if (last) model.channels[stage = 0] = channels;
        break;
      }
      case BLOCK_OP: {
        r.require(stage >= 0, "a block before the stem");
        r.require(op.kernel % 2 == 1 && op.kernel <= MAX_KERNEL, "a depthwise kernel is odd and at most 31");
        const uint64_t wide = padded(channels), hidden = 4 * uint64_t{channels};
        r.require(hidden <= MAX_CHANNELS, "hidden channels above 65536");
        r.norm(true, channels);
        r.unused(false, true, false);
        r.tensor(op.dw_weight, wide * op.kernel * op.kernel * 4, "depthwise weight");
        r.tensor(op.dw_bias, wide * 4, "depthwise bias");
        r.tensor(op.grn_weight, padded(hidden) * 4, "GRN weight", true);
        r.tensor(op.grn_bias, padded(hidden) * 4, "GRN bias", true);
        r.require(op.grn_weight || !op.grn_bias, "a GRN bias without its weight");
        r.require(std::isfinite(op.grn_eps) && op.grn_eps >= 0, "GRN's epsilon is negative or not finite");
        r.product(op.a, wide, hidden, "expand");
        r.product(op.b, padded(hidden), channels, "project");
        if (op.kernel / 2 > model.margin[stage]) model.margin[stage] = op.kernel / 2;
        break;
      }
      case DOWNSAMPLE:
        r.require(stage >= 0 && stage < 3, "a downsample that is not between two stages");
        r.norm(true, channels);
        r.unused(true, true, true);
        r.require(channels_are_valid(op.a.outputs), "outputs are 0 or above 65536");
        r.product(op.a, 4 * padded(channels), op.a.outputs, "downsample");
        channels = op.a.outputs;
        model.channels[++stage] = channels;
        break;
      case FEATURES:
        r.require(stage >= 0 && !(model.maps >> stage & 1) && op.channels == channels,
                  "a map that is not the stage's only one");
        r.norm(op.norm != NO_NORM, channels);
        r.require(op.norm != NO_NORM || !(op.norm_weight | op.norm_bias), "tensors of no norm");
        r.unused(true, true, true);
        r.require(r.blank(op.a), "a product of another kind");
        model.maps |= uint32_t{1} << stage;
        break;
      case HEAD: {
        r.require(stage == 3 && !model.maps, "a head that does not follow the last stage");
        r.norm(true, channels);
        r.unused(true, true, false);
        model.width = channels;
        for (const Product *p : {&op.a, &op.b})
          if (p->outputs) {
            r.product(*p, padded(model.width), p->outputs, "head");
            model.width = p->outputs;
          } else {
            r.require(r.blank(*p), "half of a product");
          }
        closed = true;
        break;
      }
    }
  }
  if (!closed && model.operations.back().kind != FEATURES)
    fail("the file ends before the head, or before the last stage's map");
  if (!patched && convolutions != 2) fail("a stem is one patch convolution or two others");
  return model;
}

std::array<uint32_t, 4> map_sides(const Model &model, uint32_t side) {
  const bool overlaps = model.operations.front().kind == STEM_CONV;
  const uint32_t first = overlaps ? static_cast<uint32_t>(half_padded(half_padded(side))) : side / 4;
  return {first, first / 2, first / 4, first / 8};
}

cnxt_info describe(const Model &model, uint32_t height, uint32_t width) {
  cnxt_info info = {};
  info.input = model.header->input;
  info.in_chans = model.header->in_chans;
  info.outputs = model.maps ? 4 : 1;
  for (int s = 0; s < 4; s++)
    info.channels[s] = model.maps >> s & 1 ? model.channels[s] : !model.maps && s == 0 ? model.width : 0;
  info.is_map = model.maps != 0;
  info.operations = static_cast<uint32_t>(model.operations.size());
  const auto heights = map_sides(model, height), widths = map_sides(model, width);
  for (int s = 0; s < 4; s++)
    info.heights[s] = model.maps ? heights[s] : 0, info.widths[s] = model.maps ? widths[s] : 0;
  uint64_t pixels = 0;
  int stage = 0;
  const auto count = [&](const Product &p, uint64_t inputs) {
    info.products[p.type]++;
    info.multiply_accumulates[p.type] += pixels * inputs * p.outputs;
  };
  for (const Operation &op : model.operations) {
    const uint64_t channels = op.channels;
    switch (op.kind) {
      case STEM_PATCH: pixels = uint64_t{heights[0]} * widths[0], count(op.a, 16 * channels); break;
      case STEM_CONV:
        pixels = pixels ? uint64_t{heights[0]} * widths[0] : half_padded(height) * half_padded(width);
        count(op.a, 9 * channels);
        break;
      case DOWNSAMPLE: stage++, pixels = uint64_t{heights[stage]} * widths[stage], count(op.a, 4 * channels); break;
      case BLOCK_OP:
        info.multiply_accumulates[FP32] += pixels * channels * op.kernel * op.kernel;
        count(op.a, channels), count(op.b, 4 * channels);
        break;
      case HEAD:
        pixels = 1;
        if (op.a.outputs) count(op.a, channels);
        if (op.b.outputs) count(op.b, op.a.outputs ? op.a.outputs : channels);
        break;
    }
  }
  return info;
}

}  // namespace cnxt
