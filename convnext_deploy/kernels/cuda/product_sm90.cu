// The two products of a block on Hopper's matrix units (sm_90a), in 16 bits or int8: out = f(x w^T), rows of x are
// pixels.
//
// One program stays on each multiprocessor and takes tiles of 128 x BN results in turn. Its first warp group brings what
// the others need: one warp asks the copy engine for operands, one for the residual, one has what belongs to columns,
// and two make the norms of the rows.
// The other groups take the tiles in turn: while one multiplies, the rest end their tiles (norm, activation, residual),
// so that the matrix units do not wait for arithmetic. They take turns in multiplying: a barrier tells only even rounds
// of the operands from odd ones, so that nobody may wait for what is two rounds ahead. Behind its product every warp
// goes its own way, down to the copies of its results.
//
// Compiled at run time, hence without headers. Constants given on the command line:
//   BN       results a tile is wide, a multiple of 32 up to 192, with a residual of 64
//   STAGES   steps of K that are under way
//   PROJECT  1: bias and residual; 0: norm deferred from the convolution, bias, activation
//   BF16     1: bfloat16; 0: float16
//   INT8     1: x and w are int8, whose products times `of_columns` are the linear's; an expand's results are int8 too
//   NORM     0 layernorm, 1 rmsnorm, 2 simplenorm, 3 none
//   ACTIVATION  0 none, 1 GELU, 2 GELU's tanh form, 3 SiLU
// and WGMMA, the one instruction whose text depends on BN.

#define CODES_WRITTEN (INT8 && !PROJECT)
constexpr int SWIZZLED = 128;                      // bytes of a row that is swizzled
constexpr int BM = 128, BK = INT8 ? SWIZZLED : SWIZZLED / 2;
constexpr int HALVES = BM / 64, TOTALS = BN / 2;   // a warp group multiplies 64 rows at a time; sums a thread and half
constexpr int X_BYTES = BM * SWIZZLED, W_BYTES = BN * SWIZZLED, STAGE_BYTES = X_BYTES + W_BYTES;
// Results leave by copies of 16 rows and CHUNK columns, each of a warp. With a residual, which is there before, a group
// has room for the whole tile; else a warp has room for two copies of either half, of which one is written while the
// copy engine reads the other.
constexpr int CHUNK = PROJECT || INT8 ? 64 : 32, CHUNKS_N = BN / CHUNK;
constexpr int ROW_BYTES = CHUNK * (CODES_WRITTEN ? 1 : 2), COPY_BYTES = 16 * ROW_BYTES;
constexpr int OUT_BYTES = PROJECT ? CHUNKS_N * BM * ROW_BYTES : 4 * 2 * HALVES * COPY_BYTES;
constexpr int END_BYTES = NORM < 3 || INT8 ? 16 : 8, ENDS_BYTES = BN / 2 * END_BYTES, NORMS_BYTES = NORM < 3 ? BM * 8 : 0;
static_assert(BN % CHUNK == 0, "copies are whole");
static_assert(!PROJECT || (NORM == 3 && ACTIVATION == 0), "a residual comes without a norm and an activation");
static_assert(!INT8 || NORM == 3, "codes are of what is normalized");
constexpr int GROUPS = 2;  // that multiply
constexpr int TURN = 1;    // named barriers, one a group

#if INT8
typedef int Sum;
#else
typedef float Sum;
#endif
WGMMA

// Of two columns: HALF of their biases, and the sums of their weights where a norm is deferred, or HALF of their scales.
__device__ __forceinline__ void put_end(u32 to, float2 bias, float2 more) {
  bias = make_float2(HALF * bias.x, HALF * bias.y);
  if (INT8) more = make_float2(HALF * more.x, HALF * more.y);
  if (END_BYTES == 16) write(to, make_float4(bias.x, bias.y, more.x, more.y));
  else write(to, bias);
}
__device__ __forceinline__ float4 end_of(u32 from) {
  if (END_BYTES == 16) return floats_at(from);
  float2 bias = pair_at(from);
  return make_float4(bias.x, bias.y, 0, 0);
}

// x: (M, K), w: (N, K), residual: (M, N), each described to the copy engine in boxes of 128 x BK, BN x BK and 128 x 64,
// out: (M, N), in boxes of 16 x CHUNK; bias: (N,) in 16 bits.
// of_columns: (N,), sums of the weight's rows where a norm is deferred, or scales of int8.
// moments: (M, chunks, 2) of `chunk` channels each, of a norm; out_scale: (2,), scale and shift of codes.
extern "C" __global__ void __launch_bounds__(128 + GROUPS * 128, 1)
product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap out,
        const __grid_constant__ TensorMap residual, const u32* __restrict__ bias, const float2* __restrict__ of_columns,
        const float2* __restrict__ moments, const float* __restrict__ out_scale, int M, int N, int K, int chunk, int chunks,
        float eps) {
  extern __shared__ unsigned char memory[];
  u32 base = (shared(memory) + 1023) & ~1023u;
  u32 staged = base + STAGES * STAGE_BYTES;  // results of each warp group, before that its residual
  u32 ends = staged + GROUPS * OUT_BYTES;    // of each group and pair of columns: bias and sums of the weight
  u32 norms = ends + GROUPS * ENDS_BYTES;    // of each group and row
  u32 full = norms + GROUPS * NORMS_BYTES, empty = full + 8 * STAGES;      // operands of each stage
  u32 known = empty + 8 * STAGES, used = known + 8 * GROUPS;               // ends and norms of each group
  u32 loaded = used + 8 * GROUPS, emptied = loaded + 8 * GROUPS;           // residual of each group
  int tiles_n = (N + BN - 1) / BN, tiles = (M + BM - 1) / BM * tiles_n, trips = (K + BK - 1) / BK;
  int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  int warp = __shfl_sync(~0u, thread / 32, 0);  // of the group; the compiler sees that it is one for all lanes

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      initialize(full + 8 * s, 1);
      initialize(empty + 8 * s, 4);  // each warp of a group
    }
    for (int g = 0; g < GROUPS; ++g) {
      initialize(known + 8 * g, NORM < 3 ? 3 : 1);
      initialize(used + 8 * g, 4);
      initialize(loaded + 8 * g, 1);
      initialize(emptied + 8 * g, 4);
    }
    initialized();
  }
  __syncthreads();

  if (group == 0) {
    fewer_registers<BN <= 160 ? 40 : 24>();
    if (warp == 0 && lane == 0) {
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
#if PROJECT
    if (warp == 1 && lane == 0) {
      for (int tile = blockIdx.x, mine = 0, parity = 1; tile < tiles; tile += gridDim.x) {
        int row = tile / tiles_n * BM, column = tile % tiles_n * BN;
        int there = min(CHUNKS_N, (N - column + CHUNK - 1) / CHUNK);  // chunks of columns that exist
        wait(emptied + 8 * mine, parity);
        expect(loaded + 8 * mine, there * BM * ROW_BYTES);
        for (int c = 0; c < there; ++c)
          fetch(staged + mine * OUT_BYTES + c * BM * ROW_BYTES, &residual, column + c * CHUNK, row, loaded + 8 * mine);
        if (++mine == GROUPS) { mine = 0; parity ^= 1; }
      }
    }
#endif
    if (warp == 2) {
      for (int tile = blockIdx.x, mine = 0, parity = 1; tile < tiles; tile += gridDim.x) {
        int column = tile % tiles_n * BN;
        wait(used + 8 * mine, parity);
#pragma unroll
        for (int part = 0; part < (BN / 2 + 31) / 32; ++part) {
          int pair = part * 32 + lane, there = min(column / 2 + pair, N / 2 - 1);
          if (pair < BN / 2)
            put_end(ends + mine * ENDS_BYTES + pair * END_BYTES, unpacked(bias[there]),
                    END_BYTES == 16 ? of_columns[there] : make_float2(0, 0));
        }
        __syncwarp();
        if (lane == 0) arrive(known + 8 * mine);
        if (++mine == GROUPS) { mine = 0; parity ^= 1; }
      }
    }
#if NORM < 3
    if (warp == 1 || warp == 3) {
      int r = warp / 2 * 64 + lane;  // and the row 32 below
      for (int tile = blockIdx.x, mine = 0, parity = 1; tile < tiles; tile += gridDim.x) {
        int row = tile / tiles_n * BM;
        wait(used + 8 * mine, parity);
        int rows[2] = {min(row + r, M - 1), min(row + r + 32, M - 1)};
        float2 norm[2];
        normalizers(norm, moments, rows, K, chunk, chunks, eps);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          write(norms + mine * NORMS_BYTES + (r + i * 32) * 8, norm[i]);
        __syncwarp();
        if (lane == 0) arrive(known + 8 * mine);
        if (++mine == GROUPS) { mine = 0; parity ^= 1; }
      }
    }
#endif
  } else {
    more_registers<BN <= 160 ? 232 : 240>();
    int mine = group - 1;
    u32 my_ends = ends + mine * ENDS_BYTES, my_norms = norms + mine * NORMS_BYTES;
    // Of the 8 x 8 results that this lane gives the place of: it has four of them, 8 rows and a half of the tile apart.
    u32 results = staged + mine * OUT_BYTES + (PROJECT ? warp * COPY_BYTES : warp * 2 * HALVES * COPY_BYTES);
    constexpr int APART = PROJECT ? 64 * ROW_BYTES : COPY_BYTES;  // bytes between halves
    u32 place = results + (lane & 15) * ROW_BYTES + (lane >> 4) * APART;
    u32 turned = ROW_BYTES == 128 ? lane & 7 : lane >> 1 & 3;  // of the swizzle
#if CODES_WRITTEN
    u32 mine_of_row = results + lane / 4 * ROW_BYTES + (lane & 3) * 2;  // where this lane has results, not a place of others
    turned = lane >> 3 & 3;
    float fine = 1 / out_scale[0], centre = -out_scale[1] * fine;
#endif
    u32 parity = 0;  // of what is known and loaded
    int which = 0;   // of the two copies that a warp has room for
    for (int index = mine;; index += GROUPS, parity ^= 1) {
      int tile = blockIdx.x + index * gridDim.x;
      if (tile >= tiles) break;
      int row = tile / tiles_n * BM, column = tile % tiles_n * BN;
#if PROJECT
      if (lane == 0 && index >= GROUPS) {
        puts_have_been_read();
        arrive(emptied + 8 * mine);
      }
#endif
      Sum totals[HALVES][TOTALS];
      int at = index * trips, stage = at % STAGES, before = 0;
      u32 round = (at / STAGES) & 1;
      if (index) take_turn(TURN + mine);  // the group ahead has its operands
      for (int k = 0; k < trips; ++k) {
        wait(full + 8 * stage, round);
        u64 left = descriptor<SWIZZLED>(base + stage * STAGE_BYTES);
        u64 right = descriptor<SWIZZLED>(base + stage * STAGE_BYTES + X_BYTES);
        begin();
#pragma unroll
        for (int step = 0; step < 4; ++step)  // of 32 bytes
#pragma unroll
          for (int h = 0; h < HALVES; ++h)
            multiply(totals[h], left + h * (64 * SWIZZLED >> 4) + step * STEP, right + step * STEP, (k | step) != 0);
        commit();
        if (k) {
          ended<1>();
          if (lane == 0) arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == STAGES) { stage = 0; round ^= 1; }
      }
      if (tile + (int)gridDim.x < tiles) give_turn(TURN + (mine + 1) % GROUPS);
      wait(known + 8 * mine, parity);
#if NORM < 3
      float2 norm[2 * HALVES];
#pragma unroll
      for (int r = 0; r < 2 * HALVES; ++r)
        norm[r] = pair_at(my_norms + (warp * 16 + lane / 4 + (r & 1) * 8 + (r >> 1) * 64) * 8);
#endif
      u32 from = my_ends + (lane & 3) * END_BYTES;
      float4 next = end_of(from);
#if PROJECT
      wait(loaded + 8 * mine, parity);
#endif
      ended<0>();
      if (lane == 0) arrive(empty + 8 * before);

      // By units of two rows and two columns: what an activation is made from; then, while its slow instruction is under
      // way, the unit before ends.
      constexpr int UNITS = BN / 8 * HALVES;
      float halved[2][4], t[2][4];
      float4 end = next;
      u32 codes[2 * HALVES];
#pragma unroll
      for (int unit = 0; unit <= UNITS; ++unit) {
        if (unit < UNITS) {
          int j = unit / HALVES, h = unit % HALVES;
          if (h == 0) {
            end = next;
            if (j + 1 < BN / 8) next = end_of(from + (j + 1) * 4 * END_BYTES);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float total = (float)totals[h][j * 4 + i], bias = i % 2 ? end.y : end.x;
#if INT8
            total = fmaf(total, i % 2 ? end.w : end.z, bias);
#elif PROJECT
            total += bias;
#elif NORM == 3
            total = fmaf(HALF, total, bias);
#else
            total = fmaf(norm[h * 2 + i / 2].x, fmaf(-norm[h * 2 + i / 2].y, i % 2 ? end.w : end.z, total), bias);
#endif
            halved[unit % 2][i] = total;
            t[unit % 2][i] = turned_down(total);
          }
        }
        if (unit == 0) continue;
        int j = (unit - 1) / HALVES, h = (unit - 1) % HALVES;  // what ends
#if CODES_WRITTEN
        // Two bytes of a row: of its pieces of 16 bytes, two groups of 8 columns are one.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float *half = halved[(unit - 1) % 2] + r * 2, *its = t[(unit - 1) % 2] + r * 2;
          write(mine_of_row + which * HALVES * COPY_BYTES + h * APART + r * 8 * ROW_BYTES
                    + ((j % 8 / 2 ^ turned) << 4) + j % 2 * 8,
                codes_of(fmaf(ended_by(half[0], its[0]), fine, centre), fmaf(ended_by(half[1], its[1]), fine, centre)));
        }
        if (h < HALVES - 1) continue;
#else
        u32 to = place + ((j % (CHUNK / 8) ^ turned) << 4)
                 + (PROJECT ? j / (CHUNK / 8) * BM * ROW_BYTES : which * HALVES * COPY_BYTES);
#if PROJECT
        if (h == 0) load_matrices(codes, to);
#endif
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float *half = halved[(unit - 1) % 2] + r * 2, *its = t[(unit - 1) % 2] + r * 2;
          float low = ended_by(half[0], its[0]), high = ended_by(half[1], its[1]);
#if PROJECT
          float2 residue = unpacked(codes[h * 2 + r]);
          low += residue.x;
          high += residue.y;
#endif
          codes[h * 2 + r] = packed(low, high);
        }
        if (h < HALVES - 1) continue;
        store_matrices(to, codes);
#endif
        if (j % (CHUNK / 8) == CHUNK / 8 - 1) {
          publish();
          __syncwarp();
          if (lane == 0) {
            int c = j / (CHUNK / 8), first = column + c * CHUNK;
            if (first < N) {
              u32 copied = results + (PROJECT ? c * BM * ROW_BYTES : which * HALVES * COPY_BYTES);
#pragma unroll
              for (int half = 0; half < HALVES; ++half)
                put(&out, first, row + half * 64 + warp * 16, copied + half * APART);
            }
            puts_are_a_group();
            if (!PROJECT) puts_have_been_read<1>();  // the other room is free again
          }
          __syncwarp();
          which ^= 1;
        }
      }
      __syncwarp();
      if (lane == 0) arrive(used + 8 * mine);
    }
    if (lane == 0) puts_have_ended();
  }
}
