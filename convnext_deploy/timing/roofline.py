"""The shortest time a device can take for a ConvNeXt: from the architecture, and what the device can do at best.

Every operation is bound by whichever takes longest: its matrix products at the device's matrix rate, its depthwise
convolution at the vector rate, or its bytes at the rate of a copy. Operations run one after another, so their times
add up. An operation reads its inputs and weights once and writes its output once: the three of a block (`DwconvNorm`,
`Expand`, `Project`), a stem, a downsample and a head each run as one kernel, their norms, activations and residuals
inside it. GRN adds no pass: its sums are formed while `Expand` writes and applied while `Project` reads. Norms and
activations are not counted as FLOPs, as in the papers.

What fuses further than that (a whole MLP in one kernel) moves fewer bytes and can pass this bound; so can a batch
that stays in the caches, because bytes are counted at the rate of main memory.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..arguments import Progress
from ..env import missing, usable_cores
from ..errors import MissingPackageError, UsageError, counted
from ..records.base import Device
from ..records.manifest import ModelSpec
from ..records.timing import Ceilings, Limit, RooflineRow

# Bytes of one element: of the residual stream, and of what the linears read and multiply with. With int8 only the
# latter is in 8 bits.
STREAM_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 2}
OPERAND_BYTES = STREAM_BYTES | {"int8": 1}

# Dense rates: the data sheets print tensor-core rates with 2:4 sparsity, which is twice these.
DATA_SHEETS = {
    "a100": Ceilings(
        name="NVIDIA A100 80GB SXM",
        source="data sheet, NVIDIA, 2021: dense rates at boost clock",
        matrix_tflops={"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0, "int8": 624.0},
        vector_tflops=19.5,
        copy_gb_s=2039.0,
    ),
    "h100": Ceilings(
        name="NVIDIA H100 SXM",
        source="data sheet, NVIDIA, 2023: dense rates at boost clock",
        matrix_tflops={"fp32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "int8": 1979.0},
        vector_tflops=67.0,
        copy_gb_s=3350.0,
    ),
    "h200": Ceilings(
        name="NVIDIA H200 SXM",
        source="data sheet, NVIDIA, 2024: dense rates at boost clock",
        matrix_tflops={"fp32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5, "int8": 1979.0},
        vector_tflops=67.0,
        copy_gb_s=4800.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, for one image. Elements are of the residual stream unless they are `operands`."""

    stage: str
    name: str
    count: int
    matrix_macs: int = 0
    vector_macs: int = 0
    elements: int = 0  # read and written
    operands: int = 0  # read by a linear, from the kernel before it
    weights: int = 0  # read once a batch


def operations(spec: ModelSpec) -> Iterator[Operation]:
    """Every operation of the model in order, for one image of `spec.image_size`."""
    pixels = [height * width for height, width in spec.map_sizes()]
    yield _stem(spec, pixels[0])
    for index, (channels, depth) in enumerate(zip(spec.dims, spec.depths, strict=True)):
        if index == spec.stages:
            break
        stage, here = f"stage {index + 1}", pixels[index]
        if index:
            before = spec.dims[index - 1]
            weights = 4 * before * channels
            moved = pixels[index - 1] * before + here * channels
            yield Operation(stage, "downsample", 1, matrix_macs=here * weights, elements=moved, weights=weights)
        map_, taps = here * channels, spec.kernel_sizes[index] ** 2 * channels
        linear = 4 * channels * channels
        yield Operation(stage, "dwconv_norm", depth, vector_macs=here * taps, elements=2 * map_, weights=taps)
        yield Operation(
            stage, "expand", depth, matrix_macs=here * linear, operands=5 * map_, weights=linear
        )  # reads C, writes what the next linear reads
        yield Operation(
            stage, "project", depth, matrix_macs=here * linear, operands=4 * map_, elements=2 * map_, weights=linear
        )
    if spec.task != "features":
        yield _head(spec, pixels[3] * spec.dims[3])


def _stem(spec: ModelSpec, pixels: int) -> Operation:
    channels = spec.dims[0]
    height, width = spec.image_size
    if spec.stem == "patch":
        weights = 16 * spec.in_chans * channels
        macs, between = pixels * weights, 0
    else:
        from ..models.convnext import tiered_width

        middle = tiered_width(channels) if spec.stem == "overlap_tiered" else channels
        first, second = 9 * spec.in_chans * middle, 9 * middle * channels
        halved = -(-height // 2) * -(-width // 2)
        weights, between = first + second, halved * middle
        macs = halved * first + pixels * second
    moved = height * width * spec.in_chans + 2 * between + pixels * channels
    return Operation("stem", "stem", 1, matrix_macs=macs, elements=moved, weights=weights)


def _head(spec: ModelSpec, elements: int) -> Operation:
    width, weights = spec.dims[3], 0
    if spec.head_hidden is not None:
        weights, width = width * spec.head_hidden, spec.head_hidden
    if spec.task == "classify" and spec.num_classes:
        weights, width = weights + width * spec.num_classes, spec.num_classes
    return Operation("head", "head", 1, matrix_macs=weights, elements=elements + width, weights=weights)


def flop(spec: ModelSpec) -> int:
    """Multiplications and additions for one image: twice what the papers call FLOPs."""
    return sum(2 * o.count * (o.matrix_macs + o.vector_macs) for o in operations(spec))


def bound(spec: ModelSpec, precision: str, batch: int, ceilings: Ceilings) -> tuple[RooflineRow, ...]:
    """The shortest time of each operation for one batch; the batch's is their sum.

    Raises:
        UsageError: the ceilings know no rate for this precision.
    """
    if precision not in ceilings.matrix_tflops:
        known = ", ".join(ceilings.matrix_tflops)
        raise UsageError(f"{ceilings.name} has no ceiling for {precision}; expected one of {known}")
    rates = {
        "matrix": ceilings.matrix_tflops[precision] * 1e12,
        "vector": ceilings.vector_tflops * 1e12,
        "memory": ceilings.copy_gb_s * 1e9,
    }
    rows = []
    for o in operations(spec):
        moved = batch * (o.elements * STREAM_BYTES[precision] + o.operands * OPERAND_BYTES[precision])
        moved += o.weights * OPERAND_BYTES[precision]
        work: dict[Limit, float] = {
            "matrix": 2.0 * batch * o.matrix_macs,
            "vector": 2.0 * batch * o.vector_macs,
            "memory": moved,
        }
        limit = max(work, key=lambda name: work[name] / rates[name])
        rows.append(
            RooflineRow(
                stage=o.stage,
                operation=o.name,
                count=o.count,
                gflop=o.count * (work["matrix"] + work["vector"]) / 1e9,
                mb=o.count * moved / 1e6,
                ms=o.count * work[limit] / rates[limit] * 1e3,
                limit=limit,
            )
        )
    return tuple(rows)


def bound_ms(spec: ModelSpec, precision: str, batch: int, ceilings: Ceilings) -> float:
    """The shortest time of one batch: what `percent_of_bound` divides by the measured time."""
    return sum(row.ms for row in bound(spec, precision, batch, ceilings))


def rate(
    spec: ModelSpec, precision: str, batch: int, images_per_s: float, ceilings: Ceilings | None
) -> tuple[float, float | None]:
    """A measured speed as TFLOP/s, and as percent of the bound; None where the ceilings know no such precision."""
    tflops = flop(spec) * images_per_s / 1e12
    if ceilings is None or precision not in ceilings.matrix_tflops:
        return tflops, None
    return tflops, 100 * bound_ms(spec, precision, batch, ceilings) / (batch / images_per_s * 1e3)


# Measuring -----------------------------------------------------------------------------------------------------------

MEASURED: dict[str, Device] = {"this": "cpu", "this-gpu": "cuda"}
SIDES: dict[Device, tuple[int, ...]] = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of the square products
COPY_BYTES: dict[Device, int] = {"cpu": 1 << 28, "cuda": 1 << 31}  # far beyond the caches
SECONDS = 0.3  # of one shape, about; what takes longer than this once is left out
TRIAL_SIDE = 128  # of the product whose time tells how long larger ones will take


def measure(
    device: Device,
    threads: int | None = None,
    precisions: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Ceilings:
    """The ceilings of this machine: the best of every shape, for what is slower was disturbed.

    A GPU's are what PyTorch reaches; a CPU's what PyTorch or this package's engine does, whichever is faster: PyTorch's
    product in int8 is naive on x86 without VNNI, and that in bf16 without its instructions. Each takes seconds at most:
    a shape that would take longer than `SECONDS` once is left out.

    Matrix products in fp32, bf16 and int8 (on a GPU also tf32 and fp16; PyTorch's CPU product in fp16 is no ceiling of
    anything), and a copy. The vector rate is that of the fp32 product, which uses the same units. Without PyTorch a
    CPU's are those of the engine.

    Args:
        threads: of PyTorch and of the engine while they measure; None: PyTorch's own setting.
        precisions: which; fp32 is always among them. None: all.
        progress: told what is being measured.

    Raises:
        UsageError: there is no GPU.
        MissingPackageError: a GPU without PyTorch, or a CPU without it and without an engine.
    """
    if device == "cpu" and missing(("torch",)):
        return _measured_by_the_engine(threads or usable_cores(), precisions, progress)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("PyTorch finds no NVIDIA GPU here; use --device this, or a data sheet's: a100, h100, h200")
    before, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(threads or before)
    try:
        used = torch.get_num_threads()
        names = [name for name in _measured(device) if precisions is None or name in ("fp32", *precisions)]
        say = progress or (lambda done, total, what: None)
        rates, sources = {}, ["the best square product of torch"]
        native = _native(device, compile=names != ["fp32"])  # nothing is compiled where torch has a product
        if native:
            sources.append("the native engine's kernels")
        for done, name in enumerate(names):
            say(done, len(names) + 1, f"measuring {name} products")
            rate = max(_product_tflops(name, device), _native_tflops(name, used) if native else 0.0)
            if rate:
                rates[name] = rate
        say(len(names), len(names) + 1, "measuring copies")
        copied = _copy_gb_s(device)
        name = torch.cuda.get_device_name() if device == "cuda" else f"this CPU, {counted(used, 'thread')}"
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = tf32
    shapes = ", ".join(map(str, SIDES[device]))
    return Ceilings(
        name=name,
        source=f"measured with torch {torch.__version__}: {' or '.join(sources)}, side {shapes}, and copy of "
        f"{COPY_BYTES[device] >> 20} MiB",
        matrix_tflops=rates,
        vector_tflops=rates["fp32"],
        copy_gb_s=copied,
    )


def _measured_by_the_engine(threads: int, precisions: Sequence[str] | None, progress: Progress | None) -> Ceilings:
    names = [name for name in _measured("cpu") if precisions is None or name in ("fp32", *precisions)]
    say, rates = progress or (lambda done, total, what: None), {}
    for done, name in enumerate(names):
        say(done, len(names) + 1, f"measuring {name} products")
        rates[name] = _native_tflops(name, threads)
    say(len(names), len(names) + 1, "measuring copies")
    parts = np.array_split(np.ones(COPY_BYTES["cpu"], np.uint8), threads)
    into = [np.zeros_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:  # numpy copies without the interpreter's lock
        seconds = _best_s(lambda: list(pool.map(np.copyto, into, parts)), "cpu", SECONDS)
    return Ceilings(
        name=f"this CPU, {counted(threads, 'thread')}",
        source=f"measured with the native engine's kernels, and copy of {COPY_BYTES['cpu'] >> 20} MiB with numpy",
        matrix_tflops=rates,
        vector_tflops=rates["fp32"],
        copy_gb_s=2 * COPY_BYTES["cpu"] / seconds / 1e9,
    )


def _measured(device: Device) -> tuple[str, ...]:
    return ("fp32", "tf32", "fp16", "bf16", "int8") if device == "cuda" else ("fp32", "bf16", "int8")


def _product_tflops(precision: str, device: Device) -> float:
    """PyTorch's best; on a CPU 0 where the smallest product would take too long for it to be a ceiling of anything.

    A GPU takes as long for a small product as it takes to be asked, which tells nothing of a large one.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    trial_s = 0.0 if device == "cuda" else _best_s(_product(precision, TRIAL_SIDE, device), device, SECONDS / 10)
    best = 0.0
    for side in SIDES[device]:
        if trial_s * (side / TRIAL_SIDE) ** 3 > SECONDS and not (precision == "fp32" and best == 0.0):
            break
        best = max(best, 2 * side**3 / _best_s(_product(precision, side, device), device, SECONDS) / 1e12)
    return best


def _product(precision: str, side: int, device: Device) -> Callable[[], Any]:
    import torch

    if precision == "int8":
        a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in "ab")
        return partial(torch._int_mm, a, b.t())  # cuBLAS takes no other layout
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in "xy")
    return partial(torch.mm, x, y)


def _native(device: Device, compile: bool) -> bool:
    """Whether this package's engine is built here, or with `compile` can be."""
    from ..native import library

    if device != "cpu":
        return False
    if not compile:
        return library.is_built()
    try:
        library.state()
    except MissingPackageError:
        return False
    return True


def _native_tflops(precision: str, threads: int) -> float:
    from ..native import packed, peak

    kind = next(type for type in packed.TYPES if type == precision)
    return max(2 * peak.gmacs_per_s(kind, threads, SECONDS / 3) / 1e3 for _ in range(3))


def _copy_gb_s(device: Device) -> float:
    import torch

    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES[device] / _best_s(partial(target.copy_, source), device, SECONDS) / 1e9


def _best_s(call: Callable[[], Any], device: Device, seconds: float) -> float:
    if device == "cuda":
        import torch

    end = time.perf_counter() + seconds
    call()
    best = math.inf
    while best == math.inf or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter_ns() - start) / 1e9)
    return best
