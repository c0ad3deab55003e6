// What the kernels in `kernels/cuda` ask of a GPU, on the host: for tests of their arithmetic and their barriers.
//
// Threads are coroutines that change places at collective instructions, which do what PTX defines for the fragments of
// ldmatrix, stmatrix, mma and wgmma. Shared memory begins with NaN. The copy engine is as late as it may be: what it
// brings is NaN at once and has its values when someone waits for them, and what it takes it reads when someone waits
// for that. With RACES, of each byte of shared memory the last write and read are known: two warps of which one writes
// have to have a barrier of the whole program between them. Kernels whose warps wait for each other do without.

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
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
#ifndef RACES
#define RACES 0
#endif

typedef uint32_t u32;
typedef uint64_t u64;
typedef uint16_t u16;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
// Axes begin with the one whose elements are side by side; swizzle: bytes of a row of the box, 64 or 128.
struct TensorMap { unsigned char* data; int bytes, swizzle, sizes[4], box[4]; };
struct Index { unsigned x; };

constexpr int LANES = 32, MEMORY_BYTES = 232448, COPY = -2, MANY = -3, NOBODY = -1;
constexpr u32 FIRST = 16;  // address: as little aligned as a program may find it
alignas(16) unsigned char memory[MEMORY_BYTES];

struct Access { int warp = NOBODY; u32 interval = 0; };
struct Shadow { Access read, written; };
struct Group { int arrived = 0; u32 rounds = 0; };
struct Thread { ucontext_t context; std::vector<char> stack; bool ended = false; };
struct Operands { u32 address, a[4], b[2], results[4]; float value, sums[4]; int code; void* total; u64 left, right; };

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
  for (u32 i = address; RACES && i < address + bytes; ++i) {
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
inline void come(Group& group, int size) {  // and do not wait for the others
  if (++group.arrived == size) group.arrived = 0, ++group.rounds, idle = 0;
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

inline int __shfl_sync(u32, int value, int from) {
  Operands mine{};
  mine.address = value;
  return collective(50, mine, [&](Operands* all) {
    u32 one = all[from].address;
    for (int lane = 0; lane < LANES; ++lane) all[lane].address = one;
  }).address;
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
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float tanh_of(float x) { return std::tanh(x); }
inline u16 codes_of(float low, float high) {
  auto code = [](float x) { return (u16)(unsigned char)(signed char)std::clamp(std::nearbyint(x), -128.0f, 127.0f); };
  return code(low) | code(high) << 8;
}

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
inline float2 pair_at(u32 address) { return read<float2>(address); }
inline float4 floats_at(u32 address) { return read<float4>(address); }

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
inline void load_matrices(u32 (&r)[4], u32 address) { load_matrices(r, address, false); }
inline void store_matrices(u32 address, const u32 (&r)[4]) {
  Operands mine{};
  mine.address = address;
  std::copy(r, r + 4, mine.a);
  collective(300, mine, [&](Operands* all) {
    for (int m = 0; m < 4; ++m) {
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) {
        u32 to = all[8 * m + row].address;
        check(to, 16, warp_of(), true);
        for (int four = 0; four < 4; ++four) std::memcpy(memory + (to - FIRST) + four * 4, &all[row * 4 + four].a[m], 4);
        banks |= 1u << to / 16 % 8;
      }
      if (banks != 255) report("bank conflict", all[8 * m].address);
    }
  });
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

// Warp groups -----------------------------------------------------------------------------------------------------------

template <int COUNT>
void fewer_registers() {}
template <int COUNT>
void more_registers() {}
inline std::map<int, Group> named;  // barriers
inline void meet(int barrier) { together(named[barrier], 128, [] {}); }
inline void take_turn(int barrier) { together(named[barrier], 256, [] {}); }
inline void give_turn(int barrier) { come(named[barrier], 256); }

// Rows of 128 bytes, eight of them a group, of which the pieces of 16 bytes change places by their own address.
template <int ROW_BYTES>
u64 descriptor(u32 address) {
  static_assert(ROW_BYTES == 128);
  return (u64)(address & 0x3FFFF) >> 4;
}
constexpr int STEP = 32 >> 4;
inline void begin() {}
inline void commit() {}
template <int UNDER_WAY>
void ended() {}
template <typename Element>
Element element(u64 operand, int row, int k) {
  u32 address = (u32)(operand << 4) + row / 8 * 1024 + row % 8 * 128 + k * sizeof(Element);
  address ^= (address >> 7 & 7) << 4;
  check(address, sizeof(Element), warp_of(), false);
  Element value;
  std::memcpy(&value, memory + (address - FIRST), sizeof value);
  return value;
}
inline float wide(float value) { return value; }
inline int wide(signed char code) { return code; }
// 64 rows times twice as many columns as a thread has sums, 32 bytes of K; each warp does its 16 rows.
template <typename Element, typename Sum, int COUNT>
void multiply_groups(Sum (&sums)[COUNT], u64 left, u64 right, int add) {
  Operands mine{};
  mine.left = left, mine.right = right, mine.total = sums;
  collective(400 + add, mine, [&](Operands* all) {
    constexpr int DEPTH = 32 / sizeof(Element), COLUMNS = COUNT * 2;
    static Sum x[16][DEPTH], w[COLUMNS][DEPTH];
    for (int lane = 0; lane < LANES; ++lane)
      if (all[lane].left != left || all[lane].right != right) report("lanes multiply different operands", 0);
    for (int k = 0; k < DEPTH; ++k) {
      for (int row = 0; row < 16; ++row) x[row][k] = wide(element<Element>(left, warp_of() % 4 * 16 + row, k));
      for (int column = 0; column < COLUMNS; ++column) w[column][k] = wide(element<Element>(right, column, k));
    }
    for (int lane = 0; lane < LANES; ++lane)
      for (int i = 0; i < COUNT; ++i) {
        int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        Sum& sum = ((Sum*)all[lane].total)[i];
        if (!add) sum = 0;
        for (int k = 0; k < DEPTH; ++k) sum += x[row][k] * w[column][k];
      }
  });
}

// The copy engine ---------------------------------------------------------------------------------------------------------

struct Fetch { u32 to; const TensorMap* map; int start[4]; };
struct Barrier { int arrivals = 0, missing = 0; long bytes = 0; u32 phases = 0; std::deque<Fetch> asked; };
struct Put { const TensorMap* map; int start[4]; u32 from; };
inline std::map<u32, Barrier> barriers;
inline std::map<unsigned, std::deque<std::vector<Put>>> told;  // of each thread, in groups, the last of which is open

inline void initialize(u32 barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals}; }
inline void initialized() {}
inline void publish() {}
inline void settle(Barrier& b) {
  if (b.missing == 0 && b.bytes == 0) b.missing = b.arrivals, ++b.phases, idle = 0;
}
inline void arrive(u32 barrier) {
  Barrier& b = barriers.at(barrier);
  if (--b.missing < 0) report("too many arrivals", barrier);
  settle(b);
}
inline void expect(u32 barrier, u32 bytes) {
  barriers.at(barrier).bytes += bytes;
  arrive(barrier);
}
inline u32 box_bytes(const TensorMap& map) {
  u32 bytes = map.bytes;
  for (int axis : map.box) bytes *= axis;
  return bytes;
}
// Each element of a box: its place in shared memory, and in the tensor, or null beyond its ends.
template <typename Do>
void each(const TensorMap& map, const int (&start)[4], u32 base, Do what) {
  u32 place = 0, pieces = map.swizzle / 16 - 1;
  for (int n = 0; n < map.box[3]; ++n) for (int h = 0; h < map.box[2]; ++h) for (int w = 0; w < map.box[1]; ++w)
    for (int c = 0; c < map.box[0]; ++c, place += map.bytes) {
      long at[4] = {start[0] + c, start[1] + w, start[2] + h, start[3] + n};
      bool inside = true;
      for (int axis = 0; axis < 4; ++axis) inside = inside && at[axis] >= 0 && at[axis] < map.sizes[axis];
      long index = ((at[3] * map.sizes[2] + at[2]) * map.sizes[1] + at[1]) * map.sizes[0] + at[0];
      what(base + (place ^ (place >> 7 & pieces) << 4), inside ? map.data + index * map.bytes : nullptr);
    }
}
inline void fetch(u32 to, const TensorMap* map, int channel, int column, int row, int image, u32 barrier) {
  if (to % (map->swizzle * 8)) report("a copy", to);
  barriers.at(barrier).asked.push_back({to, map, {channel, column, row, image}});
  check(to, box_bytes(*map), COPY, true);
  std::memset(memory + (to - FIRST), 0xFF, box_bytes(*map));
}
inline void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier) { fetch(to, map, column, row, 0, 0, barrier); }
inline void wait(u32 barrier, u32 parity) {
  Barrier& b = barriers.at(barrier);
  while ((b.phases & 1) == parity) {
    if (b.asked.empty()) { others(); continue; }
    Fetch one = b.asked.front();
    b.asked.pop_front();
    each(*one.map, one.start, one.to, [&](u32 place, unsigned char* value) {
      if (value) std::memcpy(memory + (place - FIRST), value, one.map->bytes);
      else std::memset(memory + (place - FIRST), 0, one.map->bytes);
    });
    b.bytes -= box_bytes(*one.map);
    settle(b);
  }
}
inline std::deque<std::vector<Put>>& mine_to_put() {
  auto& groups = told[running];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void put(const TensorMap* map, int column, int row, u32 from) {
  if (from % (map->swizzle * 8)) report("a copy", from);
  mine_to_put().back().push_back({map, {column, row, 0, 0}, from});
}
inline void puts_are_a_group() { mine_to_put().emplace_back(); }
template <int UNDER_WAY = 0>
void puts_have_been_read() {
  for (auto& groups = mine_to_put(); groups.size() > UNDER_WAY + 1; groups.pop_front())
    for (const Put& one : groups.front()) {
      check(one.from, box_bytes(*one.map), COPY, false);
      each(*one.map, one.start, one.from, [&](u32 place, unsigned char* value) {
        if (value) std::memcpy(value, memory + (place - FIRST), one.map->bytes);
      });
    }
}
inline void puts_have_ended() { puts_have_been_read<0>(); }

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
    named.clear();
    barriers.clear();
    told.clear();
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
    for (auto& [address, barrier] : barriers)
      if (!barrier.asked.empty()) report("a copy that nobody waited for", barrier.asked.front().to);
    for (auto& [thread, groups] : told)
      if (groups.size() > 1 || !groups.back().empty()) report("results that nobody waited for", thread);
  }
  return problem;
}
