// Depthwise 7x7 convolution on matrix units, NHWC, with the moments of each pixel, for Hopper (sm_90).
//
// For one channel and one row of the filter, 8 outputs side by side are 16 inputs times a band of 7 taps (16 x 8). So a
// product of 16 x 16 x 8 has 16 sites, each 8 outputs of one row, and 7 of these, one a row of taps, make 128 outputs,
// with sums in fp32. A site is ROWS rows: the inputs of row r of all sites serve each output row r - i that they reach,
// so that ROWS + 6 loads feed 7 * ROWS products.
//
// The matrix units want the columns of one channel side by side, and memory has its channels so. Hence a step of 32
// channels goes through shared memory twice. The copy engine brings it as it is, with its halo and with zeros where the
// map has ended. Warps then turn it, 8 pixels x 8 channels an instruction, and the engine may bring the next one. A
// warp convolves one channel at a time and puts the results where that channel's inputs were; they are turned back on
// the way out, where four lanes have the 32 channels of a pixel. Two or three programs share a multiprocessor, so that
// one turns while another multiplies.
//
// The band of a row is zero but for 7 elements of a column, so that of the two registers which a lane has of it one is
// zero: (tap d, tap d + 1) for d = -1..6, with zeros for taps -1 and 7, is all that there is of a row.
//
// Pieces of 16 bytes (8 columns of a row and channel) are laid out so that no two of those which an instruction reads
// or writes at a time are in the same banks: rows with the same remainder by ROWS side by side, so that the sites of
// STRIPS strips are; a block's or image's pieces 4 of 8 apart from those that are read with them (PLANE, MAP);
// channels one piece apart, and another two behind every 8 (of_channel).
//
// Compiled at run time, hence without headers. Constants given on the command line:
//   CHUNK          channels that have moments of their own: 32 or 64, which are two steps
//   STRIPS, ROWS   of a tile, rows of a strip
//   BLOCKS, IMAGES of a tile, blocks of 8 columns; STRIPS * BLOCKS * IMAGES = 16
//   TILE_ROWS, TILE_COLUMNS  that a tile moves by: at most STRIPS * ROWS, BLOCKS * 8
//   PLANE, MAP     pieces from a block to the next, from an image to the next
//   PITCH          bytes from a channel to the next
//   PROGRAMS       on a multiprocessor
//   H, W, C        of a map
//   BF16           1: bfloat16 instead of float16

constexpr int TAPS = 7, PAD = 3, STEP_CHANNELS = 32, WARPS = 8, THREADS = 32 * WARPS, PIECE = 16;
constexpr int HEIGHT = TILE_ROWS + 2 * PAD, WIDTH = TILE_COLUMNS + 2 * PAD;
constexpr int OWN_BLOCKS = (TILE_COLUMNS + 7) / 8;  // the others have no outputs
constexpr int HALVES = OWN_BLOCKS + 1, PAIRS = BLOCKS == 1 ? 1 : BLOCKS / 2;
constexpr bool SHARE = BLOCKS > 1;  // a quarter of a product's inputs is copied from another instead of loaded
constexpr int RUN = (HEIGHT + ROWS - 1) / ROWS > STRIPS ? (HEIGHT + ROWS - 1) / ROWS : STRIPS;  // of one remainder
// On the way out: warps side by side, rows between those of a warp, and how often it takes one of each image.
constexpr int WARPS_ACROSS = OWN_BLOCKS == 3 ? 4 : OWN_BLOCKS, DISTANCE = WARPS / WARPS_ACROSS;
constexpr int ROUNDS = (TILE_ROWS + DISTANCE - 1) / DISTANCE;
constexpr int STEPS = CHUNK / STEP_CHANNELS, chunks = (C + CHUNK - 1) / CHUNK;
constexpr int ACROSS = (W + TILE_COLUMNS - 1) / TILE_COLUMNS, DOWN = (H + TILE_ROWS - 1) / TILE_ROWS;
constexpr u32 ONES = BF16 ? 0x3F803F80 : 0x3C003C00;
static_assert(STRIPS * BLOCKS * IMAGES == 16 && (BLOCKS == 1 || BLOCKS % 2 == 0) && ROWS % 2 == 0);
static_assert(TILE_ROWS <= STRIPS * ROWS && TILE_COLUMNS <= BLOCKS * 8 && OWN_BLOCKS >= BLOCKS - 1);
static_assert(PITCH % 128 == PIECE);

// Shared memory, bytes from a multiple of 512. What is read beyond the last row brought is 16 pixels of zeros.
constexpr int PIXEL_BYTES = STEP_CHANNELS * 2, BROUGHT_BYTES = IMAGES * HEIGHT * WIDTH * PIXEL_BYTES;
constexpr int BEYOND = BROUGHT_BYTES, BEYOND_BYTES = 16 * PIXEL_BYTES;
constexpr int TABLE = BEYOND + BEYOND_BYTES, TABLE_BYTES = STEP_CHANNELS * 256;
constexpr int TURNED = TABLE + TABLE_BYTES, TURNED_BYTES = STEP_CHANNELS * PITCH + STEP_CHANNELS / 8 * 2 * PIECE;
constexpr int EARLIER = TURNED + TURNED_BYTES, EARLIER_BYTES = STEPS > 1 ? IMAGES * ROUNDS * THREADS / 4 * 8 : 0;
constexpr int BARRIER = EARLIER + EARLIER_BYTES;
static_assert(BARRIER % 8 == 0 && TABLE % 16 == 0 && TURNED % 16 == 0);

__device__ __forceinline__ constexpr int of_channel(int channel) { return channel * PITCH + channel / 8 * 2 * PIECE; }

#ifndef EMULATED
__device__ __forceinline__ void load(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load(u32& r, u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_turned(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// Of the four lanes that have a pixel.
__device__ __forceinline__ float added(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// x, described to the copy engine, y: (N, H, W, C); weight: (49, C); bias: (C,); moments: (N, H, W, chunks, 2).
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)
dwconv_moments(const __grid_constant__ TensorMap x, const u16* __restrict__ weight, const u16* __restrict__ bias,
               u16* __restrict__ y, float2* __restrict__ moments, int N) {
  extern __shared__ unsigned char memory[];
  u32 base = (shared(memory) + 511) & ~511u, full = base + BARRIER;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, four = lane % 4, eight = lane / 4;
  int tiles = (N + IMAGES - 1) / IMAGES * DOWN * ACROSS * chunks;

  auto ask = [&](int tile, int step) {
    int rest = tile / chunks;
    expect(full, BROUGHT_BYTES);
    fetch(base, &x, tile % chunks * CHUNK + step * STEP_CHANNELS, rest % ACROSS * TILE_COLUMNS - PAD,
          rest / ACROSS % DOWN * TILE_ROWS - PAD, rest / (ACROSS * DOWN) * IMAGES, full);
  };
  if (threadIdx.x < BEYOND_BYTES / 4) write(base + BEYOND + threadIdx.x * 4, 0u);
  if (threadIdx.x == 0) {
    initialize(full, 1);
    initialized();
    if ((int)blockIdx.x < tiles) ask(blockIdx.x, 0);
  }
  __syncthreads();  // The barrier is one, and the zeros are there, before anyone looks.

  // The first piece of a site: row `site` of the upper or lower eight of a product.
  auto piece_of = [&](int site, int lower) {
    int strip = site % STRIPS, rest = site / STRIPS;
    int block = BLOCKS == 1 ? 0 : lower + rest % PAIRS * 2, image = BLOCKS == 1 ? rest * 2 + lower : rest / PAIRS;
    return (u32)(image * MAP + block * PLANE + strip) * PIECE;
  };
  // Of the four eights by eights of a product's inputs, the lower left and the upper right one are the same where the
  // lower sites are the upper ones a block to the right.
  // A last block without outputs has no half to its right; the first block's is in other banks.
  int part = lane / 8, site = lane % 8;
  int right = OWN_BLOCKS < BLOCKS && site / STRIPS % PAIRS == PAIRS - 1 ? (1 - BLOCKS) * PLANE * PIECE : PLANE * PIECE;
  u32 first = base + TURNED + piece_of(site, part & 1) + (SHARE ? 0 : part / 2 * (part & 1 ? right : PLANE * PIECE));
  u32 second = base + TURNED + piece_of(site, 1) + right;
  u32 upper = base + TURNED + piece_of(eight, 0) + four * 4, lower = base + TURNED + piece_of(eight, 1) + four * 4;
  int tap = 2 * four - eight + 1;  // of a band's column `eight`, 1 above the lane's first
  bool low = tap >= 0;             // or its other register has them
  u32 band = base + TABLE + (tap & 7) * 16;
  u32 turned_to = base + TURNED + of_channel(eight) + four * 4;
  u32 turned_back = base + TURNED + of_channel(site / 2 * 8 + part * 2 + site % 2);

  int tile = blockIdx.x, step = 0, current = -1;
  u32 parity = 0;
  while (tile < tiles) {
    int chunk = tile % chunks, rest = tile / chunks, start = chunk * CHUNK + step * STEP_CHANNELS;
    int left = rest % ACROSS * TILE_COLUMNS, top = rest / ACROSS % DOWN * TILE_ROWS, image = rest / (ACROSS * DOWN) * IMAGES;

    // A thread: one channel, one pair of neighbours of each row of taps. The bias is where an eighth row would be.
    if (start != current) {
      int channel = start + lane;
      bool real = C % STEP_CHANNELS == 0 || channel < C;
      u32 pairs[8];
#pragma unroll
      for (int i = 0; i < TAPS; ++i) {
        u32 one = real && warp > 0 ? weight[(i * TAPS + warp - 1) * C + channel] : 0;
        u32 two = real && warp < TAPS ? weight[(i * TAPS + warp) * C + channel] : 0;
        pairs[i] = one | two << 16;
      }
      pairs[7] = __float_as_uint(unpacked(real ? bias[channel] : 0).x);
      u32 to = base + TABLE + lane * 256 + warp * 16;
      write(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      write(to + 128, make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
      current = start;
    }
    static_assert(WARPS == TAPS + 1);

    wait(full, parity);
    parity ^= 1;
    for (int line = warp; line < IMAGES * HEIGHT; line += WARPS) {
      int pixel = line * WIDTH + site, inside = line / HEIGHT, row = line - inside * HEIGHT;
      u32 from = base + pixel * PIXEL_BYTES + (part ^ (pixel >> 1 & 3)) * PIECE;  // as the engine swizzles; + 8: the same
      u32 to = turned_to + (inside * MAP + row % ROWS * RUN + row / ROWS) * PIECE;
      u32 values[HALVES][4];
#pragma unroll
      for (int half = 0; half < HALVES; ++half) load_turned(values[half], from + half * 8 * PIXEL_BYTES);
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int g = 0; g < 4; ++g) write(to + half * PLANE * PIECE + of_channel(8 * g), values[half][g]);
    }
    __syncthreads();  // All is turned, and nobody reads any more what the engine has brought.

    int next_tile = tile, next_step = step + 1;
    if (next_step == STEPS || (C % CHUNK != 0 && start + STEP_CHANNELS >= C)) next_tile += gridDim.x, next_step = 0;
    if (threadIdx.x == 0 && next_tile < tiles) {
      publish();
      ask(next_tile, next_step);
    }

#pragma unroll 1
    for (int channel = warp; channel < STEP_CHANNELS; channel += WARPS) {
      uint4 head = read_vector(band + channel * 256), tail = read_vector(band + channel * 256 + 128);
      u32 pairs[TAPS] = {head.x, head.y, head.z, head.w, tail.x, tail.y, tail.z};
      float bias_here = __uint_as_float(tail.w);
      u32 at = of_channel(channel);
      u32 b0[TAPS], b1[TAPS];
      float sums[ROWS][4];
#pragma unroll
      for (int i = 0; i < TAPS; ++i) {
        b0[i] = low ? pairs[i] : 0;
        b1[i] = low ? 0 : pairs[i];
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[r][k] = bias_here;
#pragma unroll
      for (int i = 0; i < ROWS + TAPS - 1; ++i) {
        u32 offset = at + (i % ROWS * RUN + i / ROWS) * PIECE, a[4];
        if (SHARE) {
          u32 left_ones[2];
          load(left_ones, first + offset);
          load(a[3], second + offset);
          a[0] = left_ones[0], a[1] = a[2] = left_ones[1];
        } else {
          load(a, first + offset);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          if (i - r >= 0 && i - r < TAPS) multiply(sums[r], a[0], a[1], a[2], a[3], b0[i - r], b1[i - r]);
      }
      __syncwarp();  // All lanes have their inputs of this channel, which no other warp reads.
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        write(upper + at + r * RUN * PIECE, packed(sums[r][0], sums[r][1]));
        write(lower + at + r * RUN * PIECE, packed(sums[r][2], sums[r][3]));
      }
    }
    __syncthreads();  // All channels have been convolved.

    // A lane has 8 channels of a pixel, a warp 8 columns of every DISTANCE-th row. Sums over channels are products with
    // ones, of two times 8 pixels.
    int count = C % STEP_CHANNELS == 0 ? STEP_CHANNELS : min(STEP_CHANNELS, C - start);
    bool real = C % STEP_CHANNELS == 0 || four * 8 < count;
    bool last = STEPS == 1 || next_step == 0;
    float share = 1.0f / (float)count;
    int block = warp % WARPS_ACROSS, row = warp / WARPS_ACROSS, column = block * 8 + eight;
    bool inside = column < TILE_COLUMNS && (W % TILE_COLUMNS == 0 || left + column < W);
    long long pixel = ((long long)image * H + top + row) * W + left + column;
    u16* to = y + pixel * C + start + four * 8;
    float2* moments_to = moments + pixel * chunks + chunk;
    u32 from = turned_back + (block * PLANE + row % ROWS * RUN + row / ROWS) * PIECE;
    if (OWN_BLOCKS == WARPS_ACROSS || block < OWN_BLOCKS) {
#pragma unroll
      for (int pair = 0; pair < IMAGES * ROUNDS; pair += 2) {
        u32 values[2][4];
        float totals[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          int i = pair + k < IMAGES * ROUNDS ? pair + k : pair, further = i % ROUNDS * DISTANCE;
          load_turned(values[k], from + (i / ROUNDS * MAP + further % ROWS * RUN + further / ROWS) * PIECE);
        }
#pragma unroll
        for (int g = 0; g < 4; g += 2)
          multiply(totals, values[0][g], values[1][g], values[0][g + 1], values[1][g + 1], ONES, ONES);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          int i = pair + k, further = i % ROUNDS * DISTANCE, in = i / ROUNDS;
          if (i >= IMAGES * ROUNDS) continue;
          float mean = totals[2 * k] * share, power = 0;
#pragma unroll
          for (int g = 0; g < 4; ++g) {
            float2 wide = unpacked(values[k][g]);
            float one = wide.x - mean, two = wide.y - mean;
            power = fmaf(one, one, fmaf(two, two, power));
          }
          power = added(real ? power : 0.0f);
          bool here = inside && (further + DISTANCE <= TILE_ROWS || row + further < TILE_ROWS) &&
                      (H % TILE_ROWS == 0 || top + row + further < H) && (IMAGES == 1 || image + in < N);
          long long beyond = ((long long)in * H + further) * W;
          if (here && real)
            *(uint4*)(to + beyond * C) = make_uint4(values[k][0], values[k][1], values[k][2], values[k][3]);
          if (here && four == 0) {
            u32 earlier = base + EARLIER + (i * THREADS / 4 + warp * 8 + eight) * 8;  // of this lane alone
            if (STEPS > 1 && step > 0) {
              float2 before = read_pair(earlier);
              float distance = mean - before.x, part_of_it = (float)count / (float)(STEP_CHANNELS + count);
              mean = before.x + distance * part_of_it;
              power += before.y + distance * distance * part_of_it * (float)STEP_CHANNELS;
            }
            if (last) moments_to[beyond * chunks] = make_float2(mean, power);
            else write(earlier, make_float2(mean, power));
          }
        }
      }
    }
    __syncthreads();  // The results have been read; the next step is turned into their place, with its table.
    tile = next_tile, step = next_step;
  }
}
