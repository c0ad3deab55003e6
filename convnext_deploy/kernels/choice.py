"""Which parts of a model run in the fused kernels, and when they are refused.

`measured.json` says where they were measured to be faster than compiled PyTorch, by GPU. It is empty until somebody
measures: a GPU without entries runs no kernel unless it is told to, with "all".
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from .. import env
from ..errors import MissingPackageError, UsageError
from ..models.convnext import ConvNeXt
from ..records.base import KernelChoice, Precision
from ..records.manifest import ExportRequest, ModelSpec
from ..records.plan import Plan
from ..records.timing import KernelMeasurement
from .launch import E4M3_SINCE
from .use import MLP, alternatives, parts

TABLE = Path(__file__).with_name("measured.json")
ONE_KERNEL = 96  # channels up to which both linears of a block are faster in one kernel


def refuse(request: ExportRequest, choice: KernelChoice, plan: Plan | None) -> None:
    """What can be refused before any work.

    Raises:
        UsageError: another device than a GPU, a dynamic image size, or a plan of more than blocks.
        MissingPackageError: PyTorch's builds for the CPU come without Triton.
    """
    if request.device != "cuda":
        raise UsageError(f"--kernels {choice} is for NVIDIA GPUs, not for {request.device}; use --device cuda")
    if request.dynamic_image_size:
        raise UsageError("the fused kernels are compiled for one image size; leave --dynamic-image-size out")
    if plan is not None:
        _refuse_plan(plan)
    if env.missing(("triton",)):
        raise MissingPackageError("--kernels needs triton, which only PyTorch's builds for CUDA bring along")


def _refuse_plan(plan: Plan) -> None:
    kept = [name for name, operation in plan.operations.items() if operation.type == "fp32"]
    if kept:
        way_out = (
            "leave --kernels out" if len(kept) == len(plan.operations) else "run quantize with --rest bf16 or fp32"
        )
        raise UsageError(f"the plan keeps {kept[0]} in fp32, and the fused kernels have one float type; {way_out}")
    for name, operation in plan.operations.items():
        block, _, kind = name.rpartition(".")
        other = plan.operations.get(f"{block}.{'project' if kind == 'expand' else 'expand'}")
        if kind not in ("expand", "project") or other is None or other.type != operation.type:
            raise UsageError(
                f"the plan has {name} in {operation.type}; the fused kernels run expand and project of a block in "
                "8 bits, both or none, and nothing else"
            )
        if operation.type == "u8s8" or operation.zero_point or (operation.shift and kind == "expand"):
            raise UsageError(
                f"the plan has {name} in {operation.type} with zero point {operation.zero_point} and shift "
                f"{operation.shift:g}; the fused kernels have no zero points, and a shift before project only"
            )
    gpus = env.nvidia_gpu_facts()
    if gpus and "fp8" in {operation.type for operation in plan.operations.values()}:
        generation = tuple(int(part) for part in gpus[0]["compute_capability"].split("."))
        if generation < E4M3_SINCE:
            raise UsageError(
                f"the plan has operations in fp8, and {gpus[0]['name']} has compute capability "
                f"{gpus[0]['compute_capability']}; E4M3 needs 8.9. Run quantize with --type int8"
            )


def chosen(
    model: ConvNeXt, request: ExportRequest, choice: KernelChoice, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The parts of a folded and cast model that run in kernels; says which they are, where not all were asked for.

    Stages that a plan quantizes are among them in any case: PyTorch's own operations would only simulate it.

    Raises:
        UsageError: a stage that a plan quantizes has a block that no kernel runs.
    """
    possible = parts(model)
    planned = sorted({path[: len("stages.0")] for path, _ in model.named_buffers() if path.endswith(".weight_scale")})
    for stage in planned:
        if stage not in possible:
            raise UsageError(f"the plan quantizes {stage} of {model.spec.architecture}, which no fused kernel runs")
    if choice == "all":
        return all_of(model, request)
    gpus = env.nvidia_gpu_facts()
    gpu = gpus[0]["name"] if gpus else "this GPU, which nvidia-smi does not name"
    rows = table().get(gpu)
    if rows is None:
        say(f"kernels: none was measured on {gpu}, so {_none_but(planned)} used; --kernels all uses every one")
        return tuple(planned)
    faster_names = faster(model.spec, request.precision, request.batch.opt, (*possible, *alternatives(model)), rows)
    more = [stage for stage in planned if stage not in faster_names]
    because = f"; because the plan quantizes them: {', '.join(more)}" if more else ""
    say(f"kernels: measured faster on {gpu} at batch {request.batch.opt}: {', '.join(faster_names) or 'none'}{because}")
    return (*faster_names, *more)


def all_of(model: ConvNeXt, request: ExportRequest) -> tuple[str, ...]:
    """Every part that kernels run; of the two ways to run a narrow stage, the one that was faster on an H200.

    fp16, ConvNeXt-T, 96 channels: both linears in one kernel take 0.45 of the time of two at batch 256, and make the
    network 12 % faster at batch 32 and 2 % slower at batch 1. With 128 channels there is no difference.
    """
    narrow = [name for name in alternatives(model) if model.spec.dims[int(name.split(".")[1])] <= ONE_KERNEL]
    if request.batch.opt == 1 or request.precision not in ("fp16", "bf16"):
        narrow = []
    return tuple(name + MLP if name + MLP in narrow else name for name in parts(model))


def _none_but(planned: Sequence[str]) -> str:
    return f"none but what the plan quantizes ({', '.join(planned)}) is" if planned else "none is"


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
    key = kind, channels, spec.grn and kind == "stages", precision
    alike = [row for row in rows if (row.part, row.channels, row.grn, row.precision) == key]
    return min(alike, key=lambda row: abs(row.batch - batch)).speedup if alike else 0.0
