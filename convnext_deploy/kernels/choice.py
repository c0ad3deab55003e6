"""Which parts of a model run in the fused kernels, and when they are refused.

`measured.json` says where they were measured to be faster than compiled PyTorch, by GPU. It is empty until somebody
measures: a GPU without entries runs no kernel unless it is told to, with "all".
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from .. import env
from ..errors import MissingPackageError, UsageError
from ..models.convnext import ConvNeXt
from ..types import ExportSpec, KernelChoice, KernelMeasurement, ModelSpec, Precision
from .use import MLP, alternatives, parts

TABLE = Path(__file__).with_name("measured.json")


def refuse(spec: ExportSpec, choice: KernelChoice) -> None:
    """What can be refused before any work.

    Raises:
        UsageError: another device than a GPU, a dynamic image size, or a plan.
        MissingPackageError: PyTorch's builds for the CPU come without Triton.
    """
    if spec.device != "cuda":
        raise UsageError(f"--kernels {choice} is for NVIDIA GPUs, not for {spec.device}; use --device cuda")
    if spec.dynamic_image_size:
        raise UsageError("the fused kernels are compiled for one image size; leave --dynamic-image-size out")
    if spec.quantization is not None:
        raise UsageError(f"the fused kernels run no plan yet; leave --plan out, or --kernels {choice}")
    if env.missing(("triton",)):
        raise MissingPackageError("--kernels needs triton, which only PyTorch's builds for CUDA bring along")


def chosen(model: ConvNeXt, spec: ExportSpec, choice: KernelChoice, say: Callable[[str], None]) -> tuple[str, ...]:
    """The parts of a folded and cast model that run in kernels; says which they are, where not all were asked for."""
    possible = parts(model)
    if choice == "all":
        return possible
    gpu = env.nvidia_gpu_facts()[0]["name"]
    rows = table().get(gpu)
    if rows is None:
        say(f"kernels: none was measured on {gpu}, so none is used; --kernels all uses every one")
        return ()
    found = faster(model.spec, spec.precision, spec.batch.opt, (*possible, *alternatives(model)), rows)
    say(f"kernels: measured faster on {gpu} at batch {spec.batch.opt}: {', '.join(found) or 'none'}")
    return found


def table() -> dict[str, list[KernelMeasurement]]:
    """GPU, as the driver names it, to what was measured on it."""
    return msgspec.json.decode(TABLE.read_bytes(), type=dict[str, list[KernelMeasurement]])


def faster(
    spec: ModelSpec, precision: Precision, batch: int, possible: tuple[str, ...], rows: list[KernelMeasurement]
) -> tuple[str, ...]:
    """Those of the possible parts for which the measurement nearest to this batch says that the kernels are faster.

    Of two ways to run one part, the faster.
    """
    best = {name.removesuffix(MLP): (1.0, "") for name in possible}
    for name in possible:
        part, speedup = name.removesuffix(MLP), _speedup(spec, precision, batch, name, rows)
        if speedup > best[part][0]:
            best[part] = speedup, name
    return tuple(name for _, name in best.values() if name)


def _speedup(spec: ModelSpec, precision: Precision, batch: int, name: str, rows: list[KernelMeasurement]) -> float:
    kind, _, index = name.removesuffix(MLP).partition(".")
    channels = spec.dims[3 if kind == "head" else int(index or 0)]  # of what goes in; of the stem, of what comes out
    kind = "mlp" if name.endswith(MLP) else kind
    alike = [row for row in rows if (row.part, row.channels, row.precision) == (kind, channels, precision)]
    return min(alike, key=lambda row: abs(row.batch - batch)).speedup if alike else 0.0
