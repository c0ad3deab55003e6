"""Every runtime and type that runs on this machine, what each could gain at best, and how one is built."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .. import env, formats
from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..artifact.trust import built_here
from ..data.image_source import ImageSource
from ..errors import MissingPackageError, UsageError, WorkerError
from ..formats.base import Format
from ..models.source import Source
from ..quantization.saturation import EXACT_FEATURES
from ..records.base import Device, InputKind, PlanType, Precision
from ..records.manifest import BatchRange, ExportRequest
from ..records.optimize import Candidate, Objective
from ..timing.worker import Worker
from .evaluate import Images

HALVES: tuple[Precision, ...] = ("bf16", "fp16", "tf32")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the artifact is to reach, and what it is measured on; each as in `api.optimize`."""

    images: Images
    calibration: str | ImageSource | None
    max_drop: float  # percentage points of top-1
    alpha: float
    objective: Objective
    batch: int
    max_latency_ms: float | None
    runtimes: tuple[str, ...]
    input: InputKind
    device: Device
    threads: int | None


def listed(runtimes: Sequence[str], device: Device) -> tuple[list[Format], dict[str, str]]:
    """The formats that take part, those that most models are served with first; and why others do not.

    Args:
        runtimes: that were asked for; none: all that `Format.optimized` names for the device.

    Raises:
        UsageError: one that was asked for does not run on the device, or is not installed.
    """
    candidates, left_out = [], {}
    for name in runtimes or formats.names():
        try:
            fmt = formats.get(name)
            if not runtimes and device not in fmt.optimized:
                continue
            formats.refuse_device(fmt, device)
            formats.state(fmt)
            if fmt.ahead_of_time and not env.nvidia_gpus():
                raise UsageError(f"format {name} is timed on the GPU that it runs on, and there is none here")
        except (MissingPackageError, UsageError) as error:
            if runtimes:
                raise
            left_out[name] = str(error)
        else:
            candidates.append(fmt)
    return sorted(candidates, key=lambda fmt: device not in fmt.benched), left_out


def floats(fmt: Format, device: Device) -> list[Candidate]:
    """A runtime's candidates without a plan: fp32, and what is shorter. On GPUs with the fused kernels too."""
    types = [name for name in ("fp32", *HALVES) if name in fmt.precisions]
    rows = [candidate(fmt, name) for name in types]
    if device == "cuda" and fmt.kernels:
        rows += [candidate(fmt, name, kernels=True) for name in types if name in ("fp16", "bf16")]
    return rows


def candidate(
    fmt: Format,
    precision: Precision,
    eight_bits: PlanType | None = None,
    *,
    kernels: bool = False,
    operations: tuple[str, ...] = (),
    suffix: str = "",
) -> Candidate:
    words = (fmt.name, eight_bits or precision, "kernels" if kernels and eight_bits is None else "", suffix)
    return Candidate(
        name="-".join(filter(None, words)),
        runtime=fmt.name,
        precision=precision,
        eight_bits=eight_bits,
        kernels=kernels,
        operations=operations,
    )


def rest_of(fmt: Format, device: Device) -> Precision:
    """The type of what a plan leaves: what the format says, or bf16 where this CPU multiplies that faster."""
    assert fmt.eight_bits is not None
    if device == "cpu" and fmt.bf16_features & env.cpu_features():
        return "bf16"
    return "fp32" if device == "cpu" else fmt.eight_bits.rest


def peak_gain(type: str, device: Device) -> float:
    """How many times as many products a second as in fp32 this processor's instructions for a type can do at most.

    1 where a CPU has none: then the type saves memory at best, and every runtime here converts it before it multiplies.
    Infinite where nothing is known about the processor.
    """
    features = env.cpu_features()
    if device == "cuda" or type == "fp32" or not features or platform.machine().lower() not in ("x86_64", "amd64"):
        return 1.0 if type == "fp32" else math.inf
    if type == "int8":
        return 32.0 if "amx_int8" in features else 4.0 if features & EXACT_FEATURES else 2.0
    if type in ("bf16", "fp16"):
        return 16.0 if f"amx_{type}" in features else 2.0 if f"avx512_{type}" in features else 1.0
    return 1.0


def hopeless(type: str, device: Device, fp32_ms: float, best_ms: float) -> str | None:
    """Why a runtime's shorter type cannot be the fastest, by the time of its own fp32; None where it can."""
    gain = peak_gain(type, device)
    if gain <= 1.0:
        return f"this CPU has no instructions that multiply {type}"
    if fp32_ms / gain >= best_ms:
        return (
            f"{type} multiplies {gain:g} times as fast as fp32 at most: {fp32_ms:.2f} ms in fp32 cannot become less "
            f"than the {best_ms:.2f} ms that are reached already"
        )
    return None


@dataclass(kw_only=True)
class Workshop:
    """Builds candidates in a process of its own, so that a compiler that crashes ends one candidate and no more."""

    folder: Path
    source: Source
    input: InputKind
    batch: BatchRange
    device: Device
    _worker: Worker | None = field(default=None)

    def path(self, wanted: Candidate) -> Path:
        return self.folder / wanted.name

    def request(self, wanted: Candidate) -> ExportRequest:
        return ExportRequest(
            format=wanted.runtime,
            precision=wanted.precision,
            input=self.input,
            batch=self.batch,
            device=self.device,
        )

    def kept(self, wanted: Candidate, plan_sha256: str | None) -> Artifact | None:
        """What an earlier call has built, where every file of it is unchanged."""
        path = self.path(wanted)
        if not (path / manifest.MANIFEST_NAME).is_file():
            return None
        existing = manifest.verified(path)
        recorded = existing.manifest.export.quantization
        ours = not formats.get(wanted.runtime).runs_code or built_here(existing.sha256)
        return existing if ours and (recorded.plan_sha256 if recorded else None) == plan_sha256 else None

    def built(self, wanted: Candidate, plan: Path | None) -> Artifact:
        """Export it.

        Raises:
            WorkerError: why it cannot be built, or is wrong.
        """
        if self._worker is None:
            self._worker = Worker("building", ("convnext_deploy.workflows.export", "torch"))
        self._worker.name = wanted.name
        try:
            self._worker.call(
                "call",
                function=f"{__name__}:build",
                arguments={
                    "source": msgspec.to_builtins(self.source),
                    "request": msgspec.to_builtins(self.request(wanted)),
                    "plan": None if plan is None else str(plan),
                    "kernels": wanted.kernels,
                    "out": str(self.path(wanted)),
                },
            )
        except WorkerError:
            self.close()  # what a failed build has left in memory goes with it
            raise
        except BaseException:
            self.close()
            raise
        return manifest.read(self.path(wanted))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def build(source: dict[str, Any], request: dict[str, Any], plan: str | None, kernels: bool, out: str) -> None:
    """Export one candidate; runs in a worker."""
    from .export import export, plan_for

    order = msgspec.convert(request, ExportRequest)
    loaded = plan_for(formats.get(order.format), plan, None)
    export(
        msgspec.convert(source, Source),
        order,
        plan=loaded,
        kernels="all" if kernels else "none",
        out=Path(out),
        force=True,
    )


def reason_of(error: WorkerError, name: str) -> str:
    """A worker's words without its name in front."""
    return str(error).removeprefix(f"{name}: ")
