// What the kernels for Hopper share: barriers and copies, 16-bit pairs, activations and norms. Where they run on the
// host, in tests, everything between EMULATED and its end is somebody else's.

#ifndef BF16
#define BF16 0
#endif
#ifndef EMULATED
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ENDED;\nbra AGAIN;\nENDED:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int channel, int column, int row, int image, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::
          "r"(to), "l"(map), "r"(channel), "r"(column), "r"(row), "r"(image), "r"(barrier) : "memory");
}
__device__ __forceinline__ void put(const TensorMap* map, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::
                   "l"(map), "r"(column), "r"(row), "r"(from) : "memory");
}
// What this thread told the copy engine to write out since the last time is one group.
__device__ __forceinline__ void puts_are_a_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the copy engine has read all groups but the last few.
template <int UNDER_WAY = 0>
__device__ __forceinline__ void puts_have_been_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(UNDER_WAY) : "memory");
}
__device__ __forceinline__ void puts_have_ended() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// An operand in shared memory, for the matrix units: rows of 64 or 128 bytes, swizzled, eight of them a group.
template <int ROW_BYTES>
__device__ __forceinline__ u64 descriptor(u32 address) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128);
  return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(ROW_BYTES / 2) << 32 | (u64)(ROW_BYTES == 128 ? 1 : 2) << 62;
}
constexpr int STEP = 32 >> 4;  // 16 elements of K, in a descriptor's units

// The matrix units: what they read and write in registers is left alone from `begin` until `ended`.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int UNDER_WAY>
__device__ __forceinline__ void ended() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory"); }

// Four 8 x 8 matrices of 16 bits, each lane giving the place of one row.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from));
}
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
                   "r"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]));
}

// Of the warp group: 128 threads.
__device__ __forceinline__ void meet(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }
// Of two warp groups, of which one goes on when the other has let it.
__device__ __forceinline__ void take_turn(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void give_turn(int barrier) { asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory"); }
// Registers of each thread of the warp group.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
// What threads wrote to shared memory is seen by the copy engine.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void initialize(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void initialized() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ u32 packed(float low, float high) {
  u32 both;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}
__device__ __forceinline__ float2 unpacked(u32 both) {
  float2 value;
#if BF16
  value.x = __uint_as_float(both << 16);
  value.y = __uint_as_float(both & 0xFFFF0000u);
#else
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(value.x), "=f"(value.y) : "r"(both));
#endif
  return value;
}

__device__ __forceinline__ uint4 read_vector(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 read_pair(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void write(u32 address, u32 v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
__device__ __forceinline__ void write(u32 address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void write(u32 address, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void write(u32 address, u16 v) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory"); }
__device__ __forceinline__ void write(u32 address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
// These may move and be left out: what they read was written before a barrier.
__device__ __forceinline__ float4 floats_at(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ float2 pair_at(u32 address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ float tanh_of(float x) {
  float t;
  asm volatile("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x));  // volatile: it stays ahead of what the caller does next
  return t;
}
// Rounded half to even, saturated to int8, the first in the low byte.
__device__ __forceinline__ u16 codes_of(float low, float high) {
  u32 both;
  asm("{\n.reg .s32 low, high;\ncvt.rni.s32.f32 low, %1;\ncvt.rni.s32.f32 high, %2;\ncvt.pack.sat.s8.s32.b32 %0, high, low, 0;\n}"
      : "=r"(both) : "f"(low), "f"(high));
  return (u16)both;
}
#endif  // EMULATED

#ifdef ACTIVATION

// As `triton_blocks.activated`: x times the sigmoid of a polynomial, which here is (1 + tanh of its half) / 2. The tanh
// is one instruction of the hardware, and as good as the exponential and the root in the results' 16 bits (measured).
// It takes x / 2, since the norm and the bias in front of it can be halved for nothing, and exactly.
constexpr float HALF = ACTIVATION == 0 ? 1.0f : 0.5f;  // what x is times, before it is activated
constexpr float SCALE = 2 * -0.34657359f;              // of coefficients that are times -log2(e), and of x for its half
// In two steps, since the tanh takes a while: its value, and what is made of it.
__device__ __forceinline__ float turned_down(float half) {
#if ACTIVATION == 0
  return 0;
#else
#if ACTIVATION == 3
  float q = half * (-1.4426950408889634f * SCALE);
#elif ACTIVATION == 2
  float q = half * fmaf(half * half, 4 * -0.1029432346f * SCALE, -2.302208198f * SCALE);
#else
  float u = fminf(half * half, 27.0f / 4);
  float q = half * fmaf(u, fmaf(u, 16 * 0.0010145001f * SCALE, 4 * -0.1067768461f * SCALE), -2.301120344f * SCALE);
#endif
  return tanh_of(q);
#endif
}
__device__ __forceinline__ float ended_by(float half, float t) { return ACTIVATION == 0 ? half : fmaf(half, t, half); }

#if NORM < 3
// What the norm does to rows, (y - shift) * scale, and HALF of it, from moments that the convolution wrote a chunk at a
// time. Rows side by side wait for their loads together.
template <int ROWS>
__device__ __forceinline__ void normalizers(float2 (&norm)[ROWS], const float2* moments, const int (&rows)[ROWS], int channels,
                                            int chunk, int chunks, float eps) {
  const float2* mine[ROWS];
  float mean[ROWS], power[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    mine[r] = moments + (long long)rows[r] * chunks;
    mean[r] = power[r] = 0;
  }
#pragma unroll 4
  for (int c = 0; c < chunks; ++c) {
    float width = (float)min(channels - c * chunk, chunk);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] += mine[r][c].x * width;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) mean[r] /= (float)channels;
#pragma unroll 2
  for (int c = 0; c < chunks; ++c) {
    float width = (float)min(channels - c * chunk, chunk);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float2 both = mine[r][c];
      float step = both.x - mean[r];
      power[r] += both.y + step * step * width;
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#if NORM == 0
    norm[r] = make_float2(HALF * rsqrtf(power[r] / (float)channels + eps), mean[r]);
#elif NORM == 1
    norm[r] = make_float2(HALF * rsqrtf(power[r] / (float)channels + mean[r] * mean[r] + eps), 0.0f);
#else
    norm[r] = make_float2(HALF * rsqrtf(power[r] / (float)(channels - 1) + eps), 0.0f);
#endif
}
#endif
#endif
