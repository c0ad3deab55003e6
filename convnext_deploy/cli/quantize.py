"""`quantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .hints import export_command
from .options import (
    Debug,
    ExifOrientation,
    Json,
    Quiet,
    given,
    head_activation_of,
    image_size_of,
    numbers,
    one_of,
)
from .terminal import Terminal, progress_bar

if TYPE_CHECKING:
    from ..records.plan import Plan, WeightBits


def quantize(
    out: Annotated[Path, typer.Option(help="The plan, NAME.json; tensors and measurements go beside it.")],
    calibration: Annotated[str, typer.Option(help="Real images: folder, tar or Parquet; or, by name, random.")],
    target: Annotated[str, typer.Option(help="The format: onnx, openvino, native, tensorrt, eager ...")] = "onnx",
    variant: Annotated[str | None, typer.Option(help="As for export.")] = None,
    weights: Annotated[str | None, typer.Option(help="As for export.")] = None,
    type: Annotated[str, typer.Option(help="int8, or for GPUs fp8.")] = "int8",
    method: Annotated[str, typer.Option(help="Ranges: minmax, moving_average, percentile, entropy or mse.")] = "mse",
    images: Annotated[
        int | None, typer.Option(min=2, help="How many to calibrate on. Default: 512, or what is there, at least 32.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the calibration images, where they have several.")] = None,
    rest: Annotated[str | None, typer.Option(help="Type of everything else. Default: fp32; GPUs: fp16.")] = None,
    input: Annotated[str, typer.Option(help="float32 or uint8, as for export.")] = "float32",
    image_size: Annotated[str | None, typer.Option(help="Pixels, as for export.")] = None,
    task: Annotated[str, typer.Option(help="classify, embed or features.")] = "classify",
    levels: Annotated[str | None, typer.Option(help="As for export.")] = None,
    head_activation: Annotated[str | None, typer.Option(help="As for export.")] = None,
    weights_key: Annotated[str | None, typer.Option(help="As for export.")] = None,
    config: Annotated[Path | None, typer.Option(help="As for export.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for export.")] = None,
    std: Annotated[str | None, typer.Option(help="As for export.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="As for export.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="As for export.")] = None,
    exif_orientation: ExifOrientation = False,
    rounding: Annotated[bool, typer.Option("--rounding", help="Try GPTQ for the weights: minutes.")] = False,
    weight_bits: Annotated[
        str, typer.Option(help="7, 8 or auto. 7: exact and fast on x86 without VNNI; auto: what this machine wants.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the plan that export --plan builds 8-bit artifacts from. `optimize` does the whole way at once."""
    from ..records.base import InputKind, NetworkTask, PlanType, Precision
    from ..records.plan import RangeMethod

    terminal = Terminal(json, quiet)
    wanted = {
        "target": target,
        "type": one_of("--type", type, PlanType),
        "method": one_of("--method", method, RangeMethod),
        "rest": None if rest is None else one_of("--rest", rest, Precision),
        "input": one_of("--input", input, InputKind),
        "task": one_of("--task", task, NetworkTask),
        "image_size": image_size_of(image_size),
        "preprocessing": given(
            mean=numbers("--mean", mean),
            std=numbers("--std", std),
            crop_pct=crop_pct,
            interpolation=interpolation,
            exif_orientation=exif_orientation or None,
        ),
        "weight_bits": BITS[one_of("--weight-bits", weight_bits, Literal["auto", "7", "8"])],
    }
    from .. import formats

    formats.eight_bits_of(target)  # before the checkpoint's libraries are imported, so that a typo costs nothing
    from .. import api

    with progress_bar(terminal, "preparing") as bar:
        plan = api.quantize(
            weights,
            out=out,
            calibration=calibration,
            variant=variant,
            images=images,
            split=split,
            levels=levels,
            head_activation=head_activation_of(head_activation),
            weights_key=weights_key,
            config=config,
            rounding=rounding,
            force=force,
            say=terminal.say,
            progress=lambda phase: lambda done, total: bar(done, total, phase) if bar else None,
            **wanted,
        )
    turned = ("--exif-orientation",) if exif_orientation else ()
    kernels = ("--device", "cuda", "--kernels", "all") if formats.get(plan.target).kernels else ()
    repeated = {
        "weights": weights, "variant": variant, "input": None if input == "float32" else input,
        "image_size": image_size, "task": None if task == "classify" else task, "levels": levels,
        "head_activation": head_activation,
        "weights_key": weights_key, "config": config,
        "mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation,
    }  # fmt: skip
    hint = export_command(out, plan.target, repeated, *turned, *kernels)
    terminal.result({"path": str(out), "plan": plan, "build": hint}, words(out, plan, hint))


BITS: dict[str, "WeightBits | None"] = {"auto": None, "7": 7, "8": 8}


def words(out: Path, plan: "Plan", hint: str) -> str:
    """What was chosen, on what grounds, and what to type next."""
    types = [operation.type for operation in plan.operations.values()]
    counted = ", ".join(f"{types.count(name)} {name}" for name in dict.fromkeys(types))
    bits = ", weights of 7 bits" if plan.weight_bits == 7 else ""
    lines = [f"{out}: {counted} operations for {plan.target}{bits}, the rest in {plan.rest}"]
    if plan.calibration is not None and plan.calibration.random:
        lines.append("CALIBRATED ON NOISE: for trying out, not for predictions")
    for correction in plan.corrections:
        verb = "applied" if correction.applied else "left out"
        lines.append(
            f"correction {correction.name} {verb}: distance {correction.kl_without:.3g} without, "
            f"{correction.kl_with:.3g} with, on {correction.images} held-out images"
        )
    lines.append(f"build it with: {hint}")
    return "\n".join(lines)
