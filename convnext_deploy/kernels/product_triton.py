"""The two products of a block, with everything that stands around them."""

import triton
import triton.language as tl

from .triton_blocks import (
    activated,
    column,
    empty_total,
    normalizer,
    part_and_tile,
    product,
    quantized,
    row_pointers,
    store_tile,
    tile,
    tile_rows,
    wait_for_earlier,
    weight_pointers,
)


@triton.jit
def expand_kernel(x, weight, bias, moments, row_sums, scales, out_scale, out, squares, ROWS, TILES, TILES_M,
                  N: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
                  EPS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, SQUARES: tl.constexpr,
                  SCALED: tl.constexpr, QUANTIZE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm of x's rows, linear, activation.

    In 16 bits the product is of the rows as they are, and the norm is applied to its result: `W ((x - shift) scale)` is
    `scale (W x - shift (W 1))`, and W 1 are the row sums. In 32 bits, where a tf32 product would round x before the
    mean is gone, the rows are normalized first.

    Args:
        x: (M, K); weight: (N, K); bias, row_sums: (N,); moments: (M, CHUNKS, 2); out: (M, N).
        scales: (N,) fp32, with SCALED: 8-bit operands, whose product times these is the linear's.
        out_scale: (2,) fp32, with QUANTIZE: a scale and a shift; out is the activation less the shift over the scale,
            in 8 bits.
        squares: (M / ROWS, TILES, N) fp32, with SQUARES: sums of squares of each tile's rows.
    """
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    tile_m, tile_n = tile(tl.program_id(0), TILES_M, (N + BN - 1) // BN, GROUP)
    _, rows, ok = tile_rows(tile_m, ROWS, TILES, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    wait_for_earlier(PDL)
    scale, shift = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if not SCALED:
        scale, shift = normalizer(moments, rows, K, BC, CHUNKS, WIDE, EPS, NORM)
    y = product(empty_total(weight, BM, BN), row_pointers(x, rows, K), weight_pointers(weight, columns, N, K), shift,
                scale, bias, bias, K, BK, PRECISION, "normalize" if exact else "none", 0, 1)  # fmt: skip
    if SCALED:
        y = y.to(tl.float32) * column(scales, columns, N)
    elif not exact:
        y = scale[:, None] * (y - shift[:, None] * column(row_sums, columns, N))
    y = activated(y + column(bias, columns, N), ACTIVATION, exact)
    if QUANTIZE:
        codes = quantized((y - tl.load(out_scale + 1)) / tl.load(out_scale), out.dtype.element_ty)
        store_tile(out, codes, rows, ok, columns, N)
    else:
        store_tile(out, y, rows, ok, columns, N)
    if SQUARES:
        sums = tl.sum(tl.where(ok[:, None], y * y, 0.0), 0)
        tl.store(squares + tile_m.to(tl.int64) * N + columns, sums, mask=columns < N)


@triton.jit
def project_kernel(hidden, weight, bias, residual, factor, scales, hidden_scale, out, ROWS, TILES, TILES_M,
                   N: tl.constexpr, K: tl.constexpr, PROLOGUE: tl.constexpr, SCALED: tl.constexpr,
                   PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   GROUP: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Linear and residual, after GRN's factor where there is one; or the linear's sums alone, a part of K a program.

    Args:
        hidden: (M, K); weight: (N, K); bias: (N,); residual, out: (M, N).
        factor: (M / ROWS, K) fp32, with PROLOGUE "factor" or "factor_quantized".
        scales, hidden_scale: as `expand_kernel`'s and `product`'s.
        SPLIT: if more than 1, out is (SPLIT, M, N) in what the product is added up in: `add_parts_kernel` ends it.
    """
    part, tile_m, tile_n = part_and_tile(TILES_M, (N + BN - 1) // BN, GROUP, SPLIT)
    image, rows, ok = tile_rows(tile_m, ROWS, TILES, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    unused = tl.zeros([BM], tl.float32)
    wait_for_earlier(PDL)
    y = product(empty_total(weight, BM, BN), row_pointers(hidden, rows, K), weight_pointers(weight, columns, N, K),
                unused, unused, factor + image * K, hidden_scale, K, BK, PRECISION, PROLOGUE, part, SPLIT)  # fmt: skip
    if SPLIT > 1:
        store_tile(out + part.to(tl.int64) * (TILES_M // TILES * ROWS) * N, y, rows, ok, columns, N)
    else:
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask = ok[:, None] & (columns < N)[None, :]
        if SCALED:
            y = y.to(tl.float32) * column(scales, columns, N)
        y += column(bias, columns, N) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        store_tile(out, y, rows, ok, columns, N)


@triton.jit
def add_parts_kernel(parts, bias, residual, scales, out, M, N: tl.constexpr, SPLIT: tl.constexpr,
                     SCALED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """What a split product's kernel would have done with its result, BLOCK results a program.

    Args:
        parts: (SPLIT, M, N) fp32 or int32, added in order; bias, scales: (N,); residual, out: (M, N).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < M * N
    columns = at % N
    wait_for_earlier(PDL)
    place = parts + at
    y = tl.load(place, mask=ok, other=0)
    for _ in tl.static_range(1, SPLIT):
        place += M * N
        y += tl.load(place, mask=ok, other=0)
    y = y.to(tl.float32)
    if SCALED:
        y *= tl.load(scales + columns)
    y += tl.load(bias + columns).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def grn_factor_kernel(squares, weight, factor, TILES, C: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """One program an image: factor (images, C) is 1 + weight * norm / (mean norm + EPS).

    squares: (images, TILES, C).

    The tiles are added in order: the result does not depend on which of them was written first.
    """
    image = tl.program_id(0)
    channels = tl.arange(0, WIDE)
    real = channels < C
    total = tl.zeros([WIDE], tl.float32)
    wait_for_earlier(PDL)
    for index in tl.range(0, TILES):
        total += tl.load(squares + (image * TILES + index).to(tl.int64) * C + channels, mask=real, other=0.0)
    norm = tl.sqrt(total)
    response = norm / (tl.sum(norm) / C + EPS)
    gain = tl.load(weight + channels, mask=real, other=0.0).to(tl.float32)
    tl.store(factor + image.to(tl.int64) * C + channels, 1.0 + gain * response, mask=real)
