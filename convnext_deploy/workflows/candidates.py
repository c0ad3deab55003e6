"""Every runtime and type that runs on a machine, and what each could gain there at best."""

import math
import platform
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from .. import env, formats
from ..artifact.session import RunOptions
from ..data.image_source import ImageSource
from ..errors import MissingPackageError, UsageError
from ..formats.base import Format
from ..quantization import saturation
from ..quantization.saturation import EXACT_FEATURES
from ..records.base import Device, InputKind, PlanType, Precision
from ..records.optimize import Candidate, Objective
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that candidates are built and timed on, as far as it decides which of them make sense."""

    facts: dict[str, str | int]  # `env.machine`
    versions: dict[str, str]
    features: AbstractSet[str]  # of its processor, as `env.cpu_features`
    architecture: str
    saturates: bool  # `saturation.saturates`
    runtimes: tuple[str, ...]  # that take part, those that most models are served with first
    left_out: dict[str, str]  # other formats, and why

    @property
    def cores(self) -> int:
        return int(self.facts["cores"])


def machine_here(runtimes: Sequence[str], device: Device) -> Machine:
    """This one.

    Raises:
        UsageError: as `listed`, or the device is not there, or no runtime is.
    """
    if device != "cpu":
        from ..runtimes.torch_session import check_device

        check_device(RunOptions(device=device))
    there, left_out = listed(runtimes, device)
    if not there:
        raise UsageError(f"no runtime is installed that runs on {device}: {'; '.join(left_out.values())}")
    return Machine(
        facts=env.machine(),
        versions=env.versions(),
        features=env.cpu_features(),
        architecture=platform.machine().lower(),
        saturates=saturation.saturates(),
        runtimes=tuple(fmt.name for fmt in there),
        left_out=left_out,
    )


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


def rest_of(fmt: Format, device: Device, machine: Machine) -> Precision:
    """The type of what a plan leaves: what the format says, or bf16 where the CPU multiplies that faster."""
    assert fmt.eight_bits is not None
    if device == "cpu" and fmt.bf16_features & machine.features:
        return "bf16"
    return "fp32" if device == "cpu" else fmt.eight_bits.rest


def peak_gain(type: str, device: Device, machine: Machine) -> float:
    """How many times as many products a second as in fp32 the processor's instructions for a type can do at most.

    1 where a CPU has none: then the type saves memory at best, and every runtime here converts it before it multiplies.
    Infinite where nothing is known about the processor.
    """
    features = machine.features
    if device == "cuda" or type == "fp32" or not features or machine.architecture not in ("x86_64", "amd64"):
        return 1.0 if type == "fp32" else math.inf
    if type == "int8":
        return 32.0 if "amx_int8" in features else 4.0 if features & EXACT_FEATURES else 2.0
    if type in ("bf16", "fp16"):
        return 16.0 if f"amx_{type}" in features else 2.0 if f"avx512_{type}" in features else 1.0
    return 1.0


def hopeless(type: str, device: Device, machine: Machine, fp32_ms: float, best_ms: float) -> str | None:
    """Why a runtime's shorter type cannot be the fastest, by the time of its own fp32; None where it can."""
    gain = peak_gain(type, device, machine)
    if gain <= 1.0:
        return f"this CPU has no instructions that multiply {type}"
    if fp32_ms / gain >= best_ms:
        return (
            f"{type} multiplies {gain:g} times as fast as fp32 at most: {fp32_ms:.2f} ms in fp32 cannot become less "
            f"than the {best_ms:.2f} ms that are reached already"
        )
    return None
