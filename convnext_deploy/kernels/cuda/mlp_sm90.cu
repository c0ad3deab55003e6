// Both linears of a narrow block on Hopper's matrix units (sm_90a), in 16 bits: norm, linear, activation, linear,
// residual. The hidden map, four times as wide as the others, never leaves the registers.
//
// A program stays on its multiprocessor with both weights in shared memory. Each of its three warp groups takes tiles
// of 64 rows by itself: it multiplies them to BLOCK hidden columns, activates these, and multiplies them from its
// registers to the columns of the result, until no hidden column is left. The groups are not synchronized: while one
// activates, others multiply.
//
// Constants given on the command line: C, a multiple of 32; HIDDEN; BLOCK, a multiple of 16 that divides HIDDEN; and
// BF16, NORM, ACTIVATION as in product_sm90.cu. WGMMA stands for `widen` (64 x BLOCK, from shared memory) and `narrow`
// (64 x C, from registers).

constexpr int GROUPS = 3, ROWS = 64;
constexpr int SLICE = 32, SLICES = C / SLICE;                  // columns of x and of the first weight: 64 bytes
constexpr int TILE_BYTES = ROWS * C * 2, SLICE_BYTES = ROWS * SLICE * 2;
constexpr int WIDE_BYTES = HIDDEN * C * 2, PANEL = 64;         // columns of the second weight: 128 bytes
constexpr int PANEL_BYTES = C * PANEL * 2, PIECE = HIDDEN <= 256 ? HIDDEN : HIDDEN / 2;  // rows that one copy brings
static_assert(C % SLICE == 0 && HIDDEN % BLOCK == 0 && BLOCK % 16 == 0 && HIDDEN % PANEL == 0 && PIECE <= 256);
WGMMA

// x: (M, C) and residual, out: (M, C), described in boxes of 64 x 32; w1: (HIDDEN, C), of PIECE x 32; w2: (C, HIDDEN),
// of C x 64; bias: (HIDDEN,), back_bias: (C,), in 16 bits; moments: (M, chunks, 2) of `chunk` channels each.
extern "C" __global__ void __launch_bounds__(GROUPS * 128, 1)
mlp(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w1, const __grid_constant__ TensorMap w2,
    const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap out, const u32* __restrict__ bias,
    const u32* __restrict__ back_bias, const float2* __restrict__ moments, int M, int chunk, int chunks, float eps) {
  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) u64 barriers[1 + 2 * GROUPS];
  __shared__ alignas(16) float2 columns[HIDDEN];  // of each hidden column: the sum of its weights, and HALF its bias
  __shared__ float2 offsets[C / 2];               // biases of each two columns of the result
  __shared__ float2 norms[GROUPS][ROWS];
  u32 wide = (shared(memory) + 1023) & ~1023u, back = wide + WIDE_BYTES;
  int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  u32 rows = back + WIDE_BYTES + group * TILE_BYTES, results = rows + GROUPS * TILE_BYTES;
  u32 weights = shared(barriers), here = weights + 8 + 16 * group, loaded = here + 8;
  int tiles = (M + ROWS - 1) / ROWS, apart = gridDim.x * GROUPS;

  auto ask = [&](int tile) {
    expect(here, TILE_BYTES);
    for (int s = 0; s < SLICES; ++s) fetch(rows + s * SLICE_BYTES, &x, s * SLICE, tile * ROWS, here);
  };
  if (threadIdx.x == 0) {
    for (int b = 0; b < 1 + 2 * GROUPS; ++b) initialize(weights + 8 * b, 1);
    initialized();
    expect(weights, 2 * WIDE_BYTES);
    for (int s = 0; s < SLICES; ++s)
      for (int r = 0; r < HIDDEN; r += PIECE) fetch(wide + (s * HIDDEN + r) * SLICE * 2, &w1, s * SLICE, r, weights);
    for (int p = 0; p < HIDDEN / PANEL; ++p) fetch(back + p * PANEL_BYTES, &w2, p * PANEL, 0, weights);
  }
  __syncthreads();
  int tile = blockIdx.x * GROUPS + group;
  if (thread == 0 && tile < tiles) ask(tile);
  wait(weights, 0);
  for (int column = threadIdx.x; column < HIDDEN; column += GROUPS * 128) {  // a swizzle keeps a row's elements in it
    float sum = 0;
    for (int s = 0; s < SLICES; ++s)
      for (int pair = 0; pair < SLICE / 2; ++pair) {
        u32 both;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(wide + ((s * HIDDEN + column) * SLICE + pair * 2) * 2));
        float2 value = unpacked(both);
        sum += value.x + value.y;
      }
    float2 two = unpacked(bias[column / 2]);
    columns[column] = make_float2(sum, HALF * (column % 2 ? two.y : two.x));
  }
  if (threadIdx.x < C / 2) offsets[threadIdx.x] = unpacked(back_bias[threadIdx.x]);
  auto normalize = [&](int tile) {
    if (thread >= ROWS) return;
    int row[1] = {min(tile * ROWS + thread, M - 1)};
    float2 norm[1];
    normalizers(norm, moments, row, C, chunk, chunks, eps);
    norms[group][thread] = norm[0];
  };
  if (tile < tiles) normalize(tile);
  __syncthreads();

  int first_row = warp * 16 + lane / 4;  // of the two that this thread has: + 8
  // Of the 8 x 8 results that this lane gives the place of: it has four of them, 8 rows and 8 columns apart.
  u32 place = results + (warp * 16 + (lane & 15)) * SLICE * 2, turned = lane >> 1 & 3, right = lane >> 4;
  for (u32 parity = 0; tile < tiles; tile += apart, parity ^= 1) {
    if (thread == 0) {
      puts_have_been_read();
      expect(loaded, TILE_BYTES);
      for (int s = 0; s < SLICES; ++s) fetch(results + s * SLICE_BYTES, &residual, s * SLICE, tile * ROWS, loaded);
    }
    float2 norm[2];
    for (int r = 0; r < 2; ++r) norm[r] = norms[group][first_row + r * 8];
    float totals[C / 2];
    wait(here, parity);
#pragma unroll 1
    for (int first = 0; first < HIDDEN; first += BLOCK) {
      float hidden[BLOCK / 2];
      begin();
#pragma unroll
      for (int step = 0; step < C / 16; ++step)
        widen(hidden, descriptor<64>(rows + step / 2 * SLICE_BYTES) + step % 2 * STEP,
              descriptor<64>(wide + (step / 2 * HIDDEN + first) * SLICE * 2) + step % 2 * STEP, step != 0);
      commit();
      ended<0>();
      if (first + BLOCK == HIDDEN) {
        meet(1 + group);  // nobody reads the rows or their norms any more
        if (thread == 0 && tile + apart < tiles) ask(tile + apart);
      }
      u32 codes[BLOCK / 16][4];
      float t[2][8];  // of the activation of 16 columns, and while its slow instruction is under way, those before end
#pragma unroll
      for (int j = 0; j <= BLOCK / 16; ++j) {
#pragma unroll
        for (int i = 0; i < 8 && j < BLOCK / 16; ++i) {
          float2 column = columns[first + j * 16 + i / 4 * 8 + (lane & 3) * 2 + i % 2];
          float& half = hidden[j * 8 + i];
          half = fmaf(norm[i / 2 % 2].x, fmaf(-norm[i / 2 % 2].y, column.x, half), column.y);
          t[j % 2][i] = turned_down(half);
        }
#pragma unroll
        for (int i = 0; i < 4 && j > 0; ++i) {
          const float *half = hidden + (j - 1) * 8 + i * 2, *its = t[(j - 1) % 2] + i * 2;
          codes[j - 1][i] = packed(ended_by(half[0], its[0]), ended_by(half[1], its[1]));
        }
      }
      begin();
#pragma unroll
      for (int step = 0; step < BLOCK / 16; ++step) {
        int k = first / 16 + step;
        narrow(totals, codes[step], descriptor<128>(back + k / 4 * PANEL_BYTES) + k % 4 * STEP, (first | step) != 0);
      }
      commit();
    }
    if (tile + apart < tiles) normalize(tile + apart);  // while the last product is under way
    ended<0>();
    wait(loaded, parity);
#pragma unroll
    for (int j = 0; j < C / 8; j += 2) {
      u32 to = place + j / 4 * SLICE_BYTES + ((j % 4 + right ^ turned) << 4), codes[4];
      load_matrices(codes, to);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 before = unpacked(codes[i]), offset = offsets[(j + i / 2) * 4 + (lane & 3)];
        int at = (j + i / 2) * 4 + i % 2 * 2;
        codes[i] = packed(totals[at] + offset.x + before.x, totals[at + 1] + offset.y + before.y);
      }
      store_matrices(to, codes);
    }
    publish();
    meet(1 + group);
    if (thread == 0) {
      for (int s = 0; s < SLICES; ++s) put(&out, s * SLICE, tile * ROWS, results + s * SLICE_BYTES);
      puts_are_a_group();
    }
  }
  if (thread == 0) puts_have_ended();
}
