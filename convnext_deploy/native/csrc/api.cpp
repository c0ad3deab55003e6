// The C functions: arguments are checked, and no exception passes.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>

#include <sys/mman.h>
#include <sys/stat.h>

#include "convnext_deploy.h"
#include "resample_image.h"
#include "session.h"

struct cnxt_model {
  cnxt::Model model;
};

struct cnxt_session {
  cnxt::Session session;
  std::atomic_flag busy;
};

namespace {

void say(char *message, size_t size, const char *line) {
  if (message && size) std::snprintf(message, size, "%s", line);
}

template <class F>
int guarded(char *message, size_t size, F body) noexcept {
  say(message, size, "");
  try {
    body();
    return CNXT_OK;
  } catch (const cnxt::Failure &failure) {
    say(message, size, failure.line.c_str());
    return failure.code;
  } catch (const std::bad_alloc &) {
    say(message, size, "not enough memory");
    return CNXT_NO_MEMORY;
  } catch (const std::system_error &error) {
    say(message, size, error.what());
    return CNXT_NO_THREADS;
  } catch (const std::exception &error) {
    say(message, size, error.what());
    return CNXT_NO_MEMORY;
  }
}

// The file in memory of our own, with large pages where the system has them: fewer address translations than a mapped
// file needs, 1 % of an int8 and 3 % of a bf16 inference of ConvNeXt-T; and nobody can truncate it meanwhile.
cnxt::Model read_file(const char *path) {
  const auto fail = [&] { throw cnxt::Failure{CNXT_NO_FILE, std::string(path) + ": " + std::strerror(errno)}; };
  const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path, "rb"), std::fclose);
  struct stat status;
  if (!file || fstat(fileno(file.get()), &status) != 0) fail();
  if (!S_ISREG(status.st_mode)) throw cnxt::Failure{CNXT_NO_FILE, std::string(path) + " is not a file"};
  if (status.st_size == 0) throw cnxt::Failure{CNXT_BAD_FILE, std::string(path) + " is empty"};
  const auto bytes = static_cast<size_t>(status.st_size);
  void *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  try {
    if (std::fread(data, 1, bytes, file.get()) != bytes)
      throw cnxt::Failure{CNXT_NO_FILE, std::string(path) + " cannot be read to its end"};
    cnxt::Model model = cnxt::read_model(data, bytes);
    model.owned = true;
    return model;
  } catch (...) {
    munmap(data, bytes);
    throw;
  }
}

// A second thread is refused: both would work in the same memory.
template <class F>
int alone(cnxt_session &session, F body) noexcept {
  if (session.busy.test_and_set(std::memory_order_acquire)) return CNXT_BUSY;
  body();
  session.busy.clear(std::memory_order_release);
  return CNXT_OK;
}

[[noreturn]] void refuse(const char *line) { throw cnxt::Failure{CNXT_BAD_ARGUMENT, line}; }

void check(const cnxt_resize &asked) {
  constexpr uint32_t MOST = 1U << 28;  // the widths of filters are counted in 32 bits
  const auto within = [](uint32_t first, uint32_t length, uint32_t size) {
    return length >= 1 && first <= size && length <= size - first;
  };
  if (asked.pixel_bytes != 1 && asked.pixel_bytes != 3 && asked.pixel_bytes != 4)
    refuse("pixel_bytes is none of 1, 3 and 4");
  for (const uint32_t side : {asked.source_height, asked.source_width, asked.height, asked.width})
    if (side < 1 || side > MOST) refuse("a side is none of 1 to 2^28 pixels");
  if (asked.row_bytes < static_cast<size_t>(asked.source_width) * asked.pixel_bytes)
    refuse("row_bytes is less than a row has");
  if (!within(asked.top, asked.rows, asked.height) || !within(asked.left, asked.columns, asked.width))
    refuse("the window is not within the resized image");
  if (asked.filter > 2) refuse("filter is none of 0, 1 and 2");
}

}  // namespace

extern "C" {

const char *cnxt_isas(void) { return cnxt::available_kernels(); }

const char *cnxt_isas_refused(void) { return cnxt::refused_kernels(); }

const char *cnxt_isas_slower(void) {
  return cnxt::choose_kernels(nullptr)->multiplies_bf16 ? "" : cnxt::slower_kernels();
}

int cnxt_model_open(const void *data, size_t bytes, cnxt_model **model, char *message, size_t size) {
  return guarded(message, size, [&] {
    if (!model) refuse("model is NULL");
    *model = nullptr;
    if (!data) refuse("data is NULL");
    *model = new cnxt_model{cnxt::read_model(data, bytes)};
  });
}

int cnxt_model_open_file(const char *path, cnxt_model **model, char *message, size_t size) {
  return guarded(message, size, [&] {
    if (!model) refuse("model is NULL");
    *model = nullptr;
    if (!path) refuse("path is NULL");
    *model = new cnxt_model{read_file(path)};
  });
}

void cnxt_model_close(cnxt_model *model) {
  if (!model) return;
  if (model->model.owned) munmap(const_cast<uint8_t *>(model->model.data), model->model.bytes);
  delete model;
}

void cnxt_model_info(const cnxt_model *model, cnxt_info *info) { *info = cnxt::describe(model->model, 0, 0); }

int cnxt_session_open(const cnxt_model *model, const cnxt_options *options, cnxt_session **session, char *message,
                      size_t size) {
  return guarded(message, size, [&] {
    if (!session) refuse("session is NULL");
    *session = nullptr;
    if (!model || !options) refuse("model or options is NULL");
    *session = new cnxt_session{{model->model, *options}, {}};
  });
}

void cnxt_session_close(cnxt_session *session) { delete session; }

void cnxt_session_info(const cnxt_session *session, cnxt_info *info) {
  const cnxt::Session &s = session->session;
  *info = cnxt::describe(s.model, s.height, s.width);
}

const char *cnxt_session_isa(const cnxt_session *session) { return session->session.kernels.name; }

size_t cnxt_session_bytes(const cnxt_session *session) { return session->session.arena_bytes; }

int cnxt_session_run(cnxt_session *session, const void *input, float *const *outputs) {
  if (!session || !input || !outputs || !session->session.belongs_here()) return CNXT_BAD_ARGUMENT;
  return alone(*session, [&] { session->session.run(input, outputs, false); });
}

int cnxt_session_profile(cnxt_session *session, const void *input, float *const *outputs, cnxt_timing *timings,
                         size_t capacity, size_t *count) {
  if (!session || !input || !outputs || !count || !session->session.belongs_here()) return CNXT_BAD_ARGUMENT;
  return alone(*session, [&] {
    session->session.run(input, outputs, true);
    const auto &found = session->session.timings;
    *count = found.size();
    for (size_t i = 0; i < found.size() && i < capacity; i++) timings[i] = found[i];
  });
}

int cnxt_image_resize(const char *isa, const cnxt_resize *resize, const uint8_t *pixels, uint8_t *out, char *message,
                      size_t size) {
  return guarded(message, size, [&] {
    if (!resize || !pixels || !out) refuse("resize, pixels or out is NULL");
    check(*resize);
    static const cnxt::Kernels *const best = cnxt::choose_kernels(nullptr);  // in a virtual machine CPUID takes long
    const cnxt::Kernels *kernels = isa ? cnxt::choose_kernels(isa) : best;
    if (!kernels) refuse("this CPU has no such path");
    cnxt::resample(*kernels, *resize, pixels, out);
  });
}

}  // extern "C"
