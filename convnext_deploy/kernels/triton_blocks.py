"""Triton functions that several kernels share. They are inlined: nothing here is a kernel.

A product's rows are counted by image, so that a tile never has rows of two images where a kernel asks for it: `row`
is a row's index in the whole matrix, `ok` says that it belongs to the tile's image. Rows that do not are loaded all
the same (the last one of the image instead), and not stored.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """Stands before a kernel's first access to memory; `launch.dependent` says why that is enough.

    The next kernel may be launched from here on: when it begins, all programs of this one have seen the end of the one
    before, so that never more than two overlap.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def activated(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """An activation in fp32: x times the sigmoid of a polynomial q(x), which is where the kinds differ.

    EXACT: GELU by the error function, for results that are wider than 16 bits. Otherwise its normal distribution is a
    fitted odd polynomial inside the sigmoid: at most 2.6e-5 from it in the result, a tenth of fp16's rounding at 0.5.
    Coefficients are times -log2(e): the sigmoid is an exponential to the base 2 and the square of a reciprocal root.
    """
    if KIND == "none":
        return x
    if KIND == "gelu" and EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    u = x * x
    if KIND == "silu":
        q = x * -1.4426950408889634
    elif KIND == "gelu_tanh":  # 2 sqrt(2 / pi) (x + 0.044715 x^3)
        q = x * (-2.302208198 + u * -0.1029432346)
    else:
        u = tl.minimum(u, 27.0)  # the polynomial turns beyond; the sigmoid is 0 or 1 there already
        q = x * (-2.301120344 + u * (-0.1067768461 + u * 0.0010145001))
    # A division guards against divisors that this one cannot have, in three more instructions.
    root = tl.rsqrt(1.0 + tl.exp2(q))
    return x * (root * root)


@triton.jit
def scale_and_shift(mean, power, C: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr):
    """What a norm does to a row: `(x - shift) * scale`, from the row's mean and sum of squares around it."""
    if NORM == "layernorm":
        return tl.rsqrt(power / C + EPS), mean
    if NORM == "rmsnorm":
        return tl.rsqrt(power / C + mean * mean + EPS), mean * 0.0
    return tl.rsqrt(power / (C - 1) + EPS), mean * 0.0  # simplenorm: the unbiased deviation, and the mean stays


@triton.jit
def merged(count, mean, power, more_count, more_mean, more_power):
    """Mean and sum of squares around it of two groups together (Chan, Golub, LeVeque 1979); counts are not both 0."""
    total = count + more_count
    step = more_mean - mean
    share = more_count / total
    return total, mean + step * share, power + more_power + step * step * (count * share)


@triton.jit
def row_moments(values, ok, COUNT):
    """Mean, and sum of squares around it, of each row of `values` (rows, columns) over its COUNT columns.

    ok: which of them are real."""
    mean = tl.sum(tl.where(ok, values, 0.0), 1) / COUNT
    centred = tl.where(ok, values - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, 1)


@triton.jit
def normalizer(moments, rows, C: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr,
               EPS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """Scale and shift of rows whose moments were written a chunk of BC channels at a time.

    Args:
        moments: (rows, CHUNKS, 2) fp32: mean, and sum of squares around it.
        WIDE: CHUNKS rounded up to a power of two.
    """
    chunk = tl.arange(0, WIDE)
    count = tl.minimum(tl.maximum(C - chunk * BC, 0), BC).to(tl.float32)[None, :]
    at = moments + (rows.to(tl.int64)[:, None] * CHUNKS + chunk[None, :]) * 2
    present = (chunk[None, :] < CHUNKS) & (rows[:, None] >= 0)
    means = tl.load(at, mask=present, other=0.0)
    powers = tl.load(at + 1, mask=present, other=0.0)
    mean = tl.sum(means * count, 1) / C
    step = means - mean[:, None]
    return scale_and_shift(mean, tl.sum(powers + step * step * count, 1), C, EPS, NORM)


@triton.jit
def tile(pid, TILES_M, TILES_N, GROUP: tl.constexpr):
    """Which (row, column) of tiles a program takes: GROUP rows of tiles go together, so that weights stay in the L2."""
    per_group = GROUP * TILES_N
    first = (pid // per_group) * GROUP
    rows = tl.minimum(TILES_M - first, GROUP)
    inside = pid % per_group
    return first + inside % rows, inside // rows


@triton.jit
def part_and_tile(TILES_M, TILES_N, GROUP: tl.constexpr, SPLIT: tl.constexpr):
    """Which part of K this program takes, and of which tile."""
    pid = tl.program_id(0)
    part = 0
    if SPLIT > 1:
        part = pid // (TILES_M * TILES_N)
        pid = pid % (TILES_M * TILES_N)
    row, column_of_tiles = tile(pid, TILES_M, TILES_N, GROUP)
    return part, row, column_of_tiles


@triton.jit
def tile_rows(tile_m, ROWS, TILES, BM: tl.constexpr):
    """The image that a tile of rows belongs to, its rows in the whole matrix, and which of them are real."""
    image = tile_m // TILES
    inside = (tile_m % TILES) * BM + tl.arange(0, BM)
    return image, image * ROWS + tl.minimum(inside, ROWS - 1), inside < ROWS


@triton.jit
def loaded(at, k, K: tl.constexpr, BK: tl.constexpr):
    """A tile along k, zero beyond K. `at`: pointers; `k`: which k each is at, to be broadcast to them."""
    if K % BK == 0:
        return tl.load(at)
    return tl.load(at, mask=k < K, other=0.0)


@triton.jit
def quantized(x, TYPE: tl.constexpr):
    """To 8 bits as the plan's operators do: half to even and saturated; E4M3 saturates at 448."""
    if TYPE == tl.int8:
        # Adding 1.5 * 2^23 leaves the nearest integer, half to even, in the mantissa of an fp32.
        x = tl.minimum(tl.maximum(x, -128.0), 127.0)
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(TYPE)


@triton.jit
def empty_total(weight, BM: tl.constexpr, BN: tl.constexpr):
    """What a product with these weights is added up in: int32 for int8, else fp32."""
    return tl.zeros([BM, BN], tl.int32 if weight.dtype.element_ty == tl.int8 else tl.float32)


@triton.jit
def product(total, x, weight, shift, scale, factor, x_scale, K: tl.constexpr, BK: tl.constexpr,
            PRECISION: tl.constexpr, PROLOGUE: tl.constexpr, part, SPLIT: tl.constexpr):  # fmt: skip
    """`total` (BM, BN) plus p(x) @ weight^T, over K or over one of SPLIT parts of it.

    Args:
        x: (BM, 1) pointers to rows of K; weight: (1, BN) pointers to rows of K.
        shift, scale: (BM,), with PROLOGUE "normalize": p(x) = (x - shift) * scale, in x's type.
        factor: (K,) fp32, with "factor": p(x) = x * factor, in x's type; with "factor_quantized" that less the shift
            over the scale that x_scale (2,) has, in the weight's.
    """
    TRIPS: tl.constexpr = (K + BK - 1) // BK
    for start in tl.range(part * TRIPS // SPLIT * BK, (part + 1) * TRIPS // SPLIT * BK, BK):
        k = start + tl.arange(0, BK)
        a = loaded(x + k[None, :], k[None, :], K, BK)
        b = loaded(weight + k[:, None], k[:, None], K, BK)
        if PROLOGUE == "normalize":  # what is beyond K meets zeros of the weight
            a = ((a.to(tl.float32) - shift[:, None]) * scale[:, None]).to(b.dtype)
        if PROLOGUE == "factor" or PROLOGUE == "factor_quantized":
            wide = a.to(tl.float32) * loaded(factor + k, k, K, BK)[None, :]
            if PROLOGUE == "factor_quantized":
                a = quantized((wide - tl.load(x_scale + 1)) / tl.load(x_scale), b.dtype)
            else:
                a = wide.to(a.dtype)
        if b.dtype == tl.int8:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        elif b.dtype == tl.float8e4nv:
            # Hopper adds E4M3 products in 14 bits, and Triton leaves whole sums in them unless it is told how many
            # products may be added before they go to an fp32.
            total = tl.dot(a, b, total, max_num_imprecise_acc=BK)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def row_pointers(x, rows, ROW: tl.constexpr):
    """(BM, 1) pointers to rows of ROW elements."""
    return x + rows.to(tl.int64)[:, None] * ROW


@triton.jit
def weight_pointers(weight, columns, N: tl.constexpr, ROW: tl.constexpr):
    """(1, BN) pointers to a weight's rows."""
    return weight + within(columns, N).to(tl.int64)[None, :] * ROW


@triton.jit
def within(columns, N: tl.constexpr):
    """Columns that can be loaded: those beyond N are the last one again. They are not stored, and a mask would cost."""
    if (columns.shape[0] - 1) & N == 0:  # whole tiles, whose widths are powers of two
        return columns
    return tl.minimum(columns, N - 1)


@triton.jit
def store_tile(out, value, rows, ok, columns, N: tl.constexpr):
    """A tile (BM, BN) into out (M, N), in its type: the rows that are ok, and the columns that exist."""
    at = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = ok[:, None]
    if (columns.shape[0] - 1) & N != 0:
        mask = mask & (columns < N)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def column(values, columns, N: tl.constexpr):
    """(BN,) numbers of a vector of N, in fp32, as a row."""
    return tl.load(values + within(columns, N)).to(tl.float32)[None, :]
