"""Depthwise convolution in NHWC with the moments of each pixel, and with the whole norm, or the norm alone in codes.

A program computes ROWS x BW pixels x BC channels. Each vector that it loads serves up to K output rows from registers,
and the K * K weights of its channels stay there: with 2 channels a thread the loop over taps is FMAs and little else.
Shapes are compile-time numbers, so that addresses are immediates of the loads.
"""

import triton
import triton.language as tl

from .triton_blocks import merged, normalizer, quantized, row_moments, scale_and_shift, wait_for_earlier


@triton.jit
def convolved(x, weight, bias, image, top, columns, channels, H: tl.constexpr, W: tl.constexpr,
              C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
              PACKED: tl.constexpr):  # fmt: skip
    """ROWS tensors (BW, BC) in fp32: convolution and bias of the pixels (top + r, columns).

    Args:
        x: (N, H, W, C); weight: (K * K, C); bias: (C,).
        PACKED: the taps of one kernel row are added in fp16, two channels an instruction, and the rows in fp32.
    """
    PAD: tl.constexpr = K // 2
    real = (channels < C)[None, :]
    corner = ((image * H + top - PAD) * W + columns - PAD).to(tl.int64)[:, None] * C + channels[None, :]
    inside = ()
    for kw in tl.static_range(K):
        column = (columns + (kw - PAD))[:, None]
        inside += ((column >= 0) & (column < W) & real,)
    weights = ()
    for tap in tl.static_range(K * K):
        value = tl.load(weight + tap * C + channels, mask=channels < C, other=0.0)[None, :]
        weights += (value if PACKED else value.to(tl.float32),)
    start = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([BW, BC], tl.float32) + start,)
    for i in tl.static_range(ROWS + K - 1):
        row = tl.full([BW, 1], 0, tl.int32) + (top + (i - PAD))
        values = ()
        for kw in tl.static_range(K):
            mask = inside[kw] & (row >= 0) & (row < H)
            value = tl.load(x + corner + (i * W + kw) * C, mask=mask, other=0.0)
            values += (value if PACKED else value.to(tl.float32),)
        changed = ()
        for r in tl.static_range(ROWS):
            if i - r >= 0 and i - r < K:
                changed += (row_added(sums[r], values, weights, (i - r) * K, K, PACKED),)
            else:
                changed += (sums[r],)
        sums = changed
    return sums


@triton.jit
def row_added(total, values, weights, FIRST: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr):
    """One row of taps onto a sum. FMAs are spelled out: Triton 3.10 no longer contracts products and sums by itself."""
    if PACKED:
        row = values[0] * weights[FIRST]
        for kw in tl.static_range(1, K):
            # The addition of zeros makes LLVM hold a weight's two channels in one register: without it every FMA is
            # preceded by two byte permutations (compiled for sm_90: 2.10 instead of 1.67 instructions a product).
            row = tl.fma(values[kw], weights[FIRST + kw] + tl.zeros_like(values[kw]), row)
        return total + row.to(tl.float32)
    for kw in tl.static_range(K):
        total = tl.fma(values[kw], tl.broadcast_to(weights[FIRST + kw], total.shape), total)
    return total


@triton.jit
def place(H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr):
    """The image, first row and columns of this program's pixels."""
    STRIPS: tl.constexpr = (H + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (W + BW - 1) // BW
    pid = tl.program_id(0)
    return (
        pid // (STRIPS * ACROSS),
        pid % (STRIPS * ACROSS) // ACROSS * ROWS,
        pid % ACROSS * BW + tl.arange(0, BW),
    )


@triton.jit
def dwconv_moments_kernel(x, weight, bias, y, moments, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
                          K: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
                          PACKED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Deferred norm: y (N, H, W, C) is the convolution, moments (N, H, W, chunks, 2) fp32 what the norm needs of it."""
    CHUNKS: tl.constexpr = (C + BC - 1) // BC
    image, top, columns = place(H, W, ROWS, BW)
    chunk = tl.program_id(1)
    channels = chunk * BC + tl.arange(0, BC)
    wait_for_earlier(PDL)
    sums = convolved(x, weight, bias, image, top, columns, channels, H, W, C, K, ROWS, BW, BC, PACKED)
    pixels = (image * H + top) * W + columns
    for r in tl.static_range(ROWS):
        ok = (columns < W) & (tl.full([BW], r, tl.int32) + top < H)
        real = ok[:, None] & (channels < C)[None, :]
        at = (pixels + r * W).to(tl.int64)
        tl.store(y + at[:, None] * C + channels[None, :], sums[r].to(y.dtype.element_ty), mask=real)
        mean, power = row_moments(sums[r], (channels < C)[None, :], tl.minimum(C - chunk * BC, BC).to(tl.float32))
        tl.store(moments + (at * CHUNKS + chunk) * 2, mean, mask=ok)
        tl.store(moments + (at * CHUNKS + chunk) * 2 + 1, power, mask=ok)


@triton.jit
def dwconv_norm_kernel(x, weight, bias, y, out, out_scale, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
                       K: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, PACKED: tl.constexpr,
                       EPS: tl.constexpr, NORM: tl.constexpr, QUANTIZE: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
    """Final norm: a program takes all channels of its pixels, twice.

    The first time it writes the convolution to y and keeps the moments; the second time it reads its own y, which is
    in the L2 still, and writes it normalized in its place; with QUANTIZE to out instead, over out_scale (C,) and
    in 8 bits.
    """
    image, top, columns = place(H, W, ROWS, BW)
    pixels = (image * H + top) * W + columns
    counts, means, powers = (), (), ()
    for _ in tl.static_range(ROWS):
        counts += (tl.zeros([BW], tl.float32),)
        means += (tl.zeros([BW], tl.float32),)
        powers += (tl.zeros([BW], tl.float32),)
    wait_for_earlier(PDL)
    for first in tl.range(0, C, BC, num_stages=1):
        channels = first + tl.arange(0, BC)
        sums = convolved(x, weight, bias, image, top, columns, channels, H, W, C, K, ROWS, BW, BC, PACKED)
        next_counts, next_means, next_powers = (), (), ()
        for r in tl.static_range(ROWS):
            ok = (columns < W) & (tl.full([BW], r, tl.int32) + top < H)
            at = (pixels + r * W).to(tl.int64)[:, None] * C + channels[None, :]
            tl.store(y + at, sums[r].to(y.dtype.element_ty), mask=ok[:, None] & (channels < C)[None, :])
            many = tl.zeros([BW], tl.float32) + tl.minimum(C - first, BC).to(tl.float32)
            mean, power = row_moments(sums[r], (channels < C)[None, :], many)
            count, mean, power = merged(counts[r], means[r], powers[r], many, mean, power)
            next_counts += (count,)
            next_means += (mean,)
            next_powers += (power,)
        counts, means, powers = next_counts, next_means, next_powers
    tl.debug_barrier()  # the threads that read y below are not those that wrote it
    for r in tl.static_range(ROWS):
        scale, shift = scale_and_shift(means[r], powers[r], C, EPS, NORM)
        ok = (columns < W) & (tl.full([BW], r, tl.int32) + top < H)
        for first in tl.range(0, C, BC, num_stages=1):
            channels = first + tl.arange(0, BC)
            at = (pixels + r * W).to(tl.int64)[:, None] * C + channels[None, :]
            mask = ok[:, None] & (channels < C)[None, :]
            value = (tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - shift[:, None]) * scale[:, None]
            if QUANTIZE:
                inverse = 1.0 / tl.load(out_scale + channels, mask=channels < C, other=1.0)
                tl.store(out + at, quantized(value * inverse[None, :], out.dtype.element_ty), mask=mask)
            else:
                tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_codes_kernel(y, moments, out_scale, out, M, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                      WIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """BM rows of y (M, C), normalized by their moments (M, CHUNKS, 2), over out_scale (C,), in 8 bits."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    wait_for_earlier(PDL)
    scale, shift = normalizer(moments, tl.minimum(rows, M - 1), C, CHUNK, CHUNKS, WIDE, EPS, NORM)
    for first in tl.static_range(0, C, BC):
        channels = first + tl.arange(0, BC)
        mask = (rows < M)[:, None] & (channels < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + channels[None, :]
        value = (tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - shift[:, None]) * scale[:, None]
        inverse = 1.0 / tl.load(out_scale + channels, mask=channels < C, other=1.0)
        tl.store(out + at, quantized(value * inverse[None, :], out.dtype.element_ty), mask=mask)
