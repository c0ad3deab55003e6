"""Both linears of a block in one kernel, for widths whose whole rows fit a program."""

import triton
import triton.language as tl

from .triton_blocks import (
    activated,
    column,
    loaded,
    normalizer,
    row_pointers,
    store_tile,
    tile_rows,
    wait_for_earlier,
    weight_pointers,
)


@triton.jit
def normalized(x, rows, k, scale, shift, C: tl.constexpr, END: tl.constexpr):
    """Columns k of rows of x (M, C), whose norm is `(x - shift) * scale`, in x's type. END: where k ends."""
    a = loaded(row_pointers(x, rows, C) + k[None, :], k[None, :], min(END, C), END)
    return ((a.to(tl.float32) - shift[:, None]) * scale[:, None]).to(a.dtype)


@triton.jit
def widened(total, a, weight, columns, k, C: tl.constexpr, HIDDEN: tl.constexpr, END: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """`total` (BM, BH) plus a (BM, k) @ weight[columns, k]^T. weight: (HIDDEN, C); END: where k ends."""
    at = weight_pointers(weight, columns, HIDDEN, C) + k[:, None]
    return tl.dot(a, loaded(at, k[:, None], min(END, C), END), total, input_precision=PRECISION)


@triton.jit
def narrowed(total, hidden, weight, columns, k, C: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr,
             END: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`total` (BM, k) plus hidden (BM, BH) @ weight[k, columns]^T. weight: (C, HIDDEN); END: where k ends."""
    at = weight_pointers(weight, k, min(END, C), HIDDEN) + columns[:, None]
    return tl.dot(hidden, loaded(at, columns[:, None], HIDDEN, BH), total, input_precision=PRECISION)


@triton.jit
def finish(y, bias, residual, out, rows, ok, columns, C: tl.constexpr):
    """y (BM, columns) plus bias and residual, into out."""
    at = residual + rows.to(tl.int64)[:, None] * C + columns[None, :]
    y += column(bias, columns, C) + tl.load(at, mask=ok[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)
    store_tile(out, y, rows, ok, columns, C)


@triton.jit
def mlp_kernel(x, weight, bias, moments, back_weight, back_bias, residual, out, M, C: tl.constexpr,
               HIDDEN: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr, EPS: tl.constexpr,
               NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
               BH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm of x's rows, linear, activation, linear, residual.

    The hidden columns are made BH at a time, rounded to x's type and multiplied at once: they never leave the program.

    Args:
        x, residual, out: (M, C); moments: (M, CHUNKS, 2).
        weight: (HIDDEN, C); bias: (HIDDEN,); back_weight: (C, HIDDEN); back_bias: (C,).
        HEAD, REST: the C channels in two parts, since a product's sizes are powers of two; REST 0: all are in HEAD.
    """
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    wait_for_earlier(PDL)
    # Rows are counted from the program's first, since pointers to those of the whole matrix take twice the registers.
    start = tl.program_id(0).to(tl.int64) * BM
    _, rows, ok = tile_rows(0, (M - start).to(tl.int32), 1, BM)
    x, residual, out, moments = x + start * C, residual + start * C, out + start * C, moments + start * (CHUNKS * 2)
    scale, shift = normalizer(moments, rows, C, BC, CHUNKS, WIDE, EPS, NORM)
    first = tl.arange(0, HEAD)
    a = normalized(x, rows, first, scale, shift, C, HEAD)
    y = tl.zeros([BM, HEAD], tl.float32)
    if REST > 0:
        second = HEAD + tl.arange(0, REST)
        b = normalized(x, rows, second, scale, shift, C, HEAD + REST)
        z = tl.zeros([BM, REST], tl.float32)
    for begin in tl.range(0, HIDDEN, BH):
        columns = begin + tl.arange(0, BH)
        hidden = tl.broadcast_to(column(bias, columns, HIDDEN), [BM, BH])
        hidden = widened(hidden, a, weight, columns, first, C, HIDDEN, HEAD, PRECISION)
        if REST > 0:
            hidden = widened(hidden, b, weight, columns, second, C, HIDDEN, HEAD + REST, PRECISION)
        hidden = activated(hidden, ACTIVATION, exact).to(x.dtype.element_ty)
        y = narrowed(y, hidden, back_weight, columns, first, C, HIDDEN, BH, HEAD, PRECISION)
        if REST > 0:
            z = narrowed(z, hidden, back_weight, columns, second, C, HIDDEN, BH, HEAD + REST, PRECISION)
    finish(y, back_bias, residual, out, rows, ok, first, C)
    if REST > 0:
        finish(z, back_bias, residual, out, rows, ok, second, C)
