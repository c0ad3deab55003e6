"""Plans: what runs in 8 bits, by `quantize`, and what stays in fp32 beside half precision, by `half`."""

from collections.abc import Callable
from typing import Literal

from .. import argument_names, arguments
from ..arguments import Unpack
from ..models.source import NetworkOptions, Source
from ..records.base import InputKind, NetworkTask, PlanTask, PlanType, Precision
from ..records.plan import HalfPrecision, HalfReport, Plan, RangeMethod, Target, WeightBits
from ..workflows.export import Say, silent
from .images import Images
from .images import images as images_of
from .verbs import verb

Progress = Callable[[str], Callable[[int, int], None]]


def no_progress(_: str) -> Callable[[int, int], None]:
    """Default for `progress`."""
    return lambda done, total: None


def _checked(progress: Progress) -> Progress:
    """`progress` of `quantize`, whose every answer is a function too; nobody knows which before it is asked."""
    arguments.called("progress", progress, ("what begins",))

    def begun(what: str) -> Callable[[int, int], None]:
        told: Callable[[int, int], None] = arguments.called(
            "what progress returns", progress(what), ("steps done", "steps in all")
        )
        return told

    return begun


@verb
def quantize(
    weights: arguments.Weights = None,
    *,
    out: arguments.Location,
    calibration: Images,
    target: Target,
    type: PlanType = "int8",
    method: RangeMethod = "mse",
    images: int | None = None,
    split: str | None = None,
    rest: Precision | None = None,
    input: InputKind = "float32",
    task: PlanTask = "classify",
    rounding: bool = False,
    weight_bits: WeightBits | None = None,
    force: bool = False,
    ray: str | None = None,
    say: Say = silent,
    progress: Progress = no_progress,
    **options: Unpack[NetworkOptions],
) -> Plan:
    """Write the plan that `export(plan=...)` builds 8-bit artifacts from.

    The linears of all blocks run in 8 bits, and the convolutions of a segmenter's head. `optimize` chooses the
    operations by what they cost and save here.

    An interrupted call leaves `<name>.partial/`, which the same call goes on with, on a cluster or without.

    Args:
        weights: as for `export`.
        out: `<name>.json`; tensors go to `<name>.safetensors`, ranges, clip rates and outliers of every tensor to
            `<name>.calibration.json`.
        calibration: real images in any form that `evaluate` takes, labels not needed; "random" is noise, and is
            marked as such.
        target: the format that the plan is for.
        type: "int8", or for GPUs "fp8".
        method: how ranges are chosen (`records.plan.RangeMethod`).
        images: how many are calibrated on; None: 512, or four fifths of a source with fewer than 640 (at least 32).
        split: which split of the calibration images, where they have several.
        rest: the type of everything else; None: fp32, on GPUs fp16.
        input: of the artifact, as for `export`.
        task: classify, embed, features or segment, as for `export`.
        rounding: try GPTQ for the weights.
        weight_bits: 7 keeps u8 by s8 products from saturating on x86 without VNNI, and is faster there; None: what
            this machine multiplies exactly and fast (see `saturation`).
        force: replace a plan that exists.
        ray: calibrate on the nodes of a Ray cluster, as `evaluate`; the plan is that of one process.
        say: told what is being done, a line a step.
        progress: told what begins; returns what is told (steps done, steps in all) of it.

    Raises:
        UsageError: what can be refused before the work.
    """
    arguments.one_of("task", task, PlanTask)
    source = Source.of(weights, task=task, **options)
    argument_names.check(
        target=target, type=type, method=method, images=images, split=split, rest=rest, input=input,
        rounding=rounding, weight_bits=weight_bits, force=force, ray=ray, say=say,
    )  # fmt: skip
    begun = _checked(progress)
    out = arguments.file("out", out)
    calibration = images_of("calibration", calibration)
    from ..workflows import quantize as workflow

    recipe = workflow.Recipe(
        calibration=calibration,
        split=split,
        images=images,
        target=target,
        type=type,
        method=method,
        rest=rest,
        input=input,
        rounding=rounding,
        weight_bits=weight_bits,
    )
    return workflow.quantize(source, recipe, out=out, force=force, ray=ray, say=say, progress=begun)


@verb
def half(
    weights: arguments.Weights = None,
    *,
    out: arguments.Location,
    data: Images,
    precision: Literal["fp16", "bf16"] = "fp16",
    images: int = 64,
    split: str | None = None,
    input: InputKind = "float32",
    task: NetworkTask = "classify",
    force: bool = False,
    say: Say = silent,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[NetworkOptions],
) -> tuple[Plan, HalfReport]:
    """Which operations overflow or lose their values in half precision, and the plan that keeps these in fp32.

    Args:
        weights: as for `export`.
        out: `<name>.json`, for `export(plan=...)`; `<name>.half.json` says why each operation is kept.
        data: real images in any form that `evaluate` takes, labels not needed.
        precision: "fp16" or "bf16".
        images: how many are looked at.
        split: which split of `data`, where it has several.
        input: of the artifact, as for `export`.
        task: classify, embed or features, as for `export`.
        force: replace a plan that exists.
        say: told what is being done, a line a step.
        progress: told (images done, images in all).

    Raises:
        UsageError: what can be refused before the work.
    """
    arguments.one_of("task", task, NetworkTask)
    source = Source.of(weights, task=task, **options)
    arguments.one_of("precision", precision, HalfPrecision)
    argument_names.check(images=images, split=split, input=input, force=force, say=say)
    arguments.progress(progress, arguments.OF_IMAGES)
    out = arguments.file("out", out)
    data = images_of("data", data)
    from ..workflows import half as workflow

    return workflow.half(
        source,
        data,
        out=out,
        precision=precision,
        images=images,
        split=split,
        input=input,
        force=force,
        say=say,
        progress=progress,
    )
