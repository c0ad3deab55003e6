// What `kernels/cuda/dwconv_sm90.cu` asks of a GPU, on the host: for a test of its arithmetic and its barriers.
//
// Threads are coroutines that change places at collective instructions, which do what PTX defines for the fragments of
// ldmatrix and mma. Shared memory begins with NaN. A copy of the engine writes NaN at once and its values when someone
// waits for them. Of each byte of shared memory the last write and read are known: two warps of which one writes have to
// have a barrier of the program between them.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#ifndef BF16
#define BF16 0
#endif

typedef uint32_t u32;
typedef uint64_t u64;
typedef uint16_t u16;
struct float2 { float x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct TensorMap { const u16* data; int sizes[4], box[4]; };  // channels, columns, rows, images
struct Index { unsigned x; };

constexpr int LANES = 32, MEMORY_BYTES = 232448, COPY = -2, MANY = -3, NOBODY = -1;
constexpr u32 FIRST = 16;  // address: as little aligned as a program may find it
alignas(16) unsigned char memory[MEMORY_BYTES];

struct Access { int warp = NOBODY; u32 interval = 0; };
struct Shadow { Access read, written; };
struct Group { int arrived = 0; u32 rounds = 0; };
struct Thread { ucontext_t context; std::vector<char> stack; bool ended = false; };
struct Operands { u32 address, a[4], b[2], results[4]; float value, sums[4]; int code; };

std::vector<Shadow> shadows(MEMORY_BYTES + FIRST);
std::vector<Thread> threads;
std::vector<Group> warps;
std::vector<Operands> operands;
Group program;
ucontext_t scheduler;
unsigned running;
Index blockIdx, gridDim;
char problem[200];
long idle;
#define threadIdx (Index{running})

inline void report(const char* what, u32 address) {
  if (!problem[0]) std::snprintf(problem, sizeof problem, "%s at %u by thread %u in interval %u", what, address, running, program.rounds);
}
inline void check(u32 address, u32 bytes, int warp, bool writes) {
  if (address < FIRST || address + bytes > MEMORY_BYTES + FIRST || address % std::min(bytes, 16u)) return report("address", address);
  for (u32 i = address; i < address + bytes; ++i) {
    Shadow& s = shadows[i];
    auto meets = [&](Access& a) { return a.warp != NOBODY && a.warp != warp && a.interval == program.rounds; };
    if (meets(s.written) || (writes && meets(s.read))) return report(writes ? "race of a write" : "race of a read", address);
    if (writes) s.written = {warp, program.rounds};
    else s.read = {meets(s.read) ? MANY : warp, program.rounds};
  }
}

inline void others() {
  if (++idle > 100000000) report("nobody goes on", 0), setcontext(&scheduler);
  swapcontext(&threads[running].context, &scheduler);
}
// The last of a group to come does it for all.
template <typename Do>
void together(Group& group, int size, Do what) {
  if (++group.arrived == size) {
    group.arrived = 0;
    what();
    ++group.rounds;
    idle = 0;
  } else {
    for (u32 round = group.rounds; round == group.rounds;) others();
  }
}
inline int warp_of() { return running / LANES; }
template <typename Do>
Operands& collective(int code, const Operands& mine, Do what) {
  int warp = warp_of();
  Operands* all = &operands[warp * LANES];
  all[running % LANES] = mine;
  all[running % LANES].code = code;
  together(warps[warp], LANES, [&] {
    for (int lane = 0; lane < LANES; ++lane) if (all[lane].code != code) report("lanes differ", 0);
    what(all);
  });
  return all[running % LANES];
}
inline void __syncthreads() { together(program, threads.size(), [] {}); }
inline void __syncwarp() { collective(1, {}, [](Operands*) {}); }
inline float __shfl_xor_sync(u32, float value, int step) {
  Operands mine{};
  mine.value = value;
  return collective(2 + step, mine, [&](Operands* all) {
    for (int lane = 0; lane < LANES; ++lane) all[lane].sums[0] = all[lane ^ step].value;
  }).sums[0];
}

inline float wide(u16 half) {
#if BF16
  u32 bits = (u32)half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#else
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return (float)value;
#endif
}
inline u16 narrow(float value) {
#if BF16
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? 0x7FFF : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#else
  _Float16 half = (_Float16)value;
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#endif
}
inline u32 packed(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
inline float2 unpacked(u32 both) { return {wide((u16)both), wide((u16)(both >> 16))}; }
inline float __uint_as_float(u32 bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline u32 __float_as_uint(float value) { u32 bits; std::memcpy(&bits, &value, 4); return bits; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
using std::min;

inline u32 shared(const void* p) { return (const unsigned char*)p - memory + FIRST; }
template <typename T>
void write(u32 address, T value) {
  check(address, sizeof value, warp_of(), true);
  std::memcpy(memory + (address - FIRST), &value, sizeof value);
}
template <typename T>
T read(u32 address) {
  check(address, sizeof(T), warp_of(), false);
  T value;
  std::memcpy(&value, memory + (address - FIRST), sizeof value);
  return value;
}
inline uint4 read_vector(u32 address) { return read<uint4>(address); }
inline float2 read_pair(u32 address) { return read<float2>(address); }

// Matrix m of 8 x 8 has its rows where lanes 8 m to 8 m + 7 say. A lane gets two neighbours of row lane / 4, or turned, of
// that column.
template <int COUNT>
void load_matrices(u32 (&r)[COUNT], u32 address, bool turned) {
  Operands mine{};
  mine.address = address;
  Operands& got = collective(100 + COUNT + 10 * turned, mine, [&](Operands* all) {
    for (int m = 0; m < COUNT; ++m) {
      u16 rows[8][8];
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) {
        u32 from = all[8 * m + row].address;
        check(from, 16, warp_of(), false);
        std::memcpy(rows[row], memory + (from - FIRST), 16);
        banks |= 1u << from / 16 % 8;
      }
      if (banks != 255) report("bank conflict", all[8 * m].address);
      for (int lane = 0; lane < LANES; ++lane) {
        int one = lane / 4, two = lane % 4 * 2;
        all[lane].results[m] = turned ? rows[two][one] | (u32)rows[two + 1][one] << 16 : rows[one][two] | (u32)rows[one][two + 1] << 16;
      }
    }
  });
  for (int m = 0; m < COUNT; ++m) r[m] = got.results[m];
}
inline void load(u32 (&r)[4], u32 address) { load_matrices(r, address, false); }
inline void load(u32 (&r)[2], u32 address) { load_matrices(r, address, false); }
inline void load(u32& r, u32 address) {
  u32 one[1];
  load_matrices(one, address, false);
  r = one[0];
}
inline void load_turned(u32 (&r)[4], u32 address) { load_matrices(r, address, true); }

inline void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Operands mine{};
  mine.a[0] = a0, mine.a[1] = a1, mine.a[2] = a2, mine.a[3] = a3, mine.b[0] = b0, mine.b[1] = b1;
  std::copy(sums, sums + 4, mine.sums);
  Operands& got = collective(200, mine, [&](Operands* all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
      int group = lane / 4, two = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int k = 0; k < 4; ++k) a[group + k % 2 * 8][two + e + k / 2 * 8] = wide((u16)(all[lane].a[k] >> 16 * e));
        for (int k = 0; k < 2; ++k) b[two + e + k * 8][group] = wide((u16)(all[lane].b[k] >> 16 * e));
      }
    }
    for (int lane = 0; lane < LANES; ++lane)
      for (int k = 0; k < 4; ++k) {
        int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
        float sum = all[lane].sums[k];
        for (int i = 0; i < 16; ++i) sum += a[row][i] * b[i][column];
        all[lane].sums[k] = sum;
      }
  });
  std::copy(got.sums, got.sums + 4, sums);
}

// One barrier, of one arrival, and one copy at a time, in rows of 64 bytes that are swizzled.
struct Copy { bool asked = false; u32 to; const TensorMap* map; int start[4]; } copy;
u32 phases, expected;
inline void initialize(u32, int) { phases = 0; }
inline void initialized() {}
inline void publish() {}
inline void expect(u32, u32 bytes) { expected = bytes; }
inline void fetch(u32 to, const TensorMap* map, int channel, int column, int row, int image, u32) {
  u32 bytes = 2;
  for (int axis : map->box) bytes *= axis;
  if (copy.asked || bytes != expected || to % 512) report("a copy", to);
  copy = {true, to, map, {channel, column, row, image}};
  check(to, bytes, COPY, true);
  std::memset(memory + (to - FIRST), 0xFF, bytes);
}
inline void wait(u32, u32 parity) {
  while ((phases & 1) == parity) {
    if (!copy.asked) { others(); continue; }
    const TensorMap& map = *copy.map;
    u32 to = 0;
    for (int n = 0; n < map.box[3]; ++n) for (int h = 0; h < map.box[2]; ++h) for (int w = 0; w < map.box[1]; ++w)
      for (int c = 0; c < map.box[0]; ++c, to += 2) {
        long at[4] = {copy.start[0] + c, copy.start[1] + w, copy.start[2] + h, copy.start[3] + n};
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) inside = inside && at[axis] >= 0 && at[axis] < map.sizes[axis];
        u16 value = inside ? map.data[((at[3] * map.sizes[2] + at[2]) * map.sizes[1] + at[1]) * map.sizes[0] + at[0]] : 0;
        std::memcpy(memory + (copy.to - FIRST) + (to ^ (to >> 7 & 3) << 4), &value, 2);
      }
    copy.asked = false;
    ++phases;
    idle = 0;
  }
}

std::function<void()> body;
void run_thread() {
  body();
  threads[running].ended = true;
  for (;;) swapcontext(&threads[running].context, &scheduler);
}
// Programs in turn. Gives what went wrong first, or nothing.
const char* launch(int programs, int count, std::function<void()> kernel) {
  problem[0] = 0;
  body = kernel;
  gridDim.x = programs;
  for (unsigned block = 0; block < (unsigned)programs && !problem[0]; ++block) {
    blockIdx.x = block;
    std::memset(memory, 0xFF, sizeof memory);
    std::fill(shadows.begin(), shadows.end(), Shadow{});
    threads.assign(count, Thread{});
    warps.assign(count / LANES, Group{});
    operands.assign(count, Operands{});
    program = Group{};
    copy = Copy{};
    idle = 0;
    for (Thread& thread : threads) {
      thread.stack.resize(64 << 10);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, run_thread, 0);
    }
    for (bool alive = true; alive && !problem[0];) {
      alive = false;
      for (running = 0; running < threads.size() && !problem[0]; ++running)
        if (!threads[running].ended) {
          alive = true;
          swapcontext(&scheduler, &threads[running].context);
        }
    }
    if (copy.asked && !problem[0]) report("a copy that nobody waited for", copy.to);
  }
  return problem;
}
