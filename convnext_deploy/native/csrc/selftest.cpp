// A program for the sanitizers, built by the tests: runs a packed network from several threads, or opens a great many
// damaged copies of one. Any crash, leak, race or undefined operation ends it with the sanitizer's own status.
//
//   selftest run FILE BATCH HEIGHT WIDTH THREADS   every path of this CPU, two sessions at once; equal outputs
//   selftest threads FILE HEIGHT WIDTH THREADS ROUNDS   that many threads over one model; outputs of one thread
//   selftest fuzz FILE COUNT SEED                  truncations, every header and record byte, random damage
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
#include "format.h"

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

int run(const std::vector<uint8_t> &file, cnxt_options options) {
  const Bytes bytes = copy_of(file.data(), file.size());
  cnxt_model *model;
  char message[256];
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  std::istringstream names(cnxt_isas());
  for (std::string isa; names >> isa;) {
    options.isa = isa.c_str();
    Runner two[2];
    for (Runner &runner : two)
      if (runner.open(model, options)) return 1;
    std::thread other([&] { for (int i = 0; i < 3; i++) two[1].run(); });
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

// Every thread opens, runs and closes sessions of its own with changing batches and numbers of threads, all over one
// model; then all of them run one session, which takes one at a time and refuses the others.
int threads(const std::vector<uint8_t> &file, uint32_t height, uint32_t width, uint32_t count, uint32_t rounds) {
  constexpr uint32_t BATCHES = 4;
  const Bytes bytes = copy_of(file.data(), file.size());
  cnxt_model *model;
  char message[256];
  if (cnxt_model_open(bytes.data, bytes.size, &model, message, sizeof message)) return std::puts(message), 1;
  std::vector<std::vector<std::vector<float>>> expected;
  for (uint32_t batch = 1; batch <= BATCHES; batch++) {
    Runner alone;
    if (alone.open(model, {batch, height, width, 1, nullptr})) return 1;
    alone.run();
    expected.push_back(alone.outputs);
  }
  std::atomic<uint32_t> runs{0}, wrong{0}, refused{0};
  const auto all = [&](auto body) {
    std::vector<std::thread> started;
    for (uint32_t thread = 0; thread < count; thread++) started.emplace_back(body, thread);
    for (auto &thread : started) thread.join();
  };
  all([&](uint32_t thread) {
    for (uint32_t round = 0; round < rounds; round++) {
      const uint32_t batch = 1 + (thread + round) % BATCHES;
      Runner own;
      if (own.open(model, {batch, height, width, 1 + round % 2, nullptr})) wrong++;
      else own.run(), runs++, wrong += own.outputs != expected[batch - 1];
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
      else runs++, wrong += outputs != expected[1];
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
  std::vector<std::string> isas;

  Fuzzer() {
    std::istringstream names(cnxt_isas());
    for (std::string isa; names >> isa;) isas.push_back(isa);
  }

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
  const uint64_t words[] = {0, 1, 16, 64, 1u << 16, 0x7FFFFFFF, 0xFFFFFFFF, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{63}};
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

}  // namespace

int main(int argc, char **argv) {
  if (argc < 5) return std::fprintf(stderr, "selftest run|threads|fuzz FILE ...\n"), 2;
  std::ifstream stream(argv[2], std::ios::binary);
  const std::vector<uint8_t> file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  const auto number = [&](int i) { return static_cast<uint32_t>(std::strtoul(argv[i], nullptr, 10)); };
  if (std::string(argv[1]) == "run" && argc == 7) return run(file, {number(3), number(4), number(5), number(6), nullptr});
  if (std::string(argv[1]) == "threads" && argc == 7) return threads(file, number(3), number(4), number(5), number(6));
  return fuzz(file, number(3), number(4));
}
