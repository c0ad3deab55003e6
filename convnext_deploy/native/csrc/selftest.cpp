// A program for the sanitizers and for emulated CPUs, built by the tests: runs a packed network from several threads,
// opens a great many damaged copies of one, or compares products with those of integers and float64. Any crash, leak,
// race or undefined operation ends it with the sanitizer's own status.
//
//   selftest run FILE BATCH HEIGHT WIDTH THREADS   every path of this CPU, two sessions at once; equal outputs
//   selftest threads FILE HEIGHT WIDTH THREADS ROUNDS   that many threads over one model; outputs of one thread
//   selftest fuzz FILE COUNT SEED                  truncations, every header and record byte, random damage
//   selftest products COUNT SEED                   every path of this CPU, that many products of each type
//   selftest outputs FILE IMAGES ISA BATCH HEIGHT WIDTH THREADS   of a batch of images in a file, to stdout as floats
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "convnext_deploy.h"
#include "kernels.h"

extern "C" int cnxt_test_kernel(const char *isa, const char *kernel, const void *arguments, uint32_t columns);

namespace {

struct Bytes {  // 64-byte aligned, and exactly as long as the file: a sanitizer sees one byte too far
  uint8_t *data;
  size_t size;
};

Bytes copy_of(const uint8_t *from, size_t size) {
  auto *data = static_cast<uint8_t *>(std::aligned_alloc(64, (size + 63) / 64 * 64));
  if (size) std::memcpy(data, from, size);
  return {data, size};
}

struct Runner {
  cnxt_model *model = nullptr;
  cnxt_session *session = nullptr;
  std::vector<float> input;
  std::vector<std::vector<float>> outputs;
  std::vector<float *> pointers;

  int open(const cnxt_model *opened, cnxt_options options) {
    char message[256];
    const int code = cnxt_session_open(opened, &options, &session, message, sizeof message);
    if (code) return code;
    cnxt_info info;
    cnxt_session_info(session, &info);
    input.assign(size_t{options.batch} * options.height * options.width * info.in_chans, 0);
    auto *bytes = reinterpret_cast<uint8_t *>(input.data());
    for (size_t i = 0; i < input.size(); i++) {
      if (info.input) bytes[i] = static_cast<uint8_t>(i * 37 % 251);
      else input[i] = static_cast<float>(i * 37 % 251) / 128 - 1;
    }
    for (uint32_t i = 0; i < info.outputs; i++) {
      const size_t side = info.is_map ? size_t{info.heights[i]} * info.widths[i] : 1;
      outputs.emplace_back(options.batch * info.channels[i] * side);
    }
    for (auto &output : outputs) pointers.push_back(output.data());
    return CNXT_OK;
  }

  void run() { cnxt_session_run(session, input.data(), pointers.data()); }
  ~Runner() { cnxt_session_close(session); }
};

std::vector<std::string> all_isas() {  // the best first
  std::istringstream names(cnxt_isas());
  std::vector<std::string> isas;
  for (std::string isa; names >> isa;) isas.push_back(isa);
  return isas;
}

int run(const std::vector<uint8_t> &file, cnxt_options options) {
  const Bytes bytes = copy_of(file.data(), file.size());
  cnxt_model *model;
  char message[256];
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  for (const std::string &isa : all_isas()) {
    options.isa = isa.c_str();
    Runner two[2];
    for (Runner &runner : two)
      if (runner.open(model, options)) return 1;
    std::thread other([&] {
      for (int i = 0; i < 3; i++) two[1].run();
    });
    for (int i = 0; i < 3; i++) two[0].run();
    other.join();
    if (two[0].outputs != two[1].outputs) return std::printf("%s: the same inference twice differs\n", isa.c_str()), 1;
    std::vector<cnxt_timing> timings(4096);
    size_t count;
    cnxt_session_profile(two[0].session, two[0].input.data(), two[0].pointers.data(), timings.data(), timings.size(),
                         &count);
    std::printf("%s: %zu timed parts\n", isa.c_str(), count);
  }
  cnxt_model_close(model);
  std::free(bytes.data);
  return 0;
}

// Every thread opens, runs and closes sessions of its own with changing batches, numbers of threads and paths, all over
// one model; then all of them run one session, which takes one at a time and refuses the others.
int threads(const std::vector<uint8_t> &file, uint32_t height, uint32_t width, uint32_t count, uint32_t rounds) {
  constexpr uint32_t BATCHES = 4;
  const Bytes bytes = copy_of(file.data(), file.size());
  cnxt_model *model;
  char message[256];
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  const std::vector<std::string> isas = all_isas();
  std::vector<std::vector<std::vector<std::vector<float>>>> expected(isas.size());
  for (size_t path = 0; path < isas.size(); path++)
    for (uint32_t batch = 1; batch <= BATCHES; batch++) {
      Runner alone;
      if (alone.open(model, {batch, height, width, 1, isas[path].c_str()})) return 1;
      alone.run();
      expected[path].push_back(alone.outputs);
    }
  cnxt_model_close(model);  // what its first session finds is found again below, by several threads at once
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  std::atomic<uint32_t> runs{0}, wrong{0}, refused{0};
  const auto all = [&](auto body) {
    std::vector<std::thread> started;
    for (uint32_t thread = 0; thread < count; thread++) started.emplace_back(body, thread);
    for (auto &thread : started) thread.join();
  };
  all([&](uint32_t thread) {
    for (uint32_t round = 0; round < rounds; round++) {
      const uint32_t batch = 1 + (thread + round) % BATCHES;
      const size_t path = isas.size() - 1 - (thread / 2 + round) % isas.size();
      Runner own;
      if (own.open(model, {batch, height, width, 1 + round % 2, isas[path].c_str()})) wrong++;
      else own.run(), runs++, wrong += own.outputs != expected[path][batch - 1];
    }
  });
  Runner shared;
  if (shared.open(model, {2, height, width, 2, nullptr})) return 1;
  all([&](uint32_t) {
    auto outputs = shared.outputs;
    std::vector<float *> pointers;
    for (auto &output : outputs) pointers.push_back(output.data());
    for (uint32_t round = 0; round < rounds; round++)
      if (cnxt_session_run(shared.session, shared.input.data(), pointers.data()) == CNXT_BUSY) refused++;
      else runs++, wrong += outputs != expected[0][1];
  });
  std::printf("%u runs, %u wrong, %u refused\n", runs.load(), wrong.load(), refused.load());
  cnxt_session_close(shared.session);
  shared.session = nullptr;
  cnxt_model_close(model);
  std::free(bytes.data);
  return wrong != 0;
}

struct Fuzzer {
  size_t opened = 0, refused = 0, ran = 0;
  const std::vector<std::string> isas = all_isas();

  void attempt(const uint8_t *data, size_t size) {
    cnxt_model *model;
    if (cnxt_model_open(data, size, &model, nullptr, 0)) {
      refused++;
      return;
    }
    if (opened++ % 64 == 0) {  // what is accepted must also run
      Runner runner;
      const char *isa = isas[ran % isas.size()].c_str();
      if (runner.open(model, {1, 32, 32, 1, isa}) == CNXT_OK) runner.run(), ran++;
    }
    cnxt_model_close(model);
  }
};

int fuzz(const std::vector<uint8_t> &file, size_t count, unsigned seed) {
  Fuzzer fuzzer;
  const auto *header = reinterpret_cast<const cnxt::Header *>(file.data());
  const size_t records = sizeof(cnxt::Header) + header->operations * sizeof(cnxt::Operation);
  // Truncated, with a header that agrees: at every length up to the tensors, then at every 64 bytes and around them.
  for (size_t size = 0; size < file.size(); size += size < records + 64 ? 1 : 21) {
    const Bytes bytes = copy_of(file.data(), size);
    if (size >= sizeof(cnxt::Header)) reinterpret_cast<cnxt::Header *>(bytes.data)->bytes = size;
    fuzzer.attempt(bytes.data, size);
    std::free(bytes.data);
  }
  const size_t truncated = fuzzer.refused;
  if (fuzzer.opened) return std::printf("a truncated file was opened\n"), 1;
  const Bytes bytes = copy_of(file.data(), file.size());
  // Every byte of the header and the records with each of these values.
  const uint8_t values[] = {0x00, 0x01, 0x10, 0x40, 0x7F, 0x80, 0xFF};
  for (size_t at = 0; at < records; at++)
    for (const uint8_t value : values) {
      const uint8_t before = bytes.data[at];
      bytes.data[at] = value;
      fuzzer.attempt(bytes.data, bytes.size);
      bytes.data[at] = before;
    }
  std::mt19937 random(seed);
  const uint64_t words[] = {
      0, 1, 16, 64, 1u << 16, 0x7FFFFFFF, 0xFFFFFFFF, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{63}};
  while (fuzzer.opened + fuzzer.refused < count) {  // one to four fields at once
    std::vector<std::pair<size_t, uint8_t>> undo;
    for (unsigned fields = 1 + random() % 4; fields; fields--) {
      const size_t width = size_t{1} << random() % 4;
      const size_t at = random() % (records - width) / width * width;
      uint64_t value = random() % 2 ? words[random() % std::size(words)] : random();
      if (random() % 4 == 0) {  // another field's value: valid somewhere else
        std::memcpy(&value, bytes.data + random() % (records - 8) / width * width, 8);
      }
      for (size_t i = 0; i < width; i++) {
        undo.emplace_back(at + i, bytes.data[at + i]);
        bytes.data[at + i] = static_cast<uint8_t>(value >> (8 * i));
      }
    }
    fuzzer.attempt(bytes.data, bytes.size);
    for (auto i = undo.rbegin(); i != undo.rend(); ++i) bytes.data[i->first] = i->second;
  }
  if (!std::equal(file.begin(), file.end(), bytes.data)) return std::puts("the driver did not restore its bytes"), 1;
  std::free(bytes.data);
  for (size_t i = 0; i < 2000; i++) {  // no file at all
    std::vector<uint8_t> noise(random() % 4096);
    for (uint8_t &byte : noise) byte = static_cast<uint8_t>(random());
    const Bytes made = copy_of(noise.data(), noise.size());
    if (i % 2 && made.size >= 16) std::memcpy(made.data, file.data(), 16);
    fuzzer.attempt(made.data, made.size);
    std::free(made.data);
  }
  std::printf("%zu inputs: %zu truncated, %zu refused in all, %zu opened, %zu of them run\n",
              fuzzer.opened + fuzzer.refused, truncated, fuzzer.refused, fuzzer.opened, fuzzer.ran);
  return 0;
}

float of_bf16(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Operands of one product, and how they read one by one.
struct Operands {
  uint32_t type, rows, inputs, outputs;
  size_t stride;                    // bytes between rows of a
  std::vector<uint8_t> a, weights;  // rows; [outputs / 16][steps][16][4 bytes]

  size_t width() const { return cnxt::bytes_of(type); }
  size_t a_at(size_t row, size_t k) const { return row * stride + k * width(); }
  size_t weight_at(size_t n, size_t k) const {
    const size_t values = 4 / width(), steps = inputs / values;
    return ((n / 16 * steps + k / values) * 16 + n % 16) * 4 + k % values * width();
  }
  double value(const std::vector<uint8_t> &from, size_t at, bool is_weight) const {
    if (type == cnxt::INT8) return is_weight ? static_cast<int8_t>(from[at]) : from[at];
    if (type == cnxt::BF16) {
      uint16_t bits;
      std::memcpy(&bits, &from[at], sizeof bits);
      return of_bf16(bits);
    }
    float value;
    std::memcpy(&value, &from[at], sizeof value);
    return value;
  }

  // Codes of the whole range, the outermost among them often; other types hold numbers of bf16 near 1.
  void fill(std::vector<uint8_t> &bytes, std::mt19937 &random, bool extreme) const {
    for (size_t at = 0; at < bytes.size(); at += width()) {
      if (type == cnxt::INT8) {
        const uint8_t ends[] = {0x00, 0x7F, 0x80, 0xFF};
        bytes[at] = extreme ? ends[random() % 4] : static_cast<uint8_t>(random());
        continue;
      }
      const uint32_t word = (random() & 0x80FF0000u) | 0x3F000000u;  // the sign, an exponent's last bit, 7 others
      std::memcpy(
          &bytes[at],
          type == cnxt::BF16 ? reinterpret_cast<const char *>(&word) + 2 : reinterpret_cast<const char *>(&word),
          width());
    }
  }
};

// Sums of codes have to be those of integers, and the others within what float32 rounds of the terms' sizes.
bool multiplied_well(const char *isa, uint32_t type, std::mt19937 &random) {
  const auto up_to = [&](uint32_t most) { return static_cast<uint32_t>(1 + random() % most); };
  Operands o = {type, up_to(40), 16 * up_to(24), 16 * up_to(4), 0, {}, {}};
  o.stride = o.inputs * o.width() + 16 * (random() % 3);
  o.a.resize(o.rows * o.stride), o.weights.resize(o.inputs * o.width() * o.outputs);
  o.fill(o.a, random, random() % 3 == 0), o.fill(o.weights, random, random() % 3 == 0);
  const auto zero_point = static_cast<int32_t>(random() % 256);
  std::vector<float> bias(o.outputs), scale(o.outputs, 1), out(o.rows * o.outputs);
  std::vector<int32_t> offset(o.outputs);
  for (size_t n = 0; n < o.outputs; n++) {
    if (type != cnxt::INT8) bias[n] = static_cast<float>(n);
    for (size_t k = 0; k < o.inputs && type == cnxt::INT8; k++)
      offset[n] -= zero_point * static_cast<int8_t>(o.weights[o.weight_at(n, k)]);
  }
  cnxt::Gemm g = {};
  g.type = type, g.rows = o.rows, g.last = o.outputs / 16, g.a = o.a.data(), g.a_stride = o.stride;
  g.steps = static_cast<uint32_t>(o.inputs * o.width() / 4);
  g.weights = o.weights.data(), g.bias = bias.data(), g.scale = scale.data(), g.offset = offset.data();
  g.epilogue.type = cnxt::FP32, g.epilogue.exact = true;
  g.epilogue.out = out.data(), g.epilogue.stride = o.outputs * sizeof(float);
  if (cnxt_test_kernel(isa, "gemm", &g, 0)) return false;
  for (size_t row = 0; row < o.rows; row++)
    for (size_t n = 0; n < o.outputs; n++) {
      double sum = bias[n], size = std::abs(sum);
      for (size_t k = 0; k < o.inputs; k++) {
        const double code = o.value(o.a, o.a_at(row, k), false) - (type == cnxt::INT8 ? zero_point : 0);
        const double term = code * o.value(o.weights, o.weight_at(n, k), true);
        sum += term, size += std::abs(term);
      }
      const double found = out[row * o.outputs + n], limit = type == cnxt::INT8 ? 0 : 1.2e-7 * size;
      if (std::abs(found - static_cast<float>(sum)) > limit)
        return std::printf("%s, type %u, %u x %u x %u: %g at (%zu, %zu), expected %g\n", isa, type, o.rows, o.inputs,
                           o.outputs, found, row, n, sum),
               false;
    }
  return true;
}

int products(uint32_t count, uint32_t seed) {
  for (const std::string &isa : all_isas()) {
    std::mt19937 random(seed);
    for (uint32_t i = 0; i < count; i++)
      for (uint32_t type = 0; type < cnxt::TYPES; type++)
        if (!multiplied_well(isa.c_str(), type, random)) return 1;
    std::printf("%s: %u products\n", isa.c_str(), 3 * count);
  }
  return 0;
}

int outputs(const std::vector<uint8_t> &file, const std::vector<uint8_t> &images, cnxt_options options) {
  const Bytes bytes = copy_of(file.data(), file.size());
  cnxt_model *model;
  char message[256];
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  Runner runner;
  if (const int code = runner.open(model, options)) return std::fprintf(stderr, "code %d\n", code), 1;
  if (images.size() > runner.input.size() * sizeof(float)) return std::fputs("more images than a batch\n", stderr), 1;
  std::memcpy(runner.input.data(), images.data(), images.size());
  runner.run();
  for (const auto &output : runner.outputs) std::fwrite(output.data(), sizeof(float), output.size(), stdout);
  cnxt_model_close(model);
  std::free(bytes.data);
  return 0;
}

std::vector<uint8_t> content_of(const char *path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

}  // namespace

int main(int argc, char **argv) {
  if (argc < 4) return std::fprintf(stderr, "selftest run|threads|fuzz|outputs FILE ..., or products ...\n"), 2;
  const auto number = [&](int i) { return static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)); };
  const std::string what = argv[1];
  if (what == "products") return products(number(2), number(3));
  const std::vector<uint8_t> file = content_of(argv[2]);
  if (what == "outputs" && argc == 9)
    return outputs(file, content_of(argv[3]), {number(5), number(6), number(7), number(8), argv[4]});
  if (what == "run" && argc == 7) return run(file, {number(3), number(4), number(5), number(6), nullptr});
  if (what == "threads" && argc == 7) return threads(file, number(3), number(4), number(5), number(6));
  return argc == 5 ? fuzz(file, number(3), number(4)) : 2;
}
