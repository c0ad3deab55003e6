"""Launch records: how large a program's tile is and how many warps work on it, by GPU generation and shape.

`PRODUCTS` are the largest tiles that compile without spilling and leave two programs to a multiprocessor. They ran on
an H200, but no measurement chose them, nor what is made of them for small batches. What wins on a GPU belongs here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

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
    pdl: bool = False  # as in `dependent`


@dataclass(frozen=True, slots=True)
class ProductLaunch:
    """A program of a matrix product: a tile of m x n results, k products at a time, `group` rows of tiles together.

    With `split` so many programs share a tile: each takes a part of K, and a second kernel adds up what they found.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    pdl: bool = False  # as in `dependent`


@dataclass(frozen=True, slots=True)
class MlpLaunch:
    """A program of a whole MLP: m rows, and so many hidden columns at a time, a power of two from 16 on."""

    m: int
    hidden: int
    warps: int
    stages: int
    pdl: bool = False  # as in `dependent`


E4M3_SINCE = (8, 9)  # the first compute capability whose matrix units multiply it
SAFE = (8, 0)  # what a GPU that is not in a table is treated as: every one since 2020 runs it
PROCESSORS = 132  # multiprocessors where there is no GPU to ask: an H200's
CUDA_CPP = (9, 0)  # the generation that has kernels in CUDA C++, see `hopper`; with another one they rest
INT8_IN_CUDA_CPP = False  # what Hopper has for it ran on the host only; where True, it takes over from Triton's
PDL_FROM = (9, 0)  # the first generation with programmatic dependent launch; see `dependent`
ENOUGH = 2 / 3  # programs, of the multiprocessors: twice as many would read more and fill little
LEAST_ROWS = 2  # of a strip of the depthwise convolution, which loads 6 more
PART_TRIPS = 8  # a part of a split product goes at least so often through its loop, or filling its pipeline costs more
SAVED_TRIPS = 20  # that a split must save, or the second kernel costs more: 2 us at 0.1 us a trip
STAGES = 6  # of the loop of a program alone on its multiprocessor: five loads share the memory's latency
STAGE_BYTES = 88 << 10  # that they may take; the smallest shared memory is 99 KiB (sm_86, sm_89, sm_120)

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


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU that a tensor is on, or of an H200."""
    if not x.is_cuda or not torch.cuda.is_available():
        return PROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def overlaps(x: Tensor) -> bool:
    """Whether kernels on this tensor's GPU use programmatic dependent launch."""
    return capability(x) >= PDL_FROM and waits_are_operations()


def waits_are_operations() -> bool:
    """Whether this Triton has an operation for the wait (3.9 has, 3.6 has not).

    Before, it was inline assembly, for which Inductor takes every argument of a kernel for written, and copies it.
    """
    from triton.language.semantic import TritonSemantic

    return hasattr(TritonSemantic, "grid_dependency_wait")


def dependent(pdl: bool) -> dict[str, bool]:
    """Arguments of a launch that may begin before the kernel ahead of it in the stream has ended, or that may not.

    Such a kernel waits (`triton_blocks.wait_for_earlier`) before it touches any memory, so that nothing but its launch
    overlaps: the wait ends when the kernel ahead has ended and all that it wrote can be seen. That one waited in the
    same way, and so on: when a kernel touches memory, everything before it in the stream has ended, whether it was one
    of ours or not. So it may read what any of them wrote, and write to memory that was theirs and has been handed out
    again. Kernels of others are launched without the attribute and begin when ours have ended.

    Where the attribute is lost on the way to the driver, a wait has nothing to wait for and returns at once.
    """
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def conv_launch(dtype: torch.dtype, height: int, channels: int, kernel_size: int) -> ConvLaunch:
    """For a map of this height. Strips are of equal height, so that 16 rows are two of 8 and not 14 and 2.

    Chunks of 64 channels, or of 32 where these leave fewer lanes idle (96 is 3 x 32). fp32 sums of 14 rows take 255
    registers, so wide types take strips of 7.
    """
    packed = dtype == torch.float16 and kernel_size > 1
    strips = math.ceil(height / (14 if packed else 7))
    chunk = min((64, 32), key=lambda size: (math.ceil(channels / size) * size, -size))
    return ConvLaunch(rows=math.ceil(height / strips), columns=256 // chunk, channels=chunk, packed=packed)


def spread_strips(launch: ConvLaunch, x: Tensor, whole: bool) -> ConvLaunch:
    """The same in lower strips, where so small a batch x (N, H, W, C) would leave most of the GPU idle.

    Rows at a strip's edges are read by two programs, so no strip is lower than it has to be for `ENOUGH`.

    Args:
        whole: programs take all channels of their pixels, not a chunk.
    """
    _, height, width, channels = x.shape
    images = cast("int | torch.SymInt", x.shape[0])
    if isinstance(images, torch.SymInt):  # as in `spread`
        return launch
    across = images * math.ceil(width / launch.columns) * (1 if whole else math.ceil(channels / launch.channels))
    strips = max(1, math.ceil(ENOUGH * processors(x) / max(1, across)))
    return replace(launch, rows=min(launch.rows, max(LEAST_ROWS, math.ceil(height / strips))))


def traced(rows: int | torch.SymInt) -> int:
    """Of a dynamic batch those of the batch that is traced, and no guard on it."""
    return int(rows.node.hint or 0) if isinstance(rows, torch.SymInt) else rows


def product_launch(x: Tensor, rows: int | torch.SymInt) -> ProductLaunch:
    """For a product of so many rows, with operands of x's type."""
    here, rows = capability(x), traced(rows)
    measured = next(
        record
        for generation, least_rows, most_bytes, record in PRODUCTS
        if here >= generation and rows >= least_rows and x.dtype.itemsize <= most_bytes
    )
    return replace(measured, pdl=overlaps(x))


def programs(launch: ProductLaunch, tiles: int, outputs: int) -> int:
    """Of a product of so many rows of tiles."""
    return tiles * math.ceil(outputs / launch.n) * launch.split


def per_image(launch: ProductLaunch, rows: int) -> ProductLaunch:
    """The same with a tile that an image of `rows` rows fills better: tiles of GRN's products hold one image each."""
    smaller = replace(launch, m=min(launch.m, 64))
    computed, less = (math.ceil(rows / record.m) * record.m for record in (launch, smaller))
    return smaller if computed > 1.2 * less else launch


def deepened(launch: ProductLaunch, weight: Tensor) -> ProductLaunch:
    """The same with as many stages as fit; rows count 2 bytes an element, from which 8 bits may still be made."""
    size = weight.element_size()
    stage = (launch.m * max(2, size) + launch.n * size) * launch.k
    return replace(launch, stages=max(launch.stages, min(STAGES, STAGE_BYTES // stage)))


def spread(
    launch: ProductLaunch, weight: Tensor, tiles: int | torch.SymInt, parts: Sequence[int] = (1,)
) -> ProductLaunch:
    """The same over more of the GPU, where so few rows of tiles would leave most of it idle: at batch 1, above all.

    A program alone on its multiprocessor waits for its own loads, so more of them are under way. Then tiles of 32
    columns come first, then parts of K, then 16 columns, until there are `ENOUGH` programs. Narrow tiles read every
    weight once but the activations more often (from the L2), and a trip takes little less time; parts take fewer trips,
    but their sums pass through memory, and it takes a kernel to add them.

    Args:
        weight: (outputs, inputs, ...), of the product.
        tiles: rows of tiles; of a dynamic batch, which must run at its largest too, nothing is changed.
        parts: into how many K may be split.
    """
    if isinstance(tiles, torch.SymInt) or programs(launch, tiles, len(weight)) >= processors(weight):
        return launch
    there, outputs, trips = processors(weight), len(weight), math.ceil(weight[0].numel() / launch.k)
    deep = deepened(launch, weight)
    for columns, splits in ((32, False), (32, True), (16, True)):
        if programs(deep, tiles, outputs) >= ENOUGH * there:
            break
        deep = deepened(replace(launch, n=min(launch.n, columns)), weight)
        if splits:
            most = min(there // programs(deep, tiles, outputs), trips // PART_TRIPS)
            worth = (part for part in parts if part <= most and trips - trips / part >= SAVED_TRIPS)
            deep = replace(deep, split=max(worth, default=1))
    return deep


def fitted_launch(
    weight: Tensor, rows: int | torch.SymInt, images: int | torch.SymInt | None = None, parts: Sequence[int] = (1,)
) -> ProductLaunch:
    """For a product with this weight (outputs, inputs, ...); the other arguments are `spread`'s.

    Args:
        rows: of the product; of one image, if tiles hold rows of one image each and `images` says of how many.
    """
    launch = product_launch(weight, rows if images is None else images * rows)
    if images is None:
        images = 1
    else:
        launch = per_image(launch, int(rows))
    return spread(launch, weight, images * -(-rows // launch.m), parts)


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
    here, channels, rows = capability(x), x.shape[-1], traced(rows)
    measured = next(
        record
        for generation, least_rows, most_channels, most_bytes, record in MLPS
        if here >= generation and rows >= least_rows and channels <= most_channels and x.dtype.itemsize <= most_bytes
    )
    return replace(measured, hidden=max(16, min(measured.hidden, hidden & -hidden)), pdl=overlaps(x))
