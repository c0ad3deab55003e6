// Depthwise 7x7 convolution in float16, NHWC, with the moments of each pixel, for Hopper (sm_90).
//
// A program stays on its multiprocessor and takes tiles of one chunk of channels in turn. The copy engine brings a
// tile with its halo into shared memory, zeros where the map has ended, while the one before it is computed: no thread
// makes an address or a mask for what it reads. A thread has two channels of 7 x COLUMNS pixels. It holds their 49
// weights in registers, and each pair of channels that it reads serves up to 7 rows. A row of 7 taps is added in
// packed halves, two channels an instruction, and rows are added in fp32.
//
// Compiled at run time, hence without headers. Constants given on the command line:
//   CHUNK    channels: 64, a warp's lanes; or 32, where a warp has two strips of rows
//   COLUMNS  pixels across that a thread computes
//   ACROSS   groups of COLUMNS in a tile
//   STRIPS   groups of 7 rows in a tile; 2 with a CHUNK of 32
//   IMAGES   in a tile
//   H, W, C  of a map: so that addresses are immediates, and masks are left out where tiles fill the map

constexpr int TAPS = 7, PAD = 3, ROWS = 7, LANES = CHUNK / 2, PIXELS = ROWS * COLUMNS;
constexpr int TILE_ROWS = STRIPS * ROWS, TILE_COLUMNS = ACROSS * COLUMNS;
// An odd width puts the two strips of a warp into different banks.
constexpr int WIDTH = TILE_COLUMNS + 2 * PAD + (CHUNK == 32 && TILE_COLUMNS % 2 == 0), HEIGHT = TILE_ROWS + 2 * PAD;
constexpr int BUFFER_BYTES = IMAGES * HEIGHT * WIDTH * CHUNK * 2;
constexpr bool EVEN = H % TILE_ROWS == 0 && W % TILE_COLUMNS == 0;
constexpr int WORKERS = ACROSS * STRIPS * IMAGES * LANES, WARPS = WORKERS / 32;  // and one warp that only asks for tiles
static_assert(WORKERS % 32 == 0);

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) { u32 d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
__device__ __forceinline__ u32 mul2(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
// Sums over LANES lanes of each of PIXELS values, at a time: half of the values go to the lane's partner, and so on.
// Lanes end with LEFT sums each, in order; where there are more lanes than values, PER lanes have the same one.
constexpr int SLOTS = PIXELS <= 16 ? 16 : 32, LEFT = SLOTS > LANES ? SLOTS / LANES : 1;
constexpr int PER = LANES > SLOTS ? LANES / SLOTS : 1;
__device__ __forceinline__ void reduced(float (&values)[SLOTS], int lane) {
  int count = SLOTS;
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    bool upper = lane & step;
    if (count > 1) {
      count /= 2;
#pragma unroll
      for (int i = 0; i < SLOTS / 2; ++i)
        if (i < count) {
          float give = upper ? values[i] : values[i + count], keep = upper ? values[i + count] : values[i];
          values[i] = keep + __shfl_xor_sync(~0u, give, step);
        }
    } else {
      values[0] += __shfl_xor_sync(~0u, values[0], step);
    }
  }
}

// x, described to the copy engine, y: (N, H, W, C); weight: (49, C); bias: (C,); moments: (N, H, W, chunks, 2).
extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1)
dwconv_moments(const __grid_constant__ TensorMap x, const u32* __restrict__ weight, const u32* __restrict__ bias,
               u32* __restrict__ y, float2* __restrict__ moments, int N) {
  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) u64 barriers[4];
  u32 base = (shared(memory) + 127) & ~127u, full = shared(barriers), empty = full + 16;
  constexpr int chunks = (C + CHUNK - 1) / CHUNK, across = (W + TILE_COLUMNS - 1) / TILE_COLUMNS;
  constexpr int down = (H + TILE_ROWS - 1) / TILE_ROWS;
  int each = (N + IMAGES - 1) / IMAGES * down * across, tiles = each * chunks;

  int lane = threadIdx.x % LANES, unit = threadIdx.x / LANES;
  int strip = unit % STRIPS, group = unit / STRIPS % ACROSS, inside = unit / (STRIPS * ACROSS);
  u32 corner = (((inside * HEIGHT + strip * ROWS) * WIDTH + group * COLUMNS) * CHUNK + lane * 2) * 2;

  auto ask = [&](int tile, int buffer) {
    int rest = tile % each;
    expect(full + 8 * buffer, BUFFER_BYTES);
    fetch(base + buffer * BUFFER_BYTES, &x, tile / each * CHUNK, rest % across * TILE_COLUMNS - PAD,
          rest / across % down * TILE_ROWS - PAD, rest / (across * down) * IMAGES, full + 8 * buffer);
  };
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; ++b) {
      initialize(full + 8 * b, 1);
      initialize(empty + 8 * b, WARPS);
    }
    initialized();
  }
  __syncthreads();
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS)
      for (int index = 0, tile = blockIdx.x; tile < tiles; ++index, tile += gridDim.x) {
        if (index > 1) wait(empty + 8 * (index & 1), (index / 2 - 1) & 1);
        ask(tile, index & 1);
      }
    return;
  }

  u32 taps[TAPS * TAPS];
  float2 start;
  int current = -1;
  for (int index = 0;; ++index) {
    int tile = blockIdx.x + index * gridDim.x;
    if (tile >= tiles) break;
    int chunk = tile / each, buffer = index & 1, rest = tile % each;
    int channel = chunk * CHUNK + lane * 2;
    bool real = C % CHUNK == 0 || channel < C;
    if (chunk != current) {
#pragma unroll
      for (int t = 0; t < TAPS * TAPS; ++t) taps[t] = real ? weight[(t * C + channel) / 2] : 0;
      start = real ? unpacked(bias[channel / 2]) : make_float2(0, 0);
      current = chunk;
    }
    float2 sums[ROWS][COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = start;

    wait(full + 8 * buffer, (index >> 1) & 1);
    u32 from = base + buffer * BUFFER_BYTES + corner;
#pragma unroll
    for (int i = 0; i < ROWS + TAPS - 1; ++i) {
      u32 values[COLUMNS + TAPS - 1];
#pragma unroll
      for (int k = 0; k < COLUMNS + TAPS - 1; ++k)
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(values[k]) : "r"(from + (i * WIDTH + k) * CHUNK * 2));
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        int tap = i - r;
        if (tap < 0 || tap >= TAPS) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          u32 row = mul2(values[c], taps[tap * TAPS]);
#pragma unroll
          for (int k = 1; k < TAPS; ++k) row = fma2(values[c + k], taps[tap * TAPS + k], row);
          float2 wide = unpacked(row);
          sums[r][c].x += wide.x;
          sums[r][c].y += wide.y;
        }
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(empty + 8 * buffer);

    int image = rest / (across * down) * IMAGES + inside;
    int top = rest / across % down * TILE_ROWS + strip * ROWS, left = rest % across * TILE_COLUMNS + group * COLUMNS;
    bool here = IMAGES == 1 || image < N;
    long long pixel = ((long long)image * H + top) * W + left;
    u32* to = y + (pixel * C + channel) / 2;
    float2* moments_to = moments + pixel * chunks + chunk;
    float count = (float)min(CHUNK, C - chunk * CHUNK);
    float totals[SLOTS], powers[SLOTS];
#pragma unroll
    for (int p = 0; p < SLOTS; ++p) totals[p] = p < PIXELS ? sums[p / COLUMNS % ROWS][p % COLUMNS].x + sums[p / COLUMNS % ROWS][p % COLUMNS].y : 0;
    reduced(totals, lane);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) totals[i] /= count;
#pragma unroll
    for (int p = 0; p < SLOTS; ++p) {
      if (p >= PIXELS) { powers[p] = 0; continue; }
      float mean = __shfl_sync(~0u, totals[p % LEFT], p / LEFT * PER, LANES);
      float low = sums[p / COLUMNS][p % COLUMNS].x - mean, high = sums[p / COLUMNS][p % COLUMNS].y - mean;
      powers[p] = real ? fmaf(low, low, high * high) : 0.0f;
    }
    reduced(powers, lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        if (here && real && (EVEN || (top + r < H && left + c < W))) {
          to[(r * W + c) * C / 2] = packed(sums[r][c].x, sums[r][c].y);
        }
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      int p = lane / PER * LEFT + i, r = p / COLUMNS, c = p % COLUMNS;
      if (lane % PER == 0 && p < PIXELS && here && (EVEN || (top + r < H && left + c < W)))
        moments_to[(r * W + c) * chunks] = make_float2(totals[i], powers[i]);
    }
  }
}
