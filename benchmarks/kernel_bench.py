"""What the kernel benchmarks share: shapes, inputs that leave the caches, timing in CUDA graphs, and the record.

A contender is a function of the same inputs. Before it is timed its error is taken, beside float64, on its first
inputs. Then every contender is captured in a CUDA graph that runs it once on each of several inputs, together larger
than twice the L2 cache and never zeros, and the graphs take turns. A sample is one replay over its number of calls.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from records import append, median_and_spread
from torch import Tensor

from convnext_deploy.kernels import launch
from convnext_deploy.models.convnext import DTYPES
from convnext_deploy.models.registry import VARIANTS
from convnext_deploy.records.base import Precision
from convnext_deploy.records.timing import Ceilings
from convnext_deploy.timing import roofline

FAMILY = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
BATCHES = (1, 32, 256)
REPLAYS, WARM = 15, 3
COPIES = 24  # at most, of a contender's inputs

SMALL_BATCH = 8  # up to which products are spread and early launches matter
WHOLE_K: dict[str, Any] = {"PART_TRIPS": 1 << 30}  # what `under` changes: no product is split,
WIDE_TILES: dict[str, Any] = {"ENOUGH": 0.0}  # nor narrowed,
OF_TRITON: dict[str, Any] = {"CUDA_CPP": (0, 0)}  # no kernel in CUDA C++ is launched,
IN_CUDA_CPP: dict[str, Any] = {"INT8_IN_CUDA_CPP": True}  # products of int8 are,
IN_TURN: dict[str, Any] = {"PDL_FROM": (99, 0)}  # and every kernel begins when the one before has ended


@dataclass(frozen=True)
class Case:
    """One stage's shape at one batch: maps of (batch, side, side, channels)."""

    channels: int
    side: int
    batch: int
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def pixels(self) -> int:
        return self.batch * self.side * self.side


@dataclass(frozen=True)
class Subject:
    """What is measured in one case. `exact` and the contenders take what `inputs` gives.

    `finish` turns what a contender gives into what `exact` does, outside the timing; None: it cannot be compared.
    """

    inputs: Callable[[], tuple[Tensor, ...]]
    exact: Callable[..., Tensor]
    contenders: dict[str, Callable[..., Any]]
    bytes: int  # read and written once
    matrix_flop: int = 0
    vector_flop: int = 0
    finish: dict[str, Callable[[Any], Tensor] | None] = field(default_factory=dict)


def cases(precision: Precision, batches: tuple[int, ...] = BATCHES) -> Iterator[Case]:
    """Every stage of the family, each shape once."""
    shapes = {(channels, 56 >> stage) for name in FAMILY for stage, channels in enumerate(VARIANTS[name]["dims"])}
    for batch in batches:
        for channels, side in sorted(shapes, key=lambda shape: (-shape[1], shape[0])):
            yield Case(channels, side, batch, precision)


def normal(*shape: int, like: Case, device: str, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device).mul_(scale).to(like.dtype)


def moments_of(x: Tensor, chunk: int) -> Tensor:
    """(..., C) -> (..., chunks, 2) fp32, as `dwconv_moments` gives them."""
    parts = x.float().split(chunk, -1)  # type: ignore[no-untyped-call]  # torch has no types for it
    means = [part.mean(-1) for part in parts]
    powers = [(part - mean[..., None]).square().sum(-1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack((torch.stack(means, -1), torch.stack(powers, -1)), -1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def as_it_is(result: Tensor) -> Tensor:
    return result


def errors(subject: Subject) -> dict[str, float | None]:
    """Each contender's error beside float64, on one set of inputs."""
    inputs = subject.inputs()
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    exact = subject.exact(*wide)
    found: dict[str, float | None] = {}
    for name, call in subject.contenders.items():
        finish = subject.finish.get(name, as_it_is)
        with torch.inference_mode():
            found[name] = None if finish is None else relative_error(finish(call(*inputs)), exact)
    return found


def under(call: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """The same with other numbers in `kernels.launch`."""

    def changed(*arguments: Tensor) -> Any:
        with mock.patch.multiple(launch, **settings):
            return call(*arguments)

    return changed


def captured(call: Callable[..., Any], inputs: list[tuple[Tensor, ...]]) -> Any:
    """A CUDA graph of one call on each of the inputs."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        for _ in range(WARM):
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for arguments in inputs:
            call(*arguments)
    return graph


def times_us(subject: Subject) -> dict[str, list[float]]:
    """Microseconds a call of every contender: samples, taken turn by turn; on the CPU one each, as a rehearsal."""
    first = subject.inputs()
    if not first[0].is_cuda:
        return {name: [_seconds(call, first) * 1e6] for name, call in subject.contenders.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(COPIES, 2 + 2 * cache // size)
    inputs = [first, *(subject.inputs() for _ in range(count - 1))]
    graphs = {name: captured(call, inputs) for name, call in subject.contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    names = list(graphs)
    for turn in range(WARM + REPLAYS):
        first_name = turn % len(names)
        for name in names[first_name:] + names[:first_name]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
            start.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARM:
                samples[name].append(start.elapsed_time(end) * 1e3 / count)
    return samples


def _seconds(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        call(*inputs)
    return time.perf_counter() - start


def measured(benchmark: str, case: Case, subject: Subject, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """One record a contender."""
    found, samples = errors(subject), times_us(subject)
    for name, values in samples.items():
        seconds = statistics.median(values) / 1e6
        yield {
            "benchmark": benchmark, "contender": name, "channels": case.channels, "side": case.side,
            "batch": case.batch, "precision": case.precision, "unit": "us", "scope": "one call, in a CUDA graph",
            "samples": values, **median_and_spread(values), "relative_error": found[name],
            "gb_s": subject.bytes / seconds / 1e9,
            "copy_share": subject.bytes / seconds / 1e9 / ceilings.copy_gb_s,
            "tflops": (subject.matrix_flop + subject.vector_flop) / seconds / 1e12,
            "matrix_share": subject.matrix_flop / seconds / 1e12 / ceilings.matrix_tflops.get(case.precision, math.inf),
            "vector_share": subject.vector_flop / seconds / 1e12 / ceilings.vector_tflops,
            "gpu": ceilings.name,
        }  # fmt: skip


BEST_MODE = "max-autotune-no-cudagraphs"  # of torch.compile; we capture its kernels in a graph ourselves


def compiled(call: Callable[..., Any], mode: str = BEST_MODE) -> Callable[..., Any]:
    """PyTorch's compiler, at its best unless another mode is named."""
    return torch.compile(call, mode=mode, dynamic=False)


def refuse_without_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no NVIDIA GPU here, and this benchmark measures nothing else")


def arguments(description: str | None, *more: str) -> argparse.ArgumentParser:
    """Args: more: precisions beside the float types."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32", *more], default="fp16")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    return parser


def main(
    benchmark: str, description: str | None, subject_of: Callable[[Case, str], Subject], widest: int | None = None
) -> None:
    """Measure every case of up to `widest` channels; `subject_of(case, device)` may name a contender "compiled ..."."""
    args = arguments(description).parse_args()
    refuse_without_gpu()
    torch.backends.cudnn.benchmark = True
    ceilings = roofline.measure("cuda")
    for case in cases(args.precision, tuple(args.batches)):
        if widest is not None and case.channels > widest:
            continue
        subject = subject_of(case, "cuda")
        if args.without_compile:
            for name in [name for name in subject.contenders if name.startswith("compiled")]:
                del subject.contenders[name]
        for record in measured(benchmark, case, subject, ceilings):
            append(record, "gpu-kernels")
