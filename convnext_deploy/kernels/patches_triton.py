"""Convolutions whose kernel does not overlap itself, as products over patches, with the norm behind or before them."""

import triton
import triton.language as tl

from .triton_blocks import (
    column,
    empty_total,
    merged,
    part_and_tile,
    product,
    row_moments,
    scale_and_shift,
    store_tile,
    tile_rows,
    wait_for_earlier,
    weight_pointers,
)


@triton.jit
def stem_kernel(x, weight, bias, gain, offset, out, M, BATCH_STRIDE, ROW_STRIDE, COLUMN_STRIDE, CHANNEL_STRIDE,
                H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                EPS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """K x K convolution of stride K, and norm: a tile has all N channels of its pixels.

    Args:
        x: images of any type and strides, C channels; uint8 becomes the weight's type exactly.
        weight: (N, C, K, K); bias, gain, offset: (N,), the last two the norm's.
        out: (M, N), for M pixels of maps of H x W.
        BK: K * K * C or more.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < M
    pixel = tl.minimum(rows, M - 1).to(tl.int64)
    base = pixel // (H * W) * BATCH_STRIDE + pixel // W % H * K * ROW_STRIDE + pixel % W * K * COLUMN_STRIDE
    k = tl.arange(0, BK)  # row of the patch, column, channel: neighbours in memory where images are NHWC
    down, across, channel = k // (K * C), k // C % K, k % C
    inside = k < K * K * C
    wait_for_earlier(PDL)
    at = base[:, None] + (down * ROW_STRIDE + across * COLUMN_STRIDE + channel * CHANNEL_STRIDE)[None, :]
    a = tl.load(x + at, mask=ok[:, None] & inside[None, :], other=0).to(tl.float32).to(weight.dtype.element_ty)
    columns = tl.arange(0, BN)
    place = columns[None, :] * (K * K * C) + (channel * (K * K) + down * K + across)[:, None]
    b = tl.load(weight + place, mask=inside[:, None] & (columns < N)[None, :], other=0.0)
    y = tl.dot(a, b, input_precision=PRECISION) + column(bias, columns, N)
    mean, power = row_moments(y, (columns < N)[None, :], N)
    scale, shift = scale_and_shift(mean, power, N, EPS, NORM)
    y = (y - shift[:, None]) * scale[:, None] * column(gain, columns, N)
    if OFFSET:
        y += column(offset, columns, N)
    store_tile(out, y, rows, ok, columns, N)


@triton.jit
def pixel_normalizer(x, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
    """Scale and shift of BM pixels. `x`: (BM, 1) pointers to their C channels, which the product reads again."""
    count = tl.zeros([BM], tl.float32)
    mean, power = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for start in tl.range(0, C, BK):
        k = start + tl.arange(0, BK)
        inside = (k < C)[None, :]
        values = tl.load(x + k[None, :], mask=inside, other=0.0).to(tl.float32)
        many = tl.zeros([BM], tl.float32) + tl.minimum(C - start, BK).to(tl.float32)
        more_mean, more_power = row_moments(values, inside, many)
        count, mean, power = merged(count, mean, power, many, more_mean, more_power)
    return scale_and_shift(mean, power, C, EPS, NORM)


@triton.jit
def downsample_kernel(x, weight, bias, out, M, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
                      EPS: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """Norm of each pixel, 2 x 2 convolution of stride 2; or the sums of 4 / SPLIT of its taps a program.

    Args:
        x: (images, 2 H, 2 W, C); weight: (N, 2, 2, C); bias: (N,); out: (M, N), for M pixels of maps of H x W.
        SPLIT: 1, 2 or 4; if more than 1, out is (SPLIT, M, N) fp32: `add_parts_kernel` ends it.
    """
    TILES_M = (M + BM - 1) // BM
    part, tile_m, tile_n = part_and_tile(TILES_M, (N + BN - 1) // BN, GROUP, SPLIT)
    _, rows, ok = tile_rows(tile_m, M, TILES_M, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    corner = (rows // W).to(tl.int64) * (4 * W) + rows % W * 2  # of all pixels of x, row after row
    y = empty_total(weight, BM, BN)
    wait_for_earlier(PDL)
    for step in tl.static_range(4 // SPLIT):
        tap = part * (4 // SPLIT) + step
        pixels = x + (corner + (tap // 2 * 2 * W + tap % 2))[:, None] * C
        scale, shift = pixel_normalizer(pixels, C, BM, BK, EPS, NORM)
        y = product(y, pixels, weight_pointers(weight, columns, N, 4 * C) + tap * C, shift, scale, bias, bias, C, BK,
                    PRECISION, "normalize", 0, 1)  # fmt: skip
    if SPLIT > 1:
        store_tile(out + part.to(tl.int64) * M * N, y, rows, ok, columns, N)
    else:
        store_tile(out, y + column(bias, columns, N), rows, ok, columns, N)


@triton.jit
def normalized_patches_kernel(x, out, M, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
                              BP: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm of each pixel, and the four of a patch one after the other: a convolution of stride 2 is a product then.

    Args:
        x: (images, 2 H, 2 W, C); out: (M, 2, 2, C), for M pixels of maps of H x W.
    """
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    pixel, tap = place // 4, place % 4
    corner = (pixel // W).to(tl.int64) * (4 * W) + pixel % W * 2 + tap // 2 * 2 * W + tap % 2
    channels = tl.arange(0, WIDE)
    real = (channels < C)[None, :]
    mask = (place < 4 * M)[:, None] & real
    wait_for_earlier(PDL)
    values = tl.load(x + corner[:, None] * C + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    mean, power = row_moments(values, real, C)
    scale, shift = scale_and_shift(mean, power, C, EPS, NORM)
    y = (values - shift[:, None]) * scale[:, None]
    tl.store(out + place.to(tl.int64)[:, None] * C + channels[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def pool_norm_kernel(x, out, PIXELS, C: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr,
                     NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program an image: mean over its PIXELS, norm. x: (images, PIXELS, C); out: (images, C) fp32."""
    image = tl.program_id(0)
    channels = tl.arange(0, WIDE)
    real = channels < C
    total = tl.zeros([WIDE], tl.float32)
    wait_for_earlier(PDL)
    for first in tl.range(0, PIXELS, BP):
        pixel = first + tl.arange(0, BP)
        at = (image.to(tl.int64) * PIXELS + pixel)[:, None] * C + channels[None, :]
        total += tl.sum(tl.load(x + at, mask=(pixel < PIXELS)[:, None] & real[None, :], other=0.0).to(tl.float32), 0)
    pooled = (total / PIXELS)[None, :]
    mean, power = row_moments(pooled, real[None, :], C)
    scale, shift = scale_and_shift(mean, power, C, EPS, NORM)
    y = (pooled - shift[:, None]) * scale[:, None]
    tl.store(out + image.to(tl.int64) * C + channels[None, :], y, mask=real[None, :])
