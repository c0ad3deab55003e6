"""Plans: what runs in 8 bits, by `quantize`, and what stays in fp32 beside half precision, by `half`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from .. import arguments, env
from ..models.source import Source
from ..records.base import InputKind, NetworkTask, PlanType, Precision
from ..records.manifest import HeadActivation
from ..records.plan import HalfPrecision, HalfReport, Plan, RangeMethod, Target, WeightBits
from ..workflows.export import Say, silent

Progress = Callable[[str], Callable[[int, int], None]]


def no_progress(_: str) -> Callable[[int, int], None]:
    """Default for `progress`."""
    return lambda done, total: None


@env.missing_named()
def quantize(
    weights: arguments.Weights = None,
    *,
    out: arguments.Location,
    calibration: arguments.Location,
    target: Target,
    variant: str | None = None,
    type: PlanType = "int8",
    method: RangeMethod = "mse",
    images: int | None = None,
    split: str | None = None,
    rest: Precision | None = None,
    input: InputKind = "float32",
    image_size: arguments.ImageSize | None = None,
    task: NetworkTask = "classify",
    levels: Sequence[int] | str | None = None,
    head_activation: HeadActivation | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    config: arguments.Location | None = None,
    rounding: bool = False,
    weight_bits: WeightBits | None = None,
    force: bool = False,
    say: Say = silent,
    progress: Progress = no_progress,
) -> Plan:
    """Write the plan that `export(plan=...)` builds 8-bit artifacts from.

    The linears of all blocks run in 8 bits. `optimize` chooses the operations by what they cost and save here.

    The checkpoint is given as for `export`: weights, variant, image_size, task, levels, head_activation,
    preprocessing, weights_key, config, input.

    Args:
        out: `<name>.json`; tensors go to `<name>.safetensors`, ranges, clip rates and outliers of every tensor to
            `<name>.calibration.json`.
        calibration: real images, labels not needed; "random" is noise, and is marked as such.
        target: the format that the plan is for.
        method: how ranges are chosen (`records.plan.RangeMethod`).
        images: how many are calibrated on; None: 512, or four fifths of a source with fewer than 640 (at least 32).
        rest: the type of everything else; None: fp32, on GPUs fp16.
        rounding: try GPTQ for the weights.
        weight_bits: 7 keeps u8 by s8 products from saturating on x86 without VNNI, and is faster there; None: what
            this machine multiplies exactly and fast (see `saturation`).

    Raises:
        UsageError: what can be refused before the work.
    """
    arguments.one_of("task", task, NetworkTask)
    source = Source.of(
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        weights_key=weights_key,
        config=config,
        preprocessing=preprocessing,
        levels=levels,
        head_activation=head_activation,
    )
    arguments.check(
        target=target,
        type=type,
        method=method,
        images=images,
        split=split,
        rest=rest,
        input=input,
        rounding=rounding,
        weight_bits=weight_bits,
        force=force,
        say=say,
        progress=progress,
    )
    out = arguments.file("out", out)
    calibration = arguments.images("calibration", calibration)
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
    return workflow.quantize(source, recipe, out=out, force=force, say=say, progress=progress)


@env.missing_named()
def half(
    weights: arguments.Weights = None,
    *,
    out: arguments.Location,
    data: arguments.Location,
    variant: str | None = None,
    precision: Literal["fp16", "bf16"] = "fp16",
    images: int = 64,
    split: str | None = None,
    input: InputKind = "float32",
    image_size: arguments.ImageSize | None = None,
    task: NetworkTask = "classify",
    levels: Sequence[int] | str | None = None,
    head_activation: HeadActivation | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    weights_key: str | None = None,
    config: arguments.Location | None = None,
    force: bool = False,
    say: Say = silent,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Plan, HalfReport]:
    """Which operations overflow or lose their values in half precision, and the plan that keeps these in fp32.

    The checkpoint is given as for `export`: weights, variant, image_size, task, levels, head_activation,
    preprocessing, weights_key, config, input.

    Args:
        out: `<name>.json`, for `export(plan=...)`; `<name>.half.json` says why each operation is kept.
        data: real images, labels not needed.
        images: how many are looked at.

    Raises:
        UsageError: what can be refused before the work.
    """
    arguments.one_of("task", task, NetworkTask)
    source = Source.of(
        weights,
        variant=variant,
        task=task,
        image_size=image_size,
        weights_key=weights_key,
        config=config,
        preprocessing=preprocessing,
        levels=levels,
        head_activation=head_activation,
    )
    arguments.one_of("precision", precision, HalfPrecision)
    arguments.check(images=images, split=split, input=input, force=force, say=say, progress=progress)
    out = arguments.file("out", out)
    data = arguments.images("data", data)
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
