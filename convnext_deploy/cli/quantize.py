"""`quantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .groups import Checkpoint, WholeOutputs, grouped
from .hints import export_command
from .options import WRITES, Debug, Force, Json, Quiet, RayOption, one_of, resumable
from .terminal import Terminal, progress_bar

if TYPE_CHECKING:
    from ..records.plan import Plan, WeightBits


PLAN, CALIBRATION = "Plan", "Calibration"  # panels of --help


@grouped
def quantize(
    out: Annotated[Path, typer.Option(**WRITES, help="The plan, NAME.json; tensors and measurements go beside it.")],
    calibration: Annotated[str, typer.Option(help="Real images: folder, tar or Parquet; or, by name, random.")],
    checkpoint: Checkpoint,
    outputs: WholeOutputs,
    target: Annotated[
        str, typer.Option(help="The format: onnx, openvino, native, tensorrt, eager ...", rich_help_panel=PLAN)
    ] = "onnx",
    type: Annotated[str, typer.Option(help="int8, or for GPUs fp8.", rich_help_panel=PLAN)] = "int8",
    rest: Annotated[
        str | None, typer.Option(help="Type of everything else. Default: fp32; GPUs: fp16.", rich_help_panel=PLAN)
    ] = None,
    weight_bits: Annotated[
        str,
        typer.Option(
            help="7, 8 or auto. 7: exact and fast on x86 without VNNI; auto: what this machine wants.",
            rich_help_panel=PLAN,
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(help="Ranges: minmax, moving_average, percentile, entropy or mse.", rich_help_panel=CALIBRATION),
    ] = "mse",
    images: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="How many to calibrate on. Default: 512, or what is there, at least 32.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of the calibration images, where they have several.", rich_help_panel=CALIBRATION),
    ] = None,
    rounding: Annotated[
        bool,
        typer.Option("--rounding", help="Try GPTQ for the weights: minutes.", rich_help_panel=CALIBRATION),
    ] = False,
    ray: RayOption = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the plan that export --plan builds 8-bit artifacts from. `optimize` does the whole way at once.

    Ctrl-C keeps what was calibrated; the same command goes on where it stopped.
    """
    from ..records.base import PlanType, Precision
    from ..records.plan import RangeMethod

    terminal = Terminal(json, quiet)
    options = {
        **checkpoint.read(),
        **outputs.read(),
        "target": target,
        "type": one_of("--type", type, PlanType),
        "method": one_of("--method", method, RangeMethod),
        "rest": None if rest is None else one_of("--rest", rest, Precision),
        "weight_bits": BITS[one_of("--weight-bits", weight_bits, Literal["auto", "7", "8"])],
    }
    from .. import formats

    formats.eight_bits_of(target)  # before the checkpoint's libraries are imported, so that a typo costs nothing
    from .. import api

    with resumable(terminal, kept=True), progress_bar(terminal, "preparing") as bar:
        plan = api.quantize(
            checkpoint.weights,
            out=out,
            calibration=calibration,
            images=images,
            split=split,
            rounding=rounding,
            force=force,
            ray=ray,
            say=terminal.say,
            progress=lambda phase: lambda done, total: bar(done, total, phase) if bar else None,
            **options,
        )
    kernels = ("--device", "cuda", "--kernels", "all") if formats.get(plan.target).kernels else ()
    hint = export_command(out, plan.target, *checkpoint.words(), *outputs.words(), *kernels)
    terminal.result({"path": str(out), "plan": plan}, words(out, plan), [hint])


BITS: dict[str, "WeightBits | None"] = {"auto": None, "7": 7, "8": 8}


def words(out: Path, plan: "Plan") -> str:
    """What was chosen, and on what grounds."""
    from .. import formats
    from ..quantization import saturation

    types = [operation.type for operation in plan.operations.values()]
    listed = ", ".join(f"{types.count(name)} {name}" for name in dict.fromkeys(types))
    bits = ", weights of 7 bits" if plan.weight_bits == 7 else ""
    lines = [
        f"{out}: {listed} {'operation' if len(types) == 1 else 'operations'} for {plan.target}{bits}, the rest "
        f"in {plan.rest}"
    ]
    if plan.calibration is not None and plan.calibration.random:
        lines.append("CALIBRATED ON NOISE: for trying out, not for predictions")
    elsewhere = None if formats.get(plan.target).own_network else saturation.elsewhere(plan)
    if elsewhere is not None:
        lines.append(elsewhere)
    for correction in plan.corrections:
        verb = "applied" if correction.applied else "left out"
        lines.append(
            f"correction {correction.name} {verb}: distance {correction.kl_without:.3g} without, "
            f"{correction.kl_with:.3g} with, on {correction.images} held-out images"
        )
    return "\n".join(lines)
