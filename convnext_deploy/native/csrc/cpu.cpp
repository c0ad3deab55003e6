#include <cstring>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cerrno>

#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnxt {
namespace {

struct Path {
  const char *name;
  bool (*here)();
  const Kernels *(*kernels)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too: whether it saves the wide registers.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Its registers are AVX2's; compilers of 2022 do not know its name yet.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// Intel's CPUs begin a product of bf16 every second cycle, and two of fp32 each cycle: 44 and 88 GMAC/s a core on a
// Xeon of Sapphire Rapids or later (docs/design/native.md). AMD's begin as many of either: 246 and 135 on Zen 5.
bool bf16_at_half_rate() {
#if defined(CNXT_MODEL_VENDOR)  // of another CPU than the one that a test runs on
  return std::strcmp(CNXT_MODEL_VENDOR, "GenuineIntel") == 0;
#else
  unsigned most = 0, name[3] = {};
  return __get_cpuid(0, &most, &name[0], &name[2], &name[1]) && std::memcmp(name, "GenuineIntel", 12) == 0;
#endif
}

// Tile registers are 8 KB a thread, which a process has to ask Linux for: null where it has them, or what refuses them.
const char *tiles_refused() {
#if defined(CNXT_MODEL_AMX) && CNXT_MODEL_AMX
  return nullptr;
#elif defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const std::string line = [] {
    if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0) return std::string();
    const int error = errno;
    return std::string("amx: the system does not give this process tile registers (") + std::strerror(error) + ")";
  }();
  return line.empty() ? nullptr : line.c_str();
#else
  return "amx: tile registers are asked for on Linux only";
#endif
}

// Tiles, and their products of codes and of bf16; all CPUs that have these have AVX-512 with bf16.
bool has_tiles() {
#if defined(CNXT_MODEL_AMX)
  return has_avx512_bf16();
#else
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // amx-bf16, amx-tile, amx-int8
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & NEEDED) == NEEDED;
#endif
}
#elif defined(__aarch64__)
// What Linux says of every core, by the bits of its asm/hwcap.h, of which older headers lack some; and macOS, by name.
// Other systems are not asked.
#if defined(__linux__)
bool has(unsigned long kind, unsigned long bits) { return (getauxval(kind) & bits) == bits; }
bool has_dotprod() { return has(AT_HWCAP, 1UL << 20); }
bool has_i8mm_and_bf16() { return has_dotprod() && has(AT_HWCAP2, 1UL << 13 | 1UL << 14); }
#elif defined(__APPLE__)
bool has(const char *name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm_and_bf16() {
  return has_dotprod() && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16");
}
#else
bool has_dotprod() { return false; }
bool has_i8mm_and_bf16() { return false; }
#endif
#endif

constexpr Path PATHS[] = {
#if defined(__x86_64__)
    {"amx", []() -> bool { return has_tiles() && !tiles_refused(); }, amx_kernels},
    {"avx512_bf16", [] { return has_avx512_bf16() && !bf16_at_half_rate(); }, avx512_bf16_kernels},
    {"avx512_vnni", []() -> bool { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }, avx512_vnni_kernels},
    {"avx512_bf16", [] { return has_avx512_bf16() && bf16_at_half_rate(); }, avx512_bf16_kernels},
    {"avx_vnni", has_avx_vnni, avx_vnni_kernels},
    {"avx512", has_avx512, avx512_kernels},
    {"avx2", has_avx2, avx2_kernels},
#elif defined(__aarch64__)
    {"neon_bf16", has_i8mm_and_bf16, neon_bf16_kernels},
    {"neon_dotprod", has_dotprod, neon_dotprod_kernels},
    {"neon", [] { return true; }, neon_kernels},
#endif
    {"portable", [] { return true; }, portable_kernels},
};

}  // namespace

const Kernels *choose_kernels(const char *name) {
  for (const Path &path : PATHS)
    if ((name == nullptr || std::strcmp(name, path.name) == 0) && path.here()) return path.kernels();
  return nullptr;
}

const char *available_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const Path &path : PATHS)
      if (path.here()) {
        if (!all.empty()) all += ' ';
        all += path.name;
      }
    return all;
  }();
  return names.c_str();
}

const char *refused_kernels() {
#if defined(__x86_64__)
  if (has_tiles())
    if (const char *refused = tiles_refused()) return refused;
#endif
  return "";
}

const char *slower_kernels() {
#if defined(__x86_64__)
  if (has_avx512_bf16() && bf16_at_half_rate())
    return "avx512_bf16: this CPU multiplies bf16 at half the rate of fp32, so bf16 is multiplied in fp32";
#endif
  return "";
}

}  // namespace cnxt
