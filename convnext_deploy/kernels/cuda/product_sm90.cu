// The two products of a block on Hopper's matrix units (sm_90a), in 16 bits: out = f(x w^T), rows of x are pixels.
//
// One program stays on each multiprocessor and takes tiles of 128 x BN results in turn. Its first warp group only asks
// the copy engine for operands. The other two take every other tile: while one multiplies, the other ends its tile
// (norm, activation, residual), so that the matrix units do not wait for arithmetic. They take turns in multiplying:
// a barrier tells only even rounds of the operands from odd ones, so that nobody may wait for what is two rounds ahead.
//
// Compiled at run time, hence without headers. Constants given on the command line:
//   BN       results a tile is wide, a multiple of 64 (of 32 with one chunk of columns) up to 192
//   STAGES   steps of K that are under way
//   PROJECT  1: bias and residual; 0: norm deferred from the convolution, bias, activation
//   BF16     1: bfloat16; 0: float16
//   NORM     0 layernorm, 1 rmsnorm, 2 simplenorm, 3 none
//   ACTIVATION  0 none, 1 GELU, 2 GELU's tanh form, 3 SiLU
// and WGMMA, the one instruction whose text depends on BN.

constexpr int BM = 128, BK = 64;                   // 64 elements are 128 bytes: one row of the swizzle
constexpr int HALVES = BM / 64, TOTALS = BN / 2;   // a warp group multiplies 64 rows at a time; sums a thread and half
constexpr int X_BYTES = BM * BK * 2, W_BYTES = BN * BK * 2, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int CHUNK = BN < 64 ? BN : 64, CHUNKS_N = BN / CHUNK;  // columns that one copy of results takes
constexpr int CHUNK_BYTES = BM * CHUNK * 2, OUT_BYTES = BM * BN * 2;
static_assert(BN % CHUNK == 0 && (CHUNK == 64), "results leave in chunks of 64 columns");

WGMMA

// x: (M, K), w: (N, K), out and residual: (M, N), each described to the copy engine; bias: (N,) in 16 bits.
// row_sums: (N,), moments: (M, chunks, 2) of `chunk` channels each; both of an expand only.
extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap out,
        const __grid_constant__ TensorMap residual, const u32* __restrict__ bias, const float2* __restrict__ row_sums,
        const float2* __restrict__ moments, int M, int N, int K, int chunk, int chunks, float eps) {
  extern __shared__ unsigned char memory[];
  u32 base = (shared(memory) + 1023) & ~1023u;
  u32 staged = base + STAGES * STAGE_BYTES;  // results of each warp group, before that its residual
  u32 full = staged + 2 * OUT_BYTES, empty = full + 8 * STAGES, loaded = empty + 8 * STAGES, norms = loaded + 16;
  int tiles_n = (N + BN - 1) / BN, tiles = (M + BM - 1) / BM * tiles_n, trips = (K + BK - 1) / BK;
  int group = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      initialize(full + 8 * s, 1);
      initialize(empty + 8 * s, 4);  // each warp of a group
    }
    for (int g = 0; g < 2; ++g) initialize(loaded + 8 * g, 1);
    initialized();
  }
  __syncthreads();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      int stage = 0;
      u32 parity = 1;  // the first time round every stage is empty
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int row = tile / tiles_n * BM, column = tile % tiles_n * BN;
        for (int k = 0; k < trips; ++k) {
          wait(empty + 8 * stage, parity);
          expect(full + 8 * stage, STAGE_BYTES);
          fetch(base + stage * STAGE_BYTES, &x, k * BK, row, full + 8 * stage);
          fetch(base + stage * STAGE_BYTES + X_BYTES, &w, k * BK, column, full + 8 * stage);
          if (++stage == STAGES) { stage = 0; parity ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    int mine = group - 1, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    u32 results = staged + mine * OUT_BYTES;
    int first_row = warp * 16 + lane / 4;  // of the four that this thread has: + 8, + 64, + 72
    u32 place = results + first_row * 128 + (lane & 3) * 4;
#if PROJECT
    u32 turn = 0;  // parity of `loaded`
#endif
    for (int index = mine;; index += 2) {
      int tile = blockIdx.x + index * gridDim.x;
      if (tile >= tiles) break;
      int row = tile / tiles_n * BM, column = tile % tiles_n * BN;
      int there = min(CHUNKS_N, (N - column + CHUNK - 1) / CHUNK);  // chunks of columns that exist
      if (thread == 0) {
        puts_have_been_read();
#if PROJECT
        expect(loaded + 8 * mine, there * CHUNK_BYTES);
        for (int c = 0; c < there; ++c)
          fetch(results + c * CHUNK_BYTES, &residual, column + c * CHUNK, row, loaded + 8 * mine);
#endif
      }
#if NORM < 3
      {
        float2 norm = normalizer(moments, min(row + thread, M - 1), K, chunk, chunks, eps);
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(norms + (mine * BM + thread) * 8), "f"(norm.x), "f"(norm.y) : "memory");
      }
#endif
      float totals[HALVES][TOTALS];
      int at = index * trips, stage = at % STAGES, before = 0;
      u32 parity = (at / STAGES) & 1;
      if (index) asm volatile("bar.sync %0, 256;" ::"r"(3 + mine) : "memory");  // the other group has its operands
      for (int k = 0; k < trips; ++k) {
        wait(full + 8 * stage, parity);
        u64 left = descriptor<128>(base + stage * STAGE_BYTES), right = descriptor<128>(base + stage * STAGE_BYTES + X_BYTES);
        begin();
#pragma unroll
        for (int step = 0; step < BK / 16; ++step)
#pragma unroll
          for (int h = 0; h < HALVES; ++h)
            multiply(totals[h], left + h * (64 * 128 >> 4) + step * STEP, right + step * STEP, (k | step) != 0);
        commit();
        if (k) {
          ended<1>();
          if (lane == 0) arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
      if (tile + (int)gridDim.x < tiles) asm volatile("bar.arrive %0, 256;" ::"r"(4 - mine) : "memory");
      ended<0>();
      if (lane == 0) arrive(empty + 8 * before);

#if PROJECT
      wait(loaded + 8 * mine, turn);
      turn ^= 1;
#else
      meet(1 + mine);  // the earlier results have been read
#endif
#if NORM < 3
      float2 norm[2 * HALVES];
#pragma unroll
      for (int r = 0; r < 2 * HALVES; ++r)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(norm[r].x), "=f"(norm[r].y)
                     : "r"(norms + (mine * BM + first_row + (r & 1) * 8 + (r >> 1) * 64) * 8));
#endif
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        int pair = (column + j * 8) / 2 + (lane & 3);  // of columns
        pair = min(pair, N / 2 - 1);
        float2 offset = unpacked(bias[pair]);
#if NORM < 3
        float2 sums = row_sums[pair];
#endif
        u32 chunk_place = place + j / 8 * CHUNK_BYTES + (((j % 8) ^ (lane / 4)) << 4);
#pragma unroll
        for (int r = 0; r < 2 * HALVES; ++r) {
          float low = totals[r >> 1][j * 4 + (r & 1) * 2], high = totals[r >> 1][j * 4 + (r & 1) * 2 + 1];
          u32 to = chunk_place + (r & 1) * 8 * 128 + (r >> 1) * 64 * 128;
#if PROJECT
          u32 old;
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(old) : "r"(to));
          float2 there = unpacked(old);
          low += offset.x + there.x;
          high += offset.y + there.y;
#elif NORM == 3
          low = activated(low + offset.x);
          high = activated(high + offset.y);
#else
          low = activated(fmaf(norm[r].x, fmaf(-norm[r].y, sums.x, low), offset.x));
          high = activated(fmaf(norm[r].x, fmaf(-norm[r].y, sums.y, high), offset.y));
#endif
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(packed(low, high)) : "memory");
        }
      }
      publish();
      meet(1 + mine);
      if (thread == 0) {
        for (int c = 0; c < there; ++c) put(&out, column + c * CHUNK, row, results + c * CHUNK_BYTES);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
