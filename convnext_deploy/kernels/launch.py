"""Launch records: how large a program's tile is and how many warps work on it, by GPU generation and shape.

None of these has been timed: they are the largest tiles that compile without spilling and leave two programs to a
multiprocessor. `benchmarks/kernel_bench.py` takes others, and what wins on a GPU belongs here.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConvLaunch:
    """A program of the depthwise convolution: rows x columns pixels, and channels; 2 channels a thread."""

    rows: int
    columns: int
    channels: int
    packed: bool  # fp16 pairs inside a row of taps; fp16 only
    warps: int = 4


@dataclass(frozen=True, slots=True)
class ProductLaunch:
    """A program of a matrix product: a tile of m x n results, k products at a time, `group` rows of tiles together."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True, slots=True)
class MlpLaunch:
    """A program of a whole MLP: m rows, and so many hidden columns at a time, a power of two from 16 on."""

    m: int
    hidden: int
    warps: int
    stages: int


SAFE = (8, 0)  # what a GPU that is not in a table is treated as: every one since 2020 runs it

# (generation at least, rows at least, bytes an element at most) -> record; the first that fits. Tiles of 128 x 256 are
# not among them: `project` spills with them (compiled for sm_90: 176 bytes, with int8 624), `expand` on sm_100.
PRODUCTS: tuple[tuple[tuple[int, int], int, int, ProductLaunch], ...] = (
    ((9, 0), 4096, 1, ProductLaunch(m=128, n=128, k=128, warps=8, stages=3)),
    ((9, 0), 4096, 2, ProductLaunch(m=128, n=128, k=64, warps=8, stages=3)),
    ((8, 0), 4096, 1, ProductLaunch(m=128, n=128, k=64, warps=8, stages=3)),
    ((8, 0), 4096, 2, ProductLaunch(m=128, n=128, k=32, warps=8, stages=3)),
    ((8, 0), 0, 1, ProductLaunch(m=64, n=64, k=64, warps=4, stages=4)),
    ((8, 0), 0, 2, ProductLaunch(m=64, n=64, k=64, warps=4, stages=3)),
    ((8, 0), 0, 8, ProductLaunch(m=64, n=64, k=32, warps=4, stages=2)),  # float64: of references only
)


def capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that a tensor is on; the safe default where there is none, as when a graph is only traced."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and torch.cuda.is_available() else SAFE


def conv_launch(dtype: torch.dtype, height: int, width: int, channels: int, kernel_size: int) -> ConvLaunch:
    """For a map of this size. Strips are of equal height, so that 16 rows are two of 8 and not 14 and 2.

    Chunks of 64 channels, or of 32 where these leave fewer lanes idle (96 is 3 x 32). fp32 sums of 14 rows take 255
    registers, so wide types take strips of 7.
    """
    packed = dtype == torch.float16 and kernel_size > 1
    strips = math.ceil(height / (14 if packed else 7))
    chunk = min((64, 32), key=lambda size: (math.ceil(channels / size) * size, -size))
    return ConvLaunch(rows=math.ceil(height / strips), columns=256 // chunk, channels=chunk, packed=packed)


def product_launch(x: Tensor, rows: int | torch.SymInt) -> ProductLaunch:
    """For a product of so many rows, with operands of x's type."""
    here = capability(x)
    if isinstance(rows, torch.SymInt):  # a dynamic batch: the record of the batch that was traced, and no guard on it
        rows = int(rows.node.hint or 0)
    return next(
        record
        for generation, least_rows, most_bytes, record in PRODUCTS
        if here >= generation and rows >= least_rows and x.dtype.itemsize <= most_bytes
    )


def per_image(launch: ProductLaunch, rows: int) -> ProductLaunch:
    """The same with a tile that an image of `rows` rows fills better: tiles of GRN's products hold one image each."""
    smaller = replace(launch, m=min(launch.m, 64))
    computed, less = (math.ceil(rows / record.m) * record.m for record in (launch, smaller))
    return smaller if computed > 1.2 * less else launch


# (generation at least, rows at least, channels at most, bytes an element at most) -> record; the first that fits. With
# 128 rows the weights are read from the L2 half as often as with 64. On 4 warps two such programs share a
# multiprocessor, on 8 one has it for itself: where 4 spill (96 channels on sm_120: 16 bytes; 128 on sm_90: 192).
MLPS: tuple[tuple[tuple[int, int], int, int, int, MlpLaunch], ...] = (
    ((8, 0), 16384, 80, 2, MlpLaunch(m=128, hidden=64, warps=4, stages=2)),
    ((12, 0), 16384, 128, 2, MlpLaunch(m=128, hidden=64, warps=8, stages=2)),
    ((8, 0), 16384, 96, 2, MlpLaunch(m=128, hidden=64, warps=4, stages=2)),
    ((8, 0), 16384, 128, 2, MlpLaunch(m=128, hidden=64, warps=8, stages=2)),
    ((8, 0), 0, 128, 2, MlpLaunch(m=64, hidden=64, warps=4, stages=2)),
    ((8, 0), 0, 128, 8, MlpLaunch(m=64, hidden=32, warps=8, stages=2)),
)


def mlp_launch(x: Tensor, rows: int | torch.SymInt, hidden: int) -> MlpLaunch:
    """For an MLP of so many rows (..., C) of x's type, and hidden columns, which its chunks divide if they can."""
    here, channels = capability(x), x.shape[-1]
    if isinstance(rows, torch.SymInt):  # as in `product_launch`
        rows = int(rows.node.hint or 0)
    found = next(
        record
        for generation, least_rows, most_channels, most_bytes, record in MLPS
        if here >= generation and rows >= least_rows and channels <= most_channels and x.dtype.itemsize <= most_bytes
    )
    return replace(found, hidden=max(16, min(found.hidden, hidden & -hidden)))
